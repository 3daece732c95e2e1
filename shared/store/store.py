"""Slice store, a zarr v3 group with one group per series, a table of series and a completion mark.

Layout::

    NAME.zarr/
      zarr.json                      group; attributes: schema, modality, label names
      series/<series_id>/image       (z, y, x), native dtype, one chunk per slice, sharded, zstd with checksum
      series/<series_id>/label       same grid; absent without label
      series/<series_id>/image_coronal, ...   other planes, when built with them
      series/<series_id>/record.json record of this series in the table
      manifest.json                  the table: every record, label names, intensity preset
      complete.json                  sha256 of the table, written last

A store without the mark, with a missing file, a file of another size or a wrong checksum is refused, and the message
names what is wrong.
Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from samgraft.shared.errors import DataError
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.files import LocalFiles, RemoteFiles, StoreFiles, is_address
from samgraft.shared.store.series import SeriesRecord, image_name, label_name
from samgraft.shared.store.shard import ShardedArray

Array = npt.NDArray[Any]

SCHEMA = 1
MANIFEST = "manifest.json"
COMPLETE = "complete.json"
SERIES = "series"


class SliceStore:
    """Complete store, open for reading. A pickled copy opens its own arrays in each process."""

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], *, fingerprint: str, files: StoreFiles | None = None
    ) -> None:
        self.path = path
        self.files: StoreFiles = files or LocalFiles(path)
        self.fingerprint = fingerprint
        self.modality = Modality(manifest["modality"])
        self.label_names: dict[int, str] = {int(k): str(v) for k, v in manifest["label_names"].items()}
        self.intensity = IntensityPreset.from_dict(manifest["intensity"])
        self.series: tuple[SeriesRecord, ...] = tuple(SeriesRecord.from_dict(r) for r in manifest["series"])
        # Arrays are opened at their first use, because most processes read a few of many series.
        self._by_id = {record.series_id: record for record in self.series}
        self._arrays: dict[tuple[str, str], ShardedArray] = {}

    @classmethod
    def open(cls, path: Path | str) -> SliceStore:
        """Open a complete store.

        Args:
            path: A folder, or an address like ``s3://bucket/NAME.zarr``. Remote files are not listed when the store is
                opened. A missing one is an error when it is read.

        Raises:
            DataError: If the folder is not a store, the completion mark is missing, the table does not match the
                mark, or a file of a series is missing or of another size. Checksums are verified when slices are read;
                ``samgraft store check`` reads all of them.
        """
        files: StoreFiles = RemoteFiles(str(path)) if is_address(path) else LocalFiles(Path(path))
        path = Path(str(path).rstrip("/"))
        store = cls.from_manifest(path, read_table(path, files), files=files)
        if isinstance(files, LocalFiles):
            store._check_files(files)
        return store

    @classmethod
    def from_manifest(cls, path: Path, manifest: Mapping[str, Any], *, files: StoreFiles | None = None) -> SliceStore:
        """Create a store from its table without checking its files. Most callers need ``open``."""
        try:
            if manifest["schema"] != SCHEMA:
                raise DataError(
                    f"the store must have schema {SCHEMA}, got {manifest['schema']!r}. Build it again.", where=path.name
                )
            return cls(path, manifest, fingerprint=content_fingerprint(manifest), files=files)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            if isinstance(err, DataError):
                raise
            # Its checksum is right, so another program wrote it.
            raise DataError(
                f"the table of series is invalid ({type(err).__name__}). Build the store again.", where=path.name
            ) from err

    def __len__(self) -> int:
        return len(self.series)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def record(self, series_id: str) -> SeriesRecord:
        """Return the record of a series.

        Raises:
            DataError: If the store has no such series.
        """
        if series_id not in self._by_id:
            raise DataError(f"the store has no series {series_id!r}.", where=self.path.name)
        return self._by_id[series_id]

    @property
    def patient_ids(self) -> tuple[str, ...]:
        """Ids of all patients, sorted."""
        return tuple(sorted({record.patient_id for record in self.series}))

    def read_slice(self, series_id: str, slice_index: int, *, plane: Plane | None = None) -> Array:
        """Return one slice (H, W) in native units and dtype. Plane None is the main plane."""
        return self._open_array(self.record(series_id), plane, label=False).read_slice(slice_index)

    def read_label_slice(self, series_id: str, slice_index: int, *, plane: Plane | None = None) -> Array:
        """Return the label ids (H, W) of one slice."""
        return self._open_array(self._labelled_record(series_id), plane, label=True).read_slice(slice_index)

    def read_volume(self, series_id: str, *, plane: Plane | None = None) -> Array:
        """Return all slices (Z, H, W) in native units and dtype."""
        return self._open_array(self.record(series_id), plane, label=False).read_all()

    def read_label_volume(self, series_id: str, *, plane: Plane | None = None) -> Array:
        """Return the label ids (Z, H, W) of all slices."""
        return self._open_array(self._labelled_record(series_id), plane, label=True).read_all()

    def _labelled_record(self, series_id: str) -> SeriesRecord:
        record = self.record(series_id)
        if not record.has_label:
            raise DataError(f"series {series_id} has no label.", where=self.path.name)
        return record

    def _open_array(self, record: SeriesRecord, plane: Plane | None, *, label: bool) -> ShardedArray:
        plane = plane or record.plane
        if plane not in record.planes:
            planes = ", ".join(p.value for p in record.planes)
            raise DataError(
                f"series {record.series_id} has no {plane.value} slices, only {planes}.", where=self.path.name
            )
        name = label_name(plane, record.plane) if label else image_name(plane, record.plane)
        key = (record.series_id, name)
        if key not in self._arrays:
            where = f"{self.path.name}/{SERIES}/{record.series_id}/{name}"
            shape_zyx = record.planes[plane].shape_zyx
            sizes = {
                file.removeprefix(f"{name}/"): size
                for file, (size, _) in record.files.items()
                if file.startswith(f"{name}/")
            }
            folder = f"{SERIES}/{record.series_id}/{name}"
            self._arrays[key] = ShardedArray(self.files, folder, shape_zyx=shape_zyx, sizes=sizes, where=where)
        return self._arrays[key]

    def _check_files(self, files: LocalFiles) -> None:
        # Sizes find lost and cut files in milliseconds. Hashing all bytes at every start would take minutes, and the
        # checksum of each slice finds the rest when it is read.
        for record in self.series:
            for name, (size, _) in record.files.items():
                found = files.size(f"{SERIES}/{record.series_id}/{name}")
                if found != size:
                    state = "is missing" if found is None else f"must have {size} bytes, got {found}"
                    raise DataError(
                        f"a file of the store {state}: {name}. Build the store again.",
                        where=f"{self.path.name}/{SERIES}/{record.series_id}",
                        kept="the source scans",
                        next_command=f"samgraft store check {shlex.quote(str(self.path))}",
                    )


def content_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Return the identity of a store's content, a hash of its table without file sizes and file hashes.

    Those depend on the versions of zarr and zstd, and the same scans must have one fingerprint on every machine.
    """
    series = [{key: value for key, value in record.items() if key != "files"} for record in manifest["series"]]
    return hashlib.sha256(json.dumps({**manifest, "series": series}, sort_keys=True).encode()).hexdigest()


def read_table(path: Path, files: StoreFiles | None = None) -> Any:
    """Return the content of the table after checking it against the completion mark.

    Raises:
        DataError: If the folder is no store, has no mark, or the table does not match it.
    """
    files = files or LocalFiles(path)
    if not _is_slice_store(_read_or_none(files, "zarr.json")):
        what = "is not a slice store" if path.exists() or not isinstance(files, LocalFiles) else "does not exist"
        raise DataError(
            f"the store {what}. Give a folder that `samgraft store build` wrote.",
            where=path.name,
            next_command="samgraft store build FOLDER --out STORE.zarr --modality mri",
        )
    mark = _read_or_none(files, COMPLETE)
    if mark is None:
        raise DataError(
            "the store has no completion mark, because its build was interrupted. Run the same build command again.",
            where=path.name,
            kept="every series that was complete",
        )
    table = _read_or_none(files, MANIFEST) or b""
    try:
        expected = json.loads(mark)["manifest_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DataError("the completion mark is damaged. Build the store again.", where=path.name) from err
    where = f"{path.name}/{MANIFEST}"
    if hashlib.sha256(table).hexdigest() != expected:
        raise DataError("the table of series does not match its checksum. Build the store again.", where=where)
    try:
        return json.loads(table)
    except (ValueError, RecursionError) as err:
        raise DataError("the table of series is not JSON. Build the store again.", where=where) from err


def _is_slice_store(group: bytes | None) -> bool:
    """Return whether a zarr group was written by this program."""
    if group is None:
        return False
    try:
        return "samgraft" in json.loads(group)["attributes"]
    except (ValueError, KeyError, TypeError):
        return False


def _read_or_none(files: StoreFiles, name: str) -> bytes | None:
    try:
        return files.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
