"""Surface distances against shapes worked out by hand and the reference implementation."""

import numpy as np
import pytest
from samgraft.finetune.evaluation.surface import surface_score
from scipy import ndimage

SPACING = (5.0, 0.7, 0.9)


def cube(shape=(20, 24, 24), start=(5, 6, 6), side=8):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def blobs(seed, shape=(12, 40, 36)):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma=(1.5, 4, 4))
    return field > np.quantile(field, 0.85)


def test_surface_score__equal_masks_have_distance_0():
    score = surface_score(cube(), cube(), spacing_mm=SPACING)
    assert (score.nsd, score.hd95_mm, score.mean_surface_distance_mm) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("axis", "shift_mm"), [(0, 5.0), (1, 0.7), (2, 0.9)])
def test_surface_score__shifted_cube_has_the_spacing_of_the_axis(axis, shift_mm):
    """Two of six faces move. They are more than 5 % of the surface, so that HD95 is the shift itself."""
    shifted = np.roll(cube(), 1, axis=axis)
    score = surface_score(cube(), shifted, spacing_mm=SPACING, tolerance_mm=0.01)
    assert score.hd95_mm == pytest.approx(shift_mm)
    assert 0 < score.mean_surface_distance_mm < shift_mm
    assert surface_score(cube(), shifted, spacing_mm=SPACING, tolerance_mm=shift_mm).nsd == 1.0
    assert score.nsd < 0.9


def test_surface_score__large_shifted_cube_worked_out_by_hand():
    """A cube of 40 mm is moved by 2 mm.

    The two faces across the shift have a distance of 2 mm. Each of the four others has a strip of 2 mm that overhangs,
    with a mean distance of 1 mm. The mean over the six faces is close to (2 + 2 + 4 * 2/40 * 1) / 6.
    """
    mask = cube(shape=(48, 48, 48), start=(4, 4, 4), side=40)
    moved = np.roll(mask, 2, axis=2)
    score = surface_score(mask, moved, spacing_mm=(1.0, 1.0, 1.0), tolerance_mm=1.5)
    assert score.hd95_mm == 2.0
    assert score.mean_surface_distance_mm == pytest.approx(4.2 / 6, abs=0.05)
    # Within 1.5 mm are the four other faces, without a strip of half a millimetre of 40.
    assert score.nsd == pytest.approx(4 / 6, abs=0.03)


def test_surface_score__double_spacing_doubles_distances():
    one = surface_score(blobs(0), blobs(1), spacing_mm=SPACING, tolerance_mm=2.0)
    two = surface_score(blobs(0), blobs(1), spacing_mm=tuple(2 * s for s in SPACING), tolerance_mm=4.0)
    assert two.hd95_mm == pytest.approx(2 * one.hd95_mm)
    assert two.mean_surface_distance_mm == pytest.approx(2 * one.mean_surface_distance_mm)
    assert two.nsd == pytest.approx(one.nsd)


def test_surface_score__empty_masks_follow_the_stated_rules():
    nothing, something = np.zeros((4, 6, 8), dtype=bool), cube((4, 6, 8), (1, 1, 1), 2)
    assert surface_score(nothing, nothing, spacing_mm=(2.0, 1.0, 1.0)) is None
    diagonal = np.sqrt(8.0**2 + 6**2 + 8**2)
    for predicted, true in ((nothing, something), (something, nothing)):
        score = surface_score(predicted, true, spacing_mm=(2.0, 1.0, 1.0))
        assert score.nsd == 0.0
        assert score.hd95_mm == score.mean_surface_distance_mm == pytest.approx(diagonal)


@pytest.mark.parametrize("seed", range(4))
def test_surface_score__random_shapes_equal_the_reference_implementation(seed):
    surface_distance = pytest.importorskip("surface_distance", reason="the oracle is a development dependency")
    predicted, true = blobs(seed), blobs(seed + 10)
    found = surface_score(predicted, true, spacing_mm=SPACING, tolerance_mm=1.5)
    oracle = surface_distance.compute_surface_distances(true, predicted, SPACING)
    assert found.nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(oracle, 1.5), abs=1e-5)
    assert found.hd95_mm == pytest.approx(surface_distance.compute_robust_hausdorff(oracle, 95), abs=1e-4)
    to_predicted, to_true = surface_distance.compute_average_surface_distance(oracle)
    areas = [oracle[k].sum() for k in ("surfel_areas_gt", "surfel_areas_pred")]
    mean = (to_predicted * areas[0] + to_true * areas[1]) / sum(areas)
    assert found.mean_surface_distance_mm == pytest.approx(mean, abs=1e-4)


def test_surface_score__structure_at_the_border_is_closed():
    """A structure that the edge of the scan cuts has a surface at the edge."""
    touching = np.zeros((6, 10, 10), dtype=bool)
    touching[:3, :4, :4] = True
    inner = np.zeros((8, 12, 12), dtype=bool)
    inner[1:4, 1:5, 1:5] = True
    moved, moved_inner = np.roll(touching, 3, axis=2), np.roll(inner, 3, axis=2)
    moved[..., :3] = False
    at_border = surface_score(touching, moved, spacing_mm=SPACING)
    inside = surface_score(inner, moved_inner, spacing_mm=SPACING)
    assert at_border == inside


def test_surface_score__one_slice_compares_contours():
    """The flat caps above and below a slice would be most of the surface and hide the error."""
    a, b = np.zeros((1, 30, 30), dtype=bool), np.zeros((1, 30, 30), dtype=bool)
    a[0, 5:15, 5:15], b[0, 5:15, 9:19] = True, True
    score = surface_score(a, b, spacing_mm=(5.0, 1.0, 1.0), tolerance_mm=0.5)
    assert score.hd95_mm == 4.0
    # 12 mm of the upper and lower side of each outline of 40 mm are on the other one, a little over 0.3.
    assert 0.25 < score.nsd < 0.4


def test_surface_score__other_shape_or_spacing_0_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        surface_score(cube(), cube((4, 5, 6), (1, 1, 1), 1), spacing_mm=SPACING)
    with pytest.raises(ValueError, match="must be positive"):
        surface_score(cube(), cube(), spacing_mm=(0.0, 1.0, 1.0))
