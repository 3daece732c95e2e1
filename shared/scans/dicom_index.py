"""DICOM files grouped into series by their headers; pixels are not read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from samgraft.shared.scans.discovery import Discovery

_TAGS = [
    "SOPClassUID",
    "PatientID",
    "PatientName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "ImageOrientationPatient",
    "ImageType",
    "Rows",
    "Columns",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "DeviceSerialNumber",
    "InstitutionName",
    "ReferencedSeriesSequence",
]
SEGMENTATION_CLASSES = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"


@dataclass(kw_only=True)
class DicomSeries:
    """Files of one SeriesInstanceUID and one orientation."""

    patient: str
    study: str
    series_uid: str
    modality: str
    site: str | None
    paths: list[Path] = field(default_factory=list)


def group_dicom(paths: Sequence[Path], found: Discovery) -> tuple[list[DicomSeries], dict[str, list[Path]]]:
    """Group files into series; count what is no image.

    Returns:
        The series, and the segmentation files by the SeriesInstanceUID that they refer to.
    """
    series: dict[tuple[Any, ...], DicomSeries] = {}
    segmentations: dict[str, list[Path]] = {}
    for path in paths:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        except (InvalidDicomError, EOFError, ValueError, KeyError, OSError):
            found.left_out["file with a DICOM name that is not DICOM"] += 1
            continue
        kind = str(header.get("SOPClassUID", "") or header.file_meta.get("MediaStorageSOPClassUID", ""))
        if kind in SEGMENTATION_CLASSES:
            for item in header.get("ReferencedSeriesSequence", []):
                segmentations.setdefault(str(item.get("SeriesInstanceUID", "")), []).append(path)
        elif kind == DICOMDIR_CLASS:
            found.left_out["DICOMDIR (files are found without it)"] += 1
        elif not header.get("Rows"):
            found.left_out["DICOM without pixels (report, plan, dose)"] += 1
        elif "LOCALIZER" in (header.get("ImageType") or ()):
            found.left_out["DICOM localizer"] += 1
        else:
            _add(series, header, path)
    return list(series.values()), segmentations


def _add(series: dict[tuple[Any, ...], DicomSeries], header: pydicom.Dataset, path: Path) -> None:
    orientation = header.get("ImageOrientationPatient")
    rounded = tuple(np.round(np.asarray(orientation, dtype=np.float64), 2) + 0.0) if orientation else None
    uid = str(header.get("SeriesInstanceUID", ""))
    # Projections and cine loops of one series have no common space: each file is a scan of its own.
    key = (uid, rounded, int(header.Rows), int(header.Columns), None if rounded else str(path))
    if key not in series:
        machine = [str(header.get(k, "")) for k in ("InstitutionName", "Manufacturer", "ManufacturerModelName")]
        machine.append(str(header.get("DeviceSerialNumber", "")))
        series[key] = DicomSeries(
            patient=str(header.get("PatientID", "") or header.get("PatientName", "") or ""),
            study=str(header.get("StudyInstanceUID", "")),
            series_uid=uid,
            modality=str(header.get("Modality", "")),
            site="/".join(machine) if any(machine) else None,
        )
    series[key].paths.append(path)
