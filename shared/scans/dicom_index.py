"""DICOM files grouped into series by their headers, without reading pixels."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from samgraft.shared.scans.discovery import Discovery
from samgraft.shared.scans.names import is_placeholder_id, patient_folder
from samgraft.shared.scans.readers.dicom import find_tag
from samgraft.shared.scans.readers.dicom_geometry import is_parallel
from samgraft.shared.scans.readers.registry import name_packed_scan

_MACHINE_TAGS = ("InstitutionName", "Manufacturer", "ManufacturerModelName", "DeviceSerialNumber")
_TAGS = [
    *("SOPClassUID", "PatientID", "PatientName", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ImageOrientationPatient", "ImageType", "Rows", "Columns", "NumberOfFrames", "Modality", *_MACHINE_TAGS),
    *("ReferencedSeriesSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
SEGMENTATION_CLASSES = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
_STORAGE_CLASS = "1.2.840.10008.5.1.4.1.1."
# Last parts of the classes CR, DX and MG, CT, MR, US, secondary capture, XA and RF, NM, PET.
_IMAGE_CLASSES = ("1", "1.1", "2", "3.1", "4", "6.1", "7", "12", "20", "128", "130")
_SPECTROSCOPY_CLASS = f"{_STORAGE_CLASS}4.2"
_PREAMBLE_BYTES = 132


@dataclass(kw_only=True)
class DicomSeries:
    """Files of one series with one orientation in one frame of reference."""

    patient: str
    """Patient id, or an empty text if the header holds none or a placeholder such as ANON."""
    study: str
    series_uid: str
    frame_of_reference: str
    orientation: npt.NDArray[np.float64] | None
    """The six direction cosines of the first file. None if it has none."""
    site: str | None
    paths: list[Path] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SegmentationFile:
    """One DICOM segmentation, and the identifiers that lead to its scan."""

    path: Path
    patient: str
    study: str
    frame_of_reference: str
    referenced_series: frozenset[str]


@dataclass(kw_only=True)
class _DicomIndex:
    """Files that are sorted in so far."""

    root: Path
    found: Discovery
    series: dict[tuple[Any, ...], list[DicomSeries]] = field(default_factory=lambda: defaultdict(list))
    segmentations: list[SegmentationFile] = field(default_factory=list)
    without_orientation: Counter[str] = field(default_factory=Counter)
    """Modality -> number of cross-sectional files that cannot be stacked."""


def group_dicom(
    paths: Sequence[Path], root: Path, found: Discovery
) -> tuple[list[DicomSeries], list[SegmentationFile]]:
    """Group files into series, and count those that are no image.

    A series is what has one patient, study, SeriesInstanceUID, frame of reference, picture size and orientation.
    Anonymisers write one SeriesInstanceUID for several patients, and scanners put planes of several orientations
    under one. Where the patient id is missing too, the patient's folder takes its place.
    """
    index = _DicomIndex(root=root, found=found)
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd values of tags that are not used here
                _sort_file(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS), path, index)
        except Exception:  # values are parsed when they are first used, and damaged ones raise many types
            if (reason := _reason_not_dicom(path)) is None:
                index.series["damaged", str(path)].append(_damaged(path))
            else:
                found.left_out[reason] += 1
    for modality, count in sorted(index.without_orientation.items()):
        found.notes.append(f"{count} {modality} files have no orientation: each is a scan of its own")
    return [one for group in index.series.values() for one in group], index.segmentations


def _sort_file(header: Any, path: Path, index: _DicomIndex) -> None:
    kind = str(header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", ""))
    has_pixels = bool(header.get("Rows"))
    if kind in SEGMENTATION_CLASSES:
        index.segmentations.append(_segmentation(header, path))
    elif kind == DICOMDIR_CLASS:
        index.found.left_out["DICOMDIR (files are found without it)"] += 1
    elif not has_pixels and _is_image_class(kind):  # cut before its picture size
        index.series["damaged", str(path)].append(_damaged(path))
    elif not has_pixels:
        index.found.left_out["DICOM without pixels (report, plan, contours)"] += 1
    elif "LOCALIZER" in (header.get("ImageType") or ()):
        index.found.left_out["DICOM localizer"] += 1
    else:
        _add_to_series(header, path, index)


def series_of_segmentation(segmentation: SegmentationFile, series: Sequence[DicomSeries]) -> DicomSeries | None:
    """Return the one series that a segmentation belongs to, or None if none or several fit.

    A reference to a series decides. Without one, study and frame of reference must leave a single series.
    """
    fitting = [one for one in series if one.patient == segmentation.patient and one.study == segmentation.study]
    if segmentation.referenced_series:
        candidates = [one for one in fitting if one.series_uid in segmentation.referenced_series]
        # Segmentations made elsewhere may carry another patient id or study: then the reference alone decides.
        fitting = candidates or [one for one in series if one.series_uid in segmentation.referenced_series]
    if len(fitting) > 1:
        fitting = [one for one in fitting if one.frame_of_reference == segmentation.frame_of_reference] or fitting
    return fitting[0] if len(fitting) == 1 else None


def _add_to_series(header: Any, path: Path, index: _DicomIndex) -> None:
    places = [header]
    num_frames = _number(header.get("NumberOfFrames", 1))
    if "PerFrameFunctionalGroupsSequence" in header and num_frames == 1:
        # Enhanced files with one frame each form a series like classic files; their orientation is in the groups.
        groups = [list(header.get(f"{name}FunctionalGroupsSequence") or [])[:1] for name in ("PerFrame", "Shared")]
        places = [*groups[0], *groups[1], header]
    orientation = _orientation(places)
    uid, patient = str(header.get("SeriesInstanceUID", "")), _patient(header)
    study, frame = str(header.get("StudyInstanceUID", "")), str(header.get("FrameOfReferenceUID", ""))
    # Projections, cine loops and multi-frame files have no common stack: each file is a scan of its own. Without a
    # SeriesInstanceUID the folder takes its place.
    alone = orientation is None or num_frames != 1
    place = str(path) if alone else "" if uid else str(path.parent)
    owner = patient or patient_folder(path.relative_to(index.root)) or ""
    key = (owner, study, uid, frame, str(header.get("Rows")), str(header.get("Columns")), place)
    group = index.series[key]
    one = next((s for s in group if alone or _same_orientation(s.orientation, orientation)), None)
    if one is None:
        machine = [str(header.get(name, "")) for name in _MACHINE_TAGS]
        one = DicomSeries(
            patient=patient,
            study=study,
            series_uid=uid,
            frame_of_reference=frame,
            orientation=orientation,
            site="/".join(machine) if any(machine) else None,
        )
        group.append(one)
    # Cross-sectional slices without orientation cannot be stacked, which the report must mention.
    modality = str(header.get("Modality", ""))
    if orientation is None and num_frames == 1 and modality in ("CT", "MR", "PT"):
        index.without_orientation[modality] += 1
    one.paths.append(path)


def _same_orientation(a: npt.NDArray[np.float64] | None, b: npt.NDArray[np.float64] | None) -> bool:
    # A comparison with the first file, not rounding: noise around a rounding limit would split the series.
    return a is not None and b is not None and a.shape == b.shape and is_parallel(a, b)


def _orientation(places: Sequence[Any]) -> npt.NDArray[np.float64] | None:
    try:
        value = find_tag("ImageOrientationPatient", places)
        return None if not value else np.asarray([float(v) for v in value], dtype=np.float64)
    except (ValueError, TypeError):
        return np.zeros(0)  # unreadable numbers: the files stay together, and the reader refuses the series by name


def _patient(header: Any) -> str:
    for name in ("PatientID", "PatientName"):
        if not is_placeholder_id(text := str(header.get(name, "") or "").strip()):
            return text
    return ""


def _number(value: Any) -> int:
    try:
        return int(value or 1)
    except (TypeError, ValueError):
        return 1


def _segmentation(header: Any, path: Path) -> SegmentationFile:
    references = header.get("ReferencedSeriesSequence") or []
    return SegmentationFile(
        path=path,
        patient=_patient(header),
        study=str(header.get("StudyInstanceUID", "")),
        frame_of_reference=str(header.get("FrameOfReferenceUID", "")),
        referenced_series=frozenset(str(item.get("SeriesInstanceUID", "")) for item in references) - {""},
    )


def _is_image_class(kind: str) -> bool:
    """Return whether files of a SOP class have pixels, as those without a class may."""
    part = kind.removeprefix(_STORAGE_CLASS)
    is_image = part in _IMAGE_CLASSES or part.startswith(tuple(f"{one}." for one in _IMAGE_CLASSES))
    return not kind or (kind.startswith(_STORAGE_CLASS) and is_image and kind != _SPECTROSCOPY_CLASS)


def _damaged(path: Path) -> DicomSeries:
    """Return a series of its own for a damaged file, which its reader refuses by name.

    Left out, it could be the last slice of a stack, and its absence would not be noticed.
    """
    return DicomSeries(
        patient="", study="", series_uid="", frame_of_reference="", orientation=None, site=None, paths=[path]
    )


def _reason_not_dicom(path: Path) -> str | None:
    """Return the reason to leave out a file that pydicom does not read. None for a damaged DICOM file."""
    try:
        with path.open("rb") as file:
            head = file.read(_PREAMBLE_BYTES)
    except OSError:
        return "file with a DICOM name that cannot be opened"
    # Old exports hold the data set alone: it begins with group 0002 or 0008, little endian.
    if head[:2] in (b"\x08\x00", b"\x02\x00") and head[128:132] != b"DICM":
        return "DICOM without the preamble that every DICOM file needs (export it again, or run dcmconv)"
    if head[128:132] == b"DICM":
        return None
    return name_packed_scan(path) or "file with a DICOM name that is not DICOM"
