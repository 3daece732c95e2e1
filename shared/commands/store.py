"""``samgraft store``: build a slice store from scans, verify one, describe one, split one."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samgraft.shared.cli import Command, local_path
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.files import write_json
from samgraft.shared.machine import granted_cores
from samgraft.shared.store.files import is_address, is_scans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from samgraft.shared.scans.discovery import Discovery, SourceOptions
    from samgraft.shared.store.build import BuildReport
    from samgraft.shared.store.examine import BuildSettings

log = logging.getLogger(__name__)

DEFAULT_MODALITY = "mri"
BYTES_PER_WORKER = 50_000_000
"""A process takes seconds to start; smaller sources are read in fewer of them."""


def store_of(data: Path | str, *, modality: str, folder: Path = Path("data")) -> Path | str:
    """Return the store that DATA means: itself, or one built from scans as ``folder/NAME.zarr``.

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
    log.info("%s holds scans: they go into the store %s", source.name, out)
    parser = argparse.ArgumentParser()
    _add_arguments(parser)
    arguments = parser.parse_args(["build", "--out", str(out), "--modality", modality, "--", str(source)])
    try:
        _build(arguments)
    except UsageError as err:
        raise UsageError(
            f"{err.what.split('. ')[0]}: scans were added or changed, or another folder has this name.",
            where=str(out),
            kept="the store that is there",
            next_command=f"samgraft store build FOLDER --out {folder}/OTHER.zarr --modality {modality}, then DATA=it; "
            "or add --overwrite",
        ) from err
    return out


def modality_of(data: Path | str | None) -> str:
    """Return the modality of a store; scans do not say theirs, ``mri`` is assumed."""
    if data is None or is_scans(data):
        return DEFAULT_MODALITY
    from samgraft.shared.store.store import SliceStore

    return SliceStore.open(data).modality.value


def left_by_dry_run(data: Path | str | None, store: str) -> str:
    """Return what stays on the disk after a dry run of a training: it needs a store, so scans were put into one."""
    if data is None:
        return f"no run was written; the demo data stay ({Path(store).parent})"
    if is_scans(data):
        return f"no run was written; the store {store}, made from the scans, and the salt of its ids beside it stay"
    return "no run was written"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|check|info|split")
    build = actions.add_parser("build", help="scans and labels -> slice store", allow_abbrev=False)
    build.add_argument("source", type=local_path, help="folder (plain, nnU-Net, Decathlon, BIDS, DICOM) or CSV list")
    build.add_argument("--out", type=local_path, required=True, help="the store, NAME.zarr")
    build.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")
    build.add_argument("--overwrite", action="store_true", help="replace a complete store with other content")
    build.add_argument("--skip-refused", action="store_true", help="leave refused cases out and count them")
    _add_source_options(build)
    check = actions.add_parser("check", help="verify every byte of a store, or examine scans", allow_abbrev=False)
    check.add_argument("path", type=local_path, help="a store, or a folder of scans")
    check.add_argument("--source", type=local_path, help="compare the store with these scans as well")
    _add_source_options(check)
    info = actions.add_parser("info", help="describe a store", allow_abbrev=False)
    info.add_argument("path", help="folder or address (s3://bucket/NAME.zarr)")
    info.add_argument("--json", action="store_true", help="the same for programs")
    split = actions.add_parser("split", help="draw a split by patient and save it", allow_abbrev=False)
    split.add_argument("path", help="folder or address")
    split.add_argument("--fractions", default="0.7,0.15,0.15", help="train,val,test")
    split.add_argument("--seed", type=int, default=0)
    split.add_argument("--by-site", action="store_true", help="keep every site or scanner in one part")
    split.add_argument("--few-shot", type=int, help="keep so many training patients or slices")
    split.add_argument("--unit", choices=["patients", "slices"], default="patients", help="what --few-shot counts")
    split.add_argument("--repeats", type=int, default=1, help="so many few-shot files, each with its own draw")
    split.add_argument("--out", type=Path, help="file; default: beside the store")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modality", default="mri", help="mri, ct, xray or ultrasound")
    parser.add_argument("--planes", default="", help="axial,coronal,sagittal: these planes of near-isotropic scans")
    parser.add_argument("--patient-pattern", help="regular expression on paths; its first group is the patient")
    parser.add_argument("--site-pattern", help="the same for site or scanner")
    parser.add_argument("--label-map", default="", help="1=1,4=3,9=0: label id in the files = in the store, 0 drops it")
    parser.add_argument("--label-names", default="", help="1=tumour,2=oedema")
    parser.add_argument("--frame", type=int, help="which volume of 4D files")
    parser.add_argument("--allow-gaps", action="store_true", help="accept missing DICOM slices")
    parser.add_argument("--round-labels", action="store_true", help="round label values that are nearly whole")
    parser.add_argument(
        "--nan-policy", choices=["refuse", "zero"], default="refuse", help="NaN and Inf: refuse, or set to 0"
    )
    parser.add_argument("--accept-burned-in", action="store_true", help="take scans with text burned into the pixels")
    parser.add_argument(
        "--pictures", choices=["auto", "stack", "single"], default="auto", help="a folder of pictures is"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: as many as pay, up to one per core")
    parser.add_argument(
        "--overlays", type=Path, help="folder for pictures of labels on another grid (patient images: keep them local)"
    )
    parser.add_argument("--report", type=Path, help="write the report as JSON (it names cases: keep it local)")


def _run(arguments: argparse.Namespace) -> int:
    return {"build": _build, "check": _check, "info": _info, "split": _split}[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> int:
    # Imported here and below: `samgraft --help` must not wait for zarr.
    from rich.console import Console
    from samgraft.shared.scans.sources import discover
    from samgraft.shared.store.build_report import print_report, summarise

    console = Console(stderr=True)
    found = discover(arguments.source, _source_options(arguments))
    with _progress(console, "reading") as show:
        report = _examine(arguments, found, show) if arguments.dry_run else _write(arguments, found, show)
    values = summarise(found, report)
    _write_report(arguments.report, values)
    print_report(values, console)
    if report.refused and not (arguments.skip_refused and report.records):
        raise DataError(
            f"{len(report.refused)} of {len(report.findings)} cases are refused, see the list above.",
            where=str(arguments.out),
            kept="finished series; the store is not complete and training refuses it",
            next_command="repair them and run the same command again, or add --skip-refused",
        )
    if arguments.dry_run:
        console.print("dry run: nothing was written")
    else:
        state = "already complete" if report.already_complete else "complete"
        console.print(
            f"{arguments.out}: {state}. next: samgraft store split {shlex.quote(str(arguments.out))}",
            markup=False,
            soft_wrap=True,
        )
    return 0


def _examine(arguments: argparse.Namespace, found: Discovery, show: Callable[[int, int], None]) -> BuildReport:
    from samgraft.shared.store.build import examine_cases

    return examine_cases(
        found.cases,
        settings=_settings(arguments, None),
        label_names=found.label_names,
        num_workers=_workers(arguments, found),
        overlays=arguments.overlays,
        on_progress=show,
    )


def _write(arguments: argparse.Namespace, found: Discovery, show: Callable[[int, int], None]) -> BuildReport:
    from samgraft.shared.scans.preset import load_preset
    from samgraft.shared.store.build import CasesRefused, build_store

    settings = _settings(arguments, arguments.out.parent)
    try:
        return build_store(
            found.cases,
            out=arguments.out,
            settings=settings,
            label_names=found.label_names,
            intensity=load_preset(settings.modality).intensity,
            num_workers=_workers(arguments, found),
            skip_refused=arguments.skip_refused,
            overwrite=arguments.overwrite,
            overlays=arguments.overlays,
            on_progress=show,
        )
    except CasesRefused as refusal:
        return refusal.report


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from samgraft.shared.store.check import check_sources, check_store, refuse_problems

    console = Console(stderr=True)
    if not (arguments.path / "zarr.json").is_file():
        return _check_scans(arguments, console)
    with _progress(console, "verifying") as show:
        check = check_store(arguments.path, on_progress=show)
    if arguments.source is not None and not check.problems:
        from samgraft.shared.scans.sources import discover
        from samgraft.shared.store.build import examine_cases
        from samgraft.shared.store.store import SliceStore

        found = discover(arguments.source, _source_options(arguments))
        settings = _settings(arguments, arguments.path.parent)
        report = examine_cases(found.cases, settings=settings, num_workers=_workers(arguments, found))
        digests = {r.series_id: r.source_sha256 for r in report.records}
        check.problems += [f"source {name}: {reason}" for name, reason in sorted(report.refused.items())]
        check.problems += check_sources(SliceStore.open(arguments.path), digests)
    refuse_problems(check)
    console.print(
        f"{arguments.path}: every byte is right ({check.num_series} series, {check.num_files} files, "
        f"{check.num_bytes / 1e6:.1f} MB)",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _check_scans(arguments: argparse.Namespace, console: Console) -> int:
    from samgraft.shared.scans.sources import discover
    from samgraft.shared.store.build_report import print_report, summarise

    found = discover(arguments.path, _source_options(arguments))
    with _progress(console, "reading") as show:
        report = _examine(arguments, found, show)
    values = summarise(found, report)
    _write_report(arguments.report, values)
    print_report(values, console)
    if report.refused:
        raise DataError(
            f"{len(report.refused)} of {len(report.findings)} cases would be refused, see the list above.",
            where=str(arguments.path),
        )
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from samgraft.shared.samples.store_info import describe_store, print_description
    from samgraft.shared.store.store import SliceStore

    values = describe_store(SliceStore.open(arguments.path))
    if arguments.json:
        sys.stdout.write(json.dumps(values, indent=1) + "\n")
    else:
        print_description(values, Console())
    return 0


def _split(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from samgraft.shared.samples.few_shot import few_shot
    from samgraft.shared.samples.split import default_split_path, make_split
    from samgraft.shared.store.store import SliceStore

    try:
        fractions = [float(part) for part in arguments.fractions.split(",")]
    except ValueError as err:
        raise UsageError(f"--fractions must be three numbers like 0.7,0.15,0.15, got {arguments.fractions!r}.") from err
    store = SliceStore.open(arguments.path)
    split = make_split(store, fractions=fractions, seed=arguments.seed, by_site=arguments.by_site)
    if arguments.out is None and is_address(arguments.path):
        raise UsageError("--out must say where the split goes: the store is not on this machine.")
    path = arguments.out or default_split_path(Path(arguments.path))
    console = Console(stderr=True)
    if arguments.few_shot is None:
        split.save(path)
        console.print(
            f"{path}: train {len(split.train)}, val {len(split.val)}, test {len(split.test)} patients",
            markup=False,
            soft_wrap=True,
        )
        return 0
    for repeat in range(arguments.repeats):
        small = few_shot(split, store, num=arguments.few_shot, unit=arguments.unit, repeat=repeat)
        name = path.name.removesuffix(".json").removesuffix(".split")
        target = path.with_name(f"{name}.{arguments.few_shot}{arguments.unit}.{repeat}.split.json")
        small.save(target)
        console.print(f"{target}: {len(small.train)} training patients, draw {repeat}", markup=False, soft_wrap=True)
    return 0


def _source_options(arguments: argparse.Namespace) -> SourceOptions:
    from samgraft.shared.scans.discovery import SourceOptions, parse_label_map, parse_label_names

    single = arguments.pictures == "single" or (
        arguments.pictures == "auto" and arguments.modality.lower() in ("xray", "ultrasound")
    )
    return SourceOptions(
        patient_pattern=arguments.patient_pattern,
        site_pattern=arguments.site_pattern,
        label_map=parse_label_map(arguments.label_map) or None,
        label_names=parse_label_names(arguments.label_names) or None,
        frame=arguments.frame,
        allow_gaps=arguments.allow_gaps,
        round_labels=arguments.round_labels,
        pictures_are_scans=single,
    )


def _settings(arguments: argparse.Namespace, salt_folder: Path | None) -> BuildSettings:
    from samgraft.shared.scans.orientation import Plane
    from samgraft.shared.scans.preset import load_preset
    from samgraft.shared.scans.privacy import local_salt
    from samgraft.shared.store.examine import BuildSettings

    known = {plane.value: plane for plane in Plane}
    names = [part.strip().lower() for part in arguments.planes.split(",") if part.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--planes must be among {', '.join(known)}, got {', '.join(unknown)}.")
    return BuildSettings(
        modality=load_preset(arguments.modality).modality,
        salt="not stored" if salt_folder is None else local_salt(salt_folder),
        planes=tuple(known[name] for name in names),
        zero_non_finite=arguments.nan_policy == "zero",
        accept_burned_in=arguments.accept_burned_in,
    )


def _workers(arguments: argparse.Namespace, found: Discovery) -> int:
    if arguments.workers < 0:
        raise UsageError(f"--workers must be 0 or more, got {arguments.workers}.")
    if arguments.workers:
        return int(arguments.workers)
    return min(granted_cores(), 1 + _source_bytes(found) // BYTES_PER_WORKER)


def _source_bytes(found: Discovery) -> int:
    paths = {path for case in found.cases for files in (case.scan, *(label.scan for label in case.labels))
             for path in files.paths}  # fmt: skip
    return sum(path.stat().st_size for path in paths if path.is_file())


def _write_report(path: Path | None, values: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        write_json(path, values, sort_keys=False)
    except OSError as err:
        raise StorageError(f"the report cannot be written: {err.strerror}.", where=str(path)) from err


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere: logs keep only results."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


COMMAND = Command(help="build, check, describe and split slice stores", add_arguments=_add_arguments, run=_run)
