"""NRRD with attached data, as 3D Slicer writes it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.nifti import check_spacing
from samgraft.shared.scans.readers.verified import gunzip, read_bytes
from samgraft.shared.scans.volume import RawScan

NRRD_MAGIC = b"NRRD000"
# Signs that turn a space's axes into RAS+.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}


def read_nrrd(path: Path, *, where: str) -> RawScan:
    """Read one attached NRRD file to its last byte.

    Raises:
        DataError: If the file is damaged or cut, keeps its data elsewhere, or is not a 3D scalar grid.
    """
    data, digest = read_bytes(path, where=where)
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            header = nrrd.read_header(stream)
    except Exception as err:  # pynrrd raises NRRDError, ValueError, IndexError, KeyError and warnings alike
        raise DataError(f"the NRRD header is damaged: {_first_line(err)}.", where=where) from err
    if "data file" in header or "datafile" in header:
        raise DataError("an NRRD header with its data in another file is not read. Attach the data.", where=where)
    array = _voxels(header, data[stream.tell() :], where=where)
    affine, notes, oriented = _affine(header, where=where)
    return RawScan(array_ijk=array, affine=affine, source_sha256=digest, notes=notes, has_orientation=oriented)


def _voxels(header: Any, body: bytes, *, where: str) -> Any:
    shape = tuple(int(n) for n in header["sizes"])
    if len(shape) not in (2, 3) or min(shape) <= 0:
        raise DataError(f"a scan must have three axes, got NRRD sizes {shape}. Export one scalar volume.", where=where)
    kinds = [k for k in header.get("kinds", []) if k not in ("domain", "space")]
    if kinds:
        raise DataError(f"every NRRD axis must be a space axis, got kinds {', '.join(kinds)}.", where=where)
    try:
        dtype = np.dtype(nrrd.reader._determine_datatype(header))
    except (nrrd.NRRDError, KeyError, TypeError) as err:
        raise DataError(f"the NRRD type is not a number: {_first_line(err)}.", where=where) from err
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    encoding = str(header["encoding"]).lower()
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
    directions = header.get("space directions")
    if directions is None or len(header["sizes"]) == 2:
        spacings = np.append(np.asarray(header.get("spacings", [1.0] * 3), dtype=np.float64), 1.0)[:3]
        affine = np.diag([-spacings[0], -spacings[1], spacings[2], 1.0])
        check_spacing(affine, where=where)
        return affine, ("no orientation in the header: voxel order taken as axial",), False
    space = str(header.get("space", "")).lower()
    if space not in _SPACES:
        raise DataError(f"the NRRD space must be RAS, LAS or LPS, got {space!r}.", where=where)
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64).T
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
    affine = np.diag([*_SPACES[space], 1.0]) @ affine
    check_spacing(affine, where=where)
    return affine, (), True


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
