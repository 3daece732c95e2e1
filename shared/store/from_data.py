"""Stores made from what a user gives as DATA, and the build and the dry run behind ``samgraft store``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.files import write_json
from samgraft.shared.machine import granted_cores
from samgraft.shared.scans.discovery import Discovery, SourceOptions
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.privacy import local_salt
from samgraft.shared.scans.sources import discover
from samgraft.shared.store.build import BuildReport, CasesRefused, build_store, examine_cases
from samgraft.shared.store.build_report import print_report, summarise
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.files import is_scans
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

DEFAULT_MODALITY = "mri"
BYTES_PER_WORKER = 50_000_000
"""Source bytes per worker process. A process takes seconds to start, so small sources use fewer processes."""
NO_SALT = "not stored"
"""Salt of the ids in a dry run, which are never written."""


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """Scans to read and how to read them."""

    source: Path
    """A folder in any known layout, or a CSV list."""
    modality: str = DEFAULT_MODALITY
    options: SourceOptions = field(default_factory=SourceOptions)
    planes: tuple[Plane, ...] = ()
    zero_non_finite: bool = False
    accept_burned_in: bool = False
    ignore_empty_slices: bool = False
    """True for partially annotated scans, whose slices without any label are not background."""
    num_workers: int = 0
    """Number of processes. 0 chooses it from the size of the source, up to one per core."""
    overlays: Path | None = None
    """Folder for pictures of labels on another grid than their scan."""
    report_file: Path | None = None
    """JSON file for the report. It names cases."""

    def settings(self, salt: str) -> BuildSettings:
        """Return the settings of the build."""
        return BuildSettings(
            modality=load_preset(self.modality).modality,
            salt=salt,
            planes=self.planes,
            zero_non_finite=self.zero_non_finite,
            accept_burned_in=self.accept_burned_in,
            ignore_empty_slices=self.ignore_empty_slices,
        )


def build_from_scans(
    request: ScanRequest, out: Path, *, skip_refused: bool = False, overwrite: bool = False
) -> BuildReport:
    """Build a store from scans and print the report of the build.

    Args:
        request: The scans.
        out: Folder of the store, ``NAME.zarr``.
        skip_refused: Leave refused cases out and count them.
        overwrite: Replace a complete store with other content.

    Raises:
        DataError: If cases are refused, or no scan is found.
        UsageError: If ``out`` holds something else.
        StorageError: If the disk is full or not writable.
    """
    # One salt per folder of stores: a patient has one id in all of them, and leaks between stages can be found.
    settings = request.settings(local_salt(out.parent))
    found = discover(request.source, request.options)
    try:
        with progress_bar("reading") as on_progress:
            report = build_store(
                found.cases,
                out=out,
                settings=settings,
                label_names=found.label_names,
                intensity=load_preset(settings.modality).intensity,
                num_workers=_choose_workers(request, found),
                skip_refused=skip_refused,
                overwrite=overwrite,
                overlays=request.overlays,
                on_progress=on_progress,
            )
    except CasesRefused as err:
        _show_report(request, found, err.report)
        raise _refusal(
            err.report, where=out, kept="finished series. The store is incomplete and cannot be used"
        ) from err
    _show_report(request, found, report)
    return report


def examine_scans(request: ScanRequest, *, skip_refused: bool = False) -> BuildReport:
    """Read and check scans as a build does and print the report, but write no store.

    Raises:
        DataError: If a build would refuse cases, or no scan is found.
    """
    found = discover(request.source, request.options)
    with progress_bar("reading") as on_progress:
        report = examine_cases(
            found.cases,
            settings=request.settings(NO_SALT),
            label_names=found.label_names,
            num_workers=_choose_workers(request, found),
            overlays=request.overlays,
            on_progress=on_progress,
        )
    _show_report(request, found, report)
    if report.refused and not (skip_refused and report.records):
        raise _refusal(report, where=request.source)
    return report


def examine_again(request: ScanRequest, salt_folder: Path) -> BuildReport:
    """Read the scans of a store again with the salt of its ids, to compare both."""
    found = discover(request.source, request.options)
    settings = request.settings(local_salt(salt_folder))
    return examine_cases(found.cases, settings=settings, num_workers=_choose_workers(request, found))


def store_from_data(data: Path | str, *, modality: str, folder: Path = Path("data")) -> Path | str:
    """Return the store that DATA names, or build ``folder/NAME.zarr`` when DATA holds scans.

    Scans that were built before and did not change are not read again.

    Args:
        data: A store, an address, or scans in any layout (a folder or a CSV list).
        modality: Kind of scan.
        folder: Where stores are made.

    Raises:
        DataError: If scans are refused.
        UsageError: If a store of this name was built from other scans.
    """
    if not is_scans(data):
        return data
    source = Path(data)
    out = folder / f"{source.resolve().name.removesuffix(source.suffix if source.is_file() else '')}.zarr"
    log.info("%s holds scans. They are written to the store %s", source.name, out)
    try:
        build_from_scans(ScanRequest(source=source, modality=modality), out)
    except UsageError as err:
        raise UsageError(
            f"{err.what.split('. ')[0]}: scans were added or changed, or another folder has this name.",
            where=str(out),
            kept="the existing store",
            next_command=f"samgraft store build FOLDER --out {folder}/OTHER.zarr --modality {modality}, then DATA=it; "
            "or add --overwrite",
        ) from err
    return out


def modality_of_data(data: Path | str | None) -> str:
    """Return the modality of a store, or ``mri`` for scans, whose modality is not known before they are read."""
    if data is None or is_scans(data):
        return DEFAULT_MODALITY
    return SliceStore.open(data).modality.value


def describe_dry_run(data: Path | str | None, store: str) -> str:
    """Describe what a dry run of a training leaves on the disk. Demo data and scans become a store first."""
    if data is None:
        return f"no run was written; the demo data stay ({Path(store).parent})"
    if is_scans(data):
        return f"no run was written; the store {store}, made from the scans, and the salt and names beside it stay"
    return "no run was written"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal and nothing elsewhere, so that log files hold only results."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _choose_workers(request: ScanRequest, found: Discovery) -> int:
    if request.num_workers:
        return request.num_workers
    scans = [files for case in found.cases for files in (case.scan, *(label.scan for label in case.labels))]
    paths = {path for files in scans for path in files.paths if path.is_file()}
    return min(granted_cores(), 1 + sum(path.stat().st_size for path in paths) // BYTES_PER_WORKER)


def _show_report(request: ScanRequest, found: Discovery, report: BuildReport) -> None:
    values = summarise(found, report)
    if request.report_file is not None:
        try:
            write_json(request.report_file, values, sort_keys=False)
        except OSError as err:
            raise StorageError(
                f"the report cannot be written: {err.strerror}.", where=str(request.report_file)
            ) from err
    print_report(values, Console(stderr=True))


def _refusal(report: BuildReport, *, where: Path, kept: str | None = None) -> DataError:
    return DataError(
        f"{len(report.refused)} of {counted(len(report.results), 'case is', 'cases are')} refused (reasons above).",
        where=str(where),
        kept=kept,
        next_command="repair them and run the same command again, or build with --skip-refused",
    )
