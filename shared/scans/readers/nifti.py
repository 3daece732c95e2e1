"""NIfTI-1 and NIfTI-2 in one file, plain or gzip-compressed, recognised by content."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import check_spacing, grids_agree
from samgraft.shared.scans.privacy import nifti_findings
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.verified import GZIP_MAGIC, gunzip, peek_gzip, read_bytes, read_head
from samgraft.shared.scans.volume import RawScan, check_real_numbers, is_usable_slope, rescale_values

HEADER_BYTES = 544
"""Size of the longer of the two headers, NIfTI-2 (540) with its extension flag."""
MAX_FORM_DIFFERENCE_MM = 1.0
"""Largest distance at a corner between qform and sform. Rounding alone gives hundredths of a millimetre."""
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_UNIT_NAMES = {1: "meter", 3: "micron"}


def read_nifti(path: Path, *, where: str, frame: int | None = None) -> RawScan:
    """Read one NIfTI file to its last byte.

    Args:
        path: File to read.
        where: Name for messages.
        frame: Index of the volume in a 4D file; None refuses 4D.

    Raises:
        DataError: If the file is damaged, cut, of an impossible size, 4D without ``frame``, or its two affines
            contradict each other.
    """
    data, digest = read_bytes(path, where=where)
    compressed = data[:2] == GZIP_MAGIC
    head = peek_gzip(data, num_bytes=HEADER_BYTES, where=where) if compressed else data[:HEADER_BYTES]
    kind = nifti_kind(head, where=where)
    header = _parse_header(kind, head, where=where)
    num_bytes = _announced_bytes(header, where=where)
    # The limit comes from the header, so that a gzip bomb is refused before it fills the memory.
    plain = gunzip(data, limit=num_bytes, where=where) if compressed else data
    if len(plain) < num_bytes:
        raise DataError(
            f"the file is cut short: the header announces {num_bytes} bytes, got {len(plain)}. "
            "Copy it again from its origin.",
            where=where,
        )
    image = kind.from_bytes(plain)
    array_ijk, notes = _voxels(image, header, where=where)
    num_volumes = array_ijk.shape[3] if array_ijk.ndim > 3 else 1
    array_ijk = _select_frame(array_ijk, _shape_of_frame(array_ijk.shape, frame=frame, where=where), frame)
    affine, affine_notes = _affine(header, array_ijk.shape, where=where)
    return RawScan(
        array_ijk=array_ijk,
        affine=affine,
        source_sha256=digest,
        notes=(*notes, *affine_notes),
        num_volumes=num_volumes,
        privacy=nifti_findings(header, num_extensions=len(image.header.extensions)),
    )


def inspect_nifti(path: Path, *, where: str, frame: int | None = None) -> tuple[str, ...]:
    """Check the header of a NIfTI file and return the kinds of free text in it.

    Raises:
        DataError: If the header alone shows that ``read_nifti`` would refuse the file.
    """
    head = read_head(path, HEADER_BYTES, where=where)
    kind = nifti_kind(head, where=where)
    header = _parse_header(kind, head, where=where)
    num_bytes = _announced_bytes(header, where=where)
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    if not compressed and path.stat().st_size < num_bytes:
        raise DataError("the file is cut short. Copy it again from its origin.", where=where)
    _check_voxel_type(header, where=where)
    shape = tuple(int(n) for n in header.get_data_shape())
    _affine(header, _shape_of_frame(shape, frame=frame, where=where), where=where)
    flag = head[kind.header_class.sizeof_hdr : kind.header_class.sizeof_hdr + 1]
    return nifti_findings(header, num_extensions=int(flag not in (b"", b"\0")))


def scan_of_image(image: Any, *, where: str, frame: int | None = None) -> RawScan:
    """Return a nibabel image in memory as its file would be read.

    Args:
        image: Spatial image of nibabel, of any format.
        where: Name for messages.
        frame: Index of the volume of a 4D image; None refuses 4D.

    Raises:
        DataError: If it has no affine, an impossible spacing, or is 4D without ``frame``.
    """
    if image.affine is None:
        raise DataError("the image must have an affine, it has none.", where=where)
    affine = np.asarray(image.affine, dtype=np.float64)
    is_nifti = isinstance(image, nib.Nifti1Image)
    affine, notes = _in_millimetres(affine, image.header) if is_nifti else (affine, ())
    scan = scan_of_array(np.asanyarray(image.dataobj), affine, where=where, frame=frame)
    return dataclasses.replace(scan, notes=notes)


def scan_of_array(values: Any, affine: Any, *, where: str, frame: int | None = None) -> RawScan:
    """Return an array in memory as a scan.

    Args:
        values: Voxels, shape (I, J, K), or (I, J, K, frames).
        affine: Map from voxel (i, j, k) to RAS+ mm, 4x4.
        where: Name for messages.
        frame: Index of the volume of a 4D array; None refuses 4D.

    Raises:
        DataError: If it has no real numbers, an impossible spacing or number of axes, or is 4D without ``frame``.
    """
    check_real_numbers(values, where=where)
    check_spacing(affine, where=where)
    if values.ndim < 3:
        raise DataError(
            f"an array must have three axes, got shape {values.shape}. Give a picture an axis of length 1.", where=where
        )
    array_ijk = _select_frame(values, _shape_of_frame(values.shape, frame=frame, where=where), frame)
    # It identifies the scan in the record as the hash of a file does.
    digest = hashlib.sha256(np.ascontiguousarray(array_ijk).tobytes() + affine.tobytes())
    num_volumes = values.shape[3] if values.ndim > 3 else 1
    return RawScan(array_ijk=array_ijk, affine=affine, source_sha256=digest.hexdigest(), num_volumes=num_volumes)


def nifti_form_codes(path: Path, *, where: str) -> tuple[int, int]:
    """Return (qform_code, sform_code) of a file, which a mask of the same scan must carry as well.

    Viewers place a file without codes by their own rules, so a mask with codes would lie elsewhere than its scan.
    """
    head = read_head(path, HEADER_BYTES, where=where)
    header = _parse_header(nifti_kind(head, where=where), head, where=where)
    return int(header["qform_code"]), int(header["sform_code"])


def nifti_kind(head: bytes, *, where: str) -> Any:
    """Return nibabel's image class for the first bytes of a file.

    Raises:
        DataError: If the bytes are not NIfTI, or one half of a pair of files.
    """
    if len(head) < 348:
        raise DataError(f"the file is too short for NIfTI ({len(head)} bytes). Copy it again.", where=where)
    if head[344:348] == b"n+1\x00":
        return nib.Nifti1Image
    if head[4:8] == b"n+2\x00":
        return nib.Nifti2Image
    if head[344:348] == b"ni1\x00":
        raise DataError("a NIfTI pair (.hdr with .img) is not read. Convert it to one .nii.gz file.", where=where)
    raise DataError("the file must be NIfTI, its first bytes are not. Check its extension and its origin.", where=where)


def _parse_header(kind: Any, head: bytes, *, where: str) -> Any:
    try:
        # Without the bytes after the header: extensions may be longer than what was read here.
        header = kind.header_class.from_fileobj(io.BytesIO(head[: kind.header_class.sizeof_hdr]))
        header.get_data_dtype()
        header.get_data_shape()
    except (HeaderDataError, ImageFileError, ValueError, KeyError, OverflowError) as err:
        raise DataError(f"the NIfTI header is damaged ({err}).", where=where) from err
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


def _check_voxel_type(header: Any, *, where: str) -> None:
    dtype = header.get_data_dtype()
    if dtype.fields is not None:
        raise DataError(
            f"voxels must be one number each, got {'/'.join(dtype.fields)} color. Export one channel.", where=where
        )
    check_real_numbers(np.empty(0, dtype=dtype), where=where)


def _voxels(image: Any, header: Any, *, where: str) -> tuple[Any, tuple[str, ...]]:
    _check_voxel_type(header, where=where)
    raw = np.asarray(image.dataobj.get_unscaled())
    # nibabel blanks both in the header of a loaded image; this header has the file's own bytes.
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not is_usable_slope(slope, intercept):
        return raw, ("scl_slope is 0 or not a number: raw values used",)
    return rescale_values(raw, slope=slope, intercept=intercept), ()


def _shape_of_frame(shape: tuple[int, ...], *, frame: int | None, where: str) -> tuple[int, int, int]:
    """Return the (I, J, K) of one volume of a file, or refuse the file."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 4:
        raise DataError(f"a scan must have three axes, got shape {shape}. Export scalar volumes.", where=where)
    if len(shape) == 4 and frame is None:
        raise DataError(
            f"a scan must have three axes, got 4D with {shape[3]} volumes {shape}. Choose one with --frame 0.",
            where=where,
        )
    if len(shape) == 4 and not 0 <= (frame or 0) < shape[3]:
        raise DataError(f"--frame must lie in 0..{shape[3] - 1}, got {frame}.", where=where)
    return shape[0], shape[1], shape[2]


def _select_frame(array: Any, shape_ijk: tuple[int, int, int], frame: int | None) -> Any:
    volumes = array.reshape(*shape_ijk, -1, order="F")
    return volumes[..., 0 if volumes.shape[-1] == 1 else frame]


def _affine(header: Any, shape: tuple[int, ...], *, where: str) -> tuple[Any, tuple[str, ...]]:
    notes: list[str] = []
    try:
        qform = header.get_qform() if int(header["qform_code"]) > 0 else None
    except (HeaderDataError, ValueError) as err:
        raise DataError(f"the qform of the NIfTI header is damaged ({err}).", where=where) from err
    sform = header.get_sform() if int(header["sform_code"]) > 0 else None
    # Programs differ in which of the two they prefer, so a contradiction would put the labels elsewhere.
    if qform is not None and sform is not None:
        agree, difference = grids_agree(sform, shape, qform, shape, tolerance_mm=MAX_FORM_DIFFERENCE_MM)
        if not agree:
            raise DataError(f"qform and sform must agree within 1 mm: {difference}. Repair the header.", where=where)
    if sform is None and qform is None:
        notes.append("no orientation in the header: voxel order taken as it is")
    # sform first, as nibabel, FSL and ITK do; the base affine is centred and flipped along x by convention.
    affine = sform if sform is not None else qform if qform is not None else header.get_base_affine()
    affine, unit_notes = _in_millimetres(np.asarray(affine, dtype=np.float64), header)
    check_spacing(affine, where=where)
    return affine, (*notes, *unit_notes)


def _in_millimetres(affine: Any, header: Any) -> tuple[Any, tuple[str, ...]]:
    notes: list[str] = []
    # Bits 0 to 2 are the unit of length, bits 3 to 5 that of time. Codes above 3 are not defined; files that hold
    # them (255 is common) mean millimetres, and a wrong guess does not pass the limits of check_spacing.
    code = int(header["xyzt_units"]) & 7
    if code not in _MM_PER_UNIT:
        notes.append("unknown unit of length in the header: taken as mm")
    scale = _MM_PER_UNIT.get(code, 1.0)
    if scale != 1:
        notes.append(f"spacing converted from {_UNIT_NAMES[code]} to mm")
    return np.diag([scale, scale, scale, 1.0]) @ affine, tuple(notes)


def _matches(head: bytes) -> bool:
    return head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] == b"n+2\x00"


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    # A frame is chosen among time points, which scan and label have both. Of a label with one volume per class it would
    # keep one class.
    has_one = as_label and like is not None and like.num_volumes == 1
    scan = read_nifti(files.paths[0], where=files.name, frame=0 if has_one and files.frame is None else files.frame)
    if has_one and scan.num_volumes > 1:
        raise DataError(
            f"the label of a scan with one volume must have one too, got {scan.num_volumes}. Write its classes as ids "
            "into one volume.",
            where=files.name,
        )
    return scan


NIFTI = ScanReader(
    name=ScanFormat.NIFTI,
    suffixes=(".nii", ".nii.gz"),
    matches=_matches,
    read=_read,
    inspect=lambda files: inspect_nifti(files.paths[0], where=files.name, frame=files.frame),
    has_volumes=True,
)
