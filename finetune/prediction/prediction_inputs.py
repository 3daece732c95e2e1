"""What is to be segmented: a file, a folder in any known layout, or DICOM series; and what the results are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.errors import DataError
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.discovery import SourceOptions
from samgraft.shared.scans.readers.registry import format_by_content, format_by_suffix, scan_suffix
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.sources import discover

SUFFIX = "_seg"
"""Added to the name of a scan: recognised as a label by ``store build``, and never the name of the scan itself."""


@dataclass(frozen=True, kw_only=True)
class InputScan:
    """One scan to segment."""

    name: str
    """Path below the folder, or the file's name; what a prompts file calls it."""
    case: SourceCase
    out_stem: str
    """Path of the results below the output folder, without suffix."""

    @property
    def is_dicom(self) -> bool:
        """Whether a DICOM segmentation can refer to it."""
        return self.case.scan.format == ScanFormat.DICOM


@dataclass(kw_only=True)
class Inputs:
    """Scans and what was not taken."""

    scans: list[InputScan]
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def find_inputs(source: Path, *, frame: int | None = None, allow_gaps: bool = False) -> Inputs:
    """List the scans of a file or folder; labels beside them are left out.

    Args:
        source: A scan file, a folder (plain, nnU-Net, Decathlon, BIDS, DICOM series), or a CSV list.
        frame: Which volume of 4D files.
        allow_gaps: Accept missing DICOM slices.

    Raises:
        DataError: If nothing is there, or the file is no known scan.
    """
    if source.is_file() and scan_suffix(source) not in {".csv", ".tsv"}:
        return _single_file(source, frame=frame, allow_gaps=allow_gaps)
    found = discover(source, SourceOptions(frame=frame, allow_gaps=allow_gaps))
    inputs = Inputs(scans=[], left_out=found.left_out, notes=list(found.notes))
    if num := sum(len(case.labels) for case in found.cases) + len(found.labels_without_image):
        inputs.left_out["label file (not a scan)"] += num
    stems = _unique([_stem(case, source) for case in found.cases])
    inputs.scans = [
        InputScan(name=_name(case, source), case=_without_labels(case), out_stem=f"{stem}{SUFFIX}")
        for case, stem in zip(found.cases, stems, strict=True)
    ]
    return inputs


def _single_file(path: Path, *, frame: int | None, allow_gaps: bool) -> Inputs:
    kind = format_by_suffix(path) or format_by_content(path)
    if kind is None:
        raise DataError(
            f"the file must be a scan (NIfTI, NRRD, DICOM, NumPy, a picture), got {scan_suffix(path) or 'no suffix'}.",
            where=path.name,
        )
    scan = ScanFiles(format=kind, paths=(path,), name=path.name, frame=frame, allow_gaps=allow_gaps)
    case = SourceCase(name=path.name, patient_key=path.name, scan=scan)
    return Inputs(scans=[InputScan(name=path.name, case=case, out_stem=f"{_file_stem(path.name)}{SUFFIX}")])


def _without_labels(case: SourceCase) -> SourceCase:
    return SourceCase(name=case.name, patient_key=case.patient_key, study_key=case.study_key, scan=case.scan)


def _name(case: SourceCase, source: Path) -> str:
    """A series directly in the folder is named after the folder."""
    first, *rest = case.name.split(" ", 1)
    return " ".join([source.resolve().name, *rest]) if first == "." else case.name


def _stem(case: SourceCase, source: Path) -> str:
    name = _name(case, source)
    is_file = len(case.scan.paths) == 1 and case.scan.format not in (ScanFormat.DICOM, ScanFormat.IMAGES)
    parts = [part for part in (_file_stem(name) if is_file else name).split("/") if part not in {"", ".", ".."}]
    # Names become files on systems with other rules too; what cannot be kept becomes a line.
    return "/".join(re.sub(r'[\x00-\x1f<>:"|?*\\]', "_", part) for part in parts)


def _file_stem(name: str) -> str:
    suffix = scan_suffix(name)
    return name[: len(name) - len(suffix)] if suffix else name


def _unique(stems: Sequence[str]) -> list[str]:
    """Number the names that several scans share, e.g. ``a.nii`` and ``a.nrrd``."""
    seen: Counter[str] = Counter()
    result = []
    for stem in stems:
        seen[stem.casefold()] += 1
        count = seen[stem.casefold()]
        result.append(stem if count == 1 else f"{stem}-{count}")
    return result
