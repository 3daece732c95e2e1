"""The command ``samgraft store`` with its actions build, check, info and split."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from samgraft.shared.cli import Command, keywords, local_path
from samgraft.shared.errors import UsageError
from samgraft.shared.invocation import for_terminal

if TYPE_CHECKING:
    from pandas import DataFrame
    from samgraft.shared.samples.split import Split
    from samgraft.shared.store.build import BuildReport
    from samgraft.shared.store.from_data import ScanRequest
    from samgraft.shared.store.store import SliceStore


class ScanOptions(TypedDict, total=False):
    """How scans are read."""

    modality: str
    """``mri`` (the default), ``ct``, ``xray`` or ``ultrasound``."""
    planes: Sequence[str] | str
    """Planes of near-isotropic scans, among ``axial``, ``coronal`` and ``sagittal``."""
    patient_pattern: str | None
    """Regular expression on paths, whose first group is the patient."""
    site_pattern: str | None
    """The same for site or scanner."""
    label_map: Mapping[int, int] | str
    """Label id in the files to label id in the store. 0 drops a label."""
    label_names: Mapping[int, str] | str
    """Names of the label ids."""
    label_desc: str | None
    """Entity ``desc`` of the BIDS label to read where a scan has several."""
    ignore_label: int | None
    """Label id in the files that marks voxels without annotation."""
    empty_slices: str
    """``background`` (the default), or ``ignore`` for slices without a label that were not annotated."""
    frame: int | None
    """Index of the volume in 4D files."""
    allow_gaps: bool
    """True accepts missing DICOM slices."""
    round_labels: bool
    """True rounds label values that are nearly whole."""
    nan_policy: str
    """``refuse`` (the default), or ``zero`` to set NaN and Inf to 0."""
    accept_burned_in: bool
    """True accepts scans with text burned into the pixels."""
    pictures: str
    """Meaning of a folder of pictures, ``auto``, ``stack`` or ``single``."""
    workers: int
    """Number of processes. 0 uses as many as pay off, up to one per core."""
    overlays: Path | str | None
    """Folder for pictures of labels on another grid. They are patient images, so keep them local."""


@dataclass(frozen=True, kw_only=True)
class StoreResult:
    """Store that was built, or examined in a dry run."""

    path: Path
    """Folder of the store."""
    report: Path | None
    """JSON report of the build, or None if no file was given."""
    build: BuildReport
    """Results of all cases in memory."""

    @property
    def cases(self) -> DataFrame:
        """Table with one row per case and the reason of a refusal."""
        import pandas as pd

        rows = [
            {
                "name": result.name,
                "series_id": result.record.series_id if result.record else None,
                "has_label": result.record.has_label if result.record else None,
                "refused": result.refused,
            }
            for result in self.build.results
        ]
        return pd.DataFrame(rows, columns=["name", "series_id", "has_label", "refused"])


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
    info.add_argument("--names", action="store_true", help="list the ids with the names of files and patients (local)")
    info.add_argument("--json", action="store_true", help="machine-readable output")
    split = actions.add_parser("split", help="draw or read a split by patient and save it", allow_abbrev=False)
    split.add_argument("path", help="folder or address")
    split.add_argument("--fractions", help="train,val,test; default 0.7,0.15,0.15, with --folds 1,0,0")
    split.add_argument("--folds", type=int, help="draw this many folds for a cross-validation")
    split.add_argument(
        "--from",
        dest="own",
        type=Path,
        help="read an own split: CSV with the columns patient and part (names of files or patients), or nnU-Net's "
        "splits_final.json",
    )
    split.add_argument("--seed", type=int, help="seed of the draw; default 0")
    split.add_argument("--by-site", action="store_true", help="keep every site or scanner in one part")
    split.add_argument("--few-shot", type=int, help="keep this many training patients or slices")
    split.add_argument("--unit", choices=["patients", "slices"], help="unit of --few-shot; default patients")
    split.add_argument("--repeats", type=int, help="number of few-shot files, each with its own draw; default 1")
    split.add_argument("--out", type=Path, help="file; default: beside the store")


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modality", default="mri", help="mri, ct, xray or ultrasound")
    parser.add_argument("--planes", default="", help="axial,coronal,sagittal: these planes of near-isotropic scans")
    parser.add_argument("--patient-pattern", help="regular expression on paths; its first group is the patient")
    parser.add_argument("--site-pattern", help="the same for site or scanner")
    parser.add_argument("--label-map", default="", help="1=1,4=3,9=0: label id in the files = in the store, 0 drops it")
    parser.add_argument("--label-names", default="", help="1=tumour,2=oedema")
    parser.add_argument("--label-desc", help="lesion: the BIDS labels with desc-lesion, when there are several")
    parser.add_argument(
        "--ignore-label",
        type=int,
        metavar="ID",
        help="label id of voxels that are not annotated, e.g. 255; never counted",
    )
    parser.add_argument(
        "--empty-slices",
        choices=["background", "ignore"],
        default="background",
        help="slices without any label: background, or not annotated",
    )
    parser.add_argument("--frame", type=int, help="which volume of 4D files")
    parser.add_argument("--allow-gaps", action="store_true", help="accept missing DICOM slices")
    parser.add_argument("--round-labels", action="store_true", help="round label values that are nearly whole")
    parser.add_argument(
        "--nan-policy", choices=["refuse", "zero"], default="refuse", help="NaN and Inf: refuse, or set to 0"
    )
    parser.add_argument("--accept-burned-in", action="store_true", help="accept scans with text burned into the pixels")
    parser.add_argument(
        "--pictures", choices=["auto", "stack", "single"], default="auto", help="meaning of a folder of pictures"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: as many as pay off, up to one per core")
    parser.add_argument(
        "--overlays", type=Path, help="folder for pictures of labels on another grid (patient images: keep them local)"
    )
    parser.add_argument("--report", type=Path, help="write the report as JSON (it names cases: keep it local)")


def _run(arguments: argparse.Namespace) -> int:
    actions = {"build": _build, "check": _check, "info": _info, "split": _split}
    sys.stderr.writelines(f"{for_terminal(line)}\n" for line in actions[arguments.action](arguments))
    return 0


# Each action returns the lines to print when it is done. Libraries are imported inside, because
# `samgraft --help` lists this command and must not wait for zarr.


def _build(arguments: argparse.Namespace) -> list[str]:
    result = build_store(**{name: value for name, value in keywords(arguments).items() if name != "action"})
    if arguments.dry_run:
        return ["dry run: nothing was written"]
    state = "already complete" if result.build.already_complete else "complete"
    return [f"{result.path}: {state}", f"  next     {_command_that_uses(result.path)}"]


def _command_that_uses(path: Path) -> str:
    """Return the training for which a store was built, stage 2 where it has labels."""
    from samgraft.shared.store.store import SliceStore

    has_labels = any(record.has_label for record in SliceStore.open(path).series)
    return f"make {'finetune' if has_labels else 'pretrain'} DATA={shlex.quote(str(path))}"


def build_store(
    source: Path | str,
    out: Path | str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    skip_refused: bool = False,
    report: Path | str | None = None,
    **options: Unpack[ScanOptions],
) -> StoreResult:
    """Build a slice store from scans and labels.

    Args:
        source: Folder in any known layout (plain, nnU-Net, Decathlon, BIDS, DICOM), or a CSV list.
        out: Folder of the store, ``NAME.zarr``.
        dry_run: Read and check everything, and write nothing.
        overwrite: Replace a complete store with other content.
        skip_refused: Leave refused cases out and count them.
        report: JSON file for the report of the build. It names cases, so keep it local.
        options: Modality and how to read the scans, as described at ``ScanOptions``.

    Raises:
        SamgraftError: If cases are refused, no scan is found, or the store cannot be written.
    """
    from samgraft.shared.store.from_data import build_from_scans, examine_scans

    request = scan_request(source, report=report, **options)
    build = (
        examine_scans(request, skip_refused=skip_refused)
        if dry_run
        else build_from_scans(request, Path(out), skip_refused=skip_refused, overwrite=overwrite)
    )
    return StoreResult(path=Path(out), report=request.report_file, build=build)


def _check(arguments: argparse.Namespace) -> list[str]:
    from samgraft.shared.store.check import check_store, compare_with_scans, refuse_problems
    from samgraft.shared.store.from_data import examine_again, examine_scans, progress_bar

    is_store = (arguments.path / "zarr.json").is_file()
    _refuse_unused_check(arguments, is_store=is_store)
    if not is_store:
        examine_scans(_scan_request(arguments, arguments.path))
        return []
    with progress_bar("verifying") as on_progress:
        check = check_store(arguments.path, on_progress=on_progress)
    if arguments.source is not None and not check.problems:
        report = examine_again(_scan_request(arguments, arguments.source), arguments.path.parent)
        check.problems += compare_with_scans(arguments.path, report)
    refuse_problems(check)
    return [
        f"{arguments.path}: all bytes verified ({check.num_series} series, {check.num_files} files, "
        f"{check.num_bytes / 1e6:.1f} MB)"
    ]


def _refuse_unused_check(arguments: argparse.Namespace, *, is_store: bool) -> None:
    """Refuse options of a check that it would ignore."""
    if not is_store and arguments.source is not None:
        raise UsageError("--source is compared with a store, and the path is none. Leave it out.")
    if not is_store or arguments.source is not None:
        return
    parser = argparse.ArgumentParser(add_help=False)
    _add_source_options(parser)
    defaults = vars(parser.parse_args([]))
    if given := [f"--{name.replace('_', '-')}" for name in defaults if getattr(arguments, name) != defaults[name]]:
        raise UsageError(f"{' and '.join(given)} would be ignored, because no scans are read. Add --source SCANS.")


def _info(arguments: argparse.Namespace) -> list[str]:
    from rich.console import Console
    from samgraft.shared.samples.store_info import describe_store, print_description
    from samgraft.shared.store.store import SliceStore

    store = SliceStore.open(arguments.path)
    if arguments.names:
        return _list_names(store, as_json=arguments.json)
    values = describe_store(store)
    if arguments.json:
        sys.stdout.write(json.dumps(values, indent=1) + "\n")
    else:
        print_description(values, Console())
    return []


def _list_names(store: SliceStore, *, as_json: bool) -> list[str]:
    from samgraft.shared.store.names import require_names

    names = require_names(store)
    if as_json:
        rows = {series_id: dataclasses.asdict(name) for series_id, name in names.by_series.items()}
        sys.stdout.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return []
    for series_id, name in sorted(names.by_series.items(), key=lambda item: item[1].scan):
        sys.stdout.write(f"{series_id}  {name.patient_id}  {name.patient}  {name.scan}\n")
    return ["series, patient, name of the patient, scan. This list identifies people: keep it on this machine"]


def _split(arguments: argparse.Namespace) -> list[str]:
    from samgraft.shared.samples.slices import select_few_shot
    from samgraft.shared.samples.split import default_split_path, describe_split
    from samgraft.shared.store.files import is_address
    from samgraft.shared.store.store import SliceStore

    if arguments.out is None and is_address(arguments.path):
        raise UsageError("--out is missing: the store is not on this machine, so the split cannot be saved beside it.")
    few_shot = {"--unit": arguments.unit, "--repeats": arguments.repeats}
    if arguments.few_shot is None and (given := [option for option, value in few_shot.items() if value is not None]):
        raise UsageError(f"{' and '.join(given)} would be ignored without --few-shot. Add it.")
    repeats = 1 if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {repeats}.")
    store = SliceStore.open(arguments.path)
    split = _make_split(arguments, store)
    path = arguments.out or default_split_path(Path(arguments.path))
    if arguments.few_shot is None:
        split.save(path)
        return [f"{path}: {describe_split(split)}"]
    if split.folds:
        raise UsageError("--few-shot draws from a split without folds. Use data.few_shot.num=... with data.fold=0.")
    lines = []
    name = path.name.removesuffix(".json").removesuffix(".split")
    unit = arguments.unit or "patients"
    for repeat in range(repeats):
        small = select_few_shot(split, store, num=arguments.few_shot, unit=unit, repeat=repeat)
        target = path.with_name(f"{name}.{arguments.few_shot}{unit}.{repeat}.split.json")
        small.save(target)
        lines.append(f"{target}: {len(small.train)} training patients, draw {repeat}")
    return lines


def _make_split(arguments: argparse.Namespace, store: SliceStore) -> Split:
    """Read the user's own split, or draw parts or folds."""
    from samgraft.shared.samples.own_splits import read_own_split
    from samgraft.shared.samples.split import make_folds, make_split, refuse_empty_parts

    if arguments.own is not None:
        drawn = {"--fractions": arguments.fractions, "--folds": arguments.folds, "--seed": arguments.seed}
        given = [option for option, value in drawn.items() if value is not None]
        if given := [*given, *(["--by-site"] if arguments.by_site else [])]:
            raise UsageError(f"--from reads a split, so that {' and '.join(given)} would be ignored. Remove it.")
        return read_own_split(arguments.own, store)
    text = arguments.fractions or ("1,0,0" if arguments.folds else "0.7,0.15,0.15")
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError as err:
        raise UsageError(f"--fractions must be three numbers like 0.7,0.15,0.15, got {text!r}.") from err
    seed = 0 if arguments.seed is None else arguments.seed
    if arguments.folds is None:
        split = make_split(store, fractions=fractions, seed=seed, by_site=arguments.by_site)
        refuse_empty_parts(split, fractions, where=store.path.name)
        return split
    if len(fractions) != 3 or fractions[1]:
        raise UsageError(
            f"with --folds the second of --fractions must be 0, because folds are the validation (got {text!r}). "
            "For a test part of 20 % give --fractions 0.8,0,0.2."
        )
    return make_folds(
        store,
        num_folds=arguments.folds,
        test_fraction=fractions[2],
        seed=seed,
        by_site=arguments.by_site,
    )


def _scan_request(arguments: argparse.Namespace, source: Path) -> ScanRequest:
    # A keyword that the command does not have fails here, and not when somebody reads the store.
    names = (*ScanOptions.__annotations__, "report")
    return scan_request(source, **{name: getattr(arguments, name) for name in names})


def scan_request(
    source: Path | str, *, report: Path | str | None = None, **options: Unpack[ScanOptions]
) -> ScanRequest:
    """Return the request for the scans of a folder or list.

    Raises:
        UsageError: If an option has a wrong value.
    """
    from samgraft.shared.scans.discovery import (
        SourceOptions,
        parse_label_map,
        parse_label_names,
        pictures_are_scans,
    )
    from samgraft.shared.scans.orientation import Plane
    from samgraft.shared.store.from_data import ScanRequest

    # The command gives every option, and a caller from Python only those that differ from the default.
    modality, pictures = options.get("modality", "mri"), options.get("pictures", "auto")
    known = {plane.value: plane for plane in Plane}
    planes = [part.strip().lower() for part in _listed(options.get("planes", "")) if part.strip()]
    if unknown := [name for name in planes if name not in known]:
        raise UsageError(f"--planes must be among {', '.join(known)}, got {', '.join(unknown)}.")
    workers = options.get("workers", 0)
    if workers < 0:
        raise UsageError(f"--workers must be 0 or more, got {workers}.")
    overlays = options.get("overlays")
    return ScanRequest(
        source=Path(source),
        modality=modality,
        options=SourceOptions(
            patient_pattern=options.get("patient_pattern"),
            site_pattern=options.get("site_pattern"),
            label_map=parse_label_map(_pairs(options.get("label_map", ""))) or None,
            label_names=parse_label_names(_pairs(options.get("label_names", ""))) or None,
            label_desc=options.get("label_desc"),
            ignore_label=options.get("ignore_label"),
            frame=options.get("frame"),
            allow_gaps=options.get("allow_gaps", False),
            round_labels=options.get("round_labels", False),
            pictures_are_scans=pictures_are_scans(pictures, modality),
        ),
        planes=tuple(known[name] for name in planes),
        zero_non_finite=options.get("nan_policy") == "zero",
        accept_burned_in=options.get("accept_burned_in", False),
        ignore_empty_slices=options.get("empty_slices") == "ignore",
        num_workers=workers,
        overlays=Path(overlays) if overlays else None,
        report_file=Path(report) if report else None,
    )


def _listed(value: Sequence[str] | str) -> Sequence[str]:
    return value.split(",") if isinstance(value, str) else value


def _pairs(value: Mapping[int, object] | str) -> str:
    return value if isinstance(value, str) else ",".join(f"{key}={content}" for key, content in value.items())


COMMAND = Command(help="build, check, describe and split slice stores", add_arguments=_add_arguments, run=_run)
