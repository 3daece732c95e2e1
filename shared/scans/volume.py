"""A scan in memory: voxels in native units, and where they lie in the patient.

Shape letters: Z = slices, H, W = rows and columns of a slice; z, y, x the same as axis names.
"""

from __future__ import annotations

import hashlib
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


class Modality(Enum):
    """Kind of scan; each has a preset ``configs/modality/<name>.yaml``."""

    MRI = "mri"
    CT = "ct"
    XRAY = "xray"
    ULTRASOUND = "ultrasound"


@dataclass(frozen=True, kw_only=True)
class RawScan:
    """What a reader returns: the file's own axes, nothing reoriented."""

    array_ijk: Array
    """Shape (I, J, K), native dtype and native units (Hounsfield units for CT)."""
    affine: Affine
    """Voxel (i, j, k) to RAS+ mm, 4x4."""
    source_sha256: str
    """sha256 over every byte of the source file or files, in the order of slices."""
    notes: tuple[str, ...] = ()
    """Decisions of the reader worth printing, free of identifying text."""
    modality_tag: str | None = None
    """DICOM modality (``MR``, ``CT``, ...) where the file says it."""
    privacy: tuple[str, ...] = ()
    """Kinds of identifying content in the headers, without values."""
    has_orientation: bool = True
    """False for formats without geometry: their axes are taken as axial slices, their spacing may be unknown."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan cut into canonical slices."""

    array_zyx: Array
    """Shape (Z, H, W), native dtype."""
    affine: Affine
    """Voxel (x, y, z) to RAS+ mm, 4x4."""
    modality: Modality
    plane: Plane
    grid: NativeGrid
    source_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns (z, row, col)."""
        x, y, z = voxel_sizes(self.affine)
        return float(z), float(y), float(x)


def volume_from_scan(scan: RawScan, *, modality: Modality, plane: Plane | None = None, where: str) -> Volume:
    """Cut a scan into canonical slices of one plane.

    Args:
        scan: What a reader returned.
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
    array_zyx, affine = to_plane(scan.array_ijk, scan.affine, plane)
    return Volume(
        array_zyx=storable(array_zyx, where=where),
        affine=affine,
        modality=modality,
        plane=plane,
        grid=native_grid(scan.affine, scan.array_ijk.shape),
        source_sha256=scan.source_sha256,
        notes=scan.notes,
    )


def storable(array: Array, *, where: str) -> Array:
    """Return the array in a little-endian dtype that the store holds: 8 to 32 bit integers, 32 bit floats.

    Float64 becomes float32 and 64-bit integers the smallest type that holds them exactly.

    Raises:
        DataError: For complex, object, string or structured (RGB) voxels.
    """
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.uint8)
    if kind == "f":
        return array.astype(np.float32, copy=False)
    if kind not in "iu":
        raise DataError(
            f"voxels must be real numbers, got dtype {array.dtype}. Export one channel or the magnitude.", where=where
        )
    if array.dtype.itemsize <= 4:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    low, high = int(array.min()), int(array.max())
    for name in ("uint8", "int16", "uint16", "int32", "uint32"):
        info = np.iinfo(name)
        if info.min <= low and high <= info.max:
            return array.astype(name)
    return array.astype(np.float32)


def content_sha256(array_zyx: Array) -> str:
    """Return the identity of voxel content: shape and values, not dtype, format or header.

    The same pixels as DICOM, NIfTI or PNG under two patient ids give the same hash; that is what the leak guard needs.
    Values are compared as float32, exact for every integer up to 2^24.
    """
    digest = hashlib.sha256(str(tuple(array_zyx.shape)).encode())
    for slice_HW in array_zyx:
        digest.update(np.ascontiguousarray(slice_HW, dtype="<f4").tobytes())
    return digest.hexdigest()
