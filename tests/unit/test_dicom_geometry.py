"""Affines of DICOM stacks worked out by hand, with pixels that are not square and an oblique plane."""

import numpy as np
import pytest
from dicom_factory import write_series
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.dicom import read_dicom_series
from samgraft.shared.scans.readers.dicom_geometry import FramePlane, stack_planes

ROW, COLUMN = np.array([0.8, 0.6, 0.0]), np.array([0.0, 0.0, -1.0])
NORMAL = np.array([-0.6, 0.8, 0.0])  # the cross product of both
ORIGIN = np.array([10.0, -20.0, 30.0])
SPACING = (0.5, 2.0)  # between rows, between columns


def plane(number, **changes):
    values = {
        "shape_HW": (4, 5), "origin": ORIGIN + 3.5 * number * NORMAL, "row_direction": ROW, "column_direction": COLUMN,
        "spacing_rc": SPACING, "thickness_mm": 3.0, "name": f"instance {number}", "has_position": True,
    }  # fmt: skip
    return FramePlane(**values | changes)


def test_stack_planes__affine_of_an_oblique_stack():
    """Column index along 0.8 L + 0.6 P at 2 mm, row index to the feet at 0.5 mm. RAS has two other signs."""
    found = stack_planes([plane(2), plane(0), plane(1)], where="x", allow_gaps=False)
    assert found.order == (1, 2, 0)
    expected = np.array([[-1.6, 0, 2.1, -10], [-1.2, 0, -2.8, 20], [0, -0.5, 0, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(found.affine, expected, atol=1e-9)
    # Column, row and slice index form a right-handed system in the patient.
    assert np.linalg.det(found.affine[:3, :3]) > 0


def test_stack_planes__single_slice_has_its_thickness():
    affine = stack_planes([plane(3)], where="x", allow_gaps=False).affine
    np.testing.assert_allclose(affine[:3, 2], np.array([-1, -1, 1]) * 3 * NORMAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape_HW": (5, 4)}, r"one size, got \(4, 5\) and \(5, 4\) \(instance 1\)"),
        ({"row_direction": np.array([0.6, 0.8, 0.0])}, "must be parallel, instance 1 is not"),
        ({"spacing_rc": (2.0, 0.5)}, "one pixel spacing, instance 1 differs"),
        ({"origin": ORIGIN}, "1 share one with another"),
    ],
)
def test_stack_planes__different_slices_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        stack_planes([plane(0), plane(1, **changes), plane(2)], where="x", allow_gaps=False)


def test_read_dicom_series__first_pixel_spacing_is_between_rows(tmp_path):
    """4 rows 0.5 mm apart and 5 columns 2 mm apart, and each voxel at its place."""
    volume = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    paths = write_series(tmp_path, volume, spacing=SPACING, step=3.0)
    raw = read_dicom_series(paths, where="x")
    np.testing.assert_allclose(raw.affine, np.diag([-2.0, -0.5, 3.0, 1.0]))
    np.testing.assert_array_equal(raw.array_ijk, volume.transpose(2, 1, 0))
