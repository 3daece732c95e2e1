"""Layouts that name their cases, namely nnU-Net raw, Decathlon and MONAI lists, BIDS, and CSV lists."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.discovery import (
    Discovery,
    NameRules,
    SourceOptions,
    class_ids_of,
    label_files,
    merge_patients,
    patients_by_path,
    refuse_unnamed,
)
from samgraft.shared.scans.file_index import FileIndex, index_files, reason_to_leave_out
from samgraft.shared.scans.names import patient_of_stem
from samgraft.shared.scans.readers.registry import READERS, format_by_content, format_by_suffix, scan_stem
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat

CSV_COLUMNS = ("image", "label", "patient", "study", "site")
# Other names of the columns. A list whose labels or patients are not read would be used without them.
_COLUMN_WORDS = {
    "label": {"mask", "masks", "labels", "seg", "segmentation", "gt", "groundtruth", "annotation", "roi"},
    "patient": {"patients", "subject", "subjects", "case", "pid", "participant", "id"},
    "site": {"center", "centre", "scanner", "hospital"},
    "study": {"session", "visit"},
}
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_LABEL_ENDINGS = ("_dseg", "_mask")
_IGNORED_ENTITIES = ("desc-", "space-", "label-", "atlas-", "res-")


def detect_layout(root: Path) -> str:
    """Return the layout of a source by its marks (``csv``, ``nnunet``, ``msd``, ``bids`` or ``plain``).

    Raises:
        DataError: If the source is a folder of data sets.
    """
    if root.is_file() and root.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if (root / "dataset.json").is_file():
        values = _read_json(root / "dataset.json")
        # Version 1 of nnU-Net lists cases as the Decathlon does, but its files have a channel in their names.
        has_channels = any(_CHANNEL.fullmatch(scan_stem(path)) for path in (root / "imagesTr").glob("[!.]*"))
        if "channel_names" in values or ("training" not in values and (root / "imagesTr").is_dir()):
            return "nnunet"
        if "training" in values:
            return "nnunet" if has_channels and not _any_listed(values, root) else "msd"
    if (root / "dataset_description.json").is_file() or any(root.glob("sub-*/anat")) or any(root.glob("sub-*/ses-*")):
        return "bids"
    _refuse_folder_of_data_sets(root)
    return "plain"


def _refuse_folder_of_data_sets(root: Path) -> None:
    """Refuse a folder whose subfolders are data sets, such as ``nnUNet_raw``.

    Read as plain folders, every data set would count as one patient and its lists of labels would not be read.
    """
    marked = {
        path.parent for mark in ("dataset.json", "dataset_description.json") for path in root.glob(f"[!.]*/{mark}")
    }
    names = sorted(folder.name for folder in marked if detect_layout(folder) in {"bids", "msd", "nnunet"})
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"the folder has {counted(len(names), 'data set')} below it ({shown}), whose patients and labels would not "
            "be read as they are listed. Give one of them, or list the scans of several in a CSV file.",
            where=root.name,
        )


def nnunet_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read an nnU-Net raw data set (``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``, ``dataset.json``).

    Every channel becomes a series of its own with the label of its case.
    """
    values = _read_json(root / "dataset.json")
    index = index_files(root)
    found = Discovery(layout="nnU-Net raw", label_names=_names_from_json(values, root, options))
    found.left_out, found.notes = index.left_out, list(index.notes)
    rules = NameRules(options)
    labels = {("Tr", scan_stem(path)): path for path in _below(index, "labelsTr")}
    labels |= {("Ts", scan_stem(path)): path for path in _below(index, "labelsTs")}
    images: list[tuple[Path, str, str]] = []
    for part in ("Tr", "Ts"):
        for path in _below(index, f"images{part}"):
            match = _CHANNEL.fullmatch(scan_stem(path))
            if match is None:
                found.left_out["image without the channel suffix _0000"] += 1
            else:
                images.append((path, match["case"], part))
    if others := len(index.files) - len(labels) - sum(len(_below(index, f"images{p}")) for p in ("Tr", "Ts")):
        found.left_out["file outside imagesTr, labelsTr, imagesTs and labelsTs"] = others
    patients = merge_patients({case: patient_of_stem(case) for _, case, _ in images}, found)
    for path, case, part in images:
        label = labels.get((part, case))
        stem = scan_stem(path)
        found.cases.append(_named_case(path, label, stem, rules, root, options, patient=patients[case]))
    used = {(part, case) for _, case, part in images}
    found.labels_without_image = sorted(case for part, case in labels if (part, case) not in used)
    return found


def msd_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read a Medical Segmentation Decathlon task or a MONAI list, whose ``dataset.json`` names every file.

    4D files give one series per channel; a list of files per case gives one series per file.
    """
    values = _read_json(root / "dataset.json")
    found = Discovery(layout="Medical Segmentation Decathlon", label_names=_names_from_json(values, root, options))
    rules = NameRules(options)
    # Test images of the Decathlon have no labels, yet they are as good for pretraining as the others.
    parts = ("training", "validation", "test", "testing")
    entries = [entry for part in parts for entry in _entries(values, part, root)]
    # Channels are volumes of one 4D file, unless the list has a file for each of them.
    channels = values.get("modality") if all(entry.image == entry.first for entry in entries) else None
    num_channels = len(channels) if isinstance(channels, Mapping) and channels else 1
    present = _present_entries(root, entries, found)
    _note_other_parts(values, parts, found)
    # The files of one entry are one patient, whatever their names are.
    patients = merge_patients({e.first: patient_of_stem(scan_stem(e.first)) for _, e in present}, found)
    for path, entry in present:
        label = entry.label
        label_path = _inside(root, label) if label else None
        if label_path is not None and not label_path.is_file():
            found.notes.append(f"the label of {path.name} is listed but missing")
            label_path = None
        stem = scan_stem(path)
        for channel in range(num_channels):
            frame = options.frame if num_channels == 1 else channel
            name = stem if num_channels == 1 else f"{stem}_{channel:04d}"
            patient = patients[entry.first]
            patient = scan_stem(entry.first) if patient == entry.first else patient
            case = _named_case(path, label_path, name, rules, root, options, patient=patient, frame=frame)
            found.cases.append(case)
    return found


def bids_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read anatomical images of a BIDS data set and ``*_dseg`` or ``*_mask`` files, also from ``derivatives``."""
    index = index_files(root)
    found = Discovery(
        layout="BIDS", label_names=_names_from_dseg(root), left_out=index.left_out, notes=list(index.notes)
    )
    rules = NameRules(options)
    labels: dict[str, list[Path]] = defaultdict(list)
    images: dict[str, list[Path]] = defaultdict(list)
    for path in index.single_files():
        parts, stem = path.relative_to(root).parts, scan_stem(path)
        if stem.startswith("sub-") and stem.endswith(_LABEL_ENDINGS):
            labels[_entities(stem)].append(path)
        elif parts[0].startswith("sub-") and path.parent.name == "anat":
            images[_entities(stem)].append(path)
        else:
            found.left_out["BIDS image that is not anatomical"] += 1
    if others := len(index.files) - len(index.single_files()):
        found.left_out["BIDS image that is not anatomical"] += others
    if options.label_desc is not None:
        labels = _with_description(labels, options.label_desc, found)
    has_table = found.label_names is not None
    class_ids = class_ids_of(_bids_classes(labels), options, found)
    kinds = _kinds_of_masks(labels)
    for entities, paths in images.items():
        chosen, refusals = _labels_per_image(paths, labels.pop(entities, []), found, kinds=kinds)
        for path in paths:
            stem = scan_stem(path)
            subject = stem.split("_")[0]
            session = next((part for part in stem.split("_") if part.startswith("ses-")), "")
            case = _named_case(path, None, stem, rules, root, options, patient=subject, study=session)
            parts_of = [
                label_files(p, index.files[p], options, class_id=class_ids.get(_entity(p, "label")))
                for p in chosen[path]
            ]
            refusal = refusals.get(path) or (None if has_table else refuse_unnamed(parts_of, options, found))
            # Other programs write masks such as _seg beside the images of BIDS, so the voxels are checked.
            found.cases.append(replace(case, labels=tuple(parts_of), refusal=refusal, is_named_image=False))
    found.labels_without_image += [p.name for paths in labels.values() for p in paths]
    return found


def csv_cases(path: Path, options: SourceOptions) -> Discovery:
    """Read a list with columns image, label, patient, study, site. Paths are relative to the list.

    Without a header the columns are taken in this order. Several label files are separated by ``;``.

    Raises:
        DataError: With the line number.
    """
    found = Discovery(layout="CSV list")
    rules = NameRules(options)
    rows = _csv_rows(path, found)
    unnamed = [row["image"] for _, row in rows if row.get("image") and not row.get("patient")]
    patients = {} if rules.has_patient else patients_by_path(unnamed, found)
    for column, pattern in (("patient", options.patient_pattern), ("site", options.site_pattern)):
        _check_pattern(column, pattern, rows, found)
    for number, row in rows:
        if not row.get("image"):
            raise DataError(f"line {number} has no image.", where=path.name)
        relative, refusal = row["image"], None
        labels = []
        scan = ScanFiles(format=ScanFormat.NIFTI, paths=(path.parent / relative,), name=relative)
        try:
            scan = _listed_scan(path.parent / relative, options)
            for text in filter(None, (part.strip() for part in (row.get("label") or "").split(";"))):
                part = _listed_scan(path.parent / text, options)
                labels.append(LabelFiles(scan=part, ids=options.label_map, round_values=options.round_labels))
        except DataError as err:  # one line of a long list must not keep the others out
            refusal = f"line {number}: {err.what}"
        found.cases.append(
            SourceCase(
                name=relative,
                patient_key=row.get("patient") or rules.patient(relative, patients.get(relative, relative)),
                study_key=row.get("study") or "",
                site_key=row.get("site") or rules.site(relative),
                scan=scan,
                labels=tuple(labels),
                refusal=refusal,
            )
        )
    return found


def _check_pattern(
    column: str, pattern: str | None, rows: Sequence[tuple[int, Mapping[str, str]]], found: Discovery
) -> None:
    """Refuse a pattern that no row needs, and note the rows that do not."""
    filled = sum(bool(row.get(column)) for _, row in rows)
    if pattern is not None and rows and filled == len(rows):
        raise UsageError(f"--{column}-pattern would be ignored, because every row has its {column}. Leave it out.")
    if pattern is not None and filled:
        found.notes.append(f"{filled} rows have their {column} from the list and not from --{column}-pattern")


def _csv_rows(path: Path, found: Discovery) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError("the list must be UTF-8. Save it as 'CSV UTF-8'.", where=path.name) from err
    first = next((line for line in text.splitlines() if line.strip()), "")
    # Spreadsheets export commas, semicolons or tabs, depending on the language of the system.
    delimiter = max("\t;,", key=first.count) if any(d in first for d in "\t;,") else ","
    reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: Sequence[str] = ()
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            if not any(values):
                continue
            if not header:
                lowered = [v.lower() for v in values]
                if "image" in lowered:
                    header = lowered
                    _check_columns(header, path, found)
                    continue
                if named := set(lowered) & set(CSV_COLUMNS):
                    raise DataError(
                        f"the list has the column {min(named)} and none for the scans (got {', '.join(values)}). Call "
                        "it image.",
                        where=path.name,
                    )
                header = CSV_COLUMNS
            if len(values) > len(header):
                raise DataError(
                    f"line {reader.line_num} has {len(values)} cells for {len(header)} columns. Quote paths that "
                    f"hold {delimiter!r}.",
                    where=path.name,
                )
            rows.append((reader.line_num, dict(zip(header, values, strict=False))))
    except csv.Error as err:
        raise DataError(f"line {reader.line_num} is not CSV ({err}).", where=path.name) from err
    return rows


def _check_columns(header: Sequence[str], path: Path, found: Discovery) -> None:
    """Refuse columns that may hold labels or patients under another name, and note the other unknown ones."""
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"a column must be there once, {', '.join(repeated)} is repeated.", where=path.name)
    unknown = [name for name in header if name and name not in CSV_COLUMNS]
    for name in unknown:
        meant = next((column for column, words in _COLUMN_WORDS.items() if set(re.split(r"\W|_", name)) & words), None)
        if meant is not None and meant not in header:
            raise DataError(f"the column {name} is not known. Call it {meant}, or remove it.", where=path.name)
    if unknown:
        found.notes.append(f"columns of the list that are not used: {', '.join(unknown)}")


def _listed_scan(path: Path, options: SourceOptions) -> ScanFiles:
    if not path.exists():
        hint = " Write / between folders." if "\\" in path.name else ""
        raise DataError(f"{path.name} is not there.{hint}")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and reason_to_leave_out(p, p.stat().st_size) is None)
        for reader in (ScanFormat.IMAGES, ScanFormat.DICOM):
            chosen = tuple(p for p in files if (format_by_suffix(p) or format_by_content(p)) == reader)
            if chosen:
                return ScanFiles(format=reader, paths=chosen, name=path.name, allow_gaps=options.allow_gaps)
        raise DataError(f"the folder {path.name} holds neither pictures nor DICOM files.")
    if (reason := reason_to_leave_out(path, path.stat().st_size)) is not None:
        raise DataError(f"{path.name} cannot be read ({reason}).")
    found = format_by_suffix(path) or format_by_content(path)
    if found is None:
        raise DataError(f"{path.name} is not of a known format.")
    return ScanFiles(format=found, paths=(path,), name=path.name, frame=options.frame, allow_gaps=options.allow_gaps)


def _named_case(
    path: Path,
    label: Path | None,
    name: str,
    rules: NameRules,
    root: Path,
    options: SourceOptions,
    *,
    patient: str,
    study: str = "",
    frame: int | None = None,
) -> SourceCase:
    relative = path.relative_to(root).as_posix()
    chosen_frame = options.frame if frame is None else frame
    reader = format_by_suffix(path) or ScanFormat.NIFTI
    return SourceCase(
        name=name,
        patient_key=rules.patient(relative, patient),
        study_key=study,
        site_key=rules.site(relative),
        scan=ScanFiles(format=reader, paths=(path,), name=path.name, frame=chosen_frame),
        labels=(label_files(label, format_by_suffix(label) or ScanFormat.NIFTI, options),) if label is not None else (),
    )


def _below(index: FileIndex, folder: str) -> list[Path]:
    return [p for p in index.files if p.relative_to(index.root).parts[0] == folder and _is_one_scan(index, p)]


def _is_one_scan(index: FileIndex, path: Path) -> bool:
    """Return whether a file is one scan in a layout that names each file, as pictures then are."""
    reader = READERS[index.files[path]]
    return reader.one_file_per_scan or reader.name == ScanFormat.IMAGES


def _labels_per_image(
    images: Sequence[Path], labels: Sequence[Path], found: Discovery, *, kinds: Collection[str]
) -> tuple[dict[Path, list[Path]], dict[Path, str]]:
    """Choose the labels of images that share their entities, or refuse an image if no rule decides.

    Rules, in this order: ``space-`` or the image's own ending inside the name (``sub-01_T1w_label-lesion_mask``) names
    the image; ``_dseg`` (all classes) goes before ``_mask`` (one class); masks with ``label-`` go before others and are
    classes of one label. Masks of several ``kinds`` need a choice.
    """
    fitting: dict[Path, list[Path]] = {image: [] for image in images}
    for label in labels:
        space = _entity(label, "space") or _ending_inside(label)
        chosen = [p for p in images if scan_stem(p).endswith(f"_{space}")] if space else list(images)
        if len(chosen) == 1:
            fitting[chosen[0]].append(label)
        else:
            found.labels_without_image.append(label.name)
            found.notes.append(f"{label.name} fits {len(chosen)} images: name one by space-T1w")
    refusals: dict[Path, str] = {}
    for image, candidates in fitting.items():
        segmentations = [p for p in candidates if scan_stem(p).endswith("_dseg")]
        # Sort order must never decide: a brain mask sorts before a lesion mask.
        masks = [p for p in candidates if p not in segmentations]
        specific = [p for p in masks if _entity(p, "label") not in ("", "brain")]
        chosen = segmentations or specific or masks
        names = [_entity(p, "label") for p in chosen]
        if len(chosen) > 1 and ("" in names or len(set(names)) < len(names) or segmentations):
            choice = next((desc for p in sorted(chosen) if (desc := _entity(p, "desc")) not in ("", "brain")), "NAME")
            refusals[image] = (
                f"the image has {len(chosen)} labels ({', '.join(sorted(p.name for p in chosen))}). Choose with "
                f"--label-desc {choice}, or give image and label in a CSV list."
            )
        elif chosen and chosen == masks and len(kinds) > 1:
            # The brain mask of one subject and the lesion mask of another would become one class.
            refusals[image] = (
                f"the masks of the data set show several things (desc-{', desc-'.join(sorted(kinds))}). Choose with "
                "--label-desc NAME."
            )
        if left := [p.name for p in candidates if p not in chosen]:
            unused = ", ".join(sorted(left))
            found.notes.append(f"{scan_stem(image)} has a label that matches better than {unused}")
        fitting[image] = sorted(chosen)
    return fitting, refusals


def _with_description(labels: Mapping[str, Sequence[Path]], wanted: str, found: Discovery) -> dict[str, list[Path]]:
    """Return the labels with ``desc-WANTED`` and count the others."""
    kept = {key: [p for p in paths if _entity(p, "desc") == wanted] for key, paths in labels.items()}
    every, chosen = (sum(map(len, group.values())) for group in (labels, kept))
    if not chosen:
        names = sorted({_entity(p, "desc") for paths in labels.values() for p in paths} - {""})
        raise UsageError(f"--label-desc must be among {', '.join(names) or 'none'}, got {wanted}.")
    if every > chosen:
        found.left_out["label of another --label-desc"] += every - chosen
    return kept


def _masks(labels: Mapping[str, Sequence[Path]]) -> list[Path]:
    return [p for paths in labels.values() for p in paths if scan_stem(p).endswith("_mask")]


def _bids_classes(labels: Mapping[str, Sequence[Path]]) -> set[str]:
    return {_entity(p, "label") for p in _masks(labels)} - {"", "brain"}


def _kinds_of_masks(labels: Mapping[str, Sequence[Path]]) -> set[str]:
    """Return what the masks without ``label-`` show, by their ``desc-``."""
    return {_entity(p, "desc") or "none" for p in _masks(labels) if _entity(p, "label") in ("", "brain")}


def _entity(path: Path, name: str) -> str:
    """Return the value of one BIDS entity, e.g. ``lesion`` of ``label-lesion``, or an empty text."""
    return next((p.partition("-")[2] for p in scan_stem(path).split("_") if p.startswith(f"{name}-")), "")


def _entities(stem: str) -> str:
    return "_".join(part for part in stem.split("_")[:-1] if "-" in part and not part.startswith(_IGNORED_ENTITIES))


def _ending_inside(label: Path) -> str:
    """Return the ending of an image that the name of its label repeats, or an empty text."""
    return next((part for part in scan_stem(label).split("_")[:-1] if "-" not in part), "")


def _names_from_dseg(root: Path) -> dict[int, str] | None:
    for path in sorted({*root.glob("*_dseg.tsv"), *root.glob("**/*_dseg.tsv")}):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
            if rows and {"index", "name"} <= set(rows[0]):
                return {int(row["index"]): row["name"] for row in rows if int(row["index"]) != 0}
        except (ValueError, OSError) as err:
            raise DataError(f"the table of labels must have whole numbers as index ({err}).", where=path.name) from err
    return None


def _names_from_json(values: Mapping[str, Any], root: Path, options: SourceOptions) -> dict[int, str] | None:
    """Return label id -> name of ``dataset.json``, or None if it names no labels.

    Versions write an id and its name, a name and its id, or a list of names.
    """
    labels, where = values.get("labels"), f"{root.name}/dataset.json"
    if labels is None or options.label_names is not None:
        return None
    if isinstance(labels, list):
        labels = {str(number): name for number, name in enumerate(labels)}
    if not isinstance(labels, Mapping):
        raise DataError(f"labels must map ids to names, got {labels!r}.", where=where)
    names: dict[int, str] = {}
    for name, value in labels.items():
        if isinstance(value, (list, Mapping)):
            raise DataError(
                f"region-based labels ({name}: {value}) are not read. Give the single classes with --label-names.",
                where=where,
            )
        try:
            label_id, text = (int(name), str(value)) if str(name).isdecimal() else (int(value), str(name))
        except (TypeError, ValueError) as err:
            raise DataError(f"a label must pair an id with a name, got {name!r}: {value!r}.", where=where) from err
        if label_id != 0:
            names[label_id] = text
    return names


def _note_other_parts(values: Mapping[str, Any], parts: Collection[str], found: Discovery) -> None:
    """Note lists of cases under names that are not read."""
    others = [
        name
        for name, entries in values.items()
        if name not in parts
        and isinstance(entries, list)
        and any(isinstance(entry, Mapping) and "image" in entry for entry in entries)
    ]
    if others:
        found.notes.append(f"parts of dataset.json that are not read: {', '.join(others)} (read: {', '.join(parts)})")


@dataclass(frozen=True)
class _Entry:
    """One file of a list."""

    image: str
    label: str | None
    first: str
    """First image of the case, which is another one for the second and later channels."""


def _entries(values: Mapping[str, Any], part: str, root: Path) -> list[_Entry]:
    """Return each image of a part with its label."""
    where = f"{root.name}/dataset.json"
    entries = values.get(part) or []
    if not isinstance(entries, list):
        raise DataError(f"{part} must be a list, got {type(entries).__name__}.", where=where)
    files: list[_Entry] = []
    for entry in entries:
        images, label = (entry.get("image"), entry.get("label")) if isinstance(entry, Mapping) else (entry, None)
        images = images if isinstance(images, list) else [images]
        if isinstance(label, list) and len(label) == 1:
            label = label[0]
        if not images or not all(isinstance(i, str) and i for i in images) or not isinstance(label, str | None):
            raise DataError(
                f"a case of {part} must have the path of its image and of one label, got {entry!r}.", where=where
            )
        files += [_Entry(image, label, images[0]) for image in images]
    return files


def _any_listed(values: Mapping[str, Any], root: Path) -> bool:
    return any((root / entry.image).is_file() for entry in _entries(values, "training", root))


def _present_entries(root: Path, entries: Sequence[_Entry], found: Discovery) -> list[tuple[Path, _Entry]]:
    """Return the entries whose image is a scan, and count missing and unlisted files."""
    index = index_files(root)
    found.left_out, found.notes = index.left_out, list(index.notes)
    scans = {path.resolve() for path in index.files}
    present = []
    for entry in entries:
        path = _inside(root, entry.image)
        if path.resolve() in scans:
            present.append((path, entry))
        elif not path.exists() and not path.is_symlink():  # other files were counted when they were indexed
            found.left_out["listed in dataset.json but not there"] += 1
    listed = {_inside(root, name).resolve() for e in entries for name in (e.image, e.label) if name}
    if unlisted := len(scans - listed):
        found.left_out["scan that dataset.json does not list"] += unlisted
    return present


def _inside(root: Path, listed: str) -> Path:
    path = root / listed
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"a listed path leaves the data set: {listed}.", where=f"{root.name}/dataset.json")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as err:
        raise DataError(f"the file is not JSON ({err}).", where=path.name) from err
    if not isinstance(values, dict):
        raise DataError("the file must hold one JSON object.", where=path.name)
    return values
