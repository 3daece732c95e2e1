"""Result of the search for scans in a source, and the options of the user for it."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import IGNORE_NAME, LabelFiles, SourceCase
from samgraft.shared.scans.names import patient_folder, patient_of_stem, without_contrasts
from samgraft.shared.scans.readers.registry import READERS, scan_stem
from samgraft.shared.scans.readers.scan import ScanFiles
from samgraft.shared.scans.volume import IGNORE_LABEL


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of the user for a source."""

    patient_pattern: str | None = None
    """Regular expression on the path below the root. Its first group is the patient."""
    site_pattern: str | None = None
    """Regular expression on the path below the root. Its first group is the site or scanner."""
    label_map: Mapping[int, int] | None = None
    """Map from label id in the files to label id in the store. 0 drops an id."""
    label_names: Mapping[int, str] | None = None
    label_desc: str | None = None
    """Value of ``desc-`` of the BIDS labels to use. None uses all."""
    ignore_label: int | None = None
    """Label id, after the map, of voxels that are not annotated. None takes the id with the name ``ignore``, if any."""
    frame: int | None = None
    """Index of the volume to read from 4D files."""
    allow_gaps: bool = False
    round_labels: bool = False
    pictures_are_scans: bool = False
    """True if every picture is a scan of its own (X-ray, ultrasound). Otherwise a folder of pictures is one stack."""


def refuse_unused_frame(frame: int | None, scans: Iterable[ScanFiles]) -> None:
    """Refuse a chosen volume if no scan is of a format with several volumes, or their volumes are scans of their own.

    Raises:
        UsageError: If it would be ignored for every scan.
    """
    if frame is not None and not any(READERS[one.format].has_volumes and one.frame == frame for one in scans):
        raise UsageError("--frame has no effect, because no scan is a file with several volumes. Leave it out.")


def pictures_are_scans(meaning: str, modality: str) -> bool:
    """Return whether every picture is a scan of its own.

    Args:
        meaning: ``stack``, ``single``, or ``auto``, which takes pictures of X-ray and ultrasound as scans.
        modality: Kind of scan.
    """
    return meaning == "single" or (meaning == "auto" and modality.lower() in ("xray", "ultrasound"))


@dataclass(kw_only=True)
class Discovery:
    """Cases of a source, and the files that are no part of one."""

    layout: str
    cases: list[SourceCase] = field(default_factory=list)
    label_names: dict[int, str] | None = None
    """Names of the label ids. None names them after the ids that the files hold."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files."""
    notes: list[str] = field(default_factory=list)
    labels_without_image: list[str] = field(default_factory=list)
    images_without_label: list[str] = field(default_factory=list)

    def set_ignored(self, wanted: int | None) -> None:
        """Mark one label id as not annotated, the wanted one or the one with the name ``ignore``.

        Raises:
            UsageError: If both exist and differ, or several ids have this name.
        """
        named = {i for i, name in (self.label_names or {}).items() if name.strip().lower() == IGNORE_NAME}
        ids = named | ({wanted} if wanted is not None else set())
        if len(ids) > 1:
            raise UsageError(
                f"one label id can be ignored, got {', '.join(map(str, sorted(ids)))}. Join them with --label-map.",
                where="--ignore-label",
            )
        for ignore_id in ids:
            if self.label_names is not None:
                self.label_names = {i: name for i, name in self.label_names.items() if i != ignore_id}
            self.cases = [
                replace(case, labels=tuple(_with_ignored(label, ignore_id, wanted) for label in case.labels))
                for case in self.cases
            ]

    def refuse_unused(self, options: SourceOptions) -> None:
        """Refuse options that this source ignores, which are mistakes.

        Options that permit something (gaps, rounding, NaN) may find nothing to permit.

        Raises:
            UsageError: With the option and the reason.
        """
        labels = [label for case in self.cases for label in case.labels]
        have_ids = any(label.class_id is None for label in labels)
        unused = {
            "--label-map": options.label_map and not have_ids,
            "--label-names": options.label_names and not labels,
            "--ignore-label": options.ignore_label is not None and not labels,
        }
        if given := [option for option, is_unused in unused.items() if is_unused]:
            why = "its labels name one class each" if labels else "it has no label that belongs to a scan"
            raise UsageError(f"{' and '.join(given)} would be ignored for this source, because {why}. Leave it out.")
        if options.label_desc is not None and self.layout != "BIDS":
            raise UsageError(f"--label-desc is for labels of BIDS, and this source is read as {self.layout}.")
        refuse_unused_frame(options.frame, (case.scan for case in self.cases))

    def finish(self) -> None:
        """Sort the cases, refuse copies that contradict each other, and list images without label."""
        self.cases = [_refuse_twin(case) for case in _merge_listed_twice(self.cases, self.left_out)]
        # The same number in imagesTr and imagesTs needs the folder to be a name, and a.nii beside a.nii.gz its ending.
        for longer_name in (lambda path, name: f"{path.parent.name}/{name}", lambda path, _: "/".join(path.parts[-2:])):
            counts = Counter(case.name for case in self.cases)
            self.cases = [
                case if counts[case.name] == 1 else replace(case, name=longer_name(case.scan.paths[0], case.name))
                for case in self.cases
            ]
        self._unify_patients()
        self._note_shared_labels()
        self.labels_without_image.sort()
        self.cases.sort(key=lambda case: case.name)
        if any(case.labels for case in self.cases):
            self.images_without_label = [case.name for case in self.cases if not case.labels]

    def _unify_patients(self) -> None:
        """Give patients one spelling, because ``P01`` and ``p 01`` in two splits would be a leak."""
        spellings: dict[str, set[str]] = defaultdict(set)
        for case in self.cases:
            spellings[_one_spelling(case.patient_key)].add(case.patient_key)
        self.cases = [replace(case, patient_key=min(spellings[_one_spelling(case.patient_key)])) for case in self.cases]
        if many := sum(1 for keys in spellings.values() if len(keys) > 1):
            self.notes.append(
                f"{counted(many, 'patient is', 'patients are')} written in several ways (upper case, spaces) and "
                "count as one each"
            )

    def _note_shared_labels(self) -> None:
        patients: dict[Path, set[str]] = defaultdict(set)
        for case in self.cases:
            for label in case.labels:
                patients[label.scan.paths[0]].add(case.patient_key)
        if shared := sorted(path.name for path, keys in patients.items() if len(keys) > 1):
            self.notes.append(
                f"{counted(len(shared), 'label belongs', 'labels belong')} to scans of several patients each, e.g. "
                f"{shared[0]}"
            )


class NameRules:
    """Patient and site of a scan, by the patterns of the user or by the names of files and folders."""

    def __init__(self, options: SourceOptions) -> None:
        self._patient = _compile(options.patient_pattern, "--patient-pattern")
        self._site = _compile(options.site_pattern, "--site-pattern")

    @property
    def has_patient(self) -> bool:
        """True if the user gave a pattern for patients."""
        return self._patient is not None

    def patient(self, relative: str, default: str) -> str:
        """Return the patient of a path."""
        return _group(self._patient, relative, "--patient-pattern") or default

    def site(self, relative: str) -> str | None:
        """Return the site of a path."""
        return _group(self._site, relative, "--site-pattern")


def patients_by_path(relatives: Iterable[str], found: Discovery) -> dict[str, str]:
    """Return the patient of every path of a source without patient ids, with notes on doubtful decisions.

    A patient is the first folder that is no general one (``train``, ``images``, ``T1``). Without such a folder it is
    the file itself. Files and folders whose names differ only in frame, time point, contrast or side are one patient.
    """
    by_folder: dict[str, str] = {}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for relative in relatives:
        path = PurePosixPath(relative)
        folder = patient_folder(path)
        if folder is not None:
            by_folder[relative] = folder
            continue
        stem = patient_of_stem(scan_stem(path.name))
        # Bare numbers start again in every part of a split: 001 in imagesTr and in imagesTs are two patients.
        # In T1 and in T2 they are one.
        by_stem[f"{without_contrasts(path.parent)}/{stem}" if stem.isdecimal() else stem].append(relative)
    folder_of = merge_patients(
        {folder: patient_of_stem(folder, is_file=False) for folder in by_folder.values()}, found, "folders"
    )
    by_folder = {relative: folder_of[folder] for relative, folder in by_folder.items()}
    _note_folders(by_folder, found)
    merged = merge_patients({r: stem for stem, group in by_stem.items() for r in group}, found)
    if any(merged[r] == r for r in merged):
        found.notes.append("every file directly below the root counts as its own patient; else give --patient-pattern")
    return by_folder | merged


def merge_patients(id_of: Mapping[str, str], found: Discovery, what: str = "scans") -> dict[str, str]:
    """Return the patient of every case, which is the case itself unless others share its id.

    Args:
        id_of: Case -> its id without frame, time point, contrast or side.
        found: Discovery that gets a note about merged cases.
        what: Name of the cases in the note.
    """
    counts = Counter(id_of.values())
    merged = {case: patient if counts[patient] > 1 else case for case, patient in id_of.items()}
    if num := sum(1 for case in merged if counts[id_of[case]] > 1):
        patients = sum(1 for count in counts.values() if count > 1)
        found.notes.append(
            f"{num} {what} count as {counted(patients, 'patient')}, because their names differ only in frame, time "
            "point, contrast or side; else give --patient-pattern"
        )
    return merged


def class_ids_of(names: Iterable[str], options: SourceOptions, found: Discovery) -> dict[str, int]:
    """Give classes that files name an id each, and record their names.

    The ids of ``--label-names`` count. Otherwise they follow the alphabet and not the files, so that they do not change
    when a case is added, and leave out ids that other labels of the source have.

    Raises:
        UsageError: If ``--label-names`` lacks a class.
    """
    wanted = sorted(set(names))
    if options.label_names is not None:
        ids = {name: number for number, name in options.label_names.items()}
        if missing := [name for name in wanted if name not in ids]:
            raise UsageError(f"--label-names must have the classes that files name, {', '.join(missing)} is missing.")
        return ids
    if not wanted:
        return {}
    ids = {name: number for number, name in (found.label_names or {}).items()}
    targets = set((options.label_map or {}).values()) - {0}
    free = (number for number in itertools.count(1) if number not in targets | set(ids.values()))
    for name in wanted:
        if name not in ids:
            ids[name] = next(free)
    found.label_names = {number: f"label {number}" for number in targets} | {
        number: name for name, number in ids.items()
    }
    return ids


def refuse_unnamed(labels: Sequence[LabelFiles], options: SourceOptions, found: Discovery) -> str | None:
    """Return why labels with ids cannot be put beside labels with one class per file, or None if they can."""
    named = found.label_names is not None and options.label_map is None and options.label_names is None
    if named and any(label.class_id is None and label.ids is None for label in labels):
        # Id 1 of this file would silently get the name of the first class of the other files.
        return (
            "the label has ids, while other files of the source name one class each. Add the class to the name "
            "(CASE_seg_NAME), or pass --label-map for the ids, e.g. --label-map 1=1,2=2; named classes get free ids."
        )
    return None


def label_files(path: Path, reader: str, options: SourceOptions, *, class_id: int | None = None) -> LabelFiles:
    """Describe one label file. ``class_id`` makes everything in it one class."""
    scan = ScanFiles(format=reader, paths=(path,), name=path.name, frame=options.frame)
    ids = options.label_map if class_id is None else None
    return LabelFiles(scan=scan, ids=ids, class_id=class_id, round_values=options.round_labels)


def _with_ignored(label: LabelFiles, ignore_id: int, wanted: int | None) -> LabelFiles:
    if label.class_id is None:
        return replace(label, ignore_id=ignore_id)
    # A mask file of its own for what is not annotated, or a second value in the mask of a class. The id of a name is no
    # such value: it numbers the files, and the masks in all of them are 1.
    return replace(label, class_id=IGNORE_LABEL) if label.class_id == ignore_id else replace(label, ignore_id=wanted)


def parse_label_map(text: str) -> dict[int, int]:
    """Parse ``1=2,4=3``. Ids in the files may be negative.

    Raises:
        UsageError: If it is not of this form.
    """
    return {key: _whole(value, "--label-map") for key, value in _pairs(text, "--label-map").items()}


def parse_label_names(text: str) -> dict[int, str]:
    """Parse ``1=tumour,2=oedema``.

    Raises:
        UsageError: If it is not of this form.
    """
    return _pairs(text, "--label-names")


def _pairs(text: str, option: str) -> dict[int, str]:
    result = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        left, _, right = part.partition("=")
        if not right.strip():
            raise UsageError(f"{option} must look like 1=...,2=..., got {part!r}.")
        is_negative = option == "--label-map" and left.strip().startswith("-")
        number = _whole(left.strip().removeprefix("-") if is_negative else left, option)
        result[-number if is_negative else number] = right.strip()
    return result


def _whole(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise UsageError(f"{option} must have label ids that are whole numbers, got {text!r}.")
    return int(text)


def _note_folders(by_folder: Mapping[str, str], found: Discovery) -> None:
    """Note folders that may hold several patients. Whether they do cannot be decided from names."""
    subfolders: dict[str, set[str]] = defaultdict(set)
    stems: dict[str, set[str]] = defaultdict(set)
    for relative, folder in by_folder.items():
        path = PurePosixPath(relative)
        place = path.parts.index(patient_folder(path) or path.parts[0])
        if len(path.parts) > place + 2:
            subfolders[folder].add(path.parts[place + 1])
            continue
        stem = patient_of_stem(scan_stem(path.name))
        if any(char.isdigit() for char in stem):
            stems[folder].add(stem)
    if len(by_folder) > 1 and len(set(by_folder.values())) == 1:
        found.notes.append(
            f"{counted(len(by_folder), 'scan is', 'scans are')} below one folder and count as one patient: give the "
            "folder below it, or --patient-pattern"
        )
    elif many := sorted(folder for folder, below in subfolders.items() if len(below) > 3):
        found.notes.append(
            f"{len(many)} folders count as one patient each but hold more than three folders, e.g. {many[0]}: if those "
            "are the patients, give --patient-pattern"
        )
    elif many := sorted(folder for folder, names in stems.items() if len(names) > 3):
        found.notes.append(
            f"{len(many)} folders count as one patient each but hold scans with more than three numbered names, e.g. "
            f"{many[0]}: if those are the patients, give --patient-pattern"
        )


def _merge_listed_twice(cases: Sequence[SourceCase], left_out: Counter[str]) -> list[SourceCase]:
    """Keep one of the cases with the same files, or refuse it if patients or labels contradict each other."""
    groups: dict[tuple[object, ...], list[SourceCase]] = defaultdict(list)
    for case in cases:
        groups[(*(path.resolve() for path in case.scan.paths), case.scan.frame)].append(case)
    merged = []
    for group in groups.values():
        first = next((case for case in group if case.labels), group[0])
        if len(group) > 1:
            left_out["note: image listed more than once, read once"] += len(group) - 1
            labels = {tuple(label.scan.paths for label in case.labels) for case in group if case.labels}
            if len(labels) > 1 or len({case.patient_key for case in group}) > 1:
                reason = f"the image is listed {len(group)} times with different labels or patients. Keep one entry."
                first = replace(first, refusal=reason)
        merged.append(first)
    return merged


def _one_spelling(patient: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", patient).casefold().split())


def _refuse_twin(case: SourceCase) -> SourceCase:
    """Refuse a scan that is there both plain and compressed, because either could be the newer one."""
    path = case.scan.paths[0]
    plain = path.with_name(path.name.removesuffix(".gz"))
    packed = plain.with_name(f"{plain.name}.gz")
    if plain.suffix != ".nii" or len(case.scan.paths) > 1 or not (plain.exists() and packed.exists()):
        return case
    return replace(case, refusal=f"{plain.name} and {packed.name} are both there, which is ambiguous. Remove one.")


def _compile(pattern: str | None, option: str) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise UsageError(f"{option} must be a regular expression, got {pattern!r} ({err}).") from err
    if compiled.groups < 1:
        raise UsageError(f"{option} must have one group in parentheses, got {pattern!r}, e.g. '^(sub-[^_/]+)'.")
    return compiled


def _group(pattern: re.Pattern[str] | None, relative: str, option: str) -> str | None:
    if pattern is None:
        return None
    found = pattern.search(relative)
    if found is None or not found.group(1):
        raise DataError(f"{option} must match every scan, it does not match one.", where=relative)
    return found.group(1)
