"""NRRD with attached data, as 3D Slicer writes it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import MM_PER_UNIT, axial_affine, check_spacing
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.verified import gunzip, read_bytes, read_head
from samgraft.shared.scans.volume import RawScan

# Signs that turn a space's axes into RAS+.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_MAX_HEADER_BYTES = 1 << 20


def read_nrrd(path: Path, *, where: str) -> RawScan:
    """Read one attached NRRD file to its last byte.

    Raises:
        DataError: If the file is damaged or cut, keeps its data elsewhere, or is not a 2D or 3D scalar grid.
    """
    data, digest = read_bytes(path, where=where)
    header, start = _parse_header(data, where=where)
    array_ijk = _voxels(header, data[start:], where=where)
    affine, notes, oriented = _affine(header, where=where)
    return RawScan(array_ijk=array_ijk, affine=affine, source_sha256=digest, notes=notes, has_orientation=oriented)


def inspect_nrrd(path: Path, *, where: str) -> tuple[str, ...]:
    """Check the header of an NRRD file. NRRD has no fields for identifying text.

    Raises:
        DataError: If the header alone shows that ``read_nrrd`` would refuse the file.
    """
    header, _ = _parse_header(read_head(path, _MAX_HEADER_BYTES, where=where), where=where)
    _shape_and_dtype(header, where=where)
    _affine(header, where=where)
    return ()


def _parse_header(data: bytes, *, where: str) -> tuple[Any, int]:
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            header = nrrd.read_header(stream)
    except Exception as err:  # pynrrd raises NRRDError, ValueError, IndexError, KeyError and warnings
        raise DataError(f"the NRRD header is damaged ({_first_line(err)}).", where=where) from err
    if "data file" in header or "datafile" in header:
        raise DataError("an NRRD header with its data in another file is not read. Attach the data.", where=where)
    return header, stream.tell()


def _shape_and_dtype(header: Any, *, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape = tuple(int(n) for n in header["sizes"])
    if len(shape) not in (2, 3) or min(shape) <= 0:
        raise DataError(f"a scan must have three axes, got NRRD sizes {shape}. Export one scalar volume.", where=where)
    if kinds := [k for k in header.get("kinds", []) if k not in ("domain", "space")]:
        raise DataError(f"every NRRD axis must be a space axis, got kinds {', '.join(kinds)}.", where=where)
    try:
        return shape, np.dtype(nrrd.reader._determine_datatype(header))
    except (nrrd.NRRDError, KeyError, TypeError) as err:
        raise DataError(f"the NRRD type is not a number ({_first_line(err)}).", where=where) from err


def _voxels(header: Any, body: bytes, *, where: str) -> Any:
    shape, dtype = _shape_and_dtype(header, where=where)
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    encoding = str(header["encoding"]).lower()
    # pynrrd would stop at the last voxel; decompressing here also checks length and CRC.
    if encoding in ("gzip", "gz"):
        body = gunzip(body, limit=num_bytes, where=where)
    elif encoding != "raw":
        raise DataError(f"the NRRD encoding must be raw or gzip, got {encoding!r}. Convert the file.", where=where)
    if len(body) != num_bytes:
        raise DataError(
            f"the file is cut short: the header announces {num_bytes} bytes of voxels, got {len(body)}.", where=where
        )
    array = np.frombuffer(body, dtype=dtype).reshape(shape, order="F")
    return array[:, :, None] if array.ndim == 2 else array


def _affine(header: Any, *, where: str) -> tuple[Any, tuple[str, ...], bool]:
    scale, notes = _unit(header, where=where)
    directions = header.get("space directions")
    num_axes = len(header["sizes"])
    if directions is None:
        spacings = np.append(np.asarray(header.get("spacings", [1.0] * num_axes), dtype=np.float64), 1.0)[:3] * scale
        spacings = np.where(np.isnan(spacings), 1.0, spacings)
        affine = axial_affine((spacings[2], spacings[1], spacings[0]), where=where)
        return affine, (*notes, "no orientation in the header: voxel order taken as axial"), False
    axes = np.asarray(directions, dtype=np.float64) * scale
    if axes.shape[0] != num_axes or not np.isfinite(axes).all():
        raise DataError("NRRD space directions must be one finite vector per axis.", where=where)
    if axes.shape[1] == 2:
        # A picture with directions in its own plane has sizes but no place in the patient. A rotation or a flip
        # cannot be kept: only vectors along the axes are read.
        if not np.allclose(axes, np.diag(np.abs(np.diag(axes))), atol=1e-6):
            raise DataError("2D NRRD directions must lie along the axes. Save it without rotation.", where=where)
        affine = axial_affine((1.0, axes[1, 1], axes[0, 0]), where=where)
        return affine, (*notes, "2D directions: voxel order taken as axial, slice thickness 1 mm"), False
    space = str(header.get("space", "")).lower()
    if space not in _SPACES:
        raise DataError(f"the NRRD space must be RAS, LAS or LPS, got {space!r}.", where=where)
    if num_axes == 2:  # one slice with a place in the patient: its normal is the third axis
        normal = np.cross(axes[0], axes[1])
        axes = np.stack([*axes, normal / max(float(np.linalg.norm(normal)), 1e-12)])
        notes = (*notes, "one slice: thickness taken as 1 mm")
    affine = np.eye(4)
    # NRRD lists one vector per axis, an affine has one column per axis.
    affine[:3, :3] = axes.T
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64) * scale
    affine = np.diag([*_SPACES[space], 1.0]) @ affine
    check_spacing(affine, where=where)
    return affine, notes, True


def _unit(header: Any, *, where: str) -> tuple[float, tuple[str, ...]]:
    """Return millimetres per unit of length. A file without units is in mm, as 3D Slicer writes it."""
    units = {str(unit).strip().strip('"').lower() for unit in header.get("space units", header.get("units", []))}
    if unknown := sorted(units - set(MM_PER_UNIT)):
        raise DataError(f"the NRRD unit must be one of length (mm, cm, m, um), got {', '.join(unknown)}.", where=where)
    scales = {MM_PER_UNIT[unit] for unit in units}
    if len(scales) > 1:
        raise DataError(f"NRRD axes must have one unit, got {', '.join(sorted(units))}.", where=where)
    scale = scales.pop() if scales else 1.0
    return scale, () if scale == 1 else (f"spacing converted from {min(units)} to mm",)


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    del as_label, like
    return read_nrrd(files.paths[0], where=files.name)


NRRD = ScanReader(
    name=ScanFormat.NRRD,
    suffixes=(".nrrd",),
    matches=lambda head: head[:7] == b"NRRD000",
    read=_read,
    inspect=lambda files: inspect_nrrd(files.paths[0], where=files.name),
)
