"""NIfTI-1 and NIfTI-2, single file, plain or gzip-compressed, recognised by content."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import grids_agree
from samgraft.shared.scans.privacy import nifti_findings
from samgraft.shared.scans.readers.rescale import rescale, usable_slope
from samgraft.shared.scans.readers.verified import GZIP_MAGIC, gunzip, peek_gzip, read_bytes
from samgraft.shared.scans.volume import RawScan

HEADER_BYTES = 544
"""Enough for the longer of the two headers, NIfTI-2 (540) with its extension flag."""
MAX_FORM_DIFFERENCE_MM = 1.0
"""qform and sform further apart than this at a corner contradict each other; rounding alone gives hundredths."""
PLAUSIBLE_SPACING_MM = (0.01, 50.0)
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def read_nifti(path: Path, *, where: str, frame: int | None = None) -> RawScan:
    """Read one NIfTI file to its last byte.

    Args:
        path: The file.
        where: Name for messages.
        frame: Which volume of a 4D file; None refuses 4D.

    Raises:
        DataError: If the file is damaged, cut, of an impossible size, 4D without ``frame``, or its two affines
            contradict each other.
    """
    data, digest = read_bytes(path, where=where)
    compressed = data[:2] == GZIP_MAGIC
    head = peek_gzip(data, num_bytes=HEADER_BYTES, where=where) if compressed else data[:HEADER_BYTES]
    kind = nifti_kind(head, where=where)
    header = _read_header(kind, head, where=where)
    num_bytes = _announced_bytes(header, where=where)
    plain = gunzip(data, limit=num_bytes, where=where) if compressed else data
    if len(plain) < num_bytes:
        raise DataError(
            f"the file is cut short: the header announces {num_bytes} bytes, got {len(plain)}. "
            "Copy it again from its origin.",
            where=where,
        )
    image = kind.from_bytes(plain)
    array, notes = _voxels(image, header, where=where)
    array = _one_frame(array, frame=frame, where=where)
    affine, affine_notes = _affine(image, array.shape, where=where)
    return RawScan(
        array_ijk=array,
        affine=affine,
        source_sha256=digest,
        notes=(*notes, *affine_notes),
        privacy=nifti_findings(header, num_extensions=len(image.header.extensions)),
    )


def nifti_kind(head: bytes, *, where: str) -> Any:
    """Return nibabel's image class for a header, or refuse by name."""
    if len(head) >= 348 and head[344:348] == b"n+1\x00":
        return nib.Nifti1Image
    if len(head) >= 12 and head[4:8] == b"n+2\x00":
        return nib.Nifti2Image
    if len(head) >= 348 and head[344:348] == b"ni1\x00":
        raise DataError("a NIfTI pair (.hdr with .img) is not read. Convert it to one .nii.gz file.", where=where)
    raise DataError("the file must be NIfTI, its first bytes are not. Check its extension and its origin.", where=where)


def _read_header(kind: Any, head: bytes, *, where: str) -> Any:
    try:
        header = kind.header_class.from_fileobj(io.BytesIO(head))
        header.get_data_dtype()
        header.get_data_shape()
    except (HeaderDataError, ImageFileError, ValueError, KeyError, OverflowError) as err:
        raise DataError(f"the NIfTI header is damaged: {err}.", where=where) from err
    return header


def _announced_bytes(header: Any, *, where: str) -> int:
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) <= 0:
        raise DataError(f"the NIfTI header must announce positive sizes, got {shape}.", where=where)
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**31:
        raise DataError(f"the NIfTI header announces an impossible data offset {offset}.", where=where)
    total = int(offset)
    size = int(header.get_data_dtype().itemsize)
    for n in shape:
        size *= n
    if size > 2**38:
        raise DataError(f"the NIfTI header announces {size / 2**30:.0f} GiB of voxels {shape}: damaged.", where=where)
    return total + size


def _voxels(image: Any, header: Any, *, where: str) -> tuple[Any, tuple[str, ...]]:
    raw = np.asarray(image.dataobj.get_unscaled())
    if raw.dtype.fields is not None:
        raise DataError(
            f"voxels must be one number each, got {'/'.join(raw.dtype.fields)} color. Export one channel.", where=where
        )
    # nibabel blanks both in the header of a loaded image: these come from the file's own bytes.
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not usable_slope(slope, intercept):
        return raw, ("scl_slope is 0 or not a number: raw values used",)
    return rescale(raw, slope=slope, intercept=intercept), ()


def _one_frame(array: Any, *, frame: int | None, where: str) -> Any:
    if array.ndim == 2:
        return array[:, :, None]
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3:
        return array
    if array.ndim > 4:
        raise DataError(f"a scan must have three axes, got shape {array.shape}. Export scalar volumes.", where=where)
    if frame is None:
        raise DataError(
            f"a scan must have three axes, got 4D with {array.shape[3]} volumes {array.shape}. "
            "Choose one with --frame 0.",
            where=where,
        )
    if not 0 <= frame < array.shape[3]:
        raise DataError(f"--frame must lie in 0..{array.shape[3] - 1}, got {frame}.", where=where)
    return array[..., frame]


def _affine(image: Any, shape: tuple[int, ...], *, where: str) -> tuple[Any, tuple[str, ...]]:
    header = image.header
    notes: list[str] = []
    try:
        qform = header.get_qform() if int(header["qform_code"]) > 0 else None
    except (HeaderDataError, ValueError) as err:
        raise DataError(f"the qform of the NIfTI header is damaged: {err}.", where=where) from err
    sform = header.get_sform() if int(header["sform_code"]) > 0 else None
    if qform is not None and sform is not None:
        agree, difference = grids_agree(sform, shape, qform, shape, tolerance_mm=MAX_FORM_DIFFERENCE_MM)
        if not agree:
            raise DataError(f"qform and sform must agree within 1 mm: {difference}. Repair the header.", where=where)
    if sform is None and qform is None:
        notes.append("no orientation in the header: voxel order taken as it is")
    affine = sform if sform is not None else qform if qform is not None else header.get_base_affine()
    unit = str(header.get_xyzt_units()[0])
    scale = _MM_PER_UNIT.get(unit)
    if scale is None:
        raise DataError(f"the unit of length must be m, mm or micron, got {unit!r}.", where=where)
    if scale != 1:
        notes.append(f"spacing converted from {unit} to mm")
    affine = np.diag([scale, scale, scale, 1.0]) @ np.asarray(affine, dtype=np.float64)
    check_spacing(affine, where=where)
    return affine, tuple(notes)


def check_spacing(affine: Any, *, where: str) -> None:
    """Refuse spacings that no scanner has: they mean a wrong unit or a damaged header."""
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    low, high = PLAUSIBLE_SPACING_MM
    if not ((sizes >= low) & (sizes <= high)).all():
        text = " x ".join(f"{s:.4g}" for s in sizes)
        raise DataError(f"voxel sizes must lie in {low}..{high} mm, got {text}. Repair the header.", where=where)
