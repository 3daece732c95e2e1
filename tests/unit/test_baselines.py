"""Baseline networks, their plans and their patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samgraft.finetune.baselines.networks import (
    Baseline,
    BaselineConfig,
    SliceBaseline,
    VolumeBaseline,
    as_baseline,
    build_network,
    plan_levels,
    plan_network,
    plan_patch,
)
from samgraft.finetune.baselines.volume_patches import VolumePatches, augment_patch, cut
from samgraft.finetune.classes import ClassTable
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.scans.intensity import IntensityPreset, measure_intensity
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.store import SliceStore
from store_factory import make_store

ONE = ClassTable(ids=(1,), names=("lesion",))
STILL = AugmentConfig(flip_columns_probability=0)
MOVING = AugmentConfig(max_rotation_deg=90, min_scale=0.8, max_scale=1.2, max_log_gamma=0.2, noise_std=0.02)
SMALL = BaselineConfig(base_channels=4, max_channels=16)


def small_plan(baseline, **settings):
    values = {"num_classes": 2, "in_channels": 1, "image_size": 32, "median_shape_zyx": (7, 30, 18)}
    return plan_network(baseline, SMALL, **{**values, "spacing_zyx": (5.0, 1.0, 1.0), **settings})


def test_plan_levels__isotropic_input_is_halved_down_to_four():
    kernels, strides = plan_levels([40, 56, 40], [1.0, 1.0, 1.0])
    assert strides == [[2, 2, 2]] * 3
    assert kernels == [[3, 3, 3]] * 3


def test_plan_levels__coarse_axis_is_halved_later():
    """With 5 mm slices and 1 mm pixels, rows and columns are halved twice before the slices."""
    kernels, strides = plan_levels([16, 64, 64], [5.0, 1.0, 1.0])
    assert strides[:3] == [[1, 2, 2], [1, 2, 2], [2, 2, 2]]
    assert kernels[:3] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]]


def test_plan_levels__axis_of_twice_the_spacing_is_still_halved():
    kernels, strides = plan_levels([16, 16, 16], [2.0, 1.0, 1.0])
    assert (kernels[0], strides[0]) == ([3, 3, 3], [2, 2, 2])
    kernels, strides = plan_levels([16, 16, 16], [2.01, 1.0, 1.0])
    assert (kernels[0], strides[0]) == ([1, 3, 3], [1, 2, 2])


def test_plan_levels__too_small_input_is_refused():
    with pytest.raises(UsageError, match="too small for a U-Net"):
        plan_levels([7, 7], [1.0, 1.0])


def test_plan_patch__median_scan_is_cut_to_the_largest_size():
    assert plan_patch((36, 50, 35), 2**18) == [40, 56, 40]
    cropped = plan_patch((200, 512, 512), 2**18)
    assert np.prod(cropped) <= 2**18
    assert all(side % 8 == 0 for side in cropped)
    assert plan_patch((6, 30, 20), 2**18) == [8, 32, 24]


@pytest.mark.parametrize("baseline", Baseline)
def test_build_network__plan_gives_the_same_network_again(baseline):
    plan = small_plan(baseline)
    torch.manual_seed(0)
    segmenter = build_network(plan).eval()
    assert isinstance(segmenter, VolumeBaseline) is baseline.is_volume
    images = torch.rand(2, 1, *plan["sizes"])
    again = build_network(plan).eval()
    again.net.load_state_dict(segmenter.net.state_dict(), strict=True)
    with torch.no_grad():
        logits = segmenter(images)
        assert torch.equal(again(images), logits)
    assert logits.shape == (2, 2, *plan["sizes"])
    assert as_baseline(baseline.value) is baseline
    with pytest.raises(UsageError, match="is a U-Net baseline"):
        _ = segmenter.sam


def test_plan_network__options_change_the_network():
    wide = plan_network(Baseline.UNET_2D, BaselineConfig(base_channels=8), num_classes=1, in_channels=1, image_size=32)
    assert wide["channels"] == [8, 16, 32, 64]
    patch = plan_network(
        Baseline.UNET_3D, BaselineConfig(patch_size=[8, 16, 16]), num_classes=1, in_channels=1, image_size=32,
        median_shape_zyx=(40, 40, 40), spacing_zyx=(1, 1, 1),
    )  # fmt: skip
    assert patch["sizes"] == [8, 16, 16]
    assert as_baseline("vit_t") is None
    assert as_baseline(None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [({"base_channels": 2}, "base_channels"), ({"patch_size": [8, 8]}, "three sides"), ({"overlap": 1.0}, "overlap")],
)
def test_baseline_config__bad_value_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**values)


@pytest.mark.parametrize("baseline", [Baseline.UNET_2D, Baseline.DYNUNET_2D])
def test_build_network__small_structures_and_an_empty_slice_are_learnt(baseline):
    """A head that is normalised per slice, as MONAI has it, fails here and would make a comparison worthless."""
    torch.manual_seed(0)
    images, labels = 0.2 * torch.rand(4, 1, 32, 32), torch.zeros(4, 32, 32, dtype=torch.long)
    for n in range(3):
        for label, (value, row) in enumerate([(0.6, 4), (0.9, 20)], start=1):
            images[n, 0, row : row + 5, 3 + 6 * n : 9 + 6 * n] += value
            labels[n, row : row + 5, 3 + 6 * n : 9 + 6 * n] = label
    small = BaselineConfig(base_channels=8, max_channels=32)
    net = build_network(plan_network(baseline, small, num_classes=2, in_channels=1, image_size=32)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        scores = with_background(net(images))
        torch.nn.functional.cross_entropy(scores, labels).backward()
        optimizer.step()
    found = with_background(net.eval()(images)).argmax(1)
    assert (found[labels > 0] == labels[labels > 0]).float().mean() > 0.9
    assert (found[labels == 0] > 0).float().mean() < 0.01


def with_background(logits_NCSS):
    return torch.cat([torch.zeros_like(logits_NCSS[:, :1]), logits_NCSS], dim=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=2, shape_zyx=(6, 32, 28)))


def patches(store, *, patch_size=(4, 16, 16), augment=STILL, foreground_fraction=1.0):
    return VolumePatches(
        store, [r.series_id for r in store.series], patch_size=patch_size, classes=ONE, intensity=store.intensity,
        foreground_fraction=foreground_fraction, augment=augment, seed=0,
    )  # fmt: skip


def test_volume_patches__sample_counter_decides_the_patch(store):
    data = patches(store, augment=MOVING)
    first, again, other = data[0, 5], data[0, 5], data[0, 6]
    assert torch.equal(first["volume"], again["volume"])
    assert torch.equal(first["label"], again["label"])
    assert not torch.equal(first["volume"], other["volume"])
    assert first["volume"].shape == (1, 4, 16, 16)
    shown = [bool((patches(store)[0, counter]["label"] == 1).any()) for counter in range(12)]
    assert all(shown)
    anywhere = patches(store, foreground_fraction=0.0, patch_size=(4, 8, 8))
    assert not all(bool((anywhere[0, counter]["label"] == 1).any()) for counter in range(12))


def test_volume_patches__label_moves_with_the_image(store):
    """The lesion is the brightest part before and after the augmentation."""
    sample = patches(store)[0, 3]
    inside, outside = sample["volume"][0][sample["label"] == 1], sample["volume"][0][sample["label"] == 0]
    assert inside.mean() > outside.mean() + 0.2


def patches_of_one(volume, label, patch_size):
    """Return patches around the foreground of a scan in memory."""
    record = SimpleNamespace(stats=measure_intensity(volume, modality=Modality.MRI), plane=Plane.AXIAL)
    store = SimpleNamespace(
        read_volume=lambda _: volume, read_label_volume=lambda _: label, record=lambda _: record, series=[]
    )
    return VolumePatches(
        store, ["s"], patch_size=patch_size, classes=ONE, intensity=IntensityPreset(),
        foreground_fraction=1.0, augment=STILL, seed=0,
    )  # fmt: skip


def test_volume_patches__patch_is_around_the_voxel_that_was_drawn():
    volume, label = np.random.default_rng(0).uniform(0, 100, size=(12, 20, 24)), np.zeros((12, 20, 24), np.int32)
    label[6, 9, 13] = 1
    data = patches_of_one(volume, label, (4, 6, 8))
    for counter in range(3):
        assert torch.nonzero(data[0, counter]["label"]).tolist() == [[2, 3, 4]]


def test_volume_patches__small_scan_is_in_the_middle_of_air():
    """Sides of 3, 5 and 8 in a patch of 8 begin at 2, 1 and 0. The air of this scan is far below 0."""
    volume, label = np.random.default_rng(0).uniform(-900, -500, size=(3, 5, 8)), np.zeros((3, 5, 8), np.int32)
    label[1, 2, 3] = 1
    sample = patches_of_one(volume, label, (8, 8, 8))[0, 0]
    assert torch.nonzero(sample["label"]).tolist() == [[3, 3, 3]]
    around = torch.ones(8, 8, 8, dtype=torch.bool)
    around[2:5, 1:6] = False
    assert (sample["volume"][0][around] == sample["volume"].min()).all()


def test_volume_patches__small_scan_is_padded(store):
    sample = patches(store, patch_size=(8, 32, 32))[0, 0]
    assert sample["volume"].shape == (1, 8, 32, 32)
    whole = store.read_label_volume(store.series[0].series_id)
    assert int((sample["label"] == 1).sum()) == int((whole == 1).sum())


def test_cut__outside_is_the_smallest_value():
    volume = np.arange(8).reshape(2, 2, 2) + 5
    patch = cut(volume, (-1, 0, 1), (3, 2, 2), padding=volume.min())
    assert patch.shape == (3, 2, 2)
    assert patch[1:, :, 0].tolist() == volume[:, :, 1].tolist()
    assert (patch[0] == 5).all()
    assert (patch[:, :, 1] == 5).all()


def test_augment_patch__image_and_label_move_together():
    image = torch.zeros(3, 32, 24)
    image[:, 8:20, 6:15] = 1.0
    label = (image > 0.5).long() * 4
    config = AugmentConfig(max_rotation_deg=90)
    out, moved = augment_patch(image, label, config, np.random.default_rng(1), plane=Plane.AXIAL)
    assert set(moved.unique().tolist()) <= {0, 4}
    assert ((out > 0.5) == (moved > 0)).float().mean() > 0.97
    assert not torch.equal(moved, label)


def test_augment_patch__magnified_labels_are_those_of_the_nearest_voxels():
    """Every column of a patch of 23 has its own id. At 1.25 the centres of the columns come from 1.25 times nearer."""
    label = torch.arange(23).expand(2, 9, 23).contiguous()
    still = AugmentConfig(flip_columns_probability=0, min_scale=1.25, max_scale=1.25)
    _, moved = augment_patch(torch.zeros(2, 9, 23), label, still, np.random.default_rng(1), plane=Plane.AXIAL)
    centres = (np.arange(23) - 11) / 1.25 + 11
    assert moved[1, 4].tolist() == np.floor(centres + 0.5).astype(int).tolist()


def test_augment_patch__sagittal_scan_is_never_mirrored():
    image = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(flip_columns_probability=1.0)
    outs = [
        augment_patch(image, image.long(), config, np.random.default_rng(1), plane=plane)[0]
        for plane in (Plane.CORONAL, Plane.SAGITTAL)
    ]
    torch.testing.assert_close(outs[0], image.flip(-1))
    torch.testing.assert_close(outs[1], image)


class ColumnNumber(torch.nn.Module):
    """Network whose logit is the column of a voxel in its patch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, patches):
        return self.weight * torch.arange(patches.shape[-1], dtype=torch.float32).expand(patches.shape)


def test_volume_baseline__middle_of_a_patch_has_most_influence():
    """Patches of 4 columns begin at 0, 2 and 4. Column 3 is at the edge of the first and in the middle of the second.

    Gaussian weights of deviation 1/2 are exp(-4.5) at the edge and exp(-0.5) beside the middle.
    """
    segmenter = VolumeBaseline(ColumnNumber(), num_classes=1, patch_size=(4, 4, 4), overlap=0.5)
    volume = np.random.default_rng(0).uniform(0, 100, size=(4, 4, 8)).astype(np.float32)
    stats = measure_intensity(volume, modality=Modality.MRI)
    columns = segmenter.volume_logits(volume, stats, IntensityPreset())[0, 0, 1, 2].detach()
    share = np.exp(-4.5) / (np.exp(-4.5) + np.exp(-0.5))
    assert columns[0] == pytest.approx(0.0)
    assert columns[2] == pytest.approx(2 - 2 * share, abs=0.03)
    assert columns[3] == pytest.approx(1 + 2 * share, abs=0.03)
    assert columns[7] == pytest.approx(3.0)


def test_volume_baseline__segments_a_scan_on_its_own_grid(store):
    torch.manual_seed(0)
    plan = small_plan(Baseline.DYNUNET_3D, num_classes=1, median_shape_zyx=(4, 16, 16))
    segmenter = build_network(plan).eval()
    record = store.series[0]
    with torch.no_grad():
        labels = segmenter.segment(store.read_volume(record.series_id), record.stats, ONE, store.intensity)
    assert labels.shape == record.shape_zyx
    assert set(np.unique(labels)) <= {0, 1}
    assert isinstance(segmenter, SliceBaseline)


@pytest.mark.parametrize("baseline", [Baseline.UNET_2D, Baseline.DYNUNET_2D, Baseline.DYNUNET_3D])
def test_build_network__untrained_network_expects_background(baseline):
    """Every class begins near a probability of 0.01, so that training starts with the classes."""
    config = BaselineConfig(base_channels=8)
    plan = plan_network(
        baseline,
        config,
        num_classes=3,
        in_channels=1,
        image_size=32,
        median_shape_zyx=(16, 16, 16),
        spacing_zyx=(1.0, 1.0, 1.0),
    )
    torch.manual_seed(0)
    network = build_network(plan).eval()
    side = (16, 16, 16) if baseline.is_volume else (32, 32)
    probability = torch.sigmoid(network.net(torch.rand(2, 1, *side))).median()
    assert 0.003 < probability < 0.03
