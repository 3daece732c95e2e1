"""DICOM series: classic (one file per slice), enhanced multi-frame, and multi-frame cine; rescaled per frame.

pydicom is the only DICOM reader here: others invert MONOCHROME1 or drop a truncated slice without saying so.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from samgraft.shared.errors import DataError
from samgraft.shared.scans.privacy import dicom_findings
from samgraft.shared.scans.readers import decode_process
from samgraft.shared.scans.readers.rescale import rescale
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SAME_POSITION_MM = 0.01
MAX_GAP_RATIO = 1.1
"""Largest over median slice distance; rounding of positions gives 1.01, a missing slice 2."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image plane: pixels in native units and where its first pixel lies (LPS mm)."""

    pixels: npt.NDArray[Any]
    origin: npt.NDArray[np.float64]
    row_direction: npt.NDArray[np.float64]
    """Direction in which the column index grows."""
    column_direction: npt.NDArray[np.float64]
    """Direction in which the row index grows."""
    spacing_rc: tuple[float, float]
    """Distance between rows and between columns, mm."""
    thickness_mm: float | None
    notes: tuple[str, ...]
    name: str
    has_position: bool

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Direction across the slices."""
        return np.asarray(np.cross(self.row_direction, self.column_direction), dtype=np.float64)


def read_dicom_series(paths: Sequence[Path], *, where: str, allow_gaps: bool = False) -> RawScan:
    """Read the files of one series.

    Args:
        paths: Files of one SeriesInstanceUID and one orientation, in any order.
        where: Name for messages.
        allow_gaps: Accept missing slices; the spacing is then the median distance.

    Raises:
        DataError: If a file is damaged or cut, frames are colored, differ in orientation or size, share a position,
            or slices are missing.
    """
    frames: list[Frame] = []
    digests: list[tuple[float, str]] = []
    privacy: set[str] = set()
    modality: str | None = None
    for path in paths:
        data, digest = read_bytes(path, where=where)
        dataset = parse_dicom(data, where=where)
        modality = str(dataset.get("Modality", "")) or modality
        privacy.update(dicom_findings(dataset))
        new = frames_of(dataset, data, where=where)
        frames += new
        digests.append((float(new[0].origin @ new[0].normal), digest))
    order = [digest for _, digest in sorted(digests)]
    array_ijk, affine, notes = stack_frames(frames, where=where, allow_gaps=allow_gaps)
    return RawScan(
        array_ijk=array_ijk,
        affine=affine,
        source_sha256=order[0] if len(order) == 1 else hashlib.sha256("".join(order).encode()).hexdigest(),
        notes=notes,
        modality_tag=modality,
        has_orientation=all(frame.has_position for frame in frames),
        privacy=tuple(sorted(privacy)),
    )


def parse_dicom(data: bytes, *, where: str) -> pydicom.Dataset:
    """Parse the bytes of one DICOM file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values of tags that are not used here
            return pydicom.dcmread(io.BytesIO(data))
    except (InvalidDicomError, EOFError, ValueError, KeyError, OSError) as err:
        raise DataError(f"the file must be DICOM: {_first_line(err)}.", where=where) from err


def frames_of(dataset: pydicom.Dataset, data: bytes, *, where: str) -> list[Frame]:
    """Return the frames of a file (parsed, and its bytes): one of a classic file, all of a multi-frame file."""
    pixels = decode_pixels(dataset, data, where=where)
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None and pixels.ndim == 2:
        return [_frame(pixels, dataset, [dataset], where=where, name=f"instance {dataset.get('InstanceNumber', '?')}")]
    if pixels.ndim == 2:
        pixels = pixels[None]
    if groups is None:
        return _cine(pixels, dataset, where=where)
    if len(groups) != len(pixels):
        raise DataError(f"{len(groups)} frame headers for {len(pixels)} frames: damaged.", where=where)
    shared = list(dataset.get("SharedFunctionalGroupsSequence", []))[:1]
    return [
        _frame(frame, dataset, [group, *shared, dataset], where=where, name=f"frame {number}")
        for number, (frame, group) in enumerate(zip(pixels, groups, strict=True), start=1)
    ]


def decode_pixels(dataset: pydicom.Dataset, data: bytes, *, where: str) -> npt.NDArray[Any]:
    """Return (H, W) or (frames, H, W) stored values; gray saved as color is reduced, real color refused.

    Compressed pixels are decoded in another process: see :mod:`decode_process`.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    _check_announced_size(dataset, where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if syntax is not None and syntax.is_compressed:
                pixels = decode_process.shared_process().decode(data)
            else:
                pixels = np.asarray(dataset.pixel_array)
    except Exception as err:  # decoders raise many types; all mean that these pixels cannot be trusted
        name = getattr(syntax, "name", "unknown")
        hint = " Install its decoder: pip install 'samgraft[dicom]'." if syntax and syntax.is_compressed else ""
        raise DataError(f"the pixels ({name}) cannot be decoded: {_first_line(err)}.{hint}", where=where) from err
    if int(dataset.get("SamplesPerPixel", 1)) == 1:
        if str(dataset.get("PhotometricInterpretation", "")) == "PALETTE COLOR":
            raise DataError("pixels must be gray values, got a color palette. Export gray images.", where=where)
        return pixels
    if not (np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])):
        raise DataError(
            f"pixels must be one number each, got color ({dataset.get('PhotometricInterpretation')}). "
            "Export gray images.",
            where=where,
        )
    return pixels[..., 0]


def _check_announced_size(dataset: pydicom.Dataset, *, where: str) -> None:
    """Refuse what a damaged or crafted header would allocate."""
    try:
        numbers = [int(dataset.get(name, 1) or 1) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
        size = int(dataset.get("BitsAllocated", 16) or 16) * math.prod(numbers) // 8
    except (TypeError, ValueError) as err:
        raise DataError(f"the DICOM header has no usable picture size: {_first_line(err)}.", where=where) from err
    if not 0 < size <= decode_process.MAX_PIXEL_BYTES:
        raise DataError(f"the DICOM header announces {size / 2**30:.0f} GiB of pixels: damaged.", where=where)


def find(name: str, places: Sequence[Any]) -> Any:
    """Look a tag up in functional groups (one level of sequences down) and then in the file itself."""
    for place in places:
        if place.get(name) is not None:
            return place.get(name)
        for element in place:
            if element.VR == "SQ" and element.value and element.keyword.endswith("Sequence"):
                value = element.value[0].get(name) if element.keyword in _FRAME_SEQUENCES else None
                if value is not None:
                    return value
    return None


_FRAME_SEQUENCES = {
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
}


def _frame(
    stored: npt.NDArray[Any], dataset: pydicom.Dataset, places: Sequence[Any], *, where: str, name: str
) -> Frame:
    position = find("ImagePositionPatient", places)
    orientation = np.asarray(find("ImageOrientationPatient", places) or (1, 0, 0, 0, 1, 0), dtype=np.float64)
    spacing = find("PixelSpacing", places) or dataset.get("ImagerPixelSpacing")
    thickness = find("SpacingBetweenSlices", places) or find("SliceThickness", places)
    slope, intercept = find("RescaleSlope", places), find("RescaleIntercept", places)
    slope, intercept = float(1 if slope is None else slope), float(0 if intercept is None else intercept)
    if not (np.isfinite([slope, intercept]).all() and slope != 0):
        raise DataError(f"RescaleSlope must be finite and not 0, got {slope} ({name}).", where=where)
    notes = () if spacing else ("no pixel spacing in the header: taken as 1 mm",)
    if str(dataset.get("PhotometricInterpretation", "MONOCHROME2")) == "MONOCHROME1":
        stored = _invert(stored, dataset)
        notes = (*notes, "MONOCHROME1: inverted so that dense tissue is bright")
    return Frame(
        pixels=rescale(stored, slope=slope, intercept=intercept),
        origin=np.asarray(position if position is not None else (0, 0, 0), dtype=np.float64),
        row_direction=orientation[:3],
        column_direction=orientation[3:],
        spacing_rc=(float(spacing[0]), float(spacing[1])) if spacing else (1.0, 1.0),
        thickness_mm=float(thickness) if thickness else None,
        notes=notes,
        name=name,
        has_position=position is not None,
    )


def _cine(pixels: npt.NDArray[Any], dataset: pydicom.Dataset, *, where: str) -> list[Frame]:
    """Frames without positions, e.g. an ultrasound loop: one slice per frame, 1 mm apart."""
    frames = []
    for number, stored in enumerate(pixels):
        frame = _frame(stored, dataset, [dataset], where=where, name=f"frame {number + 1}")
        frames.append(
            Frame(
                pixels=frame.pixels,
                origin=frame.normal * float(number),
                row_direction=frame.row_direction,
                column_direction=frame.column_direction,
                spacing_rc=frame.spacing_rc,
                thickness_mm=1.0,
                notes=(*frame.notes, "frames without positions taken as slices 1 mm apart"),
                name=frame.name,
                has_position=False,
            )
        )
    return frames


def _invert(stored: npt.NDArray[Any], dataset: pydicom.Dataset) -> npt.NDArray[Any]:
    """Turn MONOCHROME1 (low values are bright) into MONOCHROME2 within the range of the stored bits."""
    bits = int(dataset.BitsStored)
    signed = int(dataset.get("PixelRepresentation", 0)) == 1
    total = -1 if signed else 2**bits - 1
    return np.asarray(total - stored.astype(np.int64)).astype(stored.dtype)


def stack_frames(
    frames: Sequence[Frame], *, where: str, allow_gaps: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], tuple[str, ...]]:
    """Sort frames along their common normal and build one grid (columns, rows, slices)."""
    first = frames[0]
    for frame in frames:
        if frame.pixels.shape != first.pixels.shape:
            raise DataError(
                f"slices of a series must have one size, got {first.pixels.shape} and {frame.pixels.shape} "
                f"({frame.name}).",
                where=where,
            )
        same = np.allclose(frame.row_direction, first.row_direction, atol=1e-3)
        if not (same and np.allclose(frame.column_direction, first.column_direction, atol=1e-3)):
            raise DataError(f"slices of a series must be parallel, {frame.name} is not. Split the series.", where=where)
        if not np.allclose(frame.spacing_rc, first.spacing_rc, rtol=1e-3):
            raise DataError(f"slices of a series must have one pixel spacing, {frame.name} differs.", where=where)
    positions = np.array([float(frame.origin @ first.normal) for frame in frames])
    order = np.argsort(positions, kind="stable")
    step, notes = _slice_step(positions[order], first, where=where, allow_gaps=allow_gaps)
    arrays = [frames[i].pixels for i in order]
    dtype = np.result_type(*{a.dtype for a in arrays})
    array_ijk = np.stack([a.astype(dtype, copy=False).T for a in arrays], axis=2)
    affine = np.eye(4)
    affine[:3, 0] = first.row_direction * first.spacing_rc[1]
    affine[:3, 1] = first.column_direction * first.spacing_rc[0]
    affine[:3, 2] = _step_vector(frames, order, step)
    affine[:3, 3] = frames[order[0]].origin
    return array_ijk, LPS_TO_RAS @ affine, (*notes, *sorted({note for frame in frames for note in frame.notes}))


def _slice_step(
    positions: npt.NDArray[np.float64], first: Frame, *, where: str, allow_gaps: bool
) -> tuple[float, tuple[str, ...]]:
    if len(positions) == 1:
        return first.thickness_mm or 1.0, ()
    steps = np.diff(positions)
    if (steps < SAME_POSITION_MM).any():
        num = int((steps < SAME_POSITION_MM).sum())
        raise DataError(
            f"every slice must have its own position, {num} share one with another: duplicates, echoes or time "
            "points. Leave one of each in the folder.",
            where=where,
        )
    median = float(np.median(steps))
    if steps.max() > MAX_GAP_RATIO * median or steps.min() * MAX_GAP_RATIO < median:
        place = int(steps.argmax())
        text = f"gap at z={place} ({median:.2f} to {steps.max():.2f} mm)"
        if not allow_gaps:
            raise DataError(f"slices must be equally spaced, got a {text}. Add the slice or --allow-gaps.", where=where)
        return median, (f"{text} accepted",)
    return float(steps.mean()), ()


def _step_vector(frames: Sequence[Frame], order: npt.NDArray[np.intp], step: float) -> npt.NDArray[np.float64]:
    """The vector between neighbouring slices: from the positions, so that a tilted stack shows as shear."""
    first, last = frames[order[0]], frames[order[-1]]
    if len(frames) == 1:
        return np.asarray(first.normal * step)
    whole = last.origin - first.origin
    return np.asarray(whole * (step / abs(float(whole @ first.normal))))


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")
