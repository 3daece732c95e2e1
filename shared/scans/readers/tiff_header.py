"""Meaning of TIFF headers for values, pages and voxel sizes.

Source:
    TIFF 6.0 for the numbers of tags; ImageJ's ``FileInfo.getDescription`` and the OME schema 2016-06 for descriptions.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import MM_PER_UNIT

_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = (
    258,
    259,
    262,
    270,
    277,
    339,
)
_X_RESOLUTION, _Y_RESOLUTION = 282, 283
_LOSSY_COMPRESSIONS = {6, 7, 33003, 33005, 34712}
_TYPES = {(1, 1), (8, 1), (8, 2), (16, 1), (16, 2), (32, 1), (32, 2), (32, 3)}
"""Bits per sample and sample format (1 unsigned, 2 signed, 3 float) that Pillow reads without a change."""


def check_tiff(image: Any, *, as_label: bool, where: str) -> None:
    """Refuse a TIFF whose values or pages Pillow would change.

    Raises:
        DataError: If samples, channels, compression or pages are not those of a stack of gray slices.
    """
    tags = image.tag_v2
    bits, samples = _tiff_type(image)
    if (bits, samples) not in _TYPES:
        raise DataError(f"TIFF samples must have 1, 8, 16 or 32 bits, got {bits}. Convert the file.", where=where)
    if bits > 8 and int(tags.get(_SAMPLES_PER_PIXEL, 1)) > 1:  # Pillow keeps only the upper 8 bits of these
        raise DataError(f"TIFF of {bits} bits must be plain gray, got several channels. Save gray values.", where=where)
    if as_label and tags.get(_COMPRESSION) in _LOSSY_COMPRESSIONS:
        raise DataError("a label must not be compressed with loss: its ids change. Use PNG.", where=where)
    # WhiteIsZero pictures store bright as low. Pillow inverts those of 8 bits and not those of 16.
    if tags.get(_PHOTOMETRIC) == 0:
        raise DataError("TIFF must store black as 0, got WhiteIsZero. Save it again as BlackIsZero.", where=where)
    _check_pages(image, where=where)


def tiff_spacing(image: Any, *, where: str) -> tuple[float, float, float] | None:
    """Return the (z, row, col) spacing in mm that ImageJ or OME wrote, or None.

    The resolution of other TIFF files is that of a printer (72 per inch) and no size of a voxel.

    Raises:
        DataError: If sizes or their unit cannot be read.
    """
    text = _description(image)
    try:
        sizes = _imagej_sizes(image, text) if text.startswith("ImageJ=") else _ome_sizes(text)
    except (ValueError, TypeError, ZeroDivisionError) as err:
        raise DataError(f"the voxel sizes in the TIFF header are damaged ({err}).", where=where) from err
    if sizes is None:
        return None
    values = tuple(size * MM_PER_UNIT.get(unit, math.nan) for size, unit in sizes)
    if not all(math.isfinite(value) for value in values):
        units = ", ".join(sorted({unit for _, unit in sizes}))
        raise DataError(f"the unit of the TIFF header is not known ({units}). Give spacing.json.", where=where)
    return values[0], values[1], values[2]


def with_tiff_sign(page: Any, array: Any) -> Any:
    """Give the samples their own sign, because Pillow reads int8 as uint8 and uint32 as int32."""
    bits, samples = _tiff_type(page)
    if bits == 8 and samples == 2:
        return array.view(np.int8)
    if bits == 32 and samples == 1 and array.dtype == np.int32:
        return array.view(np.uint32)
    return array


def _check_pages(image: Any, *, where: str) -> None:
    text, num_pages = _description(image), int(getattr(image, "n_frames", 1))
    if text.startswith("ImageJ="):
        numbers = {name: int(n) for name, n in re.findall(r"^(images|channels|frames)=(\d+)", text, re.MULTILINE)}
        announced = numbers.get("images", 1)
    else:
        pixels = _ome_pixels(text)
        if len(pixels) > 1:
            raise DataError(f"a TIFF must hold one image, got {len(pixels)} of OME. Export one.", where=where)
        found = pixels[0] if pixels else {}
        numbers = {"channels": int(found.get("SizeC", 1)), "frames": int(found.get("SizeT", 1))}
        announced = int(found.get("SizeZ", 1))
    if numbers.get("channels", 1) > 1 or numbers.get("frames", 1) > 1:
        raise DataError("pages of a TIFF must be slices, got channels or time points too. Export one.", where=where)
    # ImageJ writes files above 4 GB with one page entry and the other slices behind it, where Pillow cannot see them.
    # OME may keep the other slices in other files.
    if announced > num_pages:
        raise DataError(
            f"the TIFF announces {announced} slices, {num_pages} can be read. Save it again as a plain multi-page "
            "TIFF.",
            where=where,
        )


def _imagej_sizes(image: Any, text: str) -> list[tuple[float, str]] | None:
    found = dict(re.findall(r"^(unit|spacing)=(.+)$", text, re.MULTILINE))
    unit = found.get("unit", "").strip().lower().replace("\\u00b5", "µ")
    if unit in ("", "pixel", "pixels"):
        return None
    # ImageJ stores pixels per unit.
    row, column = (1 / float(image.tag_v2[tag]) for tag in (_Y_RESOLUTION, _X_RESOLUTION))
    slices = (abs(float(found["spacing"])), unit) if "spacing" in found else (1.0, "mm")
    return [slices, (row, unit), (column, unit)]


def _ome_sizes(text: str) -> list[tuple[float, str]] | None:
    pixels = (_ome_pixels(text) or [{}])[0]
    if not {"PhysicalSizeX", "PhysicalSizeY"} <= pixels.keys():
        return None
    sizes = [
        (float(pixels[f"PhysicalSize{axis}"]), pixels.get(f"PhysicalSize{axis}Unit", "µm").lower()) for axis in "YX"
    ]
    if "PhysicalSizeZ" not in pixels:
        return [(1.0, "mm"), *sizes]
    return [(float(pixels["PhysicalSizeZ"]), pixels.get("PhysicalSizeZUnit", "µm").lower()), *sizes]


def _ome_pixels(text: str) -> list[dict[str, str]]:
    """Return the attributes of every ``Pixels`` element. No XML parser is used, because it would expand entities."""
    if "<OME" not in text:
        return []
    elements = re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", text)
    return [dict(re.findall(r'\b(\w+)\s*=\s*"([^"]*)"', element.replace("&#181;", "µ"))) for element in elements]


def _description(image: Any) -> str:
    text = image.tag_v2.get(_DESCRIPTION, "")
    if isinstance(text, tuple):
        text = text[0]
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    # Pillow decodes text as Latin-1, while OME writes UTF-8.
    try:
        return str(text).encode("latin-1").decode("utf-8")
    except UnicodeError:
        return str(text)


def _tiff_type(image: Any) -> tuple[int, int]:
    """Return bits per sample and sample format."""
    bits, samples = image.tag_v2.get(_BITS_PER_SAMPLE, (1,)), image.tag_v2.get(_SAMPLE_FORMAT, (1,))
    return (max(bits) if isinstance(bits, tuple) else int(bits)), (
        max(samples) if isinstance(samples, tuple) else int(samples)
    )
