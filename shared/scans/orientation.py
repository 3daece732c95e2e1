"""Canonical orientation of slices, and conversions between it and a file's own axes.

Axis letters: x, y, z = columns, rows, slices of the canonical grid; i, j, k = voxel axes in the order of the file.
World coordinates are RAS+ in millimetres (x to the right, y to the front, z to the head), as in NIfTI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import DataError

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

NEAR_ISOTROPIC_RATIO = 2.0
"""Largest ratio of spacings at which any plane gives usable slices. nnU-Net calls a scan anisotropic from 3 on. At
2 a reformatted slice still has nearly square pixels after the resize to the encoder's input."""
MAX_SHEAR_COSINE = 1e-3
"""Cosine between two voxel axes above which a grid counts as sheared (0.06 degrees. Headers are rounded)."""
MM_PER_UNIT = {
    **dict.fromkeys(("", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 0.001),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
    **dict.fromkeys(("in", "inch", "inches"), 25.4),
}
"""Millimetres per unit of length, by the names that file formats use. A file without a unit is in mm."""
PLAUSIBLE_SPACING_MM = (0.01, 50.0)


class Plane(Enum):
    """Anatomical plane of the slices."""

    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"


# Directions of x, y, z per plane in nibabel's letters, where "L" means that the index grows towards the patient's left.
# This is the DICOM display convention: the patient's right is on the left of the picture, the front or head on top.
DISPLAY_AXES = {
    Plane.AXIAL: ("L", "P", "S"),
    Plane.CORONAL: ("L", "I", "P"),
    Plane.SAGITTAL: ("P", "I", "L"),
}
_WORLD_AXIS_AND_SIGN = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_PLANE_OF_WORLD_AXIS = (Plane.SAGITTAL, Plane.CORONAL, Plane.AXIAL)


def has_mirror_image(plane: Plane) -> bool:
    """Return whether a left-right mirrored slice of this plane is anatomically plausible.

    It is not in sagittal slices, whose columns run from front to back.
    """
    return plane is not Plane.SAGITTAL


@dataclass(frozen=True, kw_only=True)
class NativeGrid:
    """Grid of the source file, sufficient to put a canonical array back into it without resampling."""

    shape_ijk: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    """Map from voxel (i, j, k) to RAS+ mm, 4x4, row by row."""
    orientation: str
    """Direction in which i, j, k grow, e.g. ``"RAS"``."""


def voxel_sizes(affine: Affine) -> npt.NDArray[np.float64]:
    """Return the lengths in mm of the three voxel axes of a 4x4 affine."""
    return np.asarray(np.sqrt((affine[:3, :3] ** 2).sum(axis=0)), dtype=np.float64)


def check_affine(affine: Affine, *, where: str) -> None:
    """Refuse an affine that is not a rigid grid.

    Raises:
        DataError: If values are not finite, an axis has no length, or the grid is sheared.
    """
    if not np.isfinite(affine).all():
        raise DataError("the affine must be finite, got NaN or Inf. Repair the header.", where=where)
    sizes = voxel_sizes(affine)
    if (sizes <= 0).any():
        raise DataError(f"voxel sizes must be positive, got {_mm(sizes)}. Repair the header.", where=where)
    directions = affine[:3, :3] / sizes
    cosines = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosines > MAX_SHEAR_COSINE:
        angle = float(np.degrees(np.arcsin(min(1.0, cosines))))
        raise DataError(
            f"voxel axes must be perpendicular, got a shear of {angle:.2f} degrees. Resample to a rigid grid first.",
            where=where,
        )


def slice_plane(affine: Affine, shape_ijk: tuple[int, ...]) -> Plane:
    """Return the plane in which a grid was acquired, or axial when it is near-isotropic.

    A grid with one slice is cut along that axis, one with a spacing ratio above ``NEAR_ISOTROPIC_RATIO`` along its
    thickest axis.
    """
    # The world axis (0 = left-right, 1 = back-front, 2 = foot-head) that each voxel axis is closest to.
    world_axes = nib.io_orientation(affine)[:, 0].astype(int)
    singles = [axis for axis in range(3) if shape_ijk[axis] == 1]
    if len(singles) == 1:
        return _PLANE_OF_WORLD_AXIS[world_axes[singles[0]]]
    sizes = voxel_sizes(affine)
    if sizes.max() / sizes.min() > NEAR_ISOTROPIC_RATIO:
        return _PLANE_OF_WORLD_AXIS[world_axes[int(sizes.argmax())]]
    return Plane.AXIAL


def is_near_isotropic(affine: Affine) -> bool:
    """Return whether any plane of this grid gives usable slices."""
    sizes = voxel_sizes(affine)
    return bool(sizes.max() / sizes.min() <= NEAR_ISOTROPIC_RATIO)


def to_plane(array_ijk: Array, affine: Affine, plane: Plane) -> tuple[Array, Affine]:
    """Reorient an array by permuting and flipping axes, without changing voxel values.

    Args:
        array_ijk: Array in the order of the file's voxel axes.
        affine: Voxel (i, j, k) to RAS+ mm.
        plane: Plane of the wanted slices.

    Returns:
        The array as (z, y, x), contiguous, and the affine of voxel (x, y, z) to RAS+ mm.
    """
    transform = _transform(affine, plane)
    array_xyz = nib.apply_orientation(array_ijk, transform)
    # The affine takes the inverse of what the array takes, so that every voxel keeps its place in the patient.
    affine_xyz = affine @ nib.orientations.inv_ornt_aff(transform, array_ijk.shape)
    return np.ascontiguousarray(array_xyz.transpose(2, 1, 0)), np.asarray(affine_xyz, dtype=np.float64)


def to_native(array_zyx: Array, grid: NativeGrid, plane: Plane) -> Array:
    """Put an array of canonical slices back on the grid of the source file, as the inverse of ``to_plane``."""
    affine = np.asarray(grid.affine, dtype=np.float64)
    display = nib.orientations.axcodes2ornt(DISPLAY_AXES[plane])
    back = nib.orientations.ornt_transform(display, nib.io_orientation(affine))
    array_ijk = nib.apply_orientation(array_zyx.transpose(2, 1, 0), back)
    if array_ijk.shape != grid.shape_ijk:
        raise DataError(f"the array must fill the native grid {grid.shape_ijk}, got {array_ijk.shape}.")
    return np.ascontiguousarray(array_ijk)


def change_plane(array_zyx: Array, source: Plane, target: Plane) -> Array:
    """Cut canonical slices of one plane into those of another, without changing voxel values."""
    # Canonical axes are directions in the patient, so no affine is needed.
    start, end = (nib.orientations.axcodes2ornt(DISPLAY_AXES[plane]) for plane in (source, target))
    turned = nib.apply_orientation(array_zyx.transpose(2, 1, 0), nib.orientations.ornt_transform(start, end))
    return np.ascontiguousarray(turned.transpose(2, 1, 0))


def native_grid(affine: Affine, shape_ijk: tuple[int, ...]) -> NativeGrid:
    """Describe the grid of a file."""
    i, j, k = (int(n) for n in shape_ijk)
    return NativeGrid(
        shape_ijk=(i, j, k),
        affine=tuple(tuple(float(v) for v in row) for row in affine),
        orientation="".join(str(code) for code in nib.aff2axcodes(affine)),
    )


def grids_agree(
    affine_a: Affine, shape_a: tuple[int, ...], affine_b: Affine, shape_b: tuple[int, ...], *, tolerance_mm: float
) -> tuple[bool, str]:
    """Compare two grids by their shape and by where their eight corners lie.

    Corners reveal a shift, a rotation, another spacing and a flip. A comparison of affine entries does not, because an
    angle error that is tiny per voxel amounts to millimetres at the far corner.

    Returns:
        True if they agree, and one sentence on the difference.
    """
    if tuple(shape_a) != tuple(shape_b):
        return False, f"shapes differ: {tuple(shape_a)} and {tuple(shape_b)}"
    last = np.asarray(shape_a, dtype=np.float64) - 1
    corners = np.array([[*(last * (np.array([b & 1, b >> 1 & 1, b >> 2 & 1]))), 1.0] for b in range(8)])
    distance = float(np.linalg.norm((corners @ affine_a.T - corners @ affine_b.T)[:, :3], axis=1).max())
    if not distance <= tolerance_mm:
        codes = ["".join(str(c) for c in nib.aff2axcodes(a)) for a in (affine_a, affine_b)]
        return False, f"corners lie up to {distance:.3g} mm apart (orientations {codes[0]} and {codes[1]})"
    return True, f"corners agree within {distance:.2g} mm"


def _transform(affine: Affine, plane: Plane) -> npt.NDArray[np.float64]:
    start = nib.io_orientation(affine)
    if np.isnan(start).any():
        raise DataError("the affine must map the three voxel axes to three directions, got a degenerate one.")
    return np.asarray(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(DISPLAY_AXES[plane])))


def _mm(sizes: npt.NDArray[np.float64]) -> str:
    return " x ".join(f"{s:.4g}" for s in sizes) + " mm"


def axial_affine(spacing_mm: tuple[float, float, float], *, where: str) -> Affine:
    """Return the affine of axial slices at the origin, for files without geometry.

    Args:
        spacing_mm: Distance between slices, rows and columns, in mm.
        where: Name for messages.

    Raises:
        DataError: If a spacing is implausible.
    """
    affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
    check_spacing(affine, where=where)
    return affine


def affine_of_axes(axes: str, spacing_mm: Sequence[float]) -> Affine:
    """Return the affine of an array whose axes grow in known directions.

    Args:
        axes: Direction in which each array axis grows, such as ``RAS`` or ``SPL``.
        spacing_mm: Size of a voxel along each array axis.

    Raises:
        DataError: If the axes are not three different directions, or the spacing does not fit them.
    """
    found = [_WORLD_AXIS_AND_SIGN.get(code) for code in axes.upper()]
    if None in found or sorted(world for world, _ in filter(None, found)) != [0, 1, 2]:
        raise DataError(
            f"axes must name the direction of each array axis, one of R or L, A or P, S or I (got {axes!r}, expected "
            "e.g. RAS or SPL)."
        )
    low, high = PLAUSIBLE_SPACING_MM
    if len(spacing_mm) != 3 or not all(low <= size <= high for size in spacing_mm):
        raise DataError(
            f"spacing must be the size of a voxel along each of the three array axes, {low} to {high} mm (got "
            f"{tuple(spacing_mm)})."
        )
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, (world, sign) in enumerate(filter(None, found)):
        affine[world, axis] = sign * spacing_mm[axis]
    return affine


def check_spacing(affine: Affine, *, where: str) -> None:
    """Refuse spacings that no scanner has, which come from a wrong unit or a damaged header.

    Raises:
        DataError: If a voxel axis is shorter or longer than ``PLAUSIBLE_SPACING_MM``.
    """
    sizes = voxel_sizes(affine)
    low, high = PLAUSIBLE_SPACING_MM
    if not ((sizes >= low) & (sizes <= high)).all():
        raise DataError(
            f"voxel sizes must lie in {low}..{high} mm, got {_mm(sizes).removesuffix(' mm')}. Repair the header.",
            where=where,
        )
