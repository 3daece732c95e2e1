"""Intensity presets at known points, with air, and for degenerate volumes."""

import dataclasses

import numpy as np
import pytest
from samgraft.shared.errors import DataError
from samgraft.shared.scans.intensity import (
    IntensityKind,
    IntensityPreset,
    IntensityStats,
    find_fill_values,
    foreground_fractions,
    measure_intensity,
    normalise,
)
from samgraft.shared.scans.volume import Modality

SOFT_TISSUE = IntensityPreset(name="ct", kind=IntensityKind.WINDOW, window_center=40.0, window_width=400.0)


def ct_stats():
    return measure_intensity(np.arange(-1000, 1000, dtype=np.int16).reshape(2, 20, 50), modality=Modality.CT)


@pytest.mark.parametrize(
    ("hu", "expected"),
    [(-1000.0, 0.0), (-160.0, 0.0), (40.0, 0.5), (140.0, 0.75), (240.0, 1.0), (3000.0, 1.0)],
)
def test_normalise__window_known_points(hu, expected):
    out = normalise(np.full((2, 3), hu), ct_stats(), SOFT_TISSUE)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_normalise__window_is_not_dicom_linear():
    # DICOM's own LINEAR example: c=2048, w=4096 maps 2047.5 to 0.5. Ours must not.
    wide = IntensityPreset(kind=IntensityKind.WINDOW, window_center=2048.0, window_width=4096.0)
    assert normalise(np.full((1, 1), 2047.5), ct_stats(), wide).item() < 0.5


def test_normalise__percentiles_are_of_tissue_not_of_air():
    volume = np.zeros((4, 100, 100), dtype=np.uint16)
    volume[:, 40:60, 40:60] = np.linspace(500, 1500, 400).reshape(20, 20)
    stats = measure_intensity(volume, modality=Modality.MRI)
    # 96 % of the voxels are air: a percentile over all of them would be 0.
    assert stats.percentile(50) == pytest.approx(1000, abs=2)
    assert stats.percentile(0.5) == pytest.approx(505, abs=2)
    out = normalise(volume[0], stats, IntensityPreset())
    assert out[0, 0] == 0
    assert out[50, 50] == pytest.approx((volume[0, 50, 50] - 505) / 990, abs=0.01)


def test_normalise__does_not_depend_on_the_scanner_scale():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 100.0, size=(3, 64, 64))
    for preset in (
        IntensityPreset(),
        IntensityPreset(kind=IntensityKind.ZSCORE),
        IntensityPreset(kind=IntensityKind.MINMAX),
    ):
        outs = [normalise(v[1], measure_intensity(v, modality=Modality.MRI), preset) for v in (base, base * 1e4 + 7)]
        np.testing.assert_allclose(outs[0], outs[1], atol=2e-4)


def test_normalise__zscore_known_points():
    stats = IntensityStats(minimum=0, maximum=9, mean=100.0, std=10.0, air_threshold=0, percentiles=(0.0,) * 17)
    preset = IntensityPreset(kind=IntensityKind.ZSCORE, clip_std=2.0)
    np.testing.assert_allclose(normalise(np.array([[80.0, 100.0, 110.0, 200.0]]), stats, preset), [[0, 0.5, 0.75, 1]])


@pytest.mark.parametrize("value", [0, 7, -5])
def test_normalise__constant_volume_is_zero_and_finite(value):
    volume = np.full((2, 8, 8), value, dtype=np.int16)
    stats = measure_intensity(volume, modality=Modality.MRI)
    for kind in (IntensityKind.PERCENTILE, IntensityKind.ZSCORE, IntensityKind.MINMAX):
        assert (normalise(volume[0], stats, IntensityPreset(kind=kind)) == 0).all()


def test_normalise__one_bright_voxel_stays_finite():
    volume = np.zeros((2, 32, 32), dtype=np.uint16)
    volume[0, 3, 3] = 60000
    out = normalise(volume[0], measure_intensity(volume, modality=Modality.MRI), IntensityPreset())
    assert np.isfinite(out).all()


def test_measure_intensity__large_volumes_are_sampled_across_columns():
    # 2048 * 1024 * 256 voxels would be sampled every 268th; 256 columns with all tissue in one of them.
    volume = np.zeros((8, 1024, 256), dtype=np.uint8)
    volume[:, :, 128] = 200
    import samgraft.shared.scans.intensity as module

    limit = module.MAX_SAMPLES
    try:
        module.MAX_SAMPLES = volume.size // 256
        stats = measure_intensity(volume, modality=Modality.ULTRASOUND)
    finally:
        module.MAX_SAMPLES = limit
    assert stats.percentile(50) == 200


def test_measure_intensity__non_finite_is_refused_with_count():
    volume = np.zeros((2, 4, 4), dtype=np.float32)
    volume[0, 0, :3] = np.nan
    with pytest.raises(DataError, match="3 of 32"):
        measure_intensity(volume, modality=Modality.MRI)


def test_normalise__non_finite_slice_is_refused():
    with pytest.raises(DataError, match="1 non-finite of 4"):
        normalise(np.array([[0, np.inf], [1, 2]]), ct_stats(), SOFT_TISSUE)


def test_foreground_fractions__known_share():
    volume = np.zeros((2, 10, 10))
    volume[1, :5] = 100
    stats = dataclasses.replace(measure_intensity(volume, modality=Modality.MRI), air_threshold=1.0)
    np.testing.assert_allclose(foreground_fractions(volume, stats), [0, 0.5])


@pytest.mark.parametrize("fill", [-32768, 32767])
def test_measure_intensity__fill_values_are_left_out(fill):
    volume = np.random.default_rng(0).integers(0, 900, size=(4, 20, 20)).astype(np.int16)
    filled = np.concatenate([volume, np.full_like(volume, fill)], axis=2)
    expected = measure_intensity(volume, modality=Modality.MRI)
    stats = measure_intensity(filled, modality=Modality.MRI)
    assert stats == expected
    np.testing.assert_allclose(foreground_fractions(filled, stats), foreground_fractions(volume, expected) / 2)


@pytest.mark.parametrize(("background", "top"), [(0, 1400), (0, 1050), (800, 1400)])
def test_measure_intensity__air_and_rare_outliers_are_no_fill_values(background, top):
    volume = np.random.default_rng(0).integers(1000, top, size=(4, 20, 40)).astype(np.int16)
    volume[:, :10] = background
    assert find_fill_values(volume) == ()
    volume[0, -1, -1] = 32767
    stats = measure_intensity(volume, modality=Modality.MRI)
    assert (stats.minimum, stats.maximum) == (background, 32767)


def test_find_fill_values__pictures_have_none():
    picture = np.random.default_rng(0).integers(0, 20, size=(1, 40, 40)).astype(np.uint8)
    picture[0, :10] = 255
    assert find_fill_values(picture) == ()
    assert find_fill_values(picture.astype(np.uint16)) == (255.0,)


def test_preset__round_trip_and_refusals():
    assert IntensityPreset.from_dict(SOFT_TISSUE.to_dict()) == SOFT_TISSUE
    with pytest.raises(DataError, match=r"unknown keys.*colour"):
        IntensityPreset.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="lower_percentile"):
        IntensityPreset(lower_percentile=99, upper_percentile=1)
    with pytest.raises(ValueError, match="window_width"):
        IntensityPreset(window_width=0)


def test_measure_intensity__statistics_are_of_the_voxels_above_minus_500_hu():
    volume = np.array([[[-1000, -600, -501, -500, -400, 0, 40, 800]]], dtype=np.int16)
    stats = measure_intensity(volume, modality=Modality.CT)
    tissue = [-400, 0, 40, 800]
    assert (stats.air_threshold, stats.minimum, stats.maximum) == (-500, -1000, 800)
    assert (stats.mean, stats.std) == (pytest.approx(np.mean(tissue)), pytest.approx(np.std(tissue)))
