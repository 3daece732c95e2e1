"""Building of a store from cases, which are read, checked, cut into slices and written in parallel.

A build can be interrupted at any time. The same command continues with the series that are missing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, SamgraftError, StorageError, UsageError
from samgraft.shared.machine import exit_with_parent
from samgraft.shared.scans.case import LabelGridError, SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.examine import BuildSettings, CaseResult, Examined, examine_case, series_id_of
from samgraft.shared.store.names import names_path, write_names
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import COMPLETE, SCHEMA, SERIES, SliceStore
from samgraft.shared.store.write import PARTIAL, finish_store, read_record, start_store, write_series

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Part of every build key. Raise it when the same source would give other bytes."""
MAX_LISTED = 8

Work = Callable[[SourceCase], CaseResult]
OnProgress = Callable[[int, int], None]
"""Function of the number of finished cases and of all cases."""


@dataclass(kw_only=True)
class BuildReport:
    """Results of all cases of a build."""

    path: Path
    results: list[CaseResult] = field(default_factory=list)
    already_complete: bool = False

    @property
    def records(self) -> list[SeriesRecord]:
        """Records of the cases that passed."""
        return [result.record for result in self.results if result.record is not None]

    @property
    def num_kept(self) -> int:
        """Number of series of an earlier, interrupted build that were used again."""
        return sum(result.kept for result in self.results)

    @property
    def refused(self) -> dict[str, str]:
        """Reasons of the refused cases, by case name."""
        return {result.name: result.refused for result in self.results if result.refused is not None}

    @property
    def num_slices(self) -> int:
        """Number of slices of all main stacks."""
        return sum(record.shape_zyx[0] for record in self.records)


class CasesRefused(DataError):
    """Refusal of a build because of some of its cases, with the report."""

    def __init__(self, report: BuildReport, where: str) -> None:
        lines = [f"{name}: {reason}" for name, reason in sorted(report.refused.items())]
        if len(lines) > MAX_LISTED:
            lines = [*lines[:MAX_LISTED], f"... and {len(lines) - MAX_LISTED} more"]
        super().__init__(
            f"{len(report.refused)} of {counted(len(report.results), 'case is', 'cases are')} refused:\n    "
            + "\n    ".join(lines),
            where=where,
            kept=f"{len(report.records)} finished series; the store is marked incomplete",
            next_command="repair them and run the same command again, or add --skip-refused",
        )
        self.report = report


def build_store(
    cases: Sequence[SourceCase],
    *,
    out: Path,
    settings: BuildSettings,
    label_names: Mapping[int, str] | None,
    intensity: IntensityPreset,
    num_workers: int = 1,
    skip_refused: bool = False,
    overwrite: bool = False,
    overlays: Path | None = None,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Build a store, or continue one that was interrupted.

    Args:
        cases: Scans and labels for the store.
        out: Folder of the store, ``NAME.zarr``.
        settings: Modality, salt and planes.
        label_names: Names of the label ids, without 0. None names them after the ids that are found. An id without a
            name is refused.
        intensity: Normalisation of the slices of this store, unless a run sets another one.
        num_workers: Number of processes. 1 works in this process.
        skip_refused: Leave refused cases out and count them. Otherwise one refused case leaves the store incomplete.
        overwrite: Replace a complete store with other content.
        overlays: Folder for a picture of every label that is on another grid. None draws none.
        on_progress: Called after every case.

    Returns:
        The report. Building a complete store again returns at once.

    Raises:
        UsageError: If ``out`` holds something else.
        CasesRefused: If cases are refused, with all of them in one message, or no case is left.
        StorageError: If the disk is full or not writable. Finished series are kept.
    """
    _check_case_names(cases, out)
    settings = _with_label_ids(settings, label_names)
    head = _manifest_head(settings, label_names, intensity)
    keys = {case.name: _build_key(case, settings) for case in cases}
    report = BuildReport(path=out)
    try:
        with _lock_store(out):
            report.results, todo = _find_finished(cases, keys, out, settings)
            if _is_complete(report, todo, out, head, settings, skip_refused=skip_refused, overwrite=overwrite):
                _write_missing_names(out, cases, report)
                return report
            _prepare_folder(out, settings)
            if report.num_kept:
                log.info("resuming: %d of %d series are finished already", report.num_kept, len(cases))
            work = partial(_examine_and_write, out=out, settings=settings, keys=keys, overlays=overlays)
            _collect(report, todo, work, num_workers=num_workers, on_progress=on_progress)
            if report.refused and not (skip_refused and report.records):
                raise CasesRefused(report, out.name)
            _finish(out, head, cases, report)
    except OSError as err:
        if isinstance(err, SamgraftError):
            raise
        raise _storage_error(err, out, report) from err
    return report


def examine_cases(
    cases: Sequence[SourceCase],
    *,
    settings: BuildSettings,
    label_names: Mapping[int, str] | None = None,
    num_workers: int = 1,
    overlays: Path | None = None,
    on_progress: OnProgress | None = None,
) -> BuildReport:
    """Read and check every case as a build does, but write nothing except pictures in ``overlays``."""
    _check_case_names(cases, Path())
    report = BuildReport(path=Path())
    work = partial(_examine_only, settings=_with_label_ids(settings, label_names), overlays=overlays)
    _collect(report, cases, work, num_workers=num_workers, on_progress=on_progress)
    return report


def _manifest_head(
    settings: BuildSettings, label_names: Mapping[int, str] | None, intensity: IntensityPreset
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "modality": settings.modality.value,
        "label_names": None if label_names is None else {str(k): v for k, v in sorted(label_names.items())},
        "intensity": intensity.to_dict(),
    }


def _finish(out: Path, head: Mapping[str, Any], cases: Sequence[SourceCase], report: BuildReport) -> None:
    """Remove the series of earlier builds, then write the names, the table and the completion mark."""
    records = sorted(report.records, key=lambda record: record.series_id)
    wanted = {record.series_id for record in records}
    for folder in (out / SERIES).iterdir():
        if folder.is_dir() and folder.name not in wanted:
            shutil.rmtree(folder)
    ids = sorted({label for record in records for label in record.label_voxels})
    names = head["label_names"] or {str(label): f"label {label}" for label in ids}
    _write_names(out, cases, report)
    finish_store(out, {**head, "label_names": names, "series": [record.to_dict() for record in records]})


def _write_missing_names(out: Path, cases: Sequence[SourceCase], report: BuildReport) -> None:
    # Stores of earlier versions have none.
    if not names_path(out).is_file():
        _write_names(out, cases, report)


def _write_names(out: Path, cases: Sequence[SourceCase], report: BuildReport) -> None:
    write_names(out, cases, {result.name: result.record for result in report.results if result.record is not None})


def _storage_error(err: OSError, out: Path, report: BuildReport) -> StorageError:
    return StorageError(
        f"the store cannot be written: {err.strerror or err}.",
        where=out.name,
        kept=f"{len(report.records)} finished series; the store is marked incomplete and training refuses it",
        next_command="free space or fix the permission, then run the same command again",
    )


def _find_finished(
    cases: Sequence[SourceCase], keys: Mapping[str, str], out: Path, settings: BuildSettings
) -> tuple[list[CaseResult], list[SourceCase]]:
    """Return results of the cases whose series were finished by an earlier build, and the other cases."""
    results, todo = [], []
    for case in cases:
        kept = read_record(out / SERIES / series_id_of(case, settings), build_key=keys[case.name])
        if kept is None:
            todo.append(case)
        else:
            results.append(CaseResult(name=case.name, record=kept[0], privacy=kept[1], kept=True))
    return results, todo


def _collect(
    report: BuildReport,
    todo: Sequence[SourceCase],
    work: Work,
    *,
    num_workers: int,
    on_progress: OnProgress | None,
) -> None:
    num_cases = len(report.results) + len(todo)
    for result in _run_cases(todo, work, num_workers=num_workers):
        report.results.append(result)
        if on_progress is not None:
            on_progress(len(report.results), num_cases)


def _run_cases(todo: Sequence[SourceCase], work: Work, *, num_workers: int) -> Iterator[CaseResult]:
    if num_workers <= 1 or len(todo) <= 1:
        yield from map(work, todo)
        return
    # Results arrive in any order. The table is sorted at the end, so the order does not change the store.
    unfinished = {case.name: case for case in todo}
    try:
        for result in _run_in_pool(todo, work, num_workers=num_workers):
            del unfinished[result.name]
            yield result
    except BrokenProcessPool:
        # A worker was killed, which ends the whole pool and does not show by which case. So every case that is left
        # gets a pool of its own, and only the one that kills it again is refused.
        for case in unfinished.values():
            try:
                yield from _run_in_pool([case], work, num_workers=1)
            except BrokenProcessPool:
                yield CaseResult(name=case.name, refused="the process that read it was killed (out of memory?)")


def _run_in_pool(todo: Sequence[SourceCase], work: Work, *, num_workers: int) -> Iterator[CaseResult]:
    # Spawned, not forked: codecs run threads, and a forked thread pool deadlocks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(todo)), mp_context=context, initializer=exit_with_parent) as pool:
        futures = [pool.submit(work, case) for case in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _examine_only(case: SourceCase, *, settings: BuildSettings, overlays: Path | None) -> CaseResult:
    examined = _examine_or_refuse(case, settings, overlays)
    if isinstance(examined, CaseResult):
        return examined
    return CaseResult(name=case.name, record=examined.record, privacy=examined.privacy)


def _examine_and_write(
    case: SourceCase, *, out: Path, settings: BuildSettings, keys: Mapping[str, str], overlays: Path | None
) -> CaseResult:
    examined = _examine_or_refuse(case, settings, overlays)
    if isinstance(examined, CaseResult):
        return examined
    key, privacy = keys[case.name], examined.privacy
    record = write_series(out, examined.record, examined.images, examined.labels, build_key=key, privacy=privacy)
    return CaseResult(name=case.name, record=record, privacy=privacy)


def _examine_or_refuse(case: SourceCase, settings: BuildSettings, overlays: Path | None) -> Examined | CaseResult:
    """Examine one case. A failure of any kind refuses this case and leaves the others alone."""
    try:
        return examine_case(case, settings)
    except StorageError:
        raise  # the drive does not respond, so every other case would be refused as well
    except SamgraftError as err:
        reason = err.what + (f" [{err.where}]" if err.where and err.where not in (case.name, case.scan.name) else "")
        if isinstance(err, LabelGridError):
            reason += f" {_draw_overlay(err, case, settings, overlays)}"
    except OSError as err:
        reason = f"a file of the case cannot be read: {err.strerror or err}."
    except MemoryError:
        reason = "the scan does not fit into memory."
    except Exception as err:  # readers meet damage in forms that their authors did not foresee
        log.debug("%s: unexpected error", case.name, exc_info=True)
        first_line = str(err).strip().split("\n")[0]
        reason = f"reading it failed unexpectedly ({type(err).__name__}: {first_line}). Is a file damaged?"
    return CaseResult(name=case.name, refused=reason)


def _draw_overlay(err: LabelGridError, case: SourceCase, settings: BuildSettings, overlays: Path | None) -> str:
    if overlays is None:
        return "--overlays FOLDER draws it."
    from samgraft.shared.scans.grid_picture import write_grid_picture

    path = write_grid_picture(overlays / f"{series_id_of(case, settings)}.png", err.scan, err.label)
    return f"See {path}"


def _build_key(case: SourceCase, settings: BuildSettings) -> str:
    """Return the identity of a case's files (path, size, time) and of the settings, hashed with the salt."""
    # Size and time instead of a hash of the bytes: reading all sources again would take as long as the build. Paths are
    # hashed with the salt, so that the key in ``record.json`` does not reveal them.
    files = []
    for path in (*case.scan.paths, *(p for label in case.labels for p in label.scan.paths)):
        try:
            stat = path.stat()
        except OSError:
            continue  # the reader refuses it by name
        files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    parts: list[Any] = [
        LAYOUT_VERSION,
        settings.salt,
        settings.modality.value,
        [plane.value for plane in settings.planes],
        [settings.label_ids, settings.zero_non_finite, settings.accept_burned_in],
        case.patient_key,
        case.study_key,
        case.site_key,
        [case.scan.frame, case.scan.allow_gaps],
        [[sorted(label.ids.items()) if label.ids else label.class_id, label.round_values] for label in case.labels],
        files,
    ]
    # Appended only where it is used, so that stores of earlier versions are found complete.
    if settings.ignore_empty_slices or any(label.ignore_id is not None for label in case.labels):
        parts.append([settings.ignore_empty_slices, [label.ignore_id for label in case.labels]])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_complete(
    report: BuildReport,
    todo: Sequence[SourceCase],
    out: Path,
    head: Mapping[str, Any],
    settings: BuildSettings,
    *,
    skip_refused: bool,
    overwrite: bool,
) -> bool:
    """Return whether a complete store with exactly this content exists. Remove the mark of any other store."""
    if not (out / COMPLETE).is_file():
        return False
    try:
        store = SliceStore.open(out)
    except DataError as err:
        log.info("%s: %s Building it again.", out.name, err.what)
    else:
        same_head = (
            store.modality.value == head["modality"]
            and head["label_names"] in (None, {str(k): v for k, v in store.label_names.items()})
            and store.intensity.to_dict() == head["intensity"]
        )
        if same_head and {r.series_id for r in store.series} == {r.series_id for r in report.records}:
            # A store without the refused cases is complete too, if they are refused again.
            refused = [_examine_only(case, settings=settings, overlays=None) for case in todo] if skip_refused else []
            if not todo or (refused and all(result.refused for result in refused)):
                report.results += refused
                report.already_complete = True
                return True
        if not overwrite:
            raise UsageError(
                "a complete store with other content exists. Give another --out, or --overwrite.",
                where=out.name,
                kept="the existing store",
            )
    (out / COMPLETE).unlink()  # from here on the store is under construction
    return False


def _with_label_ids(settings: BuildSettings, label_names: Mapping[int, str] | None) -> BuildSettings:
    if label_names is None:
        return settings
    return dataclasses.replace(settings, label_ids=tuple(sorted(label_names)))


@contextmanager
def _lock_store(out: Path) -> Iterator[None]:
    """Lock the folder of a store against a second build. The lock ends with the process, even if it is killed."""
    if out.exists() and not out.is_dir():
        raise UsageError("the store must be a folder, a file has this name.", where=out.name)
    out.mkdir(parents=True, exist_ok=True)
    # A lock on the folder itself needs no lock file, which a crash would leave behind.
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise UsageError(
                "another process is building this store. Wait for it, or give another --out.", where=out.name
            ) from err
        except OSError as err:  # some network drives do not lock folders
            log.debug("no lock on %s: %s", out.name, err)
        yield
    finally:
        os.close(descriptor)


def _prepare_folder(out: Path, settings: BuildSettings) -> None:
    if not (out / "zarr.json").is_file():
        if any(out.iterdir()):
            raise UsageError("the folder holds something other than a store. Give another --out.", where=out.name)
        start_store(out, modality=settings.modality)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _check_case_names(cases: Sequence[SourceCase], out: Path) -> None:
    if not cases:
        raise DataError("a store needs at least one case, found 0 usable scans.", where=out.name)
    names: set[str] = set()
    for case in cases:
        if case.name in names:
            raise UsageError(f"every case needs its own name, {case.name!r} occurs twice.")
        names.add(case.name)
