"""Canonical slices, which are permutations and flips and do not depend on the storage order."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import (
    Plane,
    affine_of_axes,
    check_affine,
    grids_agree,
    is_near_isotropic,
    native_grid,
    slice_plane,
    to_native,
    to_plane,
)

LPS = np.diag([-1.0, -1.0, 3.0, 1.0])
CODES = ["".join(p) for axes in itertools.permutations(("RL", "AP", "SI")) for p in itertools.product(*axes)]


@pytest.mark.parametrize("codes", CODES)
def test_to_plane__every_storage_order_gives_the_same_slices(codes):
    rng = np.random.default_rng(0)
    array_xyz = rng.normal(size=(4, 5, 6))
    reference_zyx, reference_affine = to_plane(array_xyz, LPS, Plane.AXIAL)
    np.testing.assert_array_equal(reference_zyx, array_xyz.transpose(2, 1, 0))
    transform = nib.orientations.ornt_transform(nib.io_orientation(LPS), nib.orientations.axcodes2ornt(tuple(codes)))
    stored = nib.apply_orientation(array_xyz, transform)
    affine = LPS @ nib.orientations.inv_ornt_aff(transform, array_xyz.shape)
    array_zyx, out_affine = to_plane(stored, affine, Plane.AXIAL)
    np.testing.assert_array_equal(array_zyx, reference_zyx)
    np.testing.assert_allclose(out_affine, reference_affine)
    grid = native_grid(affine, stored.shape)
    assert grid.orientation == codes
    np.testing.assert_array_equal(to_native(array_zyx, grid, Plane.AXIAL), stored)


@pytest.mark.parametrize(
    ("plane", "top", "left"),
    [
        (Plane.AXIAL, "front", "right"),
        (Plane.CORONAL, "head", "right"),
        (Plane.SAGITTAL, "head", "front"),
    ],
)
def test_to_plane__slices_follow_the_display_convention(plane, top, left):
    # Every voxel has its world position as value, so that the picture shows its own orientation.
    position = {
        "right": np.meshgrid(*[np.arange(4)] * 3, indexing="ij")[0],
        "front": np.meshgrid(*[np.arange(4)] * 3, indexing="ij")[1],
        "head": np.meshgrid(*[np.arange(4)] * 3, indexing="ij")[2],
    }
    for name, edge in ((top, "row"), (left, "column")):
        array_zyx, _ = to_plane(position[name], np.eye(4), plane)
        first = array_zyx[0, 0, 1] if edge == "row" else array_zyx[0, 1, 0]
        last = array_zyx[0, 3, 1] if edge == "row" else array_zyx[0, 1, 3]
        assert (first, last) == (3, 0)


@pytest.mark.parametrize(
    ("spacing", "shape", "plane"),
    [
        ((1, 1, 1), (9, 9, 9), Plane.AXIAL),
        ((1, 1, 1.9), (9, 9, 9), Plane.AXIAL),
        ((5, 1, 1), (9, 9, 9), Plane.SAGITTAL),
        ((1, 4, 1), (9, 9, 9), Plane.CORONAL),
        ((1, 1, 1), (9, 1, 9), Plane.CORONAL),
    ],
)
def test_slice_plane__thickest_axis_or_axial(spacing, shape, plane):
    assert slice_plane(np.diag([*spacing, 1.0]), shape) is plane


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_to_native__inverts_any_rotation(seed):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(0.5, 2, size=3)
    shape = tuple(int(n) for n in rng.integers(1, 6, size=3))
    array = rng.normal(size=shape)
    for plane in Plane:
        array_zyx, affine_xyz = to_plane(array, affine, plane)
        np.testing.assert_array_equal(to_native(array_zyx, native_grid(affine, shape), plane), array)
        # One voxel keeps its place in the patient.
        index = np.unravel_index(int(array_zyx.argmax()), array_zyx.shape)[::-1]
        native = np.unravel_index(int(array.argmax()), shape)
        np.testing.assert_allclose(affine_xyz @ [*index, 1], affine @ [*native, 1], atol=1e-9)


def test_check_affine__shear_nan_and_zero_are_named():
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    with pytest.raises(DataError, match=r"shear of 5\.\d+ degrees"):
        check_affine(sheared, where="x")
    with pytest.raises(DataError, match="finite"):
        check_affine(np.diag([np.nan, 1, 1, 1]), where="x")
    with pytest.raises(DataError, match="positive"):
        check_affine(np.diag([0.0, 1, 1, 1]), where="x")
    check_affine(LPS, where="x")


def test_grids_agree__measures_corners():
    shape = (101, 101, 11)
    shifted = LPS.copy()
    shifted[0, 3] += 0.5
    assert grids_agree(LPS, shape, LPS, shape, tolerance_mm=0.01)[0]
    agree, text = grids_agree(LPS, shape, shifted, shape, tolerance_mm=0.01)
    assert not agree
    assert "0.5 mm" in text
    # One thousandth per voxel is a tenth of a millimetre at the far corner.
    scaled = LPS.copy()
    scaled[0, 0] *= 1.001
    assert not grids_agree(LPS, shape, scaled, shape, tolerance_mm=0.05)[0]
    assert "shapes differ" in grids_agree(LPS, shape, LPS, (101, 101, 10), tolerance_mm=1)[1]


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [((3.0, 4.0, 5.0), True), ((0.4, 0.8, 0.8), True), ((1.0, 2.1, 1.0), False), ((6.1, 3.0, 3.0), False)],
)
def test_is_near_isotropic__largest_ratio_of_sizes_is_two(spacing, expected):
    assert is_near_isotropic(np.diag([*spacing, 1.0])) is expected


@pytest.mark.parametrize("axis", range(3))
def test_grids_agree__distance_is_that_of_the_last_voxel_of_each_axis(axis):
    shape = (101, 51, 11)
    scaled = LPS.copy()
    scaled[axis, axis] *= 1.001
    moved = abs(0.001 * LPS[axis, axis]) * (shape[axis] - 1)
    assert grids_agree(LPS, shape, scaled, shape, tolerance_mm=1.001 * moved)[0]
    assert not grids_agree(LPS, shape, scaled, shape, tolerance_mm=0.999 * moved)[0]


def test_grids_agree__corners_include_those_of_single_axes():
    """Two axes move the far corner in opposite directions, so that only the corners of one of them differ."""
    shape = (101, 101, 11)
    turned = LPS.copy()
    turned[0, 1:3] += 0.001, -0.01
    assert not grids_agree(LPS, shape, turned, shape, tolerance_mm=0.09)[0]


def test_affine_of_axes__every_letter_has_its_direction():
    expected = [[0, -3, 0, 0], [0, 0, -4, 0], [-2, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(affine_of_axes("ILP", (2, 3, 4)), expected)
    np.testing.assert_array_equal(affine_of_axes("sra", (2, 3, 4)), np.abs(expected))
    with pytest.raises(DataError, match="axes must name the direction of each array axis"):
        affine_of_axes("RLS", (1, 1, 1))
