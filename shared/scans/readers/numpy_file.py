"""NumPy ``.npy`` arrays (Z, H, W) or (H, W), with an optional sidecar ``NAME.json`` for spacing; never pickles."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.images import read_sidecar
from samgraft.shared.scans.readers.nifti import check_spacing
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan


def read_numpy(path: Path, *, where: str) -> RawScan:
    """Read one array as axial slices.

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
    spacing, has_spacing = read_sidecar(path.with_suffix(".json"), where=where)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    check_spacing(affine, where=where)
    return RawScan(
        array_ijk=array.transpose(2, 1, 0),
        affine=affine,
        source_sha256=digest,
        notes=() if has_spacing else (f"no {path.stem}.json: spacing taken as 1 mm",),
        has_orientation=False,
    )
