"""Atomic writing of the series of a store, in a hidden folder that is renamed at the end.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy.typing as npt
import zarr
from samgraft.shared.files import file_sha256, move, sync_file, write_json
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.series import SeriesRecord, image_name, label_name
from samgraft.shared.store.store import COMPLETE, MANIFEST, SCHEMA, SERIES
from zarr.codecs import ZstdCodec

Array = npt.NDArray[Any]

SHARD_SLICES = 64
"""Slices per file. 20,000 slices need 313 files, and a reader fetches one slice by its byte range."""
ZSTD_LEVEL = 1
"""Compression level. It writes twice as fast as level 3. Real scans take 1 to 3 % more space, noisy thick slices up to
8 % (measured)."""
RECORD = "record.json"
PARTIAL = ".partial"


def write_series(
    store_path: Path,
    record: SeriesRecord,
    images: dict[Plane, Array],
    labels: dict[Plane, Array],
    *,
    build_key: str,
    privacy: tuple[str, ...] = (),
) -> SeriesRecord:
    """Write one series atomically.

    Args:
        store_path: Folder of the store. Its ``series`` group must exist.
        record: The record without ``files``.
        images: (Z, H, W) per plane.
        labels: Label ids (Z, H, W) per plane. Empty without label.
        build_key: Identity of source files and settings. It is in ``record.json`` only, because the times of source
            files must not change the fingerprint of the store.
        privacy: Kinds of identifying content of the source, for the report of a resumed build.

    Returns:
        The record with size and sha256 of every file, as written to ``record.json``.
    """
    partial = store_path / PARTIAL / f"{record.series_id}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)
    try:
        zarr.create_group(partial, attributes={"samgraft": _series_attributes(record)})
        for plane, image_ZHW in images.items():
            _write_array(partial / image_name(plane, record.plane), image_ZHW, record, plane)
        for plane, label_ZHW in labels.items():
            _write_array(partial / label_name(plane, record.plane), label_ZHW, record, plane)
        record = dataclasses.replace(record, files=_file_table(partial))
        values = {**record.to_dict(), "build_key": build_key, "privacy": list(privacy)}
        write_json(partial / RECORD, values, allow_nan=False)
        # The record is written last and the rename makes the series visible in one step, so a crash at any moment
        # leaves either no series or a complete one.
        final = store_path / SERIES / record.series_id
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        move(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def start_store(path: Path, *, modality: Modality) -> None:
    """Create the groups of a store without the completion mark."""
    path.mkdir(parents=True, exist_ok=True)
    zarr.create_group(path, overwrite=False, attributes={"samgraft": {"schema": SCHEMA, "modality": modality.value}})
    zarr.create_group(path / SERIES)


def finish_store(path: Path, manifest: dict[str, Any]) -> str:
    """Write the table and then the completion mark. Return the sha256 of the table."""
    shutil.rmtree(path / PARTIAL, ignore_errors=True)
    # Readers accept a store by its mark, so the mark must not be on the disk before the table that it vouches for.
    fingerprint = write_json(path / MANIFEST, manifest, allow_nan=False).sha256
    write_json(path / COMPLETE, {"schema": SCHEMA, "manifest_sha256": fingerprint})
    return fingerprint


def read_record(folder: Path, *, build_key: str) -> tuple[SeriesRecord, tuple[str, ...]] | None:
    """Return record and privacy findings of a finished series, or None.

    A series is finished if it has this build key and all its files have the size in the record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("build_key") != build_key:
            return None
        privacy = tuple(values.pop("privacy"))
        record = SeriesRecord.from_dict(values)
    except (ValueError, KeyError, TypeError):
        return None
    for name, (size, _) in record.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return None
    return record, privacy


def _write_array(path: Path, array_ZHW: Array, record: SeriesRecord, plane: Plane) -> None:
    num_slices, height, width = array_ZHW.shape
    array = zarr.create_array(
        path,
        shape=array_ZHW.shape,
        dtype=array_ZHW.dtype,
        chunks=(1, height, width),
        shards=(min(num_slices, SHARD_SLICES), height, width),
        # The one codec of zarr whose checksum every reader verifies, sharded or not.
        compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
        fill_value=0,
        dimension_names=("z", "y", "x"),
        attributes={"samgraft": _grid_attributes(record, plane)},
        # All-zero slices are written too. zarr reads a missing chunk as zeros without an error, so a lost file would
        # look like an empty slice.
        config={"write_empty_chunks": True},
    )
    array[...] = array_ZHW


def _series_attributes(record: SeriesRecord) -> dict[str, Any]:
    keys = ("series_id", "patient_id", "study_id", "modality", "plane", "has_label", "source_sha256", "stats")
    return {key: value for key, value in record.to_dict().items() if key in keys}


def _grid_attributes(record: SeriesRecord, plane: Plane) -> dict[str, Any]:
    table = record.planes[plane]
    return {
        "spacing_mm": list(table.spacing_mm),
        "affine": [list(row) for row in table.affine],
        "plane": plane.value,
        "native_orientation": record.grid.orientation,
        "modality": record.modality.value,
    }


def _file_table(folder: Path) -> dict[str, tuple[int, str]]:
    table = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
            table[path.relative_to(folder).as_posix()] = (path.stat().st_size, file_sha256(path))
    return table
