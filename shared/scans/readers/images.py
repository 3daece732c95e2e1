"""Stacks of PNG, TIFF and JPEG files: one file per slice in natural order, or one multi-page TIFF.

A sidecar ``spacing.json`` in the folder gives the geometry that pictures lack: ``{"spacing_mm": [z, row, col]}``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.nifti import check_spacing
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan

FORMATS = ("PNG", "TIFF", "JPEG")
SIDECAR = "spacing.json"
MAX_PIXELS = 64_000_000
EXIF_ORIENTATION = 0x0112


def read_image_stack(paths: Sequence[Path], *, where: str, as_label: bool = False) -> RawScan:
    """Read pictures as axial slices, first file = lowest slice.

    Args:
        paths: The files, in any order; sorted by name with numbers in numeric order.
        where: Name for messages.
        as_label: The values are label ids: lossy files and rotation tags are refused, palettes keep their indices.

    Raises:
        DataError: If a file is damaged, colored, of another size, or a lossy label.
    """
    slices: list[Any] = []
    digests: list[str] = []
    notes: set[str] = set()
    for path in sorted(paths, key=natural_order):
        data, digest = read_bytes(path, where=where)
        digests.append(digest)
        slices += _pages(
            data, where=f"{where}: {path.name}" if len(paths) > 1 else where, as_label=as_label, notes=notes
        )
    if len(sizes := {s.shape for s in slices}) > 1:
        raise DataError(f"slices of a stack must have one size, got {sorted(sizes)}.", where=where)
    dtype = np.result_type(*{s.dtype for s in slices})
    array_zyx = np.stack([s.astype(dtype, copy=False) for s in slices])
    spacing, has_spacing = read_sidecar(paths[0].parent / SIDECAR, where=where)
    if not has_spacing:
        notes.add("no spacing.json: spacing taken as 1 mm")
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    check_spacing(affine, where=where)
    return RawScan(
        array_ijk=array_zyx.transpose(2, 1, 0),
        affine=affine,
        source_sha256=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        notes=tuple(sorted(notes)),
        has_orientation=False,
    )


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which slice_2 comes before slice_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def read_sidecar(path: Path, *, where: str) -> tuple[tuple[float, float, float], bool]:
    """Return (z, row, col) spacing of a sidecar, or 1 mm and False without one."""
    if not path.is_file():
        return (1.0, 1.0, 1.0), False
    try:
        z, row, column = (float(v) for v in json.loads(path.read_text(encoding="utf-8-sig"))["spacing_mm"])
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f'{path.name} must hold {{"spacing_mm": [z, row, col]}} in mm: {err}.', where=where) from err
    return (z, row, column), True


def _pages(data: bytes, *, where: str, as_label: bool, notes: set[str]) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"a picture must have at most {MAX_PIXELS} pixels.", where=where)
                if as_label and image.format == "JPEG":
                    raise DataError("a label must not be JPEG: its compression changes ids. Use PNG.", where=where)
                return [_pixels(p, where=where, as_label=as_label, notes=notes) for p in ImageSequence.Iterator(image)]
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as err:
        if isinstance(err, DataError):
            raise
        raise DataError(f"the picture is damaged or not PNG, TIFF or JPEG ({err}).", where=where) from err


def _pixels(page: Image.Image, *, where: str, as_label: bool, notes: set[str]) -> Any:
    if page.getexif().get(EXIF_ORIENTATION, 1) != 1:
        if as_label:
            raise DataError(
                "a label must not carry an EXIF rotation: is it applied or not? Save it again.", where=where
            )
        page = ImageOps.exif_transpose(page)
        notes.add("EXIF rotation applied")
    if page.mode == "P":
        if as_label:
            return np.asarray(page)
        page = page.convert("RGB")
    if page.mode == "1":
        return np.asarray(page).astype(np.uint8)
    array = np.asarray(page)
    if page.mode in ("LA", "La"):
        notes.add("transparency dropped")
        return array[..., 0]
    if array.ndim == 2:
        return array
    return _gray_of_color(array, where=where, notes=notes)


def _gray_of_color(array: Any, *, where: str, notes: set[str]) -> Any:
    """Gray pictures saved as RGB lose nothing by taking one channel; real color is refused."""
    if array.shape[-1] not in (3, 4) or not (
        np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2])
    ):
        raise DataError("a slice must be gray, got color. Export gray pictures.", where=where)
    notes.add("three equal color channels: one taken")
    return array[..., 0]
