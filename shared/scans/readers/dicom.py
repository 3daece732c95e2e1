"""DICOM series of single slices, enhanced multi-frame files, and cine loops, in native units.

pydicom is the only DICOM reader here, because others invert MONOCHROME1 or drop a truncated slice without a message.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.processing import apply_modality_lut
from samgraft.shared.errors import DataError
from samgraft.shared.scans.privacy import dicom_findings
from samgraft.shared.scans.readers import decode_process
from samgraft.shared.scans.readers.dicom_geometry import FramePlane, stack_planes
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan, rescale_values

Array = npt.NDArray[Any]

QUANTITATIVE_MODALITIES = frozenset({"CT", "PT", "NM"})
"""Modalities whose values have a unit, which MONOCHROME1 (a display setting) must not invert."""
_FRAME_SEQUENCES = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)


def read_dicom_series(paths: Sequence[Path], *, where: str, allow_gaps: bool = False) -> RawScan:
    """Read the files of one series.

    Args:
        paths: Files of one SeriesInstanceUID and one orientation, in any order.
        where: Name for messages.
        allow_gaps: Acceptance of missing slices; the spacing is then the median distance.

    Raises:
        DataError: If a file is damaged or cut, frames are colored, differ in orientation or size, share a position,
            or slices are missing.
    """
    planes: list[FramePlane] = []
    frames: list[Array] = []
    digests: list[tuple[float, str]] = []
    privacy: set[str] = set()
    notes: set[str] = set()
    modality: str | None = None
    for path in paths:
        data, digest = read_bytes(path, where=where)
        dataset = parse_dicom(data, where=where)
        modality = str(dataset.get("Modality", "")) or modality
        privacy.update(dicom_findings(dataset))
        stored = decode_pixels(dataset, data, where=where)
        stored = stored[None] if stored.ndim == 2 else stored
        new = planes_of(dataset, num_frames=len(stored), where=where)
        for plane, frame_HW, places in zip(new, stored, _frame_places(dataset, len(stored), where=where), strict=True):
            values, value_notes = native_values(frame_HW, dataset, places, where=f"{where}: {plane.name}")
            frames.append(values)
            notes.update(value_notes)
        planes += new
        # Sorted by position, so that the same series under other file names keeps its hash.
        digests.append((float(new[0].origin @ new[0].normal), digest))
    _check_positions(planes, num_files=len(paths), where=where)
    stack = stack_planes(planes, where=where, allow_gaps=allow_gaps)
    # Rescaling per slice may give int16 for one slice and float32 for the next.
    dtype = np.result_type(*{frame.dtype for frame in frames})
    # Rows of a frame are the second voxel axis of the grid, hence the transpose.
    array_ijk = np.stack([frames[i].astype(dtype, copy=False).T for i in stack.order], axis=2)
    order = [digest for _, digest in sorted(digests)]
    return RawScan(
        array_ijk=array_ijk,
        affine=stack.affine,
        source_sha256=order[0] if len(order) == 1 else hashlib.sha256("".join(order).encode()).hexdigest(),
        notes=(*stack.notes, *sorted(notes)),
        modality_tag=modality,
        has_orientation=all(plane.has_position for plane in planes),
        privacy=tuple(sorted(privacy)),
    )


def inspect_dicom_series(paths: Sequence[Path], *, where: str, allow_gaps: bool = False) -> tuple[str, ...]:
    """Check the headers of one series and return the kinds of identifying content in them.

    Raises:
        DataError: If the headers alone show that ``read_dicom_series`` would refuse the series.
    """
    planes: list[FramePlane] = []
    kinds: set[str] = set()
    for path in paths:
        dataset = parse_dicom(path, where=where)
        kinds.update(dicom_findings(dataset))
        check_pixel_header(dataset, where=where)
        planes += planes_of(dataset, num_frames=_whole(dataset, "NumberOfFrames", 1, where=where), where=where)
    _check_positions(planes, num_files=len(paths), where=where)
    stack_planes(planes, where=where, allow_gaps=allow_gaps)
    return tuple(sorted(kinds))


def parse_dicom(source: bytes | Path, *, where: str) -> Dataset:
    """Parse one DICOM file, from its bytes or, without its pixels, from its path.

    Raises:
        DataError: If it is not DICOM.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values of tags that are not used here
            if isinstance(source, Path):
                return pydicom.dcmread(source, stop_before_pixels=True)
            return pydicom.dcmread(io.BytesIO(source))
    except (InvalidDicomError, EOFError, ValueError, KeyError, OSError) as err:
        raise DataError(f"the file must be DICOM ({_first_line(err)}).", where=where) from err


def decode_pixels(dataset: Dataset, data: bytes, *, where: str) -> Array:
    """Return the stored values of a file, (H, W) or (frames, H, W).

    Gray saved as color is reduced to one channel. Compressed pixels are decoded in another process, see
    :mod:`decode_process`.

    Raises:
        DataError: If pixels cannot be decoded or are in color.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    check_pixel_header(dataset, where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if syntax is not None and syntax.is_compressed:
                pixels = decode_process.shared_process().decode(data)
            else:
                pixels = np.asarray(dataset.pixel_array)
    except Exception as err:  # decoders raise many types; each means that these pixels cannot be used
        name = getattr(syntax, "name", "unknown")
        hint = " Install its decoder: pip install 'samgraft[dicom]'." if syntax and syntax.is_compressed else ""
        raise DataError(f"the pixels ({name}) cannot be decoded: {_first_line(err)}.{hint}", where=where) from err
    if int(dataset.get("SamplesPerPixel", 1)) == 1:
        return pixels
    if not (np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])):
        raise DataError(
            f"pixels must be one number each, got color ({dataset.get('PhotometricInterpretation')}). "
            "Export gray images.",
            where=where,
        )
    return pixels[..., 0]


def check_pixel_header(dataset: Dataset, *, where: str) -> None:
    """Refuse files whose header shows that their pixels cannot be read as slices.

    Raises:
        DataError: For a picture size that a damaged or crafted header would allocate, palettes and mosaics.
    """
    names = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")
    numbers = [_whole(dataset, name, 1, where=where) for name in names]
    size = _whole(dataset, "BitsAllocated", 16, where=where) * math.prod(numbers) // 8
    if not 0 < size <= decode_process.MAX_PIXEL_BYTES:
        raise DataError(f"the DICOM header announces {size / 2**30:.0f} GiB of pixels: damaged.", where=where)
    if str(dataset.get("PhotometricInterpretation", "")) == "PALETTE COLOR":
        raise DataError("pixels must be gray values, got a color palette. Export gray images.", where=where)
    # Siemens stores the slices of a volume as tiles of one picture; the header places the picture and no tile.
    if "MOSAIC" in (str(part).upper() for part in dataset.get("ImageType") or ()):
        raise DataError("the picture is a mosaic of slices. Convert the series with dcm2niix.", where=where)


def find_tag(name: str, places: Sequence[Any]) -> Any:
    """Return a tag from functional groups (one level of sequences down) or the file itself, or None."""
    for place in places:
        if place.get(name) is not None:
            return place.get(name)
        for keyword in _FRAME_SEQUENCES:
            items = place.get(keyword)
            if items and items[0].get(name) is not None:
                return items[0].get(name)
    return None


def planes_of(dataset: Dataset, *, num_frames: int, where: str) -> list[FramePlane]:
    """Return the geometry of every frame of a file.

    Args:
        dataset: Parsed file.
        num_frames: Number of frames of its pixels.
        where: Name for messages.

    Raises:
        DataError: If a number in the header cannot be read or frame headers are missing.
    """
    places = _frame_places(dataset, num_frames, where=where)
    # Enhanced files carry their geometry per frame, classic files once, and cine loops not at all.
    if "PerFrameFunctionalGroupsSequence" in dataset:
        return [_plane(dataset, p, where=where, name=f"frame {n}") for n, p in enumerate(places, start=1)]
    if num_frames == 1:
        return [_plane(dataset, places[0], where=where, name=f"instance {dataset.get('InstanceNumber', '?')}")]
    return [_cine_plane(dataset, number, where=where) for number in range(num_frames)]


def native_values(
    stored_HW: Array, dataset: Dataset, places: Sequence[Any], *, where: str
) -> tuple[Array, tuple[str, ...]]:
    """Convert the stored values of one frame to the units of the modality.

    Args:
        stored_HW: Stored values, shape (H, W).
        dataset: Parsed file.
        places: Datasets in which the tags of this frame are looked up.
        where: Name for messages.

    Returns:
        Values in native units (Hounsfield units for CT), and notes on what was done.

    Raises:
        DataError: If the transformation in the header cannot be applied.

    Source:
        DICOM PS3.3 C.11.1 (modality LUT), C.7.6.16.2.9 (per-frame rescale), C.7.6.16.2.11 (real-world values).
    """
    stored_HW, notes = _without_overlay_bits(stored_HW, dataset, where=where)
    inverted = str(dataset.get("PhotometricInterpretation", "MONOCHROME2")) == "MONOCHROME1"
    if inverted and str(dataset.get("Modality", "")).upper() in QUANTITATIVE_MODALITIES:
        inverted = False
        notes = (*notes, "MONOCHROME1: a display setting here, values kept")
    if inverted:
        notes = (*notes, "MONOCHROME1: inverted so that dense tissue is bright")
    # A table replaces slope and intercept: the standard allows one of the two.
    if dataset.get("ModalityLUTSequence"):
        return _apply_modality_lut(stored_HW, dataset, inverted=inverted, where=where), notes
    if inverted:
        stored_HW = _invert(stored_HW, dataset)
    # PET and some MR files scale every slice differently, hence the tags of this very frame.
    slope, intercept = (_numbers(name, places, 1, where=where) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        values = _apply_real_world_map(stored_HW, places, where=where)
        if values is not None:
            return values, (*notes, "real-world value map applied")
    a, b = (1.0 if slope is None else slope[0]), (0.0 if intercept is None else intercept[0])
    if a == 0:
        raise DataError("RescaleSlope must be finite and not 0, got 0.0.", where=where)
    return rescale_values(stored_HW, slope=a, intercept=b), notes


def _frame_places(dataset: Dataset, num_frames: int, *, where: str) -> list[list[Any]]:
    """Return, per frame, the datasets to search (its own group, the shared group, the file)."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        return [[dataset]] * num_frames
    if len(groups) != num_frames:
        raise DataError(f"{len(groups)} frame headers for {num_frames} frames: damaged.", where=where)
    shared = list(dataset.get("SharedFunctionalGroupsSequence", []))[:1]
    return [[group, *shared, dataset] for group in groups]


def _plane(dataset: Dataset, places: Sequence[Any], *, where: str, name: str) -> FramePlane:
    place = f"{where}: {name}"
    position = _numbers("ImagePositionPatient", places, 3, where=place)
    orientation = _numbers("ImageOrientationPatient", places, 6, where=place) or (1, 0, 0, 0, 1, 0)
    spacing = _numbers("PixelSpacing", places, 2, where=place) or _numbers(
        "ImagerPixelSpacing", [dataset], 2, where=place
    )
    # Thickness places nothing: it is only the spacing of a single slice.
    thickness = _numbers("SpacingBetweenSlices", places, 1, where=place) or _numbers(
        "SliceThickness", places, 1, where=place
    )
    # Without an orientation a file is read as axial, which only files that are scans of their own reach.
    directions = np.asarray(orientation, dtype=np.float64)
    # Unit length and a right angle, with a tolerance for rounding: anything else is no orientation.
    lengths = (directions[:3] @ directions[:3], directions[3:] @ directions[3:], 1 + directions[:3] @ directions[3:])
    if not np.allclose(lengths, 1, atol=1e-2):
        raise DataError(
            f"ImageOrientationPatient must be two perpendicular unit vectors, got {orientation}.", where=place
        )
    return FramePlane(
        shape_HW=(int(dataset.Rows), int(dataset.Columns)),
        origin=np.asarray(position or (0, 0, 0), dtype=np.float64),
        row_direction=directions[:3],
        column_direction=directions[3:],
        spacing_rc=(spacing[0], spacing[1]) if spacing else (1.0, 1.0),
        thickness_mm=abs(thickness[0]) if thickness and thickness[0] else None,  # negative in some NM files
        name=name,
        has_position=position is not None,
        notes=() if spacing else ("no pixel spacing in the header: taken as 1 mm",),
    )


def _cine_plane(dataset: Dataset, number: int, *, where: str) -> FramePlane:
    """Return the plane of a frame without a position, e.g. of an ultrasound loop, at one slice per mm."""
    plane = _plane(dataset, [dataset], where=where, name=f"frame {number + 1}")
    return replace(
        plane,
        origin=plane.normal * float(number),
        thickness_mm=1.0,
        has_position=False,
        notes=(*plane.notes, "frames without positions taken as slices 1 mm apart"),
    )


def _check_positions(planes: Sequence[FramePlane], *, num_files: int, where: str) -> None:
    missing = sum(not plane.has_position for plane in planes)
    if num_files > 1 and missing:
        raise DataError(
            f"slices must have a position, {missing} of {len(planes)} have no ImagePositionPatient. Export the series "
            "again with its geometry.",
            where=where,
        )


def _numbers(name: str, places: Sequence[Any], count: int, *, where: str) -> tuple[float, ...] | None:
    """Return the numbers of a tag, None if it is absent or empty."""
    try:
        value = find_tag(name, places)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        numbers = tuple(float(v) for v in value) if hasattr(value, "__len__") else (float(value),)
    except (ValueError, TypeError, OverflowError) as err:
        raise DataError(f"{name} must hold numbers ({_first_line(err)}). Repair the header.", where=where) from err
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DataError(f"{name} must be {count} finite numbers, got {numbers}. Repair the header.", where=where)
    return numbers


def _whole(dataset: Dataset, name: str, default: int, *, where: str) -> int:
    try:
        return int(dataset.get(name, default) or default)
    except (TypeError, ValueError) as err:
        raise DataError(f"the DICOM header has no usable {name} ({_first_line(err)}).", where=where) from err


def _without_overlay_bits(stored_HW: Array, dataset: Dataset, *, where: str) -> tuple[Array, tuple[str, ...]]:
    """Drop bits above BitsStored, in which old scanners kept overlays."""
    if stored_HW.dtype.kind not in "iu" or "BitsStored" not in dataset:
        return stored_HW, ()
    bits = _whole(dataset, "BitsStored", 16, where=where)
    unused = stored_HW.dtype.itemsize * 8 - bits
    if unused <= 0 or not stored_HW.size:
        return stored_HW, ()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored_HW.dtype.kind == "i" else (0, 2**bits - 1)
    if stored_HW.min() >= low and stored_HW.max() <= high:
        return stored_HW, ()
    # Shifting up and down again restores the sign of signed values.
    return np.left_shift(stored_HW, unused) >> unused, ("bits above BitsStored dropped",)


def _invert(stored_HW: Array, dataset: Dataset) -> Array:
    """Turn MONOCHROME1 (low values are bright) into MONOCHROME2 within the range of the stored bits."""
    signed = int(dataset.get("PixelRepresentation", 0)) == 1
    total = -1 if signed else 2 ** int(dataset.BitsStored) - 1
    return np.asarray(total - stored_HW.astype(np.int64)).astype(stored_HW.dtype)


def _apply_modality_lut(stored_HW: Array, dataset: Dataset, *, inverted: bool, where: str) -> Array:
    try:
        values = np.asarray(apply_modality_lut(stored_HW, dataset))
        bits = int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])
    except Exception as err:  # pydicom raises many types for damaged tables
        raise DataError(f"the modality LUT cannot be applied ({_first_line(err)}).", where=where) from err
    return (2**bits - 1 - values.astype(np.int64)).astype(np.int32) if inverted else values


def _apply_real_world_map(stored_HW: Array, places: Sequence[Any], *, where: str) -> Array | None:
    """Apply the only real-world value map of a frame, or return None if there is none or several."""
    maps: Sequence[Any] = next(
        (p.get("RealWorldValueMappingSequence") for p in places if p.get("RealWorldValueMappingSequence")), []
    )
    if len(maps) != 1:
        return None
    slope, intercept = (_numbers(f"RealWorldValue{name}", maps, 1, where=where) for name in ("Slope", "Intercept"))
    if slope is None or intercept is None or slope[0] == 0 or (slope[0], intercept[0]) == (1, 0):
        return None
    return rescale_values(stored_HW, slope=slope[0], intercept=intercept[0])


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    del as_label, like
    return read_dicom_series(files.paths, where=files.name, allow_gaps=files.allow_gaps)


DICOM = ScanReader(
    name=ScanFormat.DICOM,
    suffixes=(".dcm", ".dicom", ".ima"),
    matches=lambda head: head[128:132] == b"DICM",
    read=_read,
    inspect=lambda files: inspect_dicom_series(files.paths, where=files.name, allow_gaps=files.allow_gaps),
    one_file_per_scan=False,
)
