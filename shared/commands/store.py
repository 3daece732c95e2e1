"""The command ``samgraft store`` with its actions build, check, info and split."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command, local_path
from samgraft.shared.errors import UsageError

if TYPE_CHECKING:
    from samgraft.shared.samples.split import Split
    from samgraft.shared.store.from_data import ScanRequest
    from samgraft.shared.store.store import SliceStore


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
    split.add_argument("--seed", type=int, default=0)
    split.add_argument("--by-site", action="store_true", help="keep every site or scanner in one part")
    split.add_argument("--few-shot", type=int, help="keep this many training patients or slices")
    split.add_argument("--unit", choices=["patients", "slices"], default="patients", help="unit of --few-shot")
    split.add_argument("--repeats", type=int, default=1, help="number of few-shot files, each with its own draw")
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
    sys.stderr.writelines(f"{line}\n" for line in actions[arguments.action](arguments))
    return 0


# Each action returns the lines to print when it is done. Libraries are imported inside, because
# `samgraft --help` lists this command and must not wait for zarr.


def _build(arguments: argparse.Namespace) -> list[str]:
    from samgraft.shared.store.from_data import build_from_scans, examine_scans

    request = _scan_request(arguments, arguments.source)
    if arguments.dry_run:
        examine_scans(request, skip_refused=arguments.skip_refused)
        return ["dry run: nothing was written"]
    report = build_from_scans(
        request, arguments.out, skip_refused=arguments.skip_refused, overwrite=arguments.overwrite
    )
    state = "already complete" if report.already_complete else "complete"
    return [f"{arguments.out}: {state}. next: samgraft store split {shlex.quote(str(arguments.out))}"]


def _check(arguments: argparse.Namespace) -> list[str]:
    from samgraft.shared.store.check import check_store, compare_with_scans, refuse_problems
    from samgraft.shared.store.from_data import examine_again, examine_scans, progress_bar

    if not (arguments.path / "zarr.json").is_file():
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
    for repeat in range(arguments.repeats):
        small = select_few_shot(split, store, num=arguments.few_shot, unit=arguments.unit, repeat=repeat)
        target = path.with_name(f"{name}.{arguments.few_shot}{arguments.unit}.{repeat}.split.json")
        small.save(target)
        lines.append(f"{target}: {len(small.train)} training patients, draw {repeat}")
    return lines


def _make_split(arguments: argparse.Namespace, store: SliceStore) -> Split:
    """Read the user's own split, or draw parts or folds."""
    from samgraft.shared.samples.own_splits import read_own_split
    from samgraft.shared.samples.split import make_folds, make_split, refuse_empty_parts

    if arguments.own is not None:
        drawn = {"--fractions": arguments.fractions, "--folds": arguments.folds, "--by-site": arguments.by_site}
        if given := [option for option, value in drawn.items() if value]:
            raise UsageError(f"--from reads a split, so that {' and '.join(given)} would be ignored. Remove it.")
        return read_own_split(arguments.own, store)
    text = arguments.fractions or ("1,0,0" if arguments.folds else "0.7,0.15,0.15")
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError as err:
        raise UsageError(f"--fractions must be three numbers like 0.7,0.15,0.15, got {text!r}.") from err
    if arguments.folds is None:
        split = make_split(store, fractions=fractions, seed=arguments.seed, by_site=arguments.by_site)
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
        seed=arguments.seed,
        by_site=arguments.by_site,
    )


def _scan_request(arguments: argparse.Namespace, source: Path) -> ScanRequest:
    from samgraft.shared.scans.discovery import SourceOptions, parse_label_map, parse_label_names
    from samgraft.shared.scans.orientation import Plane
    from samgraft.shared.store.from_data import ScanRequest

    known = {plane.value: plane for plane in Plane}
    planes = [part.strip().lower() for part in arguments.planes.split(",") if part.strip()]
    if unknown := [name for name in planes if name not in known]:
        raise UsageError(f"--planes must be among {', '.join(known)}, got {', '.join(unknown)}.")
    if arguments.workers < 0:
        raise UsageError(f"--workers must be 0 or more, got {arguments.workers}.")
    # An X-ray or ultrasound picture is a scan of its own; pictures of other modalities are slices of a stack.
    single = arguments.pictures == "single" or (
        arguments.pictures == "auto" and arguments.modality.lower() in ("xray", "ultrasound")
    )
    return ScanRequest(
        source=source,
        modality=arguments.modality,
        options=SourceOptions(
            patient_pattern=arguments.patient_pattern,
            site_pattern=arguments.site_pattern,
            label_map=parse_label_map(arguments.label_map) or None,
            label_names=parse_label_names(arguments.label_names) or None,
            label_desc=arguments.label_desc,
            ignore_label=arguments.ignore_label,
            frame=arguments.frame,
            allow_gaps=arguments.allow_gaps,
            round_labels=arguments.round_labels,
            pictures_are_scans=single,
        ),
        planes=tuple(known[name] for name in planes),
        zero_non_finite=arguments.nan_policy == "zero",
        accept_burned_in=arguments.accept_burned_in,
        ignore_empty_slices=arguments.empty_slices == "ignore",
        num_workers=arguments.workers,
        overlays=arguments.overlays,
        report_file=arguments.report,
    )


COMMAND = Command(help="build, check, describe and split slice stores", add_arguments=_add_arguments, run=_run)
