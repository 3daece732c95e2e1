"""Classic DICOM series: one file per slice, sorted by position, rescaled per slice.

pydicom is the only DICOM reader here: others invert MONOCHROME1 or drop a truncated slice without saying so.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from samgraft.shared.data.readers.rescale import rescale
from samgraft.shared.data.readers.verified import read_bytes
from samgraft.shared.data.volume import RawScan
from samgraft.shared.errors import DataError

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
    inverted: bool
    name: str

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Direction across the slices."""
        return np.cross(self.row_direction, self.column_direction)


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
    modality: str | None = None
    for path in paths:
        data, digest = read_bytes(path, where=where)
        dataset = parse_dicom(data, where=where)
        modality = str(dataset.get("Modality", "")) or modality
        new = list(frames_of(dataset, where=where))
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
    )


def parse_dicom(data: bytes, *, where: str) -> pydicom.Dataset:
    """Parse the bytes of one DICOM file."""
    try:
        return pydicom.dcmread(io.BytesIO(data))
    except (InvalidDicomError, EOFError, ValueError, KeyError, OSError) as err:
        raise DataError(f"the file must be DICOM: {_first_line(err)}.", where=where) from err


def frames_of(dataset: pydicom.Dataset, *, where: str) -> Sequence[Frame]:
    """Return the frames of a classic single-frame file."""
    samples = int(dataset.get("SamplesPerPixel", 1))
    if samples != 1:
        raise DataError(
            f"pixels must be one number each, got {samples} color samples. Export gray images.", where=where
        )
    try:
        pixels = dataset.pixel_array
    except Exception as err:  # decoders raise many types; all mean that these pixels cannot be trusted
        raise DataError(f"the pixels cannot be decoded: {_first_line(err)}.", where=where) from err
    if pixels.ndim != 2:
        raise DataError(f"a classic DICOM file must hold one frame, got shape {pixels.shape}.", where=where)
    orientation = np.asarray(dataset.get("ImageOrientationPatient", (1, 0, 0, 0, 1, 0)), dtype=np.float64)
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1.0, 1.0)
    thickness = dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness")
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    values = rescale(pixels, slope=slope, intercept=float(dataset.get("RescaleIntercept", 0) or 0))
    inverted = str(dataset.get("PhotometricInterpretation", "MONOCHROME2")) == "MONOCHROME1"
    return [
        Frame(
            pixels=invert(values, dataset, slope=slope) if inverted else values,
            origin=np.asarray(dataset.get("ImagePositionPatient", (0, 0, 0)), dtype=np.float64),
            row_direction=orientation[:3],
            column_direction=orientation[3:],
            spacing_rc=(float(spacing[0]), float(spacing[1])),
            thickness_mm=float(thickness) if thickness else None,
            inverted=inverted,
            name=f"instance {dataset.get('InstanceNumber', '?')}",
        )
    ]


def invert(values: npt.NDArray[Any], dataset: pydicom.Dataset, *, slope: float) -> npt.NDArray[Any]:
    """Turn MONOCHROME1 (low values are bright) into MONOCHROME2 within the range of the stored bits."""
    bits = int(dataset.BitsStored)
    signed = int(dataset.get("PixelRepresentation", 0)) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    total = (low + high) * slope + 2 * intercept
    if values.dtype.kind in "iu":
        return (int(total) - values.astype(np.int64)).astype(values.dtype)
    return np.asarray(np.float32(total) - values)


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
        if not np.allclose(frame.normal, first.normal, atol=1e-3):
            raise DataError(f"slices of a series must be parallel, {frame.name} is not. Split the series.", where=where)
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
    if any(frame.inverted for frame in frames):
        notes = (*notes, "MONOCHROME1: inverted so that dense tissue is bright")
    return array_ijk, LPS_TO_RAS @ affine, notes


def _slice_step(
    positions: npt.NDArray[np.float64], first: Frame, *, where: str, allow_gaps: bool
) -> tuple[float, tuple[str, ...]]:
    if len(positions) == 1:
        return first.thickness_mm or 1.0, ()
    steps = np.diff(positions)
    if (steps < SAME_POSITION_MM).any():
        num = int((steps < SAME_POSITION_MM).sum())
        raise DataError(f"every slice must have its own position, {num} share one. Remove the duplicates.", where=where)
    median = float(np.median(steps))
    if steps.max() > MAX_GAP_RATIO * median or steps.min() * MAX_GAP_RATIO < median:
        place = int(steps.argmax())
        text = f"gap at z={place} ({median:.2f} to {steps.max():.2f} mm)"
        if not allow_gaps:
            raise DataError(f"slices must be equally spaced, got a {text}. Add the slice or --allow-gaps.", where=where)
        return median, (f"{text} accepted",)
    return median, ()


def _step_vector(frames: Sequence[Frame], order: npt.NDArray[np.intp], step: float) -> npt.NDArray[np.float64]:
    """The vector between neighbouring slices: oblique stacks may shift within the plane as well."""
    first, last = frames[order[0]], frames[order[-1]]
    if len(frames) == 1:
        return first.normal * step
    whole = last.origin - first.origin
    return np.asarray(whole / np.linalg.norm(whole) * step * (np.linalg.norm(whole) / abs(whole @ first.normal)))


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
