"""The contents of released files, split into text, unknown bytes and numbers.

The privacy gate searches the three differently: in the numbers of weights and pixels, short texts occur by chance.
Archives are unpacked. A container that cannot be read here is refused, because it may contain anything.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from samgraft.shared.errors import DataError

CHUNK = 512 * 1024
"""Bytes that are searched at a time, few enough for the processor's cache."""
OVERLAP = 4096
"""Bytes that neighbouring pieces share, so that nothing is missed at a border."""
TEXT_SUFFIXES = {".json", ".md", ".txt", ".csv", ".yaml", ".yml", ".html", ".cfg"}
TEXT_NAMES = {"SHA256SUMS", "LICENSE"}
MAX_DEPTH = 4
"""Number of archives within archives."""
MAX_UNPACKED = 8 << 30
"""Largest number of bytes of an unpacked member. Nothing in a release is packed and larger."""


class Kind(Enum):
    """Kind of content, which decides how it is searched."""

    TEXT = "text"
    BINARY = "binary"
    """Bytes of an unknown format, in which printable runs are text."""
    NUMBERS = "numbers"


@dataclass(frozen=True)
class Region:
    """One piece of a file or of an archive's member."""

    name: str
    """Path of the file, and of the member after a colon."""
    offset: int
    """Position of the piece in the file or member, in bytes."""
    content: bytes
    kind: Kind


def regions(file: IO[bytes], name: str, *, depth: int = 1) -> Iterator[Region]:
    """Yield the contents of one file.

    Args:
        file: Open file, at any position.
        name: Name for messages; its suffix decides between text and weights formats.
        depth: Number of archives around it, plus one.

    Raises:
        DataError: If the file is damaged, locked, packed too deeply, or of a kind that cannot be searched.
    """
    if depth > MAX_DEPTH:
        raise DataError(f"archives in a release are packed more than {MAX_DEPTH} deep.", where=name)
    file.seek(0)
    head = file.read(16)
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".safetensors":
        yield from _safetensors(file, name)
    elif suffix == ".onnx":
        yield from _onnx(file, name)
    elif PurePosixPath(name).name == "zarr.json":
        yield from _zarr_metadata(file, name)
    elif zipfile.is_zipfile(file):
        yield from _zip(file, name, depth)
    elif head.startswith(b"\x93NUMPY"):
        yield from _npy(file, name)
    elif head.startswith(_PICTURES):
        yield from _picture(file, name)
    elif packing := next((kind for magic, kind in _PACKINGS.items() if head.startswith(magic)), None):
        yield from _packed(file, name, packing, depth)
    else:
        is_text = suffix in TEXT_SUFFIXES or PurePosixPath(name).name in TEXT_NAMES or _starts_as_text(file)
        yield from _pieces(file, name, Kind.TEXT if is_text else Kind.BINARY)


def _starts_as_text(file: IO[bytes]) -> bool:
    """Return True if the file begins with UTF-8 text, whatever its suffix."""
    file.seek(0)
    head = file.read(4096)
    # The last character may be cut.
    text = head.decode("utf-8", "replace").removesuffix("\ufffd")
    return bool(head) and "\ufffd" not in text and all(letter.isprintable() or letter.isspace() for letter in text)


def number_regions(file: IO[bytes], name: str) -> Iterator[Region]:
    """Yield a whole file as numbers, such as external data of an ONNX file."""
    return _pieces(file, name, Kind.NUMBERS)


def zarr_values(array_folder: Path, name: str) -> Iterator[Region]:
    """Yield the decoded values of a zarr array.

    Raises:
        DataError: If the array cannot be read.
    """
    import zarr

    try:
        values = np.asarray(zarr.open_array(str(array_folder), mode="r")[...])
    except Exception as err:
        raise DataError("an array in a release cannot be read.", where=name) from err
    yield from _values(values, f"{name}:values")


def external_files(path: Path) -> set[Path]:
    """Return the files with external data that an ONNX file names."""
    with path.open("rb") as file, _mapped(file) as view:
        found = _OnnxWalk(view, path.name)
        return {path.parent / location for location in found.locations}


def _pieces(file: IO[bytes], name: str, kind: Kind, *, start: int = 0, end: int | None = None) -> Iterator[Region]:
    """Yield overlapping pieces of a part of a file."""
    file.seek(start)
    offset, tail = start, b""
    while piece := file.read(CHUNK if end is None else min(CHUNK, end - offset)):
        yield Region(name, offset - len(tail), tail + piece, kind)
        offset += len(piece)
        tail = piece[-OVERLAP:]


def _safetensors(file: IO[bytes], name: str) -> Iterator[Region]:
    """Yield tensor names and metadata as text and tensors as numbers, without the offsets of the header."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        texts = [*header, *(f"{key} {value}" for key, value in metadata.items())]
    except (ValueError, AttributeError, TypeError) as err:
        raise DataError("the header of a safetensors file in a release is damaged.", where=name) from err
    yield Region(f"{name}:(header)", 8, "\n".join(texts).encode(), Kind.TEXT)
    yield from _pieces(file, name, Kind.NUMBERS, start=8 + length)


def _zarr_metadata(file: IO[bytes], name: str) -> Iterator[Region]:
    """Yield keys, strings and all attributes as text, without shapes and chunk sizes, which look like long numbers."""
    file.seek(0)
    texts: list[str] = []

    def collect(value: Any, *, is_attribute: bool = False) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                texts.append(str(key))
                # Attributes are the user's. A number there may be a patient's.
                collect(child, is_attribute=is_attribute or key == "attributes")
        elif isinstance(value, list):
            for child in value:
                collect(child, is_attribute=is_attribute)
        elif isinstance(value, str) or is_attribute:
            texts.append(str(value))

    try:
        collect(json.load(file))
    except ValueError as err:
        raise DataError("the metadata of an array in a release are damaged.", where=name) from err
    yield Region(name, 0, "\n".join(texts).encode(), Kind.TEXT)


def _npy(file: IO[bytes], name: str) -> Iterator[Region]:
    file.seek(0)
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as err:
        raise DataError("an array in a release is damaged or contains pickled objects.", where=name) from err
    yield from _values(array, name)
    # Bytes may follow the array.
    yield from _pieces(file, name, Kind.NUMBERS)


def _values(array: np.ndarray[Any, Any], name: str) -> Iterator[Region]:
    # Strings of variable length (kinds T and O) are pointers in the array's own bytes.
    if array.dtype.kind in "USTO":
        texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in array.ravel()]
        yield Region(name, 0, "\n".join(texts).encode("utf-8", "replace"), Kind.TEXT)
        return
    for field in array.dtype.names or ():
        yield Region(name, 0, field.encode(), Kind.TEXT)
        yield from _values(array[field], name)
    yield from _pieces(io.BytesIO(array.tobytes()), name, Kind.NUMBERS)


# Archives

_PACKINGS: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"MSCF": "cab",
    b"\x89HDF": "HDF5",
    b"MATLAB 5.0 MAT": "MATLAB data",
    b"PAR1": "Parquet",
    b"%PDF": "PDF",
}
_READERS: Mapping[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}


def _zip(file: IO[bytes], name: str, depth: int) -> Iterator[Region]:
    """Yield the members of a zip (torch's .pth, numpy's .npz), their names and extras, and all bytes between them."""
    covered: list[tuple[int, int]] = []
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            for info in archive.infolist():
                member = f"{name}:{info.filename}"
                yield Region(member, 0, b"\n".join([info.filename.encode(), info.comment, info.extra]), Kind.TEXT)
                covered.append(_member_data(file, info))
                if info.filename.endswith(".data/serialization_id"):
                    continue  # torch's hash of the names, which consists of digits
                if info.file_size > MAX_UNPACKED:
                    raise _too_large(member)
                content = io.BytesIO(archive.read(info))
                if _is_tensor(info.filename, names):
                    yield from _pieces(content, member, Kind.NUMBERS)
                else:
                    yield from regions(content, member, depth=depth + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, struct.error) as err:
        raise DataError("an archive in a release is damaged or locked.", where=name) from err
    yield from _between(file, name, covered)


def _is_tensor(member: str, names: Collection[str]) -> bool:
    """Return True for the members of torch's .pth that contain a tensor's numbers."""
    path = PurePosixPath(member)
    is_torch = (path.parent.parent / "data.pkl").as_posix() in names
    return is_torch and path.parent.name == "data" and path.name.isdigit()


def _member_data(file: IO[bytes], info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return first and last position of a member's data, from its local header."""
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<HH", file.read(30)[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    return start, start + info.compress_size


def _between(file: IO[bytes], name: str, covered: list[tuple[int, int]]) -> Iterator[Region]:
    """Yield the bytes outside of the covered parts, such as headers, padding and anything at the end."""
    size = file.seek(0, io.SEEK_END)
    position = 0
    for start, end in [*sorted(covered), (size, size)]:
        if start > position:
            yield from _pieces(file, f"{name}:(between)", Kind.BINARY, start=position, end=start)
        position = max(position, end)


def _packed(file: IO[bytes], name: str, packing: str, depth: int) -> Iterator[Region]:
    if packing not in _READERS:
        raise DataError(f"a file in a release cannot be searched, because it is packed as {packing}.", where=name)
    file.seek(0)
    # The header of gzip names the original file, and bytes may follow the packed part.
    yield Region(name, 0, file.read(1024), Kind.BINARY)
    yield from _pieces(file, name, Kind.NUMBERS)
    file.seek(0)
    try:
        with _READERS[packing](file) as stream:
            inside = stream.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as err:
        raise DataError(f"an archive in a release is damaged ({packing}).", where=name) from err
    if len(inside) > MAX_UNPACKED:
        raise _too_large(name)
    inner = PurePosixPath(name).name.rpartition(".")[0]
    suffix = PurePosixPath(inner).suffix
    yield from regions(io.BytesIO(inside), f"{name}:unpacked{suffix}", depth=depth + 1)


def _too_large(name: str) -> DataError:
    return DataError(f"a packed file in a release unpacks to more than {MAX_UNPACKED} bytes.", where=name)


# Pictures

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\xff\xd8\xff", b"II*\0", b"MM\0*")


def _picture(file: IO[bytes], name: str) -> Iterator[Region]:
    """Yield a picture's metadata as text, and its pixels and compressed bytes as numbers."""
    from PIL import Image, ImageSequence
    from PIL.ExifTags import IFD

    file.seek(0)
    try:
        with Image.open(file) as picture:
            exif = picture.getexif()
            facts = [*exif.items(), *dict(getattr(picture, "text", {})).items()]
            # Artist and camera are in the first directory, user comments and places in those below it.
            facts += [fact for directory in IFD for fact in exif.get_ifd(directory).items()]
            frames = []
            for frame in ImageSequence.Iterator(picture):
                # Every frame of a GIF can have a comment of its own.
                facts += frame.info.items()
                frames.append(np.asarray(frame).tobytes())
    except Exception as err:
        raise DataError("a picture in a release cannot be read.", where=name) from err
    yield Region(f"{name}:(metadata)", 0, "\n".join(map(_fact, facts)).encode("utf-8", "replace"), Kind.TEXT)
    for number, pixels in enumerate(frames):
        yield from _pieces(io.BytesIO(pixels), f"{name}:frame{number}", Kind.NUMBERS)
    yield from _pieces(file, name, Kind.NUMBERS)
    file.seek(0)
    yield from _between(file, name, _parts_without_text(file.read()))


def _fact(item: tuple[Any, Any]) -> str:
    key, value = item
    return f"{key} {value.decode('utf-8', 'replace') if isinstance(value, bytes) else value}"


def _parts_without_text(content: bytes) -> list[tuple[int, int]]:
    """Return the parts of a PNG or JPEG without readable text. Pictures of other kinds are one such part."""
    if content.startswith(b"\xff\xd8"):
        return [(content.find(b"\xff\xda"), content.rfind(b"\xff\xd9"))]
    if not content.startswith(b"\x89PNG"):
        return [(0, len(content))]
    position = 8
    parts: list[tuple[int, int]] = []
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        end = position + 8 + length
        # Compressed text and profiles were read as metadata. Of all other chunks only the data are searched, because
        # the letters of the chunk's type would join its first word.
        is_compressed = kind in (b"IDAT", b"fdAT", b"zTXt", b"iTXt", b"iCCP")
        parts += [(position, end + 4)] if is_compressed else [(position, position + 8), (end, end + 4)]
        position = end + 4
        if kind == b"IEND":
            break
    return parts


# ONNX: a protocol buffer, read by its wire format, so that the gate needs no onnx package.

_NUMBERS = "numbers"
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        7: _NUMBERS,
        8: _NUMBERS,
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {
        1: _NUMBERS,
        4: _NUMBERS,
        5: _NUMBERS,
        7: _NUMBERS,
        9: _NUMBERS,
        10: _NUMBERS,
        11: _NUMBERS,
        13: "external",
    },
    "external": {},
}
"""Fields of onnx.proto that lead to tensors, and those that contain numbers.

Source:
    https://github.com/onnx/onnx/blob/v1.19.0/onnx/onnx.proto
"""


class _OnnxWalk:
    """Positions of all numbers in an ONNX file, and the names of its external files."""

    def __init__(self, view: memoryview, name: str) -> None:
        self.numbers: list[tuple[int, int]] = []
        self.locations: list[str] = []
        self._view = view
        self._name = name
        self._read("model", 0, len(view))

    def _read(self, message: str, position: int, end: int) -> None:
        fields = _MESSAGES[message]
        entry: dict[int, bytes] = {}
        while position < end:
            tag, position = self._varint(position)
            number, wire = tag >> 3, tag & 7
            if wire == 2:
                length, position = self._varint(position)
                if position + length > end:
                    raise self._damaged()
                kind = fields.get(number)
                if kind == _NUMBERS:
                    self.numbers.append((position, position + length))
                elif kind is not None:
                    self._read(kind, position, position + length)
                elif message == "external" and number in (1, 2):
                    entry[number] = bytes(self._view[position : position + length])
                position += length
            elif wire == 0:
                _, position = self._varint(position)
            elif wire in (1, 5):
                position += 8 if wire == 1 else 4
            else:
                raise self._damaged()
        if entry.get(1) == b"location":
            self.locations.append(entry.get(2, b"").decode("utf-8", "replace"))

    def _varint(self, position: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if position >= len(self._view) or shift > 63:
                raise self._damaged()
            byte = self._view[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value, position

    def _damaged(self) -> DataError:
        return DataError("an ONNX file in a release is damaged.", where=self._name)


class _mapped:  # noqa: N801
    """Context with the bytes of a file as a memoryview, without reading a large file into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def __enter__(self) -> memoryview:
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
        except (OSError, ValueError, io.UnsupportedOperation):  # a member of an archive, or an empty file
            self._file.seek(0)
            self._view = memoryview(self._file.read())
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        if self._map is not None:
            self._map.close()


def _onnx(file: IO[bytes], name: str) -> Iterator[Region]:
    with _mapped(file) as view:
        numbers = _OnnxWalk(view, name).numbers
    for start, end in numbers:
        yield from _pieces(file, name, Kind.NUMBERS, start=start, end=end)
    # Names, metadata and strings are between the numbers.
    for region in _between(file, name, numbers):
        yield Region(name, region.offset, region.content, Kind.TEXT)
