"""What a source of scans turned out to be: its layout, its cases, and every list a person should look at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.file_index import scan_stem, scan_suffix
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a person may say about a source."""

    patient_pattern: str | None = None
    """Regular expression on the path below the root; its first group is the patient."""
    site_pattern: str | None = None
    """The same for site or scanner."""
    label_map: Mapping[int, int] | None = None
    """Label id in the files -> in the store; 0 drops it."""
    label_names: Mapping[int, str] | None = None
    frame: int | None = None
    """Which volume of 4D files."""
    allow_gaps: bool = False
    round_labels: bool = False
    pictures_are_scans: bool = False
    """Every picture is a scan of its own (X-ray, ultrasound); otherwise a folder of pictures is one stack."""


@dataclass(kw_only=True)
class Discovery:
    """Cases of a source and what was left out."""

    layout: str
    cases: list[SourceCase] = field(default_factory=list)
    label_names: dict[int, str] | None = None
    """None: named after their ids once they are known."""
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    labels_without_image: list[str] = field(default_factory=list)
    images_without_label: list[str] = field(default_factory=list)

    def finish(self) -> None:
        """Sort the cases, list images without label where others have one."""
        self.cases.sort(key=lambda case: case.name)
        if any(case.labels for case in self.cases):
            self.images_without_label = [case.name for case in self.cases if not case.labels]


class NameRules:
    """Patient and site of a scan, from the user's patterns."""

    def __init__(self, options: SourceOptions) -> None:
        self._patient = _compile(options.patient_pattern, "--patient-pattern")
        self._site = _compile(options.site_pattern, "--site-pattern")

    @property
    def has_patient(self) -> bool:
        """Whether the user said how to tell patients."""
        return self._patient is not None

    def patient(self, relative: str, default: str) -> str:
        """Return the patient of a path."""
        return _group(self._patient, relative, "--patient-pattern") or default

    def site(self, relative: str) -> str | None:
        """Return the site of a path."""
        return _group(self._site, relative, "--site-pattern")


def scan_files(path: Path, kind: ScanFormat, name: str, options: SourceOptions) -> ScanFiles:
    """Describe a scan of one file."""
    return ScanFiles(format=kind, paths=(path,), name=name, frame=options.frame, allow_gaps=options.allow_gaps)


def label_files(path: Path, kind: ScanFormat, options: SourceOptions, *, only_id: int | None = None) -> LabelFiles:
    """Describe one label file; ``only_id`` makes everything in it one class."""
    ids = options.label_map if only_id is None else {1: only_id, 255: only_id}
    scan = ScanFiles(format=kind, paths=(path,), name=path.name)
    return LabelFiles(scan=scan, ids=ids, round_values=options.round_labels)


LABEL_WORDS = "labels?|labelmap|seg|segmentation|masks?|dseg|gt|groundtruth|annotation"
_LABEL_STEM = re.compile(rf"^(?P<case>.+?)[-_.](?:{LABEL_WORDS})(?:[-_.](?P<name>[A-Za-z][\w-]*))?$", re.IGNORECASE)
_IMAGE_STEM = re.compile(r"^(?P<case>.+?)[-_.](?:image|img|scan|vol|volume)$", re.IGNORECASE)
_LABEL_FOLDER = re.compile(rf"^(?:{LABEL_WORDS})(?:tr|ts)?$", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"^(?:images?|imgs?|scans?|volumes?|data)(?:tr|ts)?$", re.IGNORECASE)


def label_key(path: Path, root: Path) -> tuple[str, str | None] | None:
    """Return (key of the case, class name) if a path is a label by its name or folder, else None."""
    folders = list(path.relative_to(root).parent.parts)
    in_label_folder = any(_LABEL_FOLDER.match(part) for part in folders)
    found = _LABEL_STEM.match(scan_stem(path))
    if found is None and not in_label_folder:
        return None
    stem = found["case"] if found else scan_stem(path)
    return _key(folders, stem), (found["name"] if found else None)


def image_key(path: Path, root: Path) -> str:
    """Return the key under which the labels of an image are looked up."""
    return _key(list(path.relative_to(root).parent.parts), scan_stem(path))


def _key(folders: Iterable[str], stem: str) -> str:
    kept = [part for part in folders if not _LABEL_FOLDER.match(part) and not _IMAGE_FOLDER.match(part)]
    found = _IMAGE_STEM.match(stem)
    return "/".join([*kept, found["case"] if found else stem]).casefold()


def parse_label_map(text: str) -> dict[int, int]:
    """Parse ``1=2,4=3``.

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
        result[_whole(left, option)] = right.strip()
    return result


def _whole(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise UsageError(f"{option} must have label ids that are whole numbers, got {text!r}.")
    return int(text)


def known_format(path: Path) -> ScanFormat | None:
    """Return the format by suffix."""
    from samgraft.shared.scans.file_index import SCAN_SUFFIXES

    return SCAN_SUFFIXES.get(scan_suffix(path))


def _compile(pattern: str | None, option: str) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise UsageError(f"{option} must be a regular expression, got {pattern!r}: {err}.") from err
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
