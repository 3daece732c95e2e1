"""Source files read to their last byte, with checksums.

Libraries stop at the last voxel and miss a cut or damaged tail: nibabel ignores a wrong gzip checksum, and SimpleITK
fills a truncated file with zeros (both measured). Every reader of this folder gets its bytes from here.
"""

from __future__ import annotations

import hashlib
import stat
import zlib
from pathlib import Path

from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.files import read_with_retry

GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path, *, where: str) -> tuple[bytes, str]:
    """Return every byte of a regular file and their sha256.

    Raises:
        DataError: If the file is missing, empty, a pipe, a socket or a folder.
        StorageError: If the drive fails repeatedly.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as err:
        raise DataError("the file vanished after it was listed. Run the command again.", where=where) from err
    except OSError as err:
        raise DataError(f"the file cannot be opened ({err.strerror}).", where=where) from err
    if not stat.S_ISREG(mode):  # opening a pipe would block until another process writes to it
        raise DataError("a scan must be a regular file, got a folder, pipe or device.", where=where)
    try:
        data = read_with_retry(path.read_bytes, where=where)
    except StorageError:
        raise
    except OSError as err:
        raise DataError(f"the file cannot be read ({err.strerror}).", where=where) from err
    if not data:
        raise DataError("the file is empty (0 bytes). Copy it again from its origin.", where=where)
    return data, hashlib.sha256(data).hexdigest()


def read_head(path: Path, num_bytes: int, *, where: str) -> bytes:
    """Return the first bytes of a file, decompressed if it is a gzip file.

    Raises:
        DataError: If the file cannot be opened or its gzip data is damaged.
    """
    try:
        with path.open("rb") as file:
            # Incompressible data grows by a few bytes per block, hence the reserve.
            data = file.read(2 * num_bytes + 4096)
    except OSError as err:
        raise DataError(f"the file cannot be opened ({err.strerror}).", where=where) from err
    return peek_gzip(data, num_bytes=num_bytes, where=where) if data[:2] == GZIP_MAGIC else data[:num_bytes]


def gunzip(data: bytes, *, limit: int, where: str) -> bytes:
    """Decompress gzip data to its end and check CRC and length.

    Args:
        data: Compressed bytes.
        limit: Number of bytes that the header of the scan announces; more is refused before it is allocated.
        where: Name for messages.

    Raises:
        DataError: If the data is cut, its checksum is wrong, or it is longer than ``limit``.
    """
    parts: list[bytes] = []
    left = limit
    while data.strip(b"\0"):  # some writers pad with zeros; others write several members
        stream = zlib.decompressobj(wbits=31)
        try:
            # One byte more than wanted, so that zlib reaches the trailer and compares CRC and length.
            parts.append(stream.decompress(data, left + 1))
        except zlib.error as err:
            raise DataError(
                f"the gzip data is damaged or cut short ({err}). Copy the file again from its origin.", where=where
            ) from err
        left -= len(parts[-1])
        if left < 0:
            raise DataError(f"the compressed data is longer than the {limit} bytes of its header.", where=where)
        if not stream.eof:
            raise DataError(
                "the gzip data is damaged or cut short (it ends too early). Copy the file again from its origin.",
                where=where,
            )
        data = stream.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def peek_gzip(data: bytes, *, num_bytes: int, where: str) -> bytes:
    """Return the first decompressed bytes, enough for a header."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, num_bytes)
    except zlib.error as err:
        raise DataError(f"the gzip data is damaged ({err}). Copy the file again from its origin.", where=where) from err
