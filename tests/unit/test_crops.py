"""Multi-crop views, which depend on slice, seed and counter only and lie in the content."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samgraft.shared.config import config_to_dict, load_config, packaged_config
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.dataset import SliceDataset, collate_slices
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import load_preset, modality_layer
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.membership import _errors, audit_slices
from samgraft.ssl.module import PretrainModule
from samgraft.ssl.monitor.held_out import held_out_loss, load_held_out
from samgraft.ssl.objectives import ObjectiveLoss
from samgraft.ssl.objectives.dino import DINO, DINOConfig
from samgraft.ssl.objectives.lejepa import LeJEPA, LeJEPAConfig
from samgraft.ssl.views.crops import CropConfig, content_boxes, local_size, multi_crop
from store_factory import make_cases, make_scan, write_nifti
from tiny_encoders import PLAIN_VIT, TINY_VIT, plain_encoder, slices

STILL = CropConfig(
    num_local_crops=1,
    min_global_area=1.0,
    max_aspect=1.0,
    flip_probability=0.0,
    max_gamma=1.0,
    max_contrast=1.0,
    max_shift=0.0,
    blur_probability=0.0,
)
"""Views that are the slice itself."""


def crop(images, config, counters=(7, 8), seed=3, size=16, planes=None):
    return multi_crop(images, sample_counters=counters, seed=seed, config=config, local_size_px=size, planes=planes)


def test_multi_crop__same_seed_and_counter_give_the_same_views():
    images, config = slices(count=3), CropConfig(num_local_crops=2)
    whole = crop(images, config, counters=(7, 8, 9))
    alone = crop(images[1:2], config, counters=(8,))
    assert torch.equal(whole.global_BCSS[1], alone.global_BCSS[0])  # first large view of the second slice
    assert torch.equal(whole.global_BCSS[3 + 1], alone.global_BCSS[1])
    assert torch.equal(whole.local_BCss[1], alone.local_BCss[0])
    assert torch.equal(whole.local_BCss[3 + 1], alone.local_BCss[1])
    assert not torch.equal(whole.global_BCSS[1], crop(images[1:2], config, counters=(9,)).global_BCSS[0])
    assert not torch.equal(whole.global_BCSS[1], crop(images[1:2], config, counters=(8,), seed=4).global_BCSS[0])


def test_multi_crop__shapes_and_range():
    crops = crop(slices(count=3), CropConfig(num_local_crops=2), counters=(1, 2, 3), size=12)
    assert crops.global_BCSS.shape == (6, 1, 32, 32)
    assert crops.local_BCss.shape == (6, 1, 12, 12)
    assert crops.global_BCSS.min() >= 0
    assert crops.global_BCSS.max() <= 1
    assert crop(slices(), CropConfig(num_local_crops=0)).local_BCss is None


def test_multi_crop__without_changes_views_are_the_slice():
    images = slices()
    torch.testing.assert_close(crop(images, STILL).global_BCSS, torch.cat([images, images]))


@pytest.mark.parametrize(
    "change",
    [
        {"min_global_area": 0.3},
        {"max_aspect": 2.0, "min_global_area": 0.5},
        {"flip_probability": 1.0},
        {"max_gamma": 2.0},
        {"max_contrast": 2.0},
        {"max_shift": 0.3},
        {"blur_probability": 1.0, "max_blur_sigma_px": 3.0},
    ],
)
def test_multi_crop__each_option_changes_the_large_views(change):
    images = slices()
    changed = crop(images, dataclasses.replace(STILL, **change), planes=[Plane.AXIAL] * 2).global_BCSS
    assert not torch.allclose(changed, torch.cat([images, images]), atol=1e-3)


def test_multi_crop__contrast_keeps_the_mean_of_a_view():
    images = 0.4 + 0.2 * slices()
    views = crop(images, dataclasses.replace(STILL, max_contrast=2.0)).global_BCSS
    both = torch.cat([images, images])
    torch.testing.assert_close(views.mean((1, 2, 3)), both.mean((1, 2, 3)))
    factors = views.std((1, 2, 3)) / both.std((1, 2, 3))
    assert (factors.log().abs() < np.log(2)).all()
    assert factors.log().abs().max() > 0.1


def test_multi_crop__blur_is_equal_along_rows_and_columns():
    image = torch.full((1, 1, 33, 33), 0.2)
    image[..., 16, 16] = 1.0
    config = dataclasses.replace(STILL, blur_probability=1.0, max_blur_sigma_px=2.0, num_local_crops=0)
    for view in crop(image, config, counters=(5,)).global_BCSS[:, 0]:
        torch.testing.assert_close(view, view.T)
        assert view[16, 17] == pytest.approx(view[17, 16].item())
        assert 0.23 < view[16, 17] < view[16, 16] < 0.9
        torch.testing.assert_close(view.sum(), image.sum())


def test_multi_crop__reduced_views_are_smoothed():
    """Every fourth column is bright. Without antialiasing a view of a quarter of the side would miss all of them."""
    image = torch.full((1, 1, 32, 32), 0.1)
    image[..., ::4] = 0.9
    config = dataclasses.replace(STILL, min_local_area=1.0, max_local_area=1.0)
    view = crop(image, config, counters=(5,), size=8).local_BCss
    torch.testing.assert_close(view[..., 1:-1], torch.full((1, 1, 8, 6), 0.3), atol=0.03, rtol=0)


@pytest.mark.parametrize("axis", [-1, -2])
def test_multi_crop__small_views_reach_both_ends_of_the_content(axis):
    """Views of 16 of 32 rows or columns begin at any of 17 places, and keep their size."""
    ramp = torch.linspace(0.1, 1, 32).expand(1, 1, 32, 32).contiguous()
    ramp = ramp if axis == -1 else ramp.mT.contiguous()
    config = dataclasses.replace(STILL, min_local_area=0.25, max_local_area=0.25, num_local_crops=4)
    views = torch.cat([crop(ramp, config, counters=(counter,)).local_BCss for counter in range(40)])
    assert views.amin().item() == pytest.approx(0.1)
    assert views.amax().item() == pytest.approx(1.0)


def test_multi_crop__flips_columns_and_small_views_are_parts():
    images = slices()
    flipped = crop(images, dataclasses.replace(STILL, flip_probability=1.0), planes=[Plane.AXIAL, Plane.CORONAL])
    torch.testing.assert_close(flipped.global_BCSS[:2].flip(-1), images)
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32).contiguous()
    small = crop(ramp, dataclasses.replace(STILL, min_local_area=0.25, max_local_area=0.25), counters=(1,))
    spread = small.local_BCss.max() - small.local_BCss.min()
    assert spread.item() == pytest.approx(0.5, abs=0.05)


def test_multi_crop__sagittal_slices_are_not_flipped():
    """Their columns run from front to back. A slice of unknown plane is not flipped either."""
    images, config = slices(count=3), CropConfig(num_local_crops=1, flip_probability=1.0)
    planes = [Plane.AXIAL, Plane.SAGITTAL, Plane.CORONAL]
    some, never = (crop(images, config, counters=(7, 8, 9), planes=p) for p in (planes, None))
    for view_some, view_never in (
        (some.global_BCSS.unflatten(0, (2, 3)), never.global_BCSS.unflatten(0, (2, 3))),
        (some.local_BCss[None], never.local_BCss[None]),
    ):
        assert torch.equal(view_some[:, 1], view_never[:, 1])
        # The other random numbers of a view stay the same.
        torch.testing.assert_close(view_some[:, [0, 2]].flip(-1), view_never[:, [0, 2]])


def test_multi_crop__missing_flip_probability_is_refused():
    with pytest.raises(ValueError, match="flip_probability must be a number, got None"):
        crop(slices(), CropConfig(), planes=[Plane.AXIAL] * 2)


def odds_of(modality, method, *overrides):
    layers = [modality_layer(modality), packaged_config(f"pretrain/{method}-cpu.yaml"), {"modality": modality}]
    layers.append({"data": {"store": "a.zarr"}, "model": {"base": "random"}})
    config = load_config(PretrainConfig, layers=layers, overrides=overrides)
    return config, getattr(config.objective, method).crops.flip_probability


@pytest.mark.parametrize(
    ("modality", "method", "expected"),
    [("mri", "dino", 0.5), ("ultrasound", "lejepa", 0.5), ("ct", "dino", 0.0), ("xray", "lejepa", 0.0)],
)
def test_config__modality_sets_the_flip_probability(modality, method, expected):
    config, odds = odds_of(modality, method)
    assert odds == expected
    assert config_to_dict(config)["objective"][method]["crops"]["flip_probability"] == expected  # as runs keep it


def test_config__user_overrides_the_flip_probability():
    augment, own = "data.augment.flip_columns_probability=0.25", "objective.dino.crops.flip_probability="
    assert [odds_of("ct", "dino", *more)[1] for more in ((augment,), (augment, f"{own}0.75"))] == [0.25, 0.75]
    config, odds = odds_of("mri", "dino", f"{own}0.0")
    assert odds == 0.0
    assert load_config(PretrainConfig, layers=[config_to_dict(config)]) == config


class Recorder(torch.nn.Module):
    """Objective that records the planes of its slices and its steps."""

    def __init__(self):
        super().__init__()
        self.seen, self.steps = [], []
        self.anchor = None

    def loss(self, images, *, sample_counters, step, planes):
        assert len(images) == len(sample_counters) == len(planes)
        self.seen += planes
        self.steps.append(step)
        return ObjectiveLoss(total=images.mean())


def test_planes__are_passed_in_training_monitoring_and_audit(tmp_path):
    cases = make_cases(tmp_path, num_patients=2, shape_zyx=(3, 24, 20), labelled=False)
    side_on = np.array([[0.0, 0, 5, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    write_nifti(cases[1].scan.paths[0], make_scan(shape_zyx=(3, 24, 20), seed=1)[0], affine=side_on)
    settings = BuildSettings(modality=Modality.MRI, salt="test")
    build_store(cases, out=tmp_path / "a.zarr", settings=settings, label_names={}, intensity=IntensityPreset())
    store = SliceStore.open(tmp_path / "a.zarr")
    expected = [record.plane for record in store.series for _ in range(3)]
    assert set(expected) == {Plane.AXIAL, Plane.SAGITTAL}

    dataset = SliceDataset(store, select_slices(store, store.patient_ids))
    trained = Recorder()
    layer = {"modality": "mri", "data": {"store": "a.zarr", "num_held_out_slices": 6}, "objective": {"name": "dino"}}
    layer |= {"model": {"base": "random", "image_size": 32}, "trainer": {"max_steps": 1}}
    config = load_config(PretrainConfig, layers=[layer])
    module = PretrainModule(trained, config)
    module._trainer = SimpleNamespace(global_step=5)
    module.training_step(collate_slices([dataset[i, i] for i in range(6)]), 0)
    assert trained.seen == expected
    assert trained.steps == [5]

    looked_at = Recorder()
    preset = load_preset("mri")
    held_out = load_held_out(store, store.patient_ids, config=config.data, model=config.model, preset=preset)
    held_out_loss(looked_at, held_out, batch_size=4, step=0, device=torch.device("cpu"))
    assert sorted(p.value for p in looked_at.seen) == sorted(p.value for p in expected)
    assert looked_at.seen == [store.record(ref.series_id).plane for ref in held_out.refs]

    audited = Recorder()
    _errors(audited, config, store, audit_slices(store, store.patient_ids, config), device=torch.device("cpu"))
    assert set(audited.seen) == set(expected)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda crops: DINO(plain_encoder(), small_dino(crops), seed=0, max_steps=4), id="dino"),
        pytest.param(lambda crops: LeJEPA(plain_encoder(), small_lejepa(crops), seed=0), id="lejepa"),
    ],
)
def test_objectives__flip_views_by_plane(build):
    objective, images = build(dataclasses.replace(STILL, flip_probability=1.0)).eval(), slices(size=96)

    def loss(plane):
        return objective.loss(images, sample_counters=(7, 8), step=0, planes=[plane] * 2).total.item()

    with torch.no_grad():
        unknown = objective.loss(images, sample_counters=(7, 8), step=0).total.item()
    assert loss(Plane.SAGITTAL) == unknown
    assert abs(loss(Plane.AXIAL) - unknown) > 1e-4


def small_dino(crops):
    return DINOConfig(crops=crops, output_dim=12, head_hidden_dim=8, head_bottleneck_dim=4)


def small_lejepa(crops):
    return LeJEPAConfig(crops=crops, head_hidden_dim=8, output_dim=4, num_directions=8)


def test_multi_crop__views_are_inside_the_content():
    images = torch.zeros(1, 1, 32, 32)
    images[..., 4:12, 6:26] = 1.0
    assert content_boxes(images) == [(4, 6, 8, 20)]
    crops = crop(images, dataclasses.replace(STILL, num_local_crops=4), counters=(1,))
    assert (crops.global_BCSS == 1).all()
    assert (crops.local_BCss == 1).all()
    assert content_boxes(torch.zeros(1, 1, 32, 32)) == [(0, 0, 32, 32)]


@pytest.mark.parametrize(
    ("spec", "image_size", "expected"),
    [
        pytest.param(arch_spec("vit_b"), 1024, 448, id="two windows of 14 tokens"),
        pytest.param(arch_spec("vit_b"), 448, 192, id="less than a window"),
        pytest.param(arch_spec("vit_t"), 64, 28, id="a window of 7 positions"),
        pytest.param(arch_spec("vit_t"), 112, 56, id="two windows"),
        pytest.param(TINY_VIT, 32, 16, id="tiny"),
        pytest.param(PLAIN_VIT, 96, 48, id="plain"),
    ],
)
def test_local_size__is_a_multiple_of_windows(spec, image_size, expected):
    assert local_size(spec, image_size, CropConfig()) == expected


def test_local_size__configured_side_is_used_or_refused():
    assert local_size(arch_spec("vit_b"), 1024, CropConfig(local_size_px=224)) == 224
    with pytest.raises(UsageError, match=r"local_size_px must be a multiple of 16 px for vit_b.*got 100"):
        local_size(arch_spec("vit_b"), 1024, CropConfig(local_size_px=100))
    with pytest.raises(UsageError, match="up to image_size 64, got 96"):
        local_size(arch_spec("vit_b"), 64, CropConfig(local_size_px=96))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_local_crops": -1}, r"num_local_crops\n  Input should be greater than or equal to 0"),
        ({"min_local_area": 0.5, "max_local_area": 0.4}, "min_local_area must be at most max_local_area"),
        ({"min_global_area": 0.0}, r"min_global_area\n  Input should be greater than 0"),
        ({"max_gamma": 0.9}, r"max_gamma\n  Input should be greater than or equal to 1"),
        ({"flip_probability": 1.5}, r"flip_probability\n  Input should be less than or equal to 1"),
        ({"max_blur_sigma_px": 0.1}, r"max_blur_sigma_px\n  Input should be greater than or equal to 0.3"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CropConfig(**settings)
