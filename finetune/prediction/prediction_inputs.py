"""Scans to segment, from a file, a folder or DICOM series, and the names of their results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from samgraft.shared.errors import DataError
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.discovery import SourceOptions, refuse_unused_frame
from samgraft.shared.scans.readers.registry import (
    format_by_content,
    format_by_suffix,
    name_packed_scan,
    scan_suffix,
)
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.sources import discover

SUFFIX = "_seg"
"""Suffix of results. ``store build`` recognises it as a label, and no scan itself has it."""
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
"""Endings of videos, which users of SAM 2 may expect to be segmented."""


@dataclass(frozen=True, kw_only=True)
class InputScan:
    """Scan to segment."""

    name: str
    """Path below the folder, or the file's name, as prompts files use it."""
    case: SourceCase
    out_stem: str
    """Path of the results below the output folder, without the end of the format."""

    @property
    def is_dicom(self) -> bool:
        """True if a DICOM segmentation can refer to it."""
        return self.case.scan.format == ScanFormat.DICOM


@dataclass(kw_only=True)
class Inputs:
    """Scans to segment and files that were left out."""

    scans: list[InputScan]
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files that were left out, by reason."""
    notes: list[str] = field(default_factory=list)
    """Notes about the folder, for the terminal."""


def find_inputs(
    source: Path, *, frame: int | None = None, allow_gaps: bool = False, pictures_are_scans: bool = False
) -> Inputs:
    """List the scans of a file or folder without their labels.

    Args:
        source: A scan file, a folder (plain, nnU-Net, Decathlon, BIDS, DICOM series), or a CSV list.
        frame: Number of the volume of 4D files, from 0.
        allow_gaps: Accept missing DICOM slices.
        pictures_are_scans: True if every picture is a scan of its own. Otherwise a folder of pictures is one stack.

    Raises:
        DataError: If there is no scan, or the file has no known format.
        UsageError: If ``frame`` is given and no scan can have several volumes.
    """
    if source.is_file() and scan_suffix(source) not in {".csv", ".tsv"}:
        return _single_file(source, frame=frame, allow_gaps=allow_gaps)
    options = SourceOptions(frame=frame, allow_gaps=allow_gaps, pictures_are_scans=pictures_are_scans)
    found = discover(source, options)
    # Who the patients are does not matter here, and there is no option for it.
    notes = [note for note in found.notes if "--patient-pattern" not in note]
    inputs = Inputs(scans=[], left_out=found.left_out, notes=notes)
    # Labels next to scans, as in training folders, are not scans to segment.
    if num := sum(len(case.labels) for case in found.cases) + len(found.labels_without_image):
        inputs.left_out["label file (not a scan)"] += num
    stems = make_unique([_stem(case, source) for case in found.cases])
    inputs.scans = [
        InputScan(name=_name(case, source), case=_without_labels(case), out_stem=f"{stem}{SUFFIX}")
        for case, stem in zip(found.cases, stems, strict=True)
    ]
    return inputs


def _single_file(path: Path, *, frame: int | None, allow_gaps: bool) -> Inputs:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(
            "videos are not segmented, not even by SAM 2, whose memory of earlier frames is not used (slices are "
            "segmented one by one).",
            where=path.name,
            next_command="save the frames as pictures in a folder, and give that folder",
        )
    kind = format_by_suffix(path) or format_by_content(path)
    if (packed := name_packed_scan(path)) is not None:
        raise DataError(f"the file is {packed}.", where=path.name)
    if kind is None:
        raise DataError(
            f"the file must be a scan (NIfTI, NRRD, DICOM, NumPy, a picture), got {scan_suffix(path) or 'no suffix'}.",
            where=path.name,
        )
    scan = ScanFiles(format=kind, paths=(path,), name=path.name, frame=frame, allow_gaps=allow_gaps)
    refuse_unused_frame(frame, [scan])
    case = SourceCase(name=path.name, patient_key=path.name, scan=scan)
    return Inputs(scans=[InputScan(name=path.name, case=case, out_stem=f"{_file_stem(path.name)}{SUFFIX}")])


def _without_labels(case: SourceCase) -> SourceCase:
    # A refusal because of the labels does not concern the scan.
    return replace(case, labels=(), refusal=None)


def _name(case: SourceCase, source: Path) -> str:
    """Return the name of a scan, the folder's name for a series directly in the folder."""
    first, *rest = case.name.split(" ", 1)
    return " ".join([source.resolve().name, *rest]) if first == "." else case.name


def _stem(case: SourceCase, source: Path) -> str:
    name = _name(case, source)
    # The name of a series or stack is that of its folder, even if it is a single file.
    is_file = case.scan.format != ScanFormat.DICOM and name.endswith(case.scan.paths[0].name)
    parts = [part for part in (_file_stem(name) if is_file else name).split("/") if part not in {"", ".", ".."}]
    # Results must have valid names on Windows too, which allows fewer characters than other systems.
    return "/".join(re.sub(r'[\x00-\x1f<>:"|?*\\]', "_", part) for part in parts)


def _file_stem(name: str) -> str:
    suffix = scan_suffix(name)
    return name[: len(name) - len(suffix)] if suffix else name


def make_unique(names: Sequence[str]) -> list[str]:
    """Add numbers to repeated names, e.g. those of ``a.nii`` and ``a.nrrd``."""
    # Compared without case, because Windows and macOS would write "A" and "a" into one file.
    used: set[str] = set()
    result = []
    for name in names:
        candidates = (name if number == 1 else f"{name}-{number}" for number in count(1))
        free = next(one for one in candidates if one.casefold() not in used)
        used.add(free.casefold())
        result.append(free)
    return result
