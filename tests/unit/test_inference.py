"""Segmentation of volumes against values worked out by hand, with a network whose logits are its image."""

import numpy as np
import pytest
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.inference import (
    ALL_FLIPS,
    InferenceConfig,
    average_planes,
    check_planes,
    segment_probabilities,
    segment_volume,
)
from samgraft.shared.errors import DataError
from samgraft.shared.scans.intensity import IntensityKind, IntensityPreset, measure_intensity
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import Modality
from torch import nn

ONE = ClassTable(ids=(7,), names=("bright",))
TWO = ClassTable(ids=(4, 9), names=("bright", "dark"))
WINDOW = IntensityPreset(kind=IntensityKind.WINDOW, window_center=50.0, window_width=100.0)
SIDE = 9


class ImageAsLogits(nn.Module):
    """Network of which one channel of the image, above 0.5, is the first class."""

    image_size = SIDE

    def __init__(self, *, channel=0, num_classes=1, ramp=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.channel, self.num_classes = channel, num_classes
        columns = torch.arange(SIDE, dtype=torch.float32)
        self.ramp = columns + 10 * columns[:, None] if ramp else torch.ones(SIDE, SIDE)
        self.was_training = []

    def forward(self, images_NCSS):
        assert images_NCSS.shape[2:] == (SIDE, SIDE)
        self.was_training.append(self.training)
        logits = (images_NCSS[:, self.channel] - 0.5) * self.ramp
        return torch.stack([logits, -logits - 0.2][: self.num_classes], dim=1)


@pytest.fixture
def volume():
    """Scan of 4 slices with 6 rows and 9 columns from 0 to 100, without any symmetry."""
    return np.random.default_rng(5).uniform(0, 100, size=(4, 6, SIDE)).astype(np.float32)


def settings(**values):
    return InferenceConfig(**{"intensity": WINDOW, "keep_aspect": True, "batch_size": 3} | values)


def stats_of(volume):
    return measure_intensity(volume, modality=Modality.CT)


def test_segment_volume__every_voxel_has_its_own_class(volume):
    """4 slices in batches of 3, so that the last batch is smaller."""
    network = ImageAsLogits(num_classes=2).train()
    found = segment_volume(network, volume, stats_of(volume), TWO, settings())
    expected = np.where(volume > 50, 4, np.where(volume < 30, 9, 0))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32
    assert network.training
    assert network.was_training == [False, False]


def test_segment_volume__chosen_slices_are_returned_in_their_order(volume):
    seen = []
    found = segment_volume(
        ImageAsLogits(), volume, stats_of(volume), ONE, settings(batch_size=2), only=[3, 0, 2],
        on_slices=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    np.testing.assert_array_equal(found, 7 * (volume[[3, 0, 2]] > 50))
    assert seen == [(2, 3), (3, 3)]


def test_segment_volume__neighbours_are_channels_in_anatomical_order(volume):
    stats, config = stats_of(volume), settings(num_neighbours=1)
    before = segment_volume(ImageAsLogits(channel=0), volume, stats, ONE, config)
    after = segment_volume(ImageAsLogits(channel=2), volume, stats, ONE, config)
    np.testing.assert_array_equal(before, 7 * (volume[[0, 0, 1, 2]] > 50))
    np.testing.assert_array_equal(after, 7 * (volume[[1, 2, 3, 3]] > 50))


def test_segment_volume__statistics_are_those_of_the_whole_scan(volume):
    volume[2] *= 0.1
    preset = IntensityPreset(lower_percentile=0, upper_percentile=100)
    stats = measure_intensity(volume, modality=Modality.MRI)
    found = segment_volume(ImageAsLogits(), volume, stats, ONE, settings(intensity=preset))
    np.testing.assert_array_equal(found, 7 * (volume > (stats.percentile(0) + stats.percentile(100)) / 2))
    assert not found[2].any()


def test_segment_volume__flips_average_four_mirrored_passes(volume):
    """The ramp depends on the place, so that each flip has other logits."""
    network = ImageAsLogits(ramp=True)
    found = segment_probabilities(network, volume, stats_of(volume), settings(), flips=ALL_FLIPS)
    ramp = network.ramp.numpy()[:6]
    mean_ramp = (ramp + ramp[::-1] + ramp[:, ::-1] + ramp[::-1, ::-1]) / 4
    logits = (volume / 100 - 0.5) * mean_ramp
    np.testing.assert_allclose(found[1], 1 / (1 + np.exp(-logits)), atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)
    alone = segment_probabilities(network, volume, stats_of(volume), settings(), only=[2])
    np.testing.assert_allclose(alone[1, 0], 1 / (1 + np.exp(-(volume[2] / 100 - 0.5) * ramp)), atol=1e-5)


def test_segment_volume__planes_average_the_probabilities_on_the_same_voxels():
    """In a cube of 9 voxels no plane is resized, so that the probability of a voxel is the mean of three."""
    volume = np.random.default_rng(6).uniform(0, 100, size=(SIDE, SIDE, SIDE)).astype(np.float32)
    config = settings(planes=tuple(Plane))
    found = segment_volume(ImageAsLogits(num_classes=2), volume, stats_of(volume), TWO, config)
    np.testing.assert_array_equal(found, np.where(volume > 50, 4, np.where(volume < 30, 9, 0)))
    part = segment_volume(ImageAsLogits(num_classes=2), volume, stats_of(volume), TWO, config, only=[5, 1])
    np.testing.assert_array_equal(part, found[[5, 1]])


def test_average_planes__each_plane_has_its_own_weight(volume):
    """Each plane returns a constant and its own cut, whose voxels must come back to their places."""
    constants = {Plane.AXIAL: 1.0, Plane.CORONAL: 2.0, Plane.SAGITTAL: 6.0}
    shapes = {}

    def segment(cut_ZHW, plane):
        shapes[plane] = cut_ZHW.shape
        return np.stack([np.full(cut_ZHW.shape, constants[plane], np.float32), cut_ZHW * constants[plane]])

    found = average_planes(volume, tuple(Plane), segment)
    np.testing.assert_allclose(found[0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(found[1], 3.0 * volume, rtol=1e-5)
    assert shapes == {Plane.AXIAL: (4, 6, 9), Plane.CORONAL: (6, 4, 9), Plane.SAGITTAL: (9, 4, 6)}


@pytest.mark.parametrize(
    ("spacing", "plane", "shape", "is_refused"),
    [
        ((1.0, 1.0, 1.0), Plane.AXIAL, (4, 5, 6), False),
        ((1.5, 1.0, 1.0), Plane.AXIAL, (4, 5, 6), False),
        ((6.0, 1.0, 1.0), Plane.AXIAL, (4, 5, 6), True),
        ((1.0, 1.0, 1.0), Plane.CORONAL, (4, 5, 6), True),
        ((1.0, 1.0, 1.0), Plane.AXIAL, (1, 5, 6), True),
    ],
)
def test_check_planes__only_near_isotropic_axial_volumes_are_cut(spacing, plane, shape, is_refused):
    class Record:
        spacing_mm, shape_zyx = spacing, shape

    Record.plane = plane
    check_planes(Record, settings(), name="head.nii.gz")
    if is_refused:
        with pytest.raises(DataError, match="needs near-isotropic scans") as refused:
            check_planes(Record, settings(planes=(Plane.AXIAL,)), name="head.nii.gz")
        assert refused.value.where == "head.nii.gz"
    else:
        check_planes(Record, settings(planes=(Plane.AXIAL,)), name="head.nii.gz")
