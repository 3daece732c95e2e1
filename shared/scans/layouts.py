"""Layouts that name their cases: nnU-Net raw, Medical Segmentation Decathlon, BIDS, CSV lists."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samgraft.shared.errors import DataError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.discovery import (
    Discovery,
    NameRules,
    SourceOptions,
    known_format,
    label_files,
    scan_files,
)
from samgraft.shared.scans.file_index import SCAN_SUFFIXES, scan_stem, scan_suffix
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat


def detect_layout(root: Path) -> str:
    """Tell a layout by its marks: ``csv``, ``nnunet``, ``msd``, ``bids`` or ``plain``."""
    if root.is_file() and root.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if (root / "dataset.json").is_file():
        values = _read_json(root / "dataset.json")
        if "channel_names" in values or ("training" not in values and (root / "imagesTr").is_dir()):
            return "nnunet"
        if "training" in values:
            return "msd"
    if (root / "dataset_description.json").is_file() or any(root.glob("sub-*/anat")) or any(root.glob("sub-*/ses-*")):
        return "bids"
    return "plain"


def nnunet_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read an nnU-Net raw data set: ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``, ``dataset.json``.

    Every channel becomes a series of its own with the label of its case.
    """
    values = _read_json(root / "dataset.json")
    found = Discovery(layout="nnU-Net raw", label_names=_names_from_nnunet(values.get("labels", {}), root))
    ending = str(values.get("file_ending", ".nii.gz"))
    rules = NameRules(options)
    labels = {p.name.removesuffix(ending): p for p in sorted((root / "labelsTr").glob(f"*{ending}"))}
    used: set[str] = set()
    for folder in ("imagesTr", "imagesTs"):
        for path in sorted((root / folder).glob(f"*{ending}")):
            stem = path.name.removesuffix(ending)
            match = re.fullmatch(r"(.+)_(\d{4})", stem)
            if match is None:
                found.left_out["image without the channel suffix _0000"] += 1
                continue
            case_id = match[1]
            label = labels.get(case_id) if folder == "imagesTr" else None
            used.add(case_id)
            found.cases.append(_named_case(path, label, stem, rules, root, options, patient=case_id))
    found.labels_without_image = sorted(set(labels) - used)
    return found


def msd_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read a Medical Segmentation Decathlon task; 4D files give one series per channel of ``dataset.json``."""
    values = _read_json(root / "dataset.json")
    names = {int(k): str(v) for k, v in dict(values.get("labels", {})).items() if int(k) != 0}
    found = Discovery(layout="Medical Segmentation Decathlon", label_names=names)
    rules = NameRules(options)
    num_channels = len(values.get("modality", {})) or 1
    entries = [(e["image"], e.get("label")) if isinstance(e, Mapping) else (e, None) for e in values["training"]]
    entries += [(e["image"], e.get("label")) for e in values.get("validation", [])]
    entries += [(e["image"] if isinstance(e, Mapping) else e, None) for e in values.get("test", [])]
    missing = 0
    for image, label in entries:
        path, label_path = _inside(root, image), _inside(root, label) if label else None
        if not path.is_file():
            missing += 1
            continue
        if label_path is not None and not label_path.is_file():
            found.notes.append(f"the label of {path.name} is listed but not there")
            label_path = None
        for channel in range(num_channels):
            frame = options.frame if num_channels == 1 else channel
            name = scan_stem(path) if num_channels == 1 else f"{scan_stem(path)}_{channel:04d}"
            case = _named_case(path, label_path, name, rules, root, options, patient=scan_stem(path), frame=frame)
            found.cases.append(case)
    if missing:
        found.left_out["listed in dataset.json but not there"] = missing
    return found


def bids_cases(root: Path, options: SourceOptions) -> Discovery:
    """Read anatomical images of a BIDS data set and ``*_dseg`` or ``*_mask`` files, also from ``derivatives``."""
    found = Discovery(layout="BIDS", label_names=_names_from_dseg(root))
    rules = NameRules(options)
    labels: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("sub-*/**/*.nii*"), *root.glob("derivatives/**/sub-*.nii*")]):
        stem = scan_stem(path)
        if stem.endswith(("_dseg", "_mask")):
            labels.setdefault(_entities(stem), []).append(path)
    images = [p for p in sorted(root.glob("sub-*/**/anat/*.nii*")) if not scan_stem(p).endswith(("_dseg", "_mask"))]
    others = sum(1 for p in root.glob("sub-*/**/*.nii*") if p.parent.name != "anat")
    if others:
        found.left_out["BIDS image that is not anatomical"] = others
    by_entities: dict[str, list[Path]] = {}
    for path in images:
        by_entities.setdefault(_entities(scan_stem(path)), []).append(path)
    for entities, paths in by_entities.items():
        chosen = _label_per_image(paths, labels.pop(entities, []), found)
        for path in paths:
            stem = scan_stem(path)
            subject = stem.split("_")[0]
            session = next((part for part in stem.split("_") if part.startswith("ses-")), "")
            label = chosen.get(path)
            found.cases.append(_named_case(path, label, stem, rules, root, options, patient=subject, study=session))
    found.labels_without_image = sorted(p.name for paths in labels.values() for p in paths)
    return found


def csv_cases(path: Path, options: SourceOptions) -> Discovery:
    """Read a list with columns image, label, patient, study, site; paths are relative to the list.

    Without a header the columns are taken in this order. Several label files are separated by ``;``.

    Raises:
        DataError: With the line number.
    """
    found = Discovery(layout="CSV list")
    rules = NameRules(options)
    for number, row in _csv_rows(path):
        if not row.get("image"):
            raise DataError(f"line {number} has no image.", where=path.name)
        image = _listed(path.parent, row["image"], number, path.name)
        scan = _scan_of_path(image, options, line=number, where=path.name)
        labels = []
        for text in filter(None, (part.strip() for part in (row.get("label") or "").split(";"))):
            label = _listed(path.parent, text, number, path.name)
            part = _scan_of_path(label, options, line=number, where=path.name)
            labels.append(LabelFiles(scan=part, ids=options.label_map, round_values=options.round_labels))
        relative = row["image"]
        found.cases.append(
            SourceCase(
                name=relative,
                patient_key=row.get("patient") or rules.patient(relative, relative),
                study_key=row.get("study") or "",
                site_key=row.get("site") or rules.site(relative),
                scan=scan,
                labels=tuple(labels),
            )
        )
    return found


COLUMNS = ("image", "label", "patient", "study", "site")


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError("the list must be UTF-8.", where=path.name) from err
    first = next((line for line in text.splitlines() if line.strip()), "")
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
                    continue
                header = COLUMNS
            if len(values) > len(header):
                raise DataError(
                    f"line {reader.line_num} has {len(values)} cells for {len(header)} columns. Quote paths that "
                    f"hold {delimiter!r}.",
                    where=path.name,
                )
            rows.append((reader.line_num, dict(zip(header, values, strict=False))))
    except csv.Error as err:
        raise DataError(f"line {reader.line_num} is not CSV: {err}.", where=path.name) from err
    return rows


def _scan_of_path(path: Path, options: SourceOptions, *, line: int, where: str) -> ScanFiles:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        for kind in (ScanFormat.IMAGES, ScanFormat.DICOM):
            chosen = tuple(p for p in files if SCAN_SUFFIXES.get(scan_suffix(p)) is kind)
            if chosen:
                return ScanFiles(format=kind, paths=chosen, name=path.name, allow_gaps=options.allow_gaps)
        raise DataError(f"line {line}: the folder holds neither pictures nor .dcm files.", where=where)
    found = known_format(path)
    if found is None:
        raise DataError(f"line {line}: {path.suffix or 'a file without suffix'} is not a known format.", where=where)
    return scan_files(path, found, path.name, options)


def _listed(folder: Path, text: str, line: int, where: str) -> Path:
    path = Path(text) if Path(text).is_absolute() else folder / text
    if not path.exists():
        raise DataError(f"line {line}: {text} is not there.", where=where)
    return path


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
    kind = known_format(path) or ScanFormat.NIFTI
    scan = ScanFiles(format=kind, paths=(path,), name=path.name, frame=options.frame if frame is None else frame)
    label_kind = (known_format(label) or ScanFormat.NIFTI) if label is not None else None
    return SourceCase(
        name=name,
        patient_key=rules.patient(relative, patient),
        study_key=study,
        site_key=rules.site(relative),
        scan=scan,
        labels=(label_files(label, label_kind, options),) if label is not None and label_kind is not None else (),
    )


def _label_per_image(images: Sequence[Path], labels: Sequence[Path], found: Discovery) -> dict[Path, Path]:
    chosen: dict[Path, Path] = {}
    for label in labels:
        space = next((p.removeprefix("space-") for p in scan_stem(label).split("_") if p.startswith("space-")), None)
        fitting = [p for p in images if scan_stem(p).endswith(f"_{space}")] if space else list(images)
        if len(fitting) != 1:
            found.notes.append(f"{label.name} fits {len(fitting)} images: name one by space-T1w")
        elif fitting[0] in chosen:
            found.notes.append(f"{fitting[0].name} has several labels: {label.name} is not used")
        else:
            chosen[fitting[0]] = label
    return chosen


def _entities(stem: str) -> str:
    parts = stem.split("_")[:-1]
    return "_".join(part for part in parts if not part.startswith(("desc-", "space-", "label-", "atlas-", "res-")))


def _names_from_dseg(root: Path) -> dict[int, str] | None:
    for path in sorted([*root.glob("*_dseg.tsv"), *root.glob("**/*_dseg.tsv")]):
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        if rows and {"index", "name"} <= set(rows[0]):
            return {int(row["index"]): row["name"] for row in rows if int(row["index"]) != 0}
    return None


def _names_from_nnunet(labels: Mapping[str, Any], root: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, value in labels.items():
        if isinstance(value, list):
            raise DataError(
                f"region-based labels ({name}: {value}) are not read. Give --label-map.",
                where=f"{root.name}/dataset.json",
            )
        # nnU-Net v1 has id -> name, v2 name -> id.
        label_id, text = (int(name), str(value)) if str(name).isdigit() else (int(value), str(name))
        if text == "ignore":
            raise DataError(
                f"the ignore label {label_id} is not supported: drop it with --label-map {label_id}=0 or complete it.",
                where=f"{root.name}/dataset.json",
            )
        if label_id != 0:
            names[label_id] = text
    return names


def _inside(root: Path, listed: str) -> Path:
    path = root / listed
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"a listed path leaves the data set: {listed}.", where=f"{root.name}/dataset.json")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as err:
        raise DataError(f"the file is not JSON: {err}.", where=path.name) from err
    if not isinstance(values, dict):
        raise DataError("the file must hold one JSON object.", where=path.name)
    return values
