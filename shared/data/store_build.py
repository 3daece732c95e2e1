"""Building a store: every case is read, checked, cut into slices and written; in parallel, resumable, atomic.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from samgraft.shared.data.case import SourceCase, label_on_plane, read_label
from samgraft.shared.data.intensity import IntensityPreset, foreground_fractions, measure_intensity
from samgraft.shared.data.orientation import Plane, is_near_isotropic
from samgraft.shared.data.pseudonym import pseudonym
from samgraft.shared.data.readers.scan import read_scan
from samgraft.shared.data.series import PlaneTable, SeriesRecord
from samgraft.shared.data.store import COMPLETE, SCHEMA, SERIES, SliceStore
from samgraft.shared.data.store_write import finish_store, read_record, start_store, write_series
from samgraft.shared.data.volume import Array, Modality, Volume, content_sha256, volume_from_scan
from samgraft.shared.errors import DataError, SamgraftError, StorageError, UsageError

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Part of every build key: raise it when the same source would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What decides the bytes of a store besides its sources."""

    modality: Modality
    salt: str
    planes: tuple[Plane, ...] = ()
    """Planes to store; the first is the main one. Empty: the acquired plane only."""
    min_foreground_voxels: int = 0
    """Refuse a scan with fewer non-air voxels."""


@dataclass(kw_only=True)
class BuildReport:
    """What happened to every case."""

    path: Path
    records: list[SeriesRecord] = field(default_factory=list)
    num_kept: int = 0
    """Series of an earlier, interrupted build that were used again."""
    refused: dict[str, str] = field(default_factory=dict)
    """Case name -> reason."""
    already_complete: bool = False

    @property
    def num_slices(self) -> int:
        """Slices of all main stacks."""
        return sum(record.shape_zyx[0] for record in self.records)


def build_store(
    cases: Sequence[SourceCase],
    *,
    out: Path,
    settings: BuildSettings,
    label_names: Mapping[int, str],
    intensity: IntensityPreset,
    num_workers: int = 1,
    skip_refused: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Build a store, or continue one that was interrupted.

    Args:
        cases: What to put in.
        out: The store's folder, ``NAME.zarr``.
        settings: Modality, salt, planes.
        label_names: Names of the label ids, without 0.
        intensity: How slices of this store are normalised unless a run says otherwise.
        num_workers: Processes; 1 works in this one.
        skip_refused: Leave refused cases out and count them; otherwise nothing is finished when one is refused.
        overwrite: Replace a complete store with other content.
        on_progress: Called with finished and all cases.

    Returns:
        The report. Building again what is complete returns at once.

    Raises:
        UsageError: If ``out`` holds something else.
        DataError: If cases are refused (all of them in one message) or none is left.
        StorageError: If the disk is full or not writable; finished series stay.
    """
    if not cases:
        raise DataError("a store needs at least one case, found 0 usable scans.", where=out.name)
    _check_case_names(cases)
    keys = {case.name: _build_key(case, settings) for case in cases}
    manifest_extra = {
        "schema": SCHEMA,
        "modality": settings.modality.value,
        "label_names": {str(k): v for k, v in sorted(label_names.items())},
        "intensity": intensity.to_dict(),
    }
    report = BuildReport(path=out)
    ids = {series_id_of(case, settings): keys[case.name] for case in cases}
    if _is_complete(out, ids, manifest_extra, report, overwrite=overwrite):
        return report
    try:
        _prepare(out, settings)
        _collect(cases, keys, out, settings, report, num_workers=num_workers, on_progress=on_progress)
        _judge(report, out, skip_refused=skip_refused)
        _remove_strangers(out, report)
        finish_store(out, {**manifest_extra, "series": [r.to_dict() for r in _sorted(report.records)]})
    except OSError as err:
        if isinstance(err, SamgraftError):
            raise
        raise StorageError(
            f"the store cannot be written: {err.strerror or err}.",
            where=out.name,
            kept=f"{len(report.records)} finished series; the store is marked incomplete and training refuses it",
            next_command="free space or fix the permission, then run the same command again",
        ) from err
    return report


def _collect(
    cases: Sequence[SourceCase],
    keys: Mapping[str, str],
    out: Path,
    settings: BuildSettings,
    report: BuildReport,
    *,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    todo = []
    for case in cases:
        record = read_record(out / SERIES / series_id_of(case, settings), build_key=keys[case.name])
        if record is not None:
            report.records.append(record)
            report.num_kept += 1
        else:
            todo.append(case)
    if report.num_kept:
        log.info("continuing: %d of %d series are already there", report.num_kept, len(cases))
    num_done = report.num_kept
    for case, result in _results(todo, keys, out, settings, num_workers=num_workers):
        if isinstance(result, SeriesRecord):
            report.records.append(result)
        else:
            report.refused[case.name] = result
        num_done += 1
        if on_progress is not None:
            on_progress(num_done, len(cases))


def _results(
    todo: Sequence[SourceCase], keys: Mapping[str, str], out: Path, settings: BuildSettings, *, num_workers: int
) -> Iterator[tuple[SourceCase, SeriesRecord | str]]:
    if num_workers <= 1 or len(todo) <= 1:
        for case in todo:
            yield case, build_series(case, out=out, settings=settings, build_key=keys[case.name])
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(num_workers, len(todo)), mp_context=context) as pool:
        futures = {
            pool.submit(build_series, case, out=out, settings=settings, build_key=keys[case.name]): case
            for case in todo
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def build_series(case: SourceCase, *, out: Path, settings: BuildSettings, build_key: str) -> SeriesRecord | str:
    """Read, check and write one case; return its record, or the reason why its data is refused."""
    try:
        scan = read_scan(case.scan)
        main = settings.planes[0] if settings.planes else None
        volume = volume_from_scan(scan, modality=settings.modality, plane=main, where=case.name)
        stats = measure_intensity(volume.array_zyx, modality=settings.modality)
        label_ijk, label_digest = read_label(case, scan) if case.labels else (None, None)
    except DataError as err:
        return f"{err.what}" + (f" [{err.where}]" if err.where and err.where != case.name else "")
    images: dict[Plane, Array] = {}
    labels: dict[Plane, Array] = {}
    tables: dict[Plane, PlaneTable] = {}
    for plane in _planes(volume, settings):
        cut = (
            volume
            if plane is volume.plane
            else volume_from_scan(scan, modality=settings.modality, plane=plane, where=case.name)
        )
        images[plane] = cut.array_zyx
        if label_ijk is not None:
            labels[plane] = label_on_plane(label_ijk, cut)
        tables[plane] = _table(cut, labels.get(plane), air=stats.air_threshold)
    record = SeriesRecord(
        series_id=series_id_of(case, settings),
        patient_id=pseudonym("p", case.patient_key, salt=settings.salt),
        study_id=pseudonym("t", f"{case.patient_key}/{case.study_key}", salt=settings.salt),
        site_id=pseudonym("c", case.site_key, salt=settings.salt) if case.site_key else None,
        modality=settings.modality,
        plane=volume.plane,
        planes=tables,
        has_label=label_ijk is not None,
        source_sha256=volume.source_sha256,
        label_sha256=label_digest,
        content_sha256=content_sha256(volume.array_zyx),
        stats=stats,
        grid=volume.grid,
        dtype=volume.array_zyx.dtype.name,
        notes=volume.notes,
    )
    return write_series(out, record, images, labels, build_key=build_key)


def series_id_of(case: SourceCase, settings: BuildSettings) -> str:
    """Return the pseudonymous id of a case's series."""
    return pseudonym("s", f"{case.patient_key}/{case.study_key}/{case.name}", salt=settings.salt)


def _planes(volume: Volume, settings: BuildSettings) -> tuple[Plane, ...]:
    """The main plane, and the others only where they give usable slices."""
    others = [plane for plane in settings.planes if plane is not volume.plane]
    return (volume.plane, *(others if is_near_isotropic(volume.affine) else ()))


def _table(volume: Volume, label_ZHW: Array | None, *, air: float) -> PlaneTable:
    z, y, x = volume.array_zyx.shape
    label_pixels: dict[int, tuple[int, ...]] = {}
    if label_ZHW is not None:
        for label in (int(v) for v in np.unique(label_ZHW) if v != 0):
            label_pixels[label] = tuple(int(n) for n in np.count_nonzero(label_ZHW == label, axis=(1, 2)))
    return PlaneTable(
        shape_zyx=(z, y, x),
        affine=tuple(tuple(float(v) for v in row) for row in volume.affine),
        foreground_fraction=tuple(float(v) for v in foreground_fractions(volume.array_zyx, air=air)),
        label_pixels=label_pixels,
    )


def _build_key(case: SourceCase, settings: BuildSettings) -> str:
    """Identity of a case's files (path, size, time) and of the settings, hashed with the salt."""
    files = []
    for path in (*case.scan.paths, *(p for label in case.labels for p in label.scan.paths)):
        try:
            stat = path.stat()
        except OSError:
            continue  # the reader will say it by name
        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    parts: list[Any] = [
        LAYOUT_VERSION,
        settings.salt,
        settings.modality.value,
        [plane.value for plane in settings.planes],
        case.patient_key,
        case.study_key,
        case.site_key,
        [case.scan.frame, case.scan.allow_gaps],
        [[sorted(label.ids.items()) if label.ids else None, label.round_values] for label in case.labels],
        files,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_complete(
    out: Path, keys: Mapping[str, str], extra: Mapping[str, Any], report: BuildReport, *, overwrite: bool
) -> bool:
    if not (out / COMPLETE).is_file():
        return False
    store: SliceStore | None
    try:
        store = SliceStore.open(out)
    except DataError as err:
        log.info("%s: %s Building it again.", out.name, err.what)
        store = None
    if store is not None:
        same_content = {r.series_id for r in store.series} == set(keys) and all(
            read_record(out / SERIES / series_id, build_key=key) is not None for series_id, key in keys.items()
        )
        same_extra = (
            store.modality.value == extra["modality"]
            and {str(k): v for k, v in store.label_names.items()} == extra["label_names"]
            and store.intensity.to_dict() == extra["intensity"]
        )
        if same_content and same_extra:
            report.records = list(store.series)
            report.num_kept = len(report.records)
            report.already_complete = True
            return True
        if not overwrite:
            raise UsageError(
                "a complete store with other content is there. Give another --out, or --overwrite.",
                where=out.name,
                kept="the store that is there",
            )
    (out / COMPLETE).unlink()  # from here on it is a store under construction
    return False


def _prepare(out: Path, settings: BuildSettings) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError("the store must be a folder, a file has this name.", where=out.name)
    if not (out / "zarr.json").is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UsageError("the folder holds something else than a store. Give another --out.", where=out.name)
        start_store(out, modality=settings.modality)
    shutil.rmtree(out / ".partial", ignore_errors=True)


def _judge(report: BuildReport, out: Path, *, skip_refused: bool) -> None:
    if report.refused and not skip_refused:
        lines = [f"{name}: {reason}" for name, reason in sorted(report.refused.items())]
        more = f"\n    ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise DataError(
            f"{len(lines)} of {len(lines) + len(report.records)} cases are refused:\n    "
            + "\n    ".join(lines[:8])
            + more,
            where=out.name,
            kept=f"{len(report.records)} finished series; the store is marked incomplete",
            next_command="repair them and run the same command again, or add --skip-refused",
        )
    if not report.records:
        raise DataError("0 usable scans are left.", where=out.name)


def _remove_strangers(out: Path, report: BuildReport) -> None:
    """Remove series of an earlier build that are not among the cases of this one."""
    wanted = {record.series_id for record in report.records}
    for folder in (out / SERIES).iterdir():
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)


def _sorted(records: Sequence[SeriesRecord]) -> list[SeriesRecord]:
    return sorted(records, key=lambda record: record.series_id)


def _check_case_names(cases: Sequence[SourceCase]) -> None:
    names: set[str] = set()
    for case in cases:
        if case.name in names:
            raise UsageError(f"every case needs its own name, {case.name!r} comes twice.")
        names.add(case.name)
