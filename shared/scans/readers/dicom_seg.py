"""DICOM segmentations (binary, fractional and label map) as labels on the grid of their scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.dicom import decode_pixels, find_tag, parse_dicom
from samgraft.shared.scans.readers.dicom_geometry import LPS_TO_RAS
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan

ON_GRID_TOLERANCE = 0.05
"""Largest distance of a frame from the scan's grid, in voxels. Positions are rounded to hundredths of a mm."""


def segment_names(path: Path) -> dict[int, str]:
    """Return segment number -> label of a segmentation, without reading its pixels."""
    header = parse_dicom(path, where=path.name)
    return {int(item.SegmentNumber): str(item.get("SegmentLabel", "")) for item in header.get("SegmentSequence", [])}


def read_dicom_seg(path: Path, *, like: RawScan, where: str) -> RawScan:
    """Read a segmentation, with segment numbers as label ids.

    Raises:
        DataError: If a frame does not lie on the scan's grid, or two segments claim one voxel.
    """
    data, digest = read_bytes(path, where=where)
    dataset = parse_dicom(data, where=where)
    pixels = decode_pixels(dataset, data, where=where)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    shared = list(dataset.get("SharedFunctionalGroupsSequence", []))[:1]
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None or len(groups) != len(pixels):
        raise DataError(f"a segmentation must have one header per frame, got {len(pixels)} frames.", where=where)
    kind = str(dataset.get("SegmentationType", "BINARY"))
    label_ijk = np.zeros(like.array_ijk.shape, dtype=np.uint16)
    for frame_HW, group in zip(pixels, groups, strict=True):
        ids_HW = _ids(frame_HW, dataset, [group, *shared], kind, where=where)
        i, j, k = _first_voxel([group, *shared], like, where=where)
        width, height = ids_HW.shape[1], ids_HW.shape[0]
        # Frames may cover a part of the slice only, as cropped segmentations do.
        part = label_ijk[i : i + width, j : j + height, k]
        if part.shape != (width, height):
            raise DataError("a frame of the segmentation reaches beyond the scan.", where=where)
        # A label map holds one id per voxel, and silently keeping the later segment would erase the earlier one.
        clash = (part != 0) & (ids_HW.T != 0) & (part != ids_HW.T)
        if clash.any():
            raise DataError(f"{int(clash.sum())} voxels are claimed by two segments. Make them disjoint.", where=where)
        np.copyto(part, ids_HW.T, where=ids_HW.T != 0)
    return RawScan(array_ijk=label_ijk, affine=like.affine, source_sha256=digest)


def _ids(
    frame_HW: npt.NDArray[Any], dataset: Dataset, places: list[Any], kind: str, *, where: str
) -> npt.NDArray[np.uint16]:
    if kind == "LABELMAP":
        return frame_HW.astype(np.uint16)
    # With one segment, writers give its number once for all frames, in the shared group.
    known = next((place for place in places if place.get("SegmentIdentificationSequence")), None)
    if known is None:
        raise DataError("a frame of the segmentation has no segment number.", where=where)
    number = int(known.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    threshold = float(dataset.get("MaximumFractionalValue", 1)) / 2 if kind == "FRACTIONAL" else 0.5
    return np.where(frame_HW >= threshold, number, 0).astype(np.uint16)


def _first_voxel(places: list[Any], like: RawScan, *, where: str) -> tuple[int, int, int]:
    """Return the voxel (i, j, k) of the scan at which a frame begins, or refuse a frame on another grid."""
    position, orientation = find_tag("ImagePositionPatient", places), find_tag("ImageOrientationPatient", places)
    if position is None or orientation is None:
        raise DataError("a frame of the segmentation has no position.", where=where)
    to_voxel = np.linalg.inv(like.affine) @ LPS_TO_RAS
    spacing = [float(v) for v in find_tag("PixelSpacing", places) or (0, 0)]
    row = np.asarray(orientation[:3], dtype=np.float64) * spacing[1]
    column = np.asarray(orientation[3:], dtype=np.float64) * spacing[0]
    # One pixel along a row must be one voxel along i, one pixel along a column one voxel along j.
    axes = to_voxel[:3, :3] @ np.stack([row, column], axis=1)
    voxel = to_voxel @ np.append(np.asarray(position, dtype=np.float64), 1.0)
    whole = np.rint(voxel[:3])
    if np.abs(axes - np.eye(3)[:, :2]).max() > 1e-2 or np.abs(voxel[:3] - whole).max() > ON_GRID_TOLERANCE:
        raise DataError("the segmentation must lie on the scan's grid. Resample it to the scan.", where=where)
    i, j, k = (int(n) for n in whole)
    if min(i, j, k) < 0 or k >= like.array_ijk.shape[2]:
        raise DataError("a frame of the segmentation lies outside the scan.", where=where)
    return i, j, k


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    del as_label
    if like is None:
        raise DataError("a DICOM segmentation is a label, not a scan.", where=files.name)
    return read_dicom_seg(files.paths[0], like=like, where=files.name)


DICOM_SEG = ScanReader(name=ScanFormat.DICOM_SEG, suffixes=(), read=_read, one_file_per_scan=False)
