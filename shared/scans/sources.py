"""Search for scans in a folder or list, by layout, cases, and pairs of images and labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.dicom_index import group_dicom, series_of_segmentation
from samgraft.shared.scans.discovery import Discovery, NameRules, SourceOptions, patients_by_path
from samgraft.shared.scans.file_index import ZARR, ZARR_MARKS, FileIndex, index_files
from samgraft.shared.scans.layouts import bids_cases, csv_cases, detect_layout, msd_cases, nnunet_cases
from samgraft.shared.scans.names import NamedFile, split_name
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

    def add(self, image: FoundScan) -> None:
        """Add an image under all its keys."""
        key, folders = image.name.key, image.name.folders
        self.by_key[key].append(image)
        self.by_loose_key[image.name.loose_key].append(image)
        self.by_folder[folders].append(image)
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
    if options.label_names is not None:
        found.label_names = dict(options.label_names)
    found.finish()
    if not found.cases:
        counts = ", ".join(f"{number} x {reason}" for reason, number in found.left_out.most_common(4))
        if found.labels_without_image:
            counts = ", ".join(filter(None, (counts, f"{len(found.labels_without_image)} x label without image")))
        raise DataError(
            f"no scan was found (layout: {found.layout}; left out: {counts or 'nothing'}).", where=str(source)
        )
    return found


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
    scans = [*_single_files(index, options), *_pictures(index, options), *_dicom(index, options, found)]
    images = [scan for scan in scans if not scan.name.is_label]
    labels = [scan for scan in scans if scan.name.is_label]
    labels_of = _pair_labels(images, labels, options, found)
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
                refusal=_refusal(labels_of.get(scan.files.name, ()), options, found),
            )
        )
    _note_dicom_patients(images, rules, found)
    return found


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


def _pictures(index: FileIndex, options: SourceOptions) -> list[FoundScan]:
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
        after = name.words[name.role_index + 1 :] if name.role_index is not None else ()
        classes = tuple(word for word in after if not any(char.isdigit() for char in word))
        stacks[path.parent, name.is_label, classes].append(path)
    for (folder, is_label, classes), paths in stacks.items():
        ordered = tuple(sorted(paths, key=natural_order))
        relative = folder.relative_to(index.root)
        # A role word that only the files have is given to the stack: its folder alone would make it an image.
        stem = "_".join(("seg", *classes)) if is_label else "image"
        folder_name = relative.as_posix()
        text = folder_name if not is_label else f"{folder_name} {stem}"
        files = ScanFiles(format=ScanFormat.IMAGES, paths=ordered, name=text)
        scans.append(FoundScan(files=files, relative=relative / "stack", name=split_name(relative / stem)))
    return scans


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
    images: Sequence[FoundScan], labels: Sequence[FoundScan], options: SourceOptions, found: Discovery
) -> dict[str, list[LabelFiles]]:
    """Return the label files of every image by its name. List labels without an image."""
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
        pairs += [(image, label, class_name) for image in owners]
    if shared:
        found.notes.append(f"{shared} labels belong to several images each (channels of one case)")
    names = sorted({name for _, _, name in pairs if name})
    # By name and not by order of files, so that the ids do not change when a case is added.
    class_ids = {name: number for number, name in enumerate(names, start=1)}
    if class_ids:
        found.label_names = {number: name for name, number in class_ids.items()}
        for target in sorted(set((options.label_map or {}).values()) - {0}):
            found.label_names.setdefault(target, f"label {target}")
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
        found.notes.append(f"{len(several)} scans have several labels, they are merged: {', '.join(several[:3])}")
    return labels_of


def _refusal(labels: Sequence[LabelFiles], options: SourceOptions, found: Discovery) -> str | None:
    """Return why labels with ids cannot be put beside labels with one class per file, or None if they can."""
    named = found.label_names is not None and options.label_map is None and options.label_names is None
    if named and any(label.class_id is None and label.ids is None for label in labels):
        # Id 1 of this file would silently get the name of the first class of the other files.
        return (
            "the label has ids, while other files of the source name one class each. Add the class to the name "
            "(CASE_seg_NAME), or pass --label-map for the ids."
        )
    return None


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
    if channels := index.by_case.get(label.name.key):
        return channels, None
    if len(loose := index.by_loose_key.get(label.name.loose_key, [])) == 1:
        return loose, None
    alone = index.by_folder.get(label.name.folders, [])
    if len(alone) == 1 and (label.name.folders or not label.name.key):
        return alone, label.name.class_name
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
    ids = {name: number for number, name in enumerate(sorted({n for one in names.values() for n in one.values()}), 1)}
    if options.label_map is not None:
        return dict.fromkeys(paths, options.label_map)
    found.label_names = {number: name for name, number in ids.items()}
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
