"""NumPy ``.npy`` arrays (Z, H, W) or (H, W), with an optional ``NAME.json`` for spacing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import axial_affine
from samgraft.shared.scans.readers.images import read_spacing_file
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan


def read_numpy(path: Path, *, where: str) -> RawScan:
    """Read one array as axial slices. Pickled objects are never loaded.

    Raises:
        DataError: If the file is damaged, cut, holds Python objects, or is not 2D or 3D.
    """
    data, digest = read_bytes(path, where=where)
    try:
        stream = io.BytesIO(data)
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError) as err:
        raise DataError(f"the array is damaged, cut or holds Python objects ({err}).", where=where) from err
    if stream.tell() != len(data):
        raise DataError(f"{len(data) - stream.tell()} bytes follow the array: damaged.", where=where)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise DataError(f"an array must have shape (Z, H, W) or (H, W), got {array.shape}.", where=where)
    spacing, has_spacing = read_spacing_file(path.with_suffix(".json"), where=where)
    return RawScan(
        array_ijk=array.transpose(2, 1, 0),
        affine=axial_affine(spacing, where=where),
        source_sha256=digest,
        notes=() if has_spacing else (f"no {path.stem}.json: spacing taken as 1 mm",),
        has_orientation=False,
    )


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    del as_label, like
    return read_numpy(files.paths[0], where=files.name)


NUMPY = ScanReader(
    name=ScanFormat.NUMPY,
    suffixes=(".npy",),
    matches=lambda head: head[:6] == b"\x93NUMPY",
    read=_read,
    has_native_geometry=False,
)
