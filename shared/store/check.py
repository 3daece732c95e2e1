"""Verification of every byte of a store against its table, and comparison of a store with its scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.files import file_sha256
from samgraft.shared.scans.volume import IGNORE_LABEL, content_sha256
from samgraft.shared.store.build import BuildReport
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import COMPLETE, MANIFEST, SERIES, SliceStore, read_table
from samgraft.shared.store.write import RECORD

MAX_LISTED = 10


@dataclass(kw_only=True)
class StoreCheck:
    """Outcome of a check."""

    path: Path
    num_series: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def check_store(path: Path, *, on_progress: Callable[[int, int], None] | None = None) -> StoreCheck:
    """Read every byte of a store and list all problems.

    Raises:
        DataError: If the folder is no store, or its table does not match its checksum.
    """
    store = SliceStore.from_manifest(path, read_table(path))
    check = StoreCheck(path=path, num_series=len(store))
    for number, record in enumerate(store.series, start=1):
        _check_series(store, record, check)
        if on_progress is not None:
            on_progress(number, len(store))
    known = {record.series_id for record in store.series}
    for folder in sorted((path / SERIES).iterdir()):
        if folder.is_dir() and folder.name not in known:
            check.problems.append(f"{folder.name}: not in the table of series")
    for entry in sorted(path.iterdir()):
        if entry.name not in {COMPLETE, MANIFEST, SERIES, "zarr.json"}:
            check.problems.append(f"{entry.name}: unexpected file in a store")
    return check


def refuse_problems(check: StoreCheck) -> None:
    """Raise one error with the first problems, if there are any.

    Raises:
        DataError: If the check found problems.
    """
    if check.problems:
        lines = "\n    ".join(check.problems[:MAX_LISTED])
        more = f"\n    ... and {len(check.problems) - MAX_LISTED} more" if len(check.problems) > MAX_LISTED else ""
        raise DataError(
            f"{counted(len(check.problems), 'problem')} in {check.num_series} series:\n    {lines}{more}",
            where=check.path.name,
            kept="the source scans",
            next_command="build the store again; undamaged series are kept",
        )


def compare_with_scans(path: Path, report: BuildReport) -> list[str]:
    """Return the differences between a store and its scans, which were read again."""
    problems = [f"source {name}: {reason}" for name, reason in sorted(report.refused.items())]
    digests = {record.series_id: record.source_sha256 for record in report.records}
    for record in SliceStore.open(path).series:
        digest = digests.get(record.series_id)
        if digest is None:
            problems.append(f"{record.series_id}: its source is no longer among the scans")
        elif digest != record.source_sha256:
            problems.append(f"{record.series_id}: the source has changed since the store was built (sha256)")
    return problems


def _check_series(store: SliceStore, record: SeriesRecord, check: StoreCheck) -> None:
    folder = store.path / SERIES / record.series_id
    problems = []
    for name, (size, digest) in record.files.items():
        file = folder / name
        check.num_files += 1
        if not file.is_file():
            problems.append(f"{record.series_id}/{name}: missing")
            continue
        found_size = file.stat().st_size
        check.num_bytes += found_size
        if found_size != size:
            problems.append(f"{record.series_id}/{name}: must have {size} bytes, got {found_size}")
        elif file_sha256(file) != digest:
            problems.append(f"{record.series_id}/{name}: sha256 differs, the file was changed")
    # The hashes cover the bytes on the disk. Decoding covers the path from there to the voxels that training sees.
    check.problems += problems or _check_voxels(store, record)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if folder.is_dir() else set()
    extra = sorted(found - set(record.files) - {RECORD})
    check.problems += [f"{record.series_id}/{name}: not in the table" for name in extra]


def _check_voxels(store: SliceStore, record: SeriesRecord) -> list[str]:
    problems = []
    try:
        volume_ZHW = store.read_volume(record.series_id)
        if content_sha256(volume_ZHW) != record.content_sha256:
            problems.append(f"{record.series_id}/image: voxels differ from those of the table")
        if record.has_label:
            label_ZHW = store.read_label_volume(record.series_id)
            counts = {int(v): int((label_ZHW == v).sum()) for v in np.unique(label_ZHW) if v != 0}
            ignored = counts.pop(IGNORE_LABEL, 0)
            expected = (record.label_voxels, record.ignored_voxels)
            if label_ZHW.shape != volume_ZHW.shape or (counts, ignored) != expected:
                problems.append(f"{record.series_id}/label: voxels differ from those of the table")
    except DataError as err:
        problems.append(f"{record.series_id}: {err.what}")
    return problems
