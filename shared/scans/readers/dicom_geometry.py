"""Geometry of DICOM frames, and their assembly into one regular grid.

DICOM positions are LPS millimetres. ``ImageOrientationPatient`` holds two unit vectors: the direction in which the
column index grows (called the row direction, because a row runs along it) and the one in which the row index grows.
``PixelSpacing`` has the other order: first the distance between rows, then between columns.

Source: DICOM PS3.3 C.7.6.2.1.1, image plane attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import DataError

Vector = npt.NDArray[np.float64]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SAME_POSITION_MM = 0.01
MAX_GAP_RATIO = 1.1
"""Largest ratio of slice distances. Rounded positions give 1.01, a missing slice gives 2."""
PARALLEL_TOLERANCE = 1e-3
"""Largest difference between direction cosines of parallel slices. Headers are rounded to 1e-5 or 1e-6."""
MAX_LATERAL_SHIFT = 0.1
"""Largest distance of a slice from the straight stack, in pixels. Rounded positions give hundredths."""


@dataclass(frozen=True, kw_only=True)
class FramePlane:
    """Place of one frame in the patient."""

    shape_HW: tuple[int, int]
    origin: Vector
    """Position of the first pixel, LPS mm. Zeros without ``has_position``."""
    row_direction: Vector
    """Unit vector along which the column index grows."""
    column_direction: Vector
    """Unit vector along which the row index grows."""
    spacing_rc: tuple[float, float]
    """Distance between rows and between columns, mm."""
    thickness_mm: float | None
    name: str
    """Name for messages, e.g. ``instance 12``."""
    has_position: bool
    notes: tuple[str, ...] = ()

    @property
    def normal(self) -> Vector:
        """Unit vector across the slices."""
        return np.asarray(np.cross(self.row_direction, self.column_direction), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class StackGeometry:
    """Order of frames and the grid that they form."""

    order: tuple[int, ...]
    """Index of the frame at each slice, first slice first."""
    affine: Vector
    """Map from voxel (column, row, slice) to RAS+ mm, 4x4."""
    notes: tuple[str, ...]


def is_parallel(orientation_a: Vector, orientation_b: Vector) -> bool:
    """Return whether two ``ImageOrientationPatient`` values describe parallel slices."""
    return bool(np.allclose(orientation_a, orientation_b, rtol=0, atol=PARALLEL_TOLERANCE))


def stack_planes(planes: Sequence[FramePlane], *, where: str, allow_gaps: bool) -> StackGeometry:
    """Sort frames along their common normal and check that they form one regular grid.

    Args:
        planes: Frames of one series, in any order.
        where: Name for messages.
        allow_gaps: Acceptance of missing slices; the spacing is then the median distance.

    Raises:
        DataError: If frames differ in size, direction or pixel spacing, share a position, are missing, or are shifted
            sideways.
    """
    first = planes[0]
    for plane in planes:
        _check_same_frame(plane, first, where=where)
    # Not InstanceNumber and not SliceLocation: both may run against the stack or restart within it. The
    # projection of the position onto the normal is the only order that the geometry itself defines.
    positions = np.array([float(plane.origin @ first.normal) for plane in planes])
    # Ascending along the normal, so that the affine is right-handed for any orientation.
    order = np.argsort(positions, kind="stable")
    step, notes = _slice_step(positions[order], first, where=where, allow_gaps=allow_gaps)
    stack = [planes[i] for i in order]
    affine = np.eye(4)
    # Columns of the affine: one voxel step along the column index, the row index and the slice index.
    affine[:3, 0] = first.row_direction * first.spacing_rc[1]
    affine[:3, 1] = first.column_direction * first.spacing_rc[0]
    affine[:3, 2] = _step_vector(stack, step)
    affine[:3, 3] = stack[0].origin
    _check_straight(stack, first, where=where)
    return StackGeometry(
        order=tuple(int(i) for i in order),
        affine=LPS_TO_RAS @ affine,
        notes=(*notes, *sorted({note for plane in planes for note in plane.notes})),
    )


def _check_same_frame(plane: FramePlane, first: FramePlane, *, where: str) -> None:
    if plane.shape_HW != first.shape_HW:
        raise DataError(
            f"slices of a series must have one size, got {first.shape_HW} and {plane.shape_HW} ({plane.name}).",
            where=where,
        )
    same_rows = is_parallel(plane.row_direction, first.row_direction)
    if not (same_rows and is_parallel(plane.column_direction, first.column_direction)):
        raise DataError(f"slices of a series must be parallel, {plane.name} is not. Split the series.", where=where)
    if not np.allclose(plane.spacing_rc, first.spacing_rc, rtol=1e-3):
        raise DataError(f"slices of a series must have one pixel spacing, {plane.name} differs.", where=where)


def _slice_step(positions: Vector, first: FramePlane, *, where: str, allow_gaps: bool) -> tuple[float, tuple[str, ...]]:
    if len(positions) == 1:
        return first.thickness_mm or 1.0, ()
    steps = np.diff(positions)
    # Equal positions come first: their median step of 0 would make every other distance look like a gap.
    if (steps < SAME_POSITION_MM).any():
        num = int((steps < SAME_POSITION_MM).sum())
        raise DataError(
            f"every slice must have its own position, {num} share one with another: duplicates, echoes or time "
            "points. Leave one of each in the folder.",
            where=where,
        )
    median = float(np.median(steps))
    # Compared with the median and not with SliceThickness, which differs from the distance in overlapping stacks.
    if steps.max() > MAX_GAP_RATIO * median or steps.min() * MAX_GAP_RATIO < median:
        place = int(np.abs(steps - median).argmax())
        text = f"gap at z={place} ({median:.2f} to {steps[place]:.2f} mm)"
        if not allow_gaps:
            raise DataError(f"slices must be equally spaced, got a {text}. Add the slice or --allow-gaps.", where=where)
        return median, (f"{text} accepted",)
    return float(steps.mean()), ()


def _step_vector(stack: Sequence[FramePlane], step: float) -> Vector:
    """Return the vector between neighbouring slices.

    It comes from the positions and not from the normal, so that a tilted gantry is visible as shear and refused.
    """
    first, last = stack[0], stack[-1]
    if len(stack) == 1:
        return np.asarray(first.normal * step)
    whole = last.origin - first.origin
    return np.asarray(whole * (step / abs(float(whole @ first.normal))))


def _check_straight(stack: Sequence[FramePlane], first: FramePlane, *, where: str) -> None:
    """Refuse a slice that is shifted sideways from the line between the first and the last slice."""
    # Distances along the normal cannot reveal the shift, because it does not change the order of the slices.
    start, whole = stack[0].origin, stack[-1].origin - stack[0].origin
    length = float(whole @ first.normal)
    # Relative to the pixel, because a shift matters by how far it moves tissue between neighbouring slices.
    limit = max(MAX_LATERAL_SHIFT * min(first.spacing_rc), 5 * SAME_POSITION_MM)
    for z, plane in enumerate(stack[1:-1], start=1):
        offset = plane.origin - start
        beside = float(np.linalg.norm(offset - whole * (float(offset @ first.normal) / length)))
        if beside > limit:
            raise DataError(
                f"slices must lie in one straight stack, slice z={z} ({plane.name}) lies {beside:.2f} mm beside it. "
                "Repair ImagePositionPatient or leave the slice out.",
                where=where,
            )
