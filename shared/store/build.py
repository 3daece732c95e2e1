"""Building a store: every case is read, checked, cut into slices and written; in parallel, resumable, atomic."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samgraft.shared.errors import DataError, SamgraftError, StorageError, UsageError
from samgraft.shared.machine import exit_with_parent
from samgraft.shared.scans.case import LabelGridError, SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.examine import BuildSettings, Finding, examine_case, series_id_of
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import COMPLETE, SCHEMA, SERIES, SliceStore
from samgraft.shared.store.write import PARTIAL, finish_store, read_record, start_store, write_series

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Part of every build key: raise it when the same source would give other bytes."""


@dataclass(kw_only=True)
class BuildReport:
    """What happened to every case."""

    path: Path
    findings: list[Finding] = field(default_factory=list)
    already_complete: bool = False

    @property
    def records(self) -> list[SeriesRecord]:
        """Records of the cases that passed."""
        return [finding.record for finding in self.findings if finding.record is not None]

    @property
    def num_kept(self) -> int:
        """Series of an earlier, interrupted build that were used again."""
        return sum(finding.kept for finding in self.findings)

    @property
    def refused(self) -> dict[str, str]:
        """Case name -> reason."""
        return {finding.name: finding.refused for finding in self.findings if finding.refused is not None}

    @property
    def num_slices(self) -> int:
        """Slices of all main stacks."""
        return sum(record.shape_zyx[0] for record in self.records)


class CasesRefused(DataError):
    """Some cases are refused; ``report`` says which and why."""

    def __init__(self, report: BuildReport, what: str, *, where: str, kept: str, next_command: str) -> None:
        super().__init__(what, where=where, kept=kept, next_command=next_command)
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
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Build a store, or continue one that was interrupted.

    Args:
        cases: What to put in.
        out: The store's folder, ``NAME.zarr``.
        settings: Modality, salt, planes.
        label_names: Names of the label ids, without 0; None names them after the ids that are found. An id that has no
            name is refused.
        intensity: How slices of this store are normalised unless a run says otherwise.
        num_workers: Processes; 1 works in this one.
        skip_refused: Leave refused cases out and count them; otherwise nothing is finished when one is refused.
        overwrite: Replace a complete store with other content.
        overlays: Folder for a picture of every label that lies on another grid; None draws none.
        on_progress: Called with finished and all cases.

    Returns:
        The report. Building again what is complete returns at once.

    Raises:
        UsageError: If ``out`` holds something else.
        CasesRefused: If cases are refused; all of them in one message.
        DataError: If no case is left.
        StorageError: If the disk is full or not writable; finished series stay.
    """
    if not cases:
        raise DataError("a store needs at least one case, found 0 usable scans.", where=out.name)
    _check_case_names(cases)
    settings = _with_label_ids(settings, label_names)
    keys = {case.name: _build_key(case, settings) for case in cases}
    manifest_extra = _manifest_head(settings, label_names, intensity)
    report = BuildReport(path=out)
    ids = {series_id_of(case, settings): keys[case.name] for case in cases}
    try:
        with _only_builder(out):
            if _is_complete(out, ids, manifest_extra, report, overwrite=overwrite):
                return report
            _prepare(out, settings)
            work = partial(_examine_and_write, out=out, settings=settings, keys=keys, overlays=overlays)
            _collect(cases, keys, out, settings, report, work, num_workers=num_workers, on_progress=on_progress)
            _judge(report, out, skip_refused=skip_refused)
            _remove_strangers(out, report)
            names = manifest_extra["label_names"] or {str(k): f"label {k}" for k in _found_ids(report.records)}
            finish_store(
                out, {**manifest_extra, "label_names": names, "series": [r.to_dict() for r in _sorted(report.records)]}
            )
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


def examine_cases(
    cases: Sequence[SourceCase],
    *,
    settings: BuildSettings,
    label_names: Mapping[int, str] | None = None,
    num_workers: int = 1,
    overlays: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Read and check every case and write nothing but pictures in ``overlays``: the dry run of a build."""
    _check_case_names(cases)
    settings = _with_label_ids(settings, label_names)
    report = BuildReport(path=Path())
    work = partial(_examine_only, settings=settings, overlays=overlays)
    for finding in _results(cases, work, num_workers=num_workers):
        report.findings.append(finding)
        if on_progress is not None:
            on_progress(len(report.findings), len(cases))
    return report


def _collect(
    cases: Sequence[SourceCase],
    keys: Mapping[str, str],
    out: Path,
    settings: BuildSettings,
    report: BuildReport,
    work: Callable[[SourceCase], Finding],
    *,
    num_workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    todo = []
    for case in cases:
        kept = read_record(out / SERIES / series_id_of(case, settings), build_key=keys[case.name])
        if kept is not None:
            report.findings.append(Finding(name=case.name, record=kept[0], privacy=kept[1], kept=True))
        else:
            todo.append(case)
    if report.num_kept:
        log.info("continuing: %d of %d series are already there", report.num_kept, len(cases))
    for finding in _results(todo, work, num_workers=num_workers):
        report.findings.append(finding)
        if on_progress is not None:
            on_progress(len(report.findings), len(cases))


def _results(
    todo: Sequence[SourceCase], work: Callable[[SourceCase], Finding], *, num_workers: int
) -> Iterator[Finding]:
    if num_workers <= 1 or len(todo) <= 1:
        yield from map(work, todo)
        return
    # Spawned, not forked: codecs run threads, and a forked thread pool deadlocks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(todo)), mp_context=context, initializer=exit_with_parent) as pool:
        futures = [pool.submit(work, case) for case in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _examine_only(case: SourceCase, *, settings: BuildSettings, overlays: Path | None) -> Finding:
    try:
        examined = examine_case(case, settings)
    except DataError as err:
        return Finding(name=case.name, refused=_reason(err, case, settings, overlays))
    return Finding(name=case.name, record=examined.record, privacy=examined.privacy)


def _examine_and_write(
    case: SourceCase, *, out: Path, settings: BuildSettings, keys: Mapping[str, str], overlays: Path | None
) -> Finding:
    try:
        examined = examine_case(case, settings)
    except DataError as err:
        return Finding(name=case.name, refused=_reason(err, case, settings, overlays))
    record = write_series(
        out,
        examined.record,
        examined.images,
        examined.labels,
        build_key=keys[case.name],
        privacy=examined.privacy,
    )
    return Finding(name=case.name, record=record, privacy=examined.privacy)


def _reason(err: DataError, case: SourceCase, settings: BuildSettings, overlays: Path | None) -> str:
    text = err.what + (f" [{err.where}]" if err.where and err.where not in (case.name, case.scan.name) else "")
    if not isinstance(err, LabelGridError):
        return text
    if overlays is None:
        return f"{text} --overlays FOLDER draws it."
    from samgraft.shared.scans.grid_picture import write_grid_picture

    path = write_grid_picture(overlays / f"{series_id_of(case, settings)}.png", err.scan, err.label)
    return f"{text} See {path}"


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
        [settings.label_ids, settings.zero_non_finite, settings.accept_burned_in],
        case.patient_key,
        case.study_key,
        case.site_key,
        [case.scan.frame, case.scan.allow_gaps],
        [[sorted(label.ids.items()) if label.ids else label.class_id, label.round_values] for label in case.labels],
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
            and extra["label_names"] in (None, {str(k): v for k, v in store.label_names.items()})
            and store.intensity.to_dict() == extra["intensity"]
        )
        if same_content and same_extra:
            report.findings = [Finding(name=r.series_id, record=r, kept=True) for r in store.series]
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


def _with_label_ids(settings: BuildSettings, label_names: Mapping[int, str] | None) -> BuildSettings:
    if label_names is None:
        return settings
    return dataclasses.replace(settings, label_ids=tuple(sorted(label_names)))


def _manifest_head(
    settings: BuildSettings, label_names: Mapping[int, str] | None, intensity: IntensityPreset
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "modality": settings.modality.value,
        "label_names": None if label_names is None else {str(k): v for k, v in sorted(label_names.items())},
        "intensity": intensity.to_dict(),
    }


def _found_ids(records: Sequence[SeriesRecord]) -> list[int]:
    return sorted({label for record in records for label in record.label_voxels})


@contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """Hold the folder of a store against a second build; the lock ends with the process, however that ends."""
    if out.exists() and not out.is_dir():
        raise UsageError("the store must be a folder, a file has this name.", where=out.name)
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise UsageError(
                "another process is building this store. Wait for it, or give another --out.", where=out.name
            ) from err
        except OSError as err:  # some network drives lock no folders
            log.debug("no lock on %s: %s", out.name, err)
        yield
    finally:
        os.close(descriptor)


def _prepare(out: Path, settings: BuildSettings) -> None:
    if not (out / "zarr.json").is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UsageError("the folder holds something else than a store. Give another --out.", where=out.name)
        start_store(out, modality=settings.modality)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _judge(report: BuildReport, out: Path, *, skip_refused: bool) -> None:
    if report.refused and not skip_refused:
        lines = [f"{name}: {reason}" for name, reason in sorted(report.refused.items())]
        more = f"\n    ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CasesRefused(
            report,
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
