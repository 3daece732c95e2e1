"""Search for scans in a folder or list, by layout, cases, and pairs of images and labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.dicom_index import group_dicom, series_of_segmentation
from samgraft.shared.scans.discovery import (
    Discovery,
    NameRules,
    SourceOptions,
    class_ids_of,
    patients_by_path,
    refuse_unnamed,
)
from samgraft.shared.scans.file_index import ZARR, ZARR_MARKS, FileIndex, index_files
from samgraft.shared.scans.layouts import bids_cases, csv_cases, detect_layout, msd_cases, nnunet_cases
from samgraft.shared.scans.names import NamedFile, SliceGroup, group_slices, split_name
from samgraft.shared.scans.readers.dicom_seg import segment_names
from samgraft.shared.scans.readers.images import count_pages, natural_order
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat

_LAYOUTS = {"csv": csv_cases, "nnunet": nnunet_cases, "msd": msd_cases, "bids": bids_cases}


@dataclass(frozen=True, kw_only=True)
class FoundScan:
    """Files that are read together, before it is decided whether they are an image or a label."""

    files: ScanFiles
    relative: Path
    """Path below the root. For a stack or series a placeholder in its folder."""
    name: NamedFile
    patient: str = ""
    """Patient id of the header, empty if there is none."""
    study: str = ""
    site: str | None = None
    slices: tuple[int, ...] = ()
    """Numbers of the slices of a stack of pictures, by their names."""
    refusal: str | None = None
    """Reason to refuse the scan, found by its name alone."""
    segments: tuple[LabelFiles, ...] = ()
    """DICOM segmentations that refer to this series."""


@dataclass(kw_only=True)
class _ImageIndex:
    """Images by the keys under which their labels are searched."""

    by_key: dict[tuple[str, ...], list[FoundScan]] = field(default_factory=lambda: defaultdict(list))
    by_loose_key: dict[tuple[str, ...], list[FoundScan]] = field(default_factory=lambda: defaultdict(list))
    by_folder: dict[tuple[str, ...], list[FoundScan]] = field(default_factory=lambda: defaultdict(list))
    by_case: dict[tuple[str, ...], list[FoundScan]] = field(default_factory=lambda: defaultdict(list))
    """Images by the beginnings of their keys, which are the cases that they may be channels of."""
    by_contrast: dict[tuple[str, ...], list[FoundScan]] = field(default_factory=lambda: defaultdict(list))
    """Images by their keys without the folders of contrasts."""

    def add(self, image: FoundScan) -> None:
        """Add an image under all its keys."""
        key, folders = image.name.key, image.name.folders
        self.by_key[key].append(image)
        self.by_loose_key[image.name.loose_key].append(image)
        self.by_folder[folders].append(image)
        self.by_contrast[image.name.key_of_case].append(image)
        for length in range(len(folders) + 1, len(key)):
            self.by_case[key[:length]].append(image)


def discover(source: Path, options: SourceOptions | None = None) -> Discovery:
    """List the cases of a source.

    Args:
        source: Folder in any of the known layouts, or a CSV list.
        options: Options of the user for names, labels and frames.

    Raises:
        DataError: If the source does not exist, contradicts itself, or holds no scan.
    """
    options = options or SourceOptions()
    if not source.exists():
        raise DataError("the source of scans does not exist.", where=str(source))
    refuse_zarr(source)
    layout = detect_layout(source)
    found = _LAYOUTS[layout](source, options) if layout in _LAYOUTS else plain_cases(source, options)
    if source.is_file() and layout not in _LAYOUTS:
        found = _only_file(source, found)
    if options.label_names is not None:
        found.label_names = dict(options.label_names)
    found.set_ignored(options.ignore_label)
    found.finish()
    if not found.cases:
        counts = ", ".join(f"{number} x {reason}" for reason, number in found.left_out.most_common(4))
        if found.labels_without_image:
            counts = ", ".join(filter(None, (counts, f"{len(found.labels_without_image)} x label without image")))
        raise DataError(
            f"no scan was found (layout: {found.layout}; left out: {counts or 'nothing'}).", where=str(source)
        )
    found.refuse_unused(options)
    return found


def _only_file(source: Path, found: Discovery) -> Discovery:
    """Return the case of one file, with its labels from the same folder."""
    cases = [case for case in found.cases if source in case.scan.paths]
    return Discovery(layout="one file", cases=cases, label_names=found.label_names)


def refuse_zarr(source: Path) -> None:
    """Refuse a store as a source of scans, and zarr of other programs, whose order of axes is not certain."""
    if (source / "complete.json").is_file() and (source / "zarr.json").is_file():
        raise UsageError("the source is a slice store already. Give it as DATA=.", where=source.name)
    if any((source / mark).exists() for mark in ZARR_MARKS):
        raise DataError(f"the source is {ZARR}.", where=source.name)


def plain_cases(root: Path, options: SourceOptions) -> Discovery:
    """Sort a folder without a known layout into volumes, DICOM series and stacks of pictures, with their labels.

    A patient is the DICOM PatientID, else what the path gives, see ``patients_by_path``.
    """
    root = root if root.is_dir() else root.parent
    index = index_files(root)
    found = Discovery(layout="plain folder", left_out=index.left_out, notes=list(index.notes))
    scans = [*_single_files(index, options), *_pictures(index, options, found), *_dicom(index, options, found)]
    images = _without_derived([scan for scan in scans if not scan.name.is_label], found)
    labels = [scan for scan in scans if scan.name.is_label]
    refusals: dict[str, str] = {}
    labels_of = _pair_labels(images, labels, options, found, refusals)
    rules = NameRules(options)
    paths = [scan.relative.as_posix() for scan in images if not scan.patient]
    patients = {} if rules.has_patient else patients_by_path(paths, found)
    for scan in images:
        relative = _first_path(scan, root)
        found.cases.append(
            SourceCase(
                name=scan.files.name,
                patient_key=rules.patient(relative, scan.patient or patients.get(scan.relative.as_posix(), "")),
                study_key=scan.study,
                site_key=rules.site(relative) or scan.site,
                scan=scan.files,
                labels=(*scan.segments, *labels_of.get(scan.files.name, ())),
                is_named_image=False,
                refusal=refusals.get(scan.files.name)
                or refuse_unnamed(labels_of.get(scan.files.name, ()), options, found),
                scan_refusal=scan.refusal,
            )
        )
    _note_dicom_patients(images, rules, found)
    return found


def _without_derived(images: Sequence[FoundScan], found: Discovery) -> list[FoundScan]:
    """Leave out what a program computed from a scan that is there as well, such as ``P01_prob`` beside ``P01``."""
    keys = {image.name.key for image in images if not image.name.is_derived}
    kept = [image for image in images if not image.name.is_derived or image.name.key_of_origin not in keys]
    if num := len(images) - len(kept):
        found.left_out["map computed from a scan, by its name (probability, uncertainty, ...)"] += num
    return kept


def _single_files(index: FileIndex, options: SourceOptions) -> list[FoundScan]:
    scans = []
    for path in index.single_files():
        relative = path.relative_to(index.root)
        files = ScanFiles(
            format=index.files[path],
            paths=(path,),
            name=relative.as_posix(),
            frame=options.frame,
            allow_gaps=options.allow_gaps,
        )
        scans.append(FoundScan(files=files, relative=relative, name=split_name(relative)))
    return scans


def _pictures(index: FileIndex, options: SourceOptions, found: Discovery) -> list[FoundScan]:
    """Group pictures into stacks, or take each as a scan. A TIFF with several pages is a volume of its own."""
    scans: list[FoundScan] = []
    stacks: dict[tuple[Path, bool, tuple[str, ...]], list[Path]] = defaultdict(list)
    for path in index.of(ScanFormat.IMAGES):
        relative = path.relative_to(index.root)
        name = split_name(relative)
        if options.pictures_are_scans or count_pages(path) > 1:
            files = ScanFiles(format=ScanFormat.IMAGES, paths=(path,), name=relative.as_posix())
            scans.append(FoundScan(files=files, relative=relative, name=name))
            continue
        # Slices and their masks may share a folder; masks of several classes are stacks of their own.
        stacks[path.parent, name.is_label, name.picture_classes].append(path)
    for (folder, is_label, classes), paths in stacks.items():
        paths.sort(key=natural_order)
        for group in group_slices([split_name(path.relative_to(index.root)).slice_text for path in paths]):
            chosen = tuple(paths[place] for place in group.members)
            scans.append(_stack(folder.relative_to(index.root), chosen, group, classes if is_label else None))
    if many := sum(1 for scan in scans if scan.slices and scan.relative.name != "stack"):
        found.notes.append(
            f"{counted(many, 'stack of pictures shares', 'stacks of pictures share')} a folder with others, and files "
            "are "
            "separated by their names"
        )
    if gaps := [scan.files.name for scan in scans if len(set(np.diff(scan.slices))) > 1]:
        lacking = counted(len(gaps), "stack of pictures lacks", "stacks of pictures lack")
        found.notes.append(f"{lacking} slices by their numbers, e.g. {gaps[0]}")
    return scans


def _stack(folder: Path, paths: tuple[Path, ...], group: SliceGroup, classes: tuple[str, ...] | None) -> FoundScan:
    """Describe a stack of pictures. ``classes`` is None for images."""
    # A role word that only the files have is given to the stack: its folder alone would make it an image.
    stem = "_".join(filter(None, (group.name, *(("image",) if classes is None else ("seg", *classes)))))
    name = " ".join(filter(None, (folder.as_posix(), group.name if classes is None else stem)))
    refusal = None
    if not group.is_ordered:
        refusal = (
            "the names of the pictures have no numbers that order them as slices. Number them, or pass "
            "--pictures single."
        )
    return FoundScan(
        files=ScanFiles(format=ScanFormat.IMAGES, paths=paths, name=name),
        relative=folder / (group.name or "stack"),
        name=split_name(folder / stem),
        slices=group.numbers,
        refusal=refusal,
    )


def _dicom(index: FileIndex, options: SourceOptions, found: Discovery) -> list[FoundScan]:
    paths = index.of(ScanFormat.DICOM)
    if not paths:
        return []
    series, segmentations = group_dicom(paths, index.root, found)
    owners = {one.path: series_of_segmentation(one, series) for one in segmentations}
    found.labels_without_image += [path.name for path, owner in owners.items() if owner is None]
    segments: dict[int, list[LabelFiles]] = defaultdict(list)
    for path, ids in _segment_ids([p for p, owner in owners.items() if owner is not None], options, found).items():
        scan = ScanFiles(format=ScanFormat.DICOM_SEG, paths=(path,), name=path.name)
        segments[id(owners[path])].append(LabelFiles(scan=scan, ids=ids))
    names: Counter[str] = Counter()
    scans = []
    for group in series:
        folder = group.paths[0].parent.relative_to(index.root)
        # The first series of a folder keeps the folder's name, which a prompts file or a report may refer to.
        names[folder.as_posix()] += 1
        number = names[folder.as_posix()]
        name = folder.as_posix() if number == 1 else f"{folder.as_posix()} series {number}"
        files = ScanFiles(format=ScanFormat.DICOM, paths=tuple(group.paths), name=name, allow_gaps=options.allow_gaps)
        scans.append(
            FoundScan(
                files=files,
                relative=folder / f"series {number}",
                name=split_name(folder / "dicom"),
                patient=group.patient,
                study=group.study,
                site=group.site,
                segments=tuple(segments[id(group)]),
            )
        )
    return scans


def _pair_labels(
    images: Sequence[FoundScan],
    labels: Sequence[FoundScan],
    options: SourceOptions,
    found: Discovery,
    refusals: dict[str, str],
) -> dict[str, list[LabelFiles]]:
    """Return the label files of every image by its name. List labels without an image, and refuse contradictions."""
    index = _ImageIndex()
    for image in images:
        index.add(image)
    pairs: list[tuple[FoundScan, FoundScan, str | None]] = []
    shared = 0
    for label in labels:
        owners, class_name = _owners(label, index)
        if not owners:
            found.labels_without_image.append(label.files.name)
        shared += len(owners) > 1
        for image in owners:
            if len(image.slices) == len(label.slices) and image.slices != label.slices:
                # Both are sorted by their numbers, so that every mask would lie on a neighbour of its slice.
                differing = next(pair for pair in zip(image.slices, label.slices, strict=True) if pair[0] != pair[1])
                refusals[image.files.name] = (
                    f"slices of pictures and masks must have the same numbers (got {differing[0]} and {differing[1]}). "
                    "Rename them."
                )
        pairs += [(image, label, class_name) for image in owners]
    if shared:
        found.notes.append(
            f"{counted(shared, 'label belongs', 'labels belong')} to several images each (channels of one case)"
        )
    class_ids = class_ids_of((name for _, _, name in pairs if name), options, found)
    return _label_files(pairs, class_ids, options, found)


def _label_files(
    pairs: Sequence[tuple[FoundScan, FoundScan, str | None]],
    class_ids: Mapping[str, int],
    options: SourceOptions,
    found: Discovery,
) -> dict[str, list[LabelFiles]]:
    labels_of: dict[str, list[LabelFiles]] = defaultdict(list)
    unnamed: Counter[str] = Counter()
    for image, label, class_name in pairs:
        unnamed[image.files.name] += class_name is None
        labels_of[image.files.name].append(
            LabelFiles(
                scan=replace(
                    label.files, name=label.relative.name if len(label.files.paths) == 1 else label.files.name
                ),
                ids=None if class_name else options.label_map,
                class_id=class_ids[class_name] if class_name else None,
                round_values=options.round_labels,
            )
        )
    if several := sorted(name for name, count in unnamed.items() if count > 1):
        found.notes.append(
            f"{counted(len(several), 'scan has', 'scans have')} several labels, they are merged: "
            f"{', '.join(several[:3])}"
        )
    return labels_of


def _owners(label: FoundScan, index: _ImageIndex) -> tuple[list[FoundScan], str | None]:
    """Return the images that a label belongs to, and the class that its name gives.

    An image with the same name goes first. Next come channels (``CASE_0000``, ``CASE_t1`` for the label ``CASE``), and
    the only image of the label's folder. When several images fit, the label is listed as one without image.
    """
    for key, class_name in label.name.label_candidates():
        fitting = index.by_key.get(key, [])
        if len(fitting) > 1:
            # a.nii and a.nrrd, or A.nii and a.nii: the folder or the exact spelling may decide.
            same_folder = [image for image in fitting if image.relative.parent == label.relative.parent]
            fitting = same_folder or fitting
        if len(fitting) == 1:
            return fitting, class_name
        if fitting:
            return [], None
    if channels := index.by_case.get(label.name.key) or index.by_contrast.get(label.name.key):
        return channels, None
    if len(loose := index.by_loose_key.get(label.name.loose_key, [])) == 1:
        return loose, None
    alone = index.by_folder.get(label.name.folders, [])
    # Directly below the root, files of many patients may lie side by side. Only a folder of labels or a stack of slices
    # then shows that its only image is meant.
    is_sure = label.name.folders or not label.name.key or label.name.in_label_folder or label.slices
    if len(alone) == 1 and is_sure:
        return alone, label.name.class_beside(alone[0].name)
    return [], None


def _segment_ids(
    paths: Sequence[Path], options: SourceOptions, found: Discovery
) -> Mapping[Path, Mapping[int, int] | None]:
    """Give equal segment names one id, because segment numbers are local to their file."""
    if not paths:
        return {}
    names: dict[Path, dict[int, str]] = {}
    for path in sorted(paths):
        try:
            names[path] = segment_names(path)
        except (DataError, ValueError, TypeError, AttributeError):
            names[path] = {}  # the reader refuses the file by name
    if options.label_map is not None:
        return dict.fromkeys(paths, options.label_map)
    ids = class_ids_of((name for one in names.values() for name in one.values()), options, found)
    return {path: {number: ids[name] for number, name in one.items()} for path, one in names.items()}


def _first_path(scan: FoundScan, root: Path) -> str:
    """Return the path that the patterns of the user are applied to."""
    if scan.files.format == ScanFormat.DICOM or len(scan.files.paths) == 1:
        return scan.files.paths[0].relative_to(root).as_posix()
    return scan.relative.as_posix()


def _note_dicom_patients(images: Sequence[FoundScan], rules: NameRules, found: Discovery) -> None:
    """Note patient ids that an anonymiser may have made equal or removed."""
    dicom = [scan for scan in images if scan.files.format == ScanFormat.DICOM]
    if rules.has_patient or not dicom:
        return
    if unnamed := sum(not scan.patient for scan in dicom):
        found.notes.append(
            f"{unnamed} DICOM series have no patient id or a placeholder: their folders count as patients; else give "
            "--patient-pattern"
        )
    ids = {scan.patient for scan in dicom}
    folders = {scan.relative.parts[0] for scan in dicom if len(scan.relative.parts) > 1}
    if len(ids) == 1 and "" not in ids and len(folders) > 1:
        found.notes.append(
            f"all {len(dicom)} DICOM series have one patient id although they are in {len(folders)} folders: if an "
            "anonymiser made them equal, give --patient-pattern"
        )
