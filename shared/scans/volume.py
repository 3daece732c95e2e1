"""Scans in memory, as their files give them and cut into canonical slices.

Shape letters: I, J, K = voxel axes of the file; Z = slices; H, W = rows and columns of a slice.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import (
    Affine,
    NativeGrid,
    Plane,
    check_affine,
    native_grid,
    slice_plane,
    to_plane,
    voxel_sizes,
)

Array = npt.NDArray[Any]

IGNORE_LABEL = -1
"""Label of voxels that are not annotated, in stores and in memory.

It is negative, so that it is never the id of a class. Some files use 255 for "not annotated", and in others 255 is the
structure."""


class Modality(Enum):
    """Kind of scan. Each has a preset ``configs/modality/<name>.yaml``."""

    MRI = "mri"
    CT = "ct"
    XRAY = "xray"
    ULTRASOUND = "ultrasound"


@dataclass(frozen=True, kw_only=True)
class RawScan:
    """Scan as a reader returns it, on the file's own axes."""

    array_ijk: Array
    """Voxels, shape (I, J, K), in native dtype and native units (Hounsfield units for CT)."""
    affine: Affine
    """Map from voxel (i, j, k) to RAS+ mm, 4x4."""
    source_sha256: str
    """SHA-256 over every byte of the source files, in the order of slices."""
    notes: tuple[str, ...] = ()
    """Decisions of the reader for the report, without identifying text."""
    modality_tag: str | None = None
    """DICOM modality (``MR``, ``CT``, ...) if the file has one."""
    privacy: tuple[str, ...] = ()
    """Kinds of identifying content in the headers, without values."""
    num_volumes: int = 1
    """Number of volumes in the file, of which this is one."""
    has_orientation: bool = True
    """False for formats without geometry, whose axes are read as axial slices with possibly unknown spacing."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Scan cut into canonical slices of one plane."""

    array_zyx: Array
    """Voxels, shape (Z, H, W), in native dtype."""
    affine: Affine
    """Map from voxel (x, y, z) to RAS+ mm, 4x4."""
    modality: Modality
    plane: Plane
    grid: NativeGrid
    source_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns in mm, order (z, row, col)."""
        x, y, z = voxel_sizes(self.affine)
        return float(z), float(y), float(x)


def volume_from_scan(scan: RawScan, *, modality: Modality, plane: Plane | None = None, where: str) -> Volume:
    """Cut a scan into canonical slices of one plane.

    Args:
        scan: Result of a reader.
        modality: Kind of scan.
        plane: Wanted plane; None takes the acquired one (axial for near-isotropic grids).
        where: Name for messages; must not identify a patient in a log that leaves the machine.

    Raises:
        DataError: If the grid is degenerate or sheared.
    """
    if scan.array_ijk.ndim != 3:
        raise DataError(f"a scan must have three axes, got shape {scan.array_ijk.shape}.", where=where)
    if scan.array_ijk.size == 0:
        raise DataError(f"a scan must have voxels, got shape {scan.array_ijk.shape}.", where=where)
    check_affine(scan.affine, where=where)
    plane = plane or slice_plane(scan.affine, scan.array_ijk.shape)
    # Permutation and flips only: a resampled grid would blur the native values for good.
    array_zyx, affine = to_plane(scan.array_ijk, scan.affine, plane)
    return Volume(
        array_zyx=to_storable_dtype(array_zyx, where=where),
        affine=affine,
        modality=modality,
        plane=plane,
        grid=native_grid(scan.affine, scan.array_ijk.shape),
        source_sha256=scan.source_sha256,
        notes=scan.notes,
    )


def check_real_numbers(array: Array, *, where: str) -> None:
    """Refuse voxels that are not real numbers.

    Raises:
        DataError: For complex, object, string or structured (RGB) voxels.
    """
    # A cast of complex numbers to float drops the imaginary part with no more than a warning.
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"voxels must be real numbers, got dtype {array.dtype}. Export one channel or the magnitude.", where=where
        )


def to_storable_dtype(array: Array, *, where: str) -> Array:
    """Return the array as 8 to 32 bit integers or 32 bit floats in native byte order.

    Float64 becomes float32 and 64-bit integers the smallest type that holds them exactly.

    Raises:
        DataError: If voxels are not real numbers or too large.
    """
    check_real_numbers(array, where=where)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            single = array.astype(np.float32, copy=False)
        # Infinite values of the scan itself were refused or replaced before.
        if not np.isfinite(single).all() and np.isfinite(array).all():
            raise DataError("voxels must fit float32, got larger values. Divide them by a constant.", where=where)
        return single
    if array.dtype.itemsize <= 4:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    # Many programs write 12-bit scans as int64; the smallest exact type keeps the store small and lossless.
    low, high = int(array.min()), int(array.max())
    for name in ("uint8", "int16", "uint16", "int32", "uint32"):
        info = np.iinfo(name)
        if info.min <= low and high <= info.max:
            return array.astype(name)
    raise DataError(f"voxels must fit 32 bits, got {low}..{high}. Divide them by a constant.", where=where)


def rescale_values(array: Array, *, slope: float, intercept: float) -> Array:
    """Return ``array * slope + intercept``.

    The result is int16 or int32 when every value is an exact integer, else float32. CT stores Hounsfield units as
    uint16 with an intercept of -1024; as int16 they need half the space of floats.
    """
    if slope == 1 and intercept == 0:
        return array
    whole = array.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer()
    if whole and array.size:
        ends = [int(array.min()) * int(slope) + int(intercept), int(array.max()) * int(slope) + int(intercept)]
        for name in ("int16", "int32"):
            info = np.iinfo(name)
            if info.min <= min(ends) and max(ends) <= info.max:
                return (array.astype(np.int64) * int(slope) + int(intercept)).astype(name)
    return (array.astype(np.float64) * slope + intercept).astype(np.float32)


def is_usable_slope(slope: float | None, intercept: float | None) -> bool:
    """Return whether a header's slope and intercept are finite and the slope is not 0."""
    return slope is not None and math.isfinite(slope) and slope != 0 and math.isfinite(intercept or 0.0)


def content_sha256(array_zyx: Array) -> str:
    """Return a hash of shape and values, independent of dtype, format and header.

    The same pixels as DICOM, NIfTI or PNG under two patient ids give the same hash, which the leak check needs.
    Values are compared as float32, exact for every integer up to 2^24.
    """
    digest = hashlib.sha256(str(tuple(array_zyx.shape)).encode())
    for slice_HW in array_zyx:
        # Slice by slice, because a float32 copy of the whole volume may not fit beside it.
        digest.update(np.ascontiguousarray(slice_HW, dtype="<f4").tobytes())
    return digest.hexdigest()
