"""Stacks of PNG, TIFF and JPEG files, one file per slice in natural order, or multi-page TIFF volumes.

A file ``spacing.json`` in the folder gives the geometry that pictures lack: ``{"spacing_mm": [z, row, col]}``.
Without it, sizes that ImageJ or OME wrote into a TIFF count.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import axial_affine
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat, ScanReader
from samgraft.shared.scans.readers.tiff_header import check_tiff, tiff_spacing, with_tiff_sign
from samgraft.shared.scans.readers.verified import read_bytes
from samgraft.shared.scans.volume import RawScan

FORMATS = ("PNG", "TIFF", "JPEG")
SPACING_FILE = "spacing.json"
MAX_PIXELS = 64_000_000
EXIF_ORIENTATION = 0x0112
_PICTURE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, UserWarning, RuntimeWarning)
_COLOR_TYPES_OF_PNG = {2: "color", 4: "gray with transparency", 6: "color with transparency"}


def read_image_stack(paths: Sequence[Path], *, where: str, as_label: bool = False) -> RawScan:
    """Read pictures as axial slices, first file = lowest slice.

    Args:
        paths: Files in any order; they are sorted by name with numbers in numeric order.
        where: Name for messages.
        as_label: True if the values are label ids: lossy files and rotation tags are refused, palettes keep their
            indices.

    Raises:
        DataError: If a file is damaged, colored, of another size, a lossy label, or of a pixel type whose values
            would be changed by decoding.
    """
    slices: list[Any] = []
    digests: list[str] = []
    notes: set[str] = set()
    spacings: set[tuple[float, float, float] | None] = set()
    for path in sorted(paths, key=natural_order):
        data, digest = read_bytes(path, where=where)
        digests.append(digest)
        name = f"{where}: {path.name}" if len(paths) > 1 else where
        slices += _pages(data, where=name, as_label=as_label, notes=notes)
        spacings.add(None if as_label else _spacing_in_header(data, where=name))
    if len(sizes := {s.shape for s in slices}) > 1:
        raise DataError(f"slices of a stack must have one size, got {sorted(sizes)}.", where=where)
    dtype = np.result_type(*{s.dtype for s in slices})
    array_zyx = np.stack([s.astype(dtype, copy=False) for s in slices])
    spacing, has_spacing = read_spacing_file(paths[0].parent / SPACING_FILE, where=where)
    if not has_spacing and len(spacings) > 1:
        raise DataError(
            f"slices of a stack must have one spacing, got {len(spacings)}. Give {SPACING_FILE}.", where=where
        )
    if not has_spacing and (in_header := spacings.pop()) is not None:
        spacing, note = in_header, "spacing taken from the TIFF header"
        notes.add(note)
    elif not has_spacing:
        notes.add("no spacing.json: spacing taken as 1 mm")
    return RawScan(
        array_ijk=array_zyx.transpose(2, 1, 0),
        affine=axial_affine(spacing, where=where),
        source_sha256=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        notes=tuple(sorted(notes)),
        has_orientation=False,
    )


def inspect_pictures(paths: Sequence[Path], *, where: str) -> tuple[str, ...]:
    """Check the headers of pictures. Their metadata are not searched for identifying text.

    Raises:
        DataError: If a header alone shows that ``read_image_stack`` would refuse the picture.
    """
    for path in paths:
        try:
            with path.open("rb") as file, _open_picture(file) as image:
                file.seek(0)
                _check_header(image, file.read(32), as_label=False, where=where)
                if image.format == "TIFF":
                    tiff_spacing(image, where=where)
        except _PICTURE_ERRORS as err:
            if isinstance(err, DataError):
                raise
            raise _damaged_picture(err, where=where) from err
    return ()


def count_pages(path: Path) -> int:
    """Return the number of pages of a TIFF file, 1 for other pictures and files that cannot be opened."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return 1
    try:
        with path.open("rb") as file, _open_picture(file) as image:
            return int(getattr(image, "n_frames", 1))
    except _PICTURE_ERRORS:
        return 1  # the reader refuses the file by name


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key under which slice_2 comes before slice_10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name) if part]


def read_spacing_file(path: Path, *, where: str) -> tuple[tuple[float, float, float], bool]:
    """Return the (z, row, col) spacing in mm of a spacing file, or 1 mm and False without one.

    Raises:
        DataError: If the file does not hold three numbers.
    """
    if not path.is_file():
        return (1.0, 1.0, 1.0), False
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        z, row, column = (float(v) for v in values["spacing_mm"])
        if unknown := sorted(set(values) - {"spacing_mm"}):
            raise ValueError(f"{', '.join(unknown)} is not read")
    except (ValueError, KeyError, TypeError, OSError) as err:
        raise DataError(f'{path.name} must hold {{"spacing_mm": [z, row, col]}} in mm ({err}).', where=where) from err
    return (z, row, column), True


def _pages(data: bytes, *, where: str, as_label: bool, notes: set[str]) -> list[Any]:
    try:
        with _open_picture(io.BytesIO(data)) as image:
            _check_header(image, data[:32], as_label=as_label, where=where)
            pages = ImageSequence.Iterator(image)
            return [_pixels(page, data[:32], where=where, as_label=as_label, notes=notes) for page in pages]
    except _PICTURE_ERRORS as err:
        if isinstance(err, DataError):
            raise
        raise _damaged_picture(err, where=where) from err


def _spacing_in_header(data: bytes, *, where: str) -> tuple[float, float, float] | None:
    with _open_picture(io.BytesIO(data)) as image:
        return tiff_spacing(image, where=where) if image.format == "TIFF" else None


@contextmanager
def _open_picture(file: IO[bytes]) -> Iterator[Image.Image]:
    """Open a picture with Pillow's warnings about size and damage as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata that are not used here
        warnings.filterwarnings("error", message="(?i).*(truncated|corrupt)")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            yield image


def _damaged_picture(err: BaseException, *, where: str) -> DataError:
    if isinstance(err, UnidentifiedImageError):  # its text is the address of a buffer
        return DataError("the picture is damaged, or not PNG, TIFF or JPEG with 1 to 32 bits per pixel.", where=where)
    return DataError(f"the picture is damaged ({err}).", where=where)


def _check_header(image: Image.Image, head: bytes, *, as_label: bool, where: str) -> None:
    """Refuse pictures whose values or pages Pillow would change, before a pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"a picture must have at most {MAX_PIXELS} pixels.", where=where)
    if image.format in ("JPEG", "MPO") and as_label:
        raise DataError("a label must not be JPEG: its compression changes ids. Use PNG.", where=where)
    if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise DataError("an animated picture is not a stack of slices. Save its frames one by one.", where=where)
    if image.format == "PNG":
        depth, color_type = _png_type(head)
        if depth == 16 and color_type in _COLOR_TYPES_OF_PNG:  # Pillow keeps only the upper 8 bits of these
            raise DataError(
                f"16-bit PNG must be plain gray, got {_COLOR_TYPES_OF_PNG[color_type]}. Save it as 16-bit gray.",
                where=where,
            )
    if image.format == "TIFF":
        check_tiff(image, as_label=as_label, where=where)


def _png_type(head: bytes) -> tuple[int, int]:
    """Return bit depth and color type, bytes 24 and 25 of every PNG file."""
    return (head[24], head[25]) if len(head) > 25 else (8, 0)


def _pixels(page: Image.Image, head: bytes, *, where: str, as_label: bool, notes: set[str]) -> Any:
    if page.getexif().get(EXIF_ORIENTATION, 1) != 1:
        if as_label:
            raise DataError(
                "a label must not carry an EXIF rotation. Apply the rotation and save it again.", where=where
            )
        page = ImageOps.exif_transpose(page)
        notes.add("EXIF rotation applied")
    if page.mode in ("P", "PA") and as_label:
        return np.asarray(page.getchannel(0) if page.mode == "PA" else page)
    if page.mode in ("P", "PA"):
        page = page.convert("RGBA" if page.mode == "PA" or "transparency" in page.info else "RGB")
    if page.mode == "1":
        return np.asarray(page).astype(np.uint8)
    if page.mode not in ("L", "LA", "RGB", "RGBA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"):
        raise DataError(f"a slice must be gray, got {page.mode} pixels. Export gray pictures.", where=where)
    array = np.asarray(page)
    if page.format == "PNG" and page.mode == "L" and (depth := _png_type(head)[0]) < 8:
        # Pillow spreads 2 and 4 bits over 0..255, which turns a label of 3 into 255.
        return array // np.uint8(255 // (2**depth - 1))
    if page.format == "TIFF" and array.ndim == 2:
        array = with_tiff_sign(page, array)
    if page.mode in ("LA", "RGBA"):
        _check_alpha(array[..., -1], where=where)
        notes.add("transparency dropped, it is the same everywhere")
        array = array[..., 0] if page.mode == "LA" else array[..., :3]
    return array if array.ndim == 2 else gray_of_color(array, where=where, notes=notes)


def _check_alpha(alpha_HW: Any, *, where: str) -> None:
    if alpha_HW.min() != alpha_HW.max():
        raise DataError(
            "transparency differs from pixel to pixel and would be lost. Save gray values only.", where=where
        )


def gray_of_color(array: Any, *, where: str, notes: set[str]) -> Any:
    """Return one channel of a gray picture that was saved as RGB, and refuse real color."""
    if not (np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2])):
        raise DataError("a slice must be gray, got color. Export gray pictures.", where=where)
    notes.add("three equal color channels: one taken")
    return array[..., 0]


def _read(files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
    del like
    return read_image_stack(files.paths, where=files.name, as_label=as_label)


PICTURES = ScanReader(
    name=ScanFormat.IMAGES,
    suffixes=(".png", ".tif", ".tiff", ".jpg", ".jpeg"),
    read=_read,
    inspect=lambda files: inspect_pictures(files.paths, where=files.name),
    one_file_per_scan=False,
    has_native_geometry=False,
)
