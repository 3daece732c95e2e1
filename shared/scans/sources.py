"""From a folder or a list to cases: the layout is detected, plain folders are sorted into scans, stacks and series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.discovery import (
    Discovery,
    NameRules,
    SourceOptions,
    image_key,
    label_files,
    label_key,
    scan_files,
)
from samgraft.shared.scans.file_index import ZARR, ZARR_MARKS, FileIndex, index_files
from samgraft.shared.scans.layouts import bids_cases, csv_cases, detect_layout, msd_cases, nnunet_cases
from samgraft.shared.scans.readers.images import natural_order
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat

_READERS = {"csv": csv_cases, "nnunet": nnunet_cases, "msd": msd_cases, "bids": bids_cases}


def discover(source: Path, options: SourceOptions | None = None) -> Discovery:
    """List the cases of a source.

    Args:
        source: A folder in any of the known layouts, or a CSV list.
        options: What the user says about names, labels and frames.

    Raises:
        DataError: If the source does not exist, contradicts itself, or holds no scan.
    """
    options = options or SourceOptions()
    if not source.exists():
        raise DataError("the source of scans does not exist.", where=str(source))
    refuse_zarr(source)
    layout = detect_layout(source)
    found = _READERS[layout](source, options) if layout in _READERS else plain_cases(source, options)
    if options.label_names is not None:
        found.label_names = dict(options.label_names)
    found.finish()
    if not found.cases:
        counts = ", ".join(f"{number} x {reason}" for reason, number in found.left_out.most_common(4))
        raise DataError(
            f"no scan was found (layout: {found.layout}; left out: {counts or 'nothing'}).", where=str(source)
        )
    return found


def refuse_zarr(source: Path) -> None:
    """Refuse a store as a source of scans, and zarr of other programs, whose axes nobody can be certain of."""
    if (source / "complete.json").is_file() and (source / "zarr.json").is_file():
        raise UsageError("the source is a slice store already. Give it as DATA=.", where=source.name)
    if any((source / mark).exists() for mark in ZARR_MARKS):
        raise DataError(f"the source is {ZARR}.", where=source.name)


def plain_cases(root: Path, options: SourceOptions) -> Discovery:
    """Sort a folder without a known layout: volumes, DICOM series, folders of pictures; labels beside them.

    A patient is the DICOM PatientID, else the first folder below the root, else the file itself: two files of one
    patient in one flat folder need ``--patient-pattern``.
    """
    root = root if root.is_dir() else root.parent
    index = index_files(root)
    found = Discovery(layout="plain folder", left_out=index.left_out, notes=list(index.notes))
    rules = NameRules(options)
    labels = _labels_by_key(index, options, found)
    for path in index.of(ScanFormat.NIFTI, ScanFormat.NRRD, ScanFormat.NUMPY):
        if label_key(path, root) is None:
            scan = scan_files(path, index.files[path], path.relative_to(root).as_posix(), options)
            found.cases.append(_plain_case(scan, path, labels.pop(image_key(path, root), ()), rules, root))
    _add_pictures(index, labels, rules, options, found)
    _add_dicom(index, labels, rules, options, found)
    found.labels_without_image = sorted(label.scan.name for group in labels.values() for label in group)
    if not rules.has_patient:
        _note_patients(found)
    return found


def _note_patients(found: Discovery) -> None:
    """Say how patients were told apart where a folder's layout alone decided it; DICOM has its own ids."""
    by_place = [case for case in found.cases if case.scan.format is not ScanFormat.DICOM]
    if any(Path(case.name).parent == Path() for case in by_place):
        found.notes.append("every file directly below the root counts as its own patient; else give --patient-pattern")
    if len(by_place) > 1 and len({case.patient_key for case in by_place}) == 1:
        found.notes.append(
            f"{len(by_place)} scans lie below one folder and count as one patient: give the folder below it, or "
            "--patient-pattern"
        )


def _plain_case(scan: ScanFiles, path: Path, labels: Sequence[LabelFiles], rules: NameRules, root: Path) -> SourceCase:
    relative = path.relative_to(root)
    default = relative.parts[0] if len(relative.parts) > 1 and not _is_role_folder(relative.parts[0]) else str(relative)
    return SourceCase(
        name=scan.name,
        patient_key=rules.patient(relative.as_posix(), default),
        site_key=rules.site(relative.as_posix()),
        scan=scan,
        labels=tuple(labels),
    )


def _is_role_folder(name: str) -> bool:
    """``images/`` and its like say nothing about the patient."""
    return image_key(Path(name) / "x", Path()) == "x"


def _labels_by_key(index: FileIndex, options: SourceOptions, found: Discovery) -> dict[str, list[LabelFiles]]:
    entries: list[tuple[str, str | None, Path]] = []
    for path in index.of(ScanFormat.NIFTI, ScanFormat.NRRD, ScanFormat.NUMPY):
        found_key = label_key(path, index.root)
        if found_key is not None:
            entries.append((*found_key, path))
    class_ids = {name: n for n, name in enumerate(sorted({name for _, name, _ in entries if name}), start=1)}
    if class_ids:
        found.label_names = {number: name for name, number in class_ids.items()}
    labels: dict[str, list[LabelFiles]] = {}
    for key, name, path in entries:
        label = label_files(path, index.files[path], options, only_id=class_ids[name] if name else None)
        labels.setdefault(key, []).append(label)
    unnamed = Counter(key for key, name, _ in entries if name is None)
    if several := sorted(key for key, count in unnamed.items() if count > 1):
        found.notes.append(f"{len(several)} scans have two labels, they are merged: {', '.join(several[:3])}")
    return labels


def _add_pictures(
    index: FileIndex, labels: dict[str, list[LabelFiles]], rules: NameRules, options: SourceOptions, found: Discovery
) -> None:
    groups: dict[Path, list[Path]] = {}
    for path in index.of(ScanFormat.IMAGES):
        groups.setdefault(path if options.pictures_are_scans else path.parent, []).append(path)
    images: dict[str, tuple[Path, ScanFiles]] = {}
    for place, paths in groups.items():
        ordered = tuple(sorted(paths, key=natural_order))
        relative = place.relative_to(index.root).as_posix()
        is_label = label_key(ordered[0], index.root)
        key = image_key(place if options.pictures_are_scans else place / "stack", index.root)
        if is_label is not None and options.pictures_are_scans:
            key = is_label[0]
        scan = ScanFiles(format=ScanFormat.IMAGES, paths=ordered, name=relative)
        if is_label:
            label = LabelFiles(scan=scan, ids=options.label_map, round_values=options.round_labels)
            labels.setdefault(key, []).append(label)
        else:
            images[key] = (place, scan)
    for key, (place, scan) in images.items():
        anchor = place if options.pictures_are_scans else place / "stack"
        found.cases.append(_plain_case(scan, anchor, labels.pop(key, ()), rules, index.root))


def _add_dicom(
    index: FileIndex, labels: dict[str, list[LabelFiles]], rules: NameRules, options: SourceOptions, found: Discovery
) -> None:
    paths = index.of(ScanFormat.DICOM)
    if not paths:
        return
    # Imported here: folders without DICOM need no pydicom.
    from samgraft.shared.scans.dicom_index import group_dicom

    series, segmentations = group_dicom(paths, found)
    ids_of = _segment_ids(segmentations, options, found)
    names: Counter[str] = Counter()
    for one in series:
        folder = one.paths[0].parent
        relative = folder.relative_to(index.root).as_posix()
        names[relative] += 1
        name = relative if names[relative] == 1 else f"{relative} series {names[relative]}"
        beside = [
            LabelFiles(scan=ScanFiles(format=ScanFormat.DICOM_SEG, paths=(path,), name=path.name), ids=ids_of[path])
            for path in segmentations.pop(one.series_uid, [])
        ]
        beside += labels.pop(image_key(folder / "series", index.root).removesuffix("/series"), [])
        first = one.paths[0].relative_to(index.root).as_posix()
        default = one.patient or (relative.split("/")[0] if relative != "." else name)
        found.cases.append(
            SourceCase(
                name=name,
                patient_key=rules.patient(first, default),
                study_key=one.study,
                site_key=rules.site(first) or one.site,
                scan=ScanFiles(
                    format=ScanFormat.DICOM, paths=tuple(one.paths), name=name, allow_gaps=options.allow_gaps
                ),
                labels=tuple(beside),
            )
        )
    found.labels_without_image += [path.name for group in segmentations.values() for path in group]


def _segment_ids(
    segmentations: dict[str, list[Path]], options: SourceOptions, found: Discovery
) -> dict[Path, Mapping[int, int] | None]:
    """Give equal segment names one id: segment numbers are local to their file."""
    paths = sorted({path for group in segmentations.values() for path in group})
    if not paths:
        return {}
    from samgraft.shared.scans.readers.dicom_seg import segment_names

    names = {path: segment_names(path) for path in paths}
    ids = {name: number for number, name in enumerate(sorted({n for one in names.values() for n in one.values()}), 1)}
    if options.label_map is not None:
        return dict.fromkeys(paths, options.label_map)
    found.label_names = {number: name for name, number in ids.items()}
    return {path: {number: ids[name] for number, name in one.items()} for path, one in names.items()}
