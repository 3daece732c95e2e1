"""Durable file operations, the only place that writes atomically, hashes files and repeats failed calls.

Every ``write_*`` function writes a draft beside the target, flushes it to the disk and renames it. A reader therefore
finds the old or the new content, and neither a killed process nor a power cut leaves a part of a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from samgraft.shared.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 24
NUM_ATTEMPTS = 4
FIRST_WAIT_S = 0.2
"""Wait in seconds after the first failed attempt. Each further wait is twice as long."""
TRANSIENT_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT})
"""Error numbers that network drives and failing disks report for a short time.

A full disk, a missing file and a missing permission are not among them and are reported at once.
"""

# Widest types first, which keeps every tensor aligned to its element size in the file.
SAFETENSORS_DTYPES = {
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.complex64": "C64",
    "torch.float32": "F32",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""Names of torch's types in the safetensors format, in the order in which the library stores them."""

PYTORCH_METADATA: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})
"""Header entry that transformers expects in a safetensors file."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class FileDigest:
    """Size and sha256 of a written file."""

    num_bytes: int
    sha256: str


def write_bytes(path: Path, data: bytes) -> FileDigest:
    """Write bytes atomically."""
    return _write_pieces(path, [data])


def write_text(path: Path, text: str) -> FileDigest:
    """Write UTF-8 text atomically, without translating line ends."""
    return write_bytes(path, text.encode())


def write_private_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically to a file that only its owner can read."""
    with write_atomically(path) as draft:
        draft.unlink(missing_ok=True)
        # The mode is set when the file is created. A moment with the usual mode would be enough to read it.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)


def write_json(
    path: Path, value: object, *, indent: int = 1, sort_keys: bool = True, allow_nan: bool = True
) -> FileDigest:
    """Write JSON with a final line end atomically. Floats keep every bit."""
    return write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=allow_nan) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] = PYTORCH_METADATA
) -> FileDigest:
    """Write a safetensors file atomically. The bytes equal those of the safetensors library.

    The library itself holds a second copy of all tensors in memory, reports a full disk without ``errno``, refuses
    tensors that share memory and ignores the umask.

    Args:
        path: Target file.
        tensors: Tensors by name, on any device and in any memory layout.
        metadata: Strings for the file's header.

    Raises:
        OSError: If the file cannot be written. ``path`` is unchanged then.

    Source:
        The format: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md#format
    """
    order = list(SAFETENSORS_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(str(tensors[name].dtype)), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _write_pieces(path, _iterate_pieces(text, [tensors[name] for name in names]))


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a draft path to write to, and rename the draft to ``path`` when the block succeeds.

    Use it for libraries that write files themselves. The draft is flushed before the rename and deleted after an error.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        yield draft
        # The content must be on the disk before the name points to it, or a power cut could leave an empty file.
        sync_file(draft)
        draft.replace(path)
    except BaseException as err:
        draft.unlink(missing_ok=True)
        if isinstance(err, OSError) and err.filename in {None, str(draft)}:
            err.filename = str(path)  # the name that a user can find
        raise
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder on its drive and flush the folder that contains it."""
    source.rename(target)
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk. Without this a rename may not survive a power cut."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, repeating the read after a transient error."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry(read)


def is_transient(error: Exception) -> bool:
    """Return whether a repeated file operation may succeed after this error."""
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRORS


def retry(
    call: Callable[[], Result],
    *,
    is_worth_repeating: Callable[[Exception], bool] = is_transient,
    first_wait_s: float | None = None,
) -> Result:
    """Return what ``call`` returns, calling it up to ``NUM_ATTEMPTS`` times.

    Args:
        call: Operation without side effects that a repetition would double.
        is_worth_repeating: Test of an error. All other errors, and that of the last attempt, are raised.
        first_wait_s: Seconds before the second attempt, doubled after each attempt. Default ``FIRST_WAIT_S``.
    """
    wait_s = FIRST_WAIT_S if first_wait_s is None else first_wait_s
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return call()
        except Exception as err:
            if attempt == NUM_ATTEMPTS or not is_worth_repeating(err):
                raise
            time.sleep(wait_s)
            wait_s *= 2  # a server that is overloaded gets time to recover
    raise AssertionError("unreachable")


def read_with_retry(read: Callable[[], Result], *, where: str) -> Result:
    """Return what ``read`` returns, with a ``StorageError`` for a transient error that stays.

    Raises:
        StorageError: If every attempt failed with a transient error.
        OSError: Any other error of ``read``, unchanged.
    """
    try:
        return retry(read)
    except OSError as err:
        if not is_transient(err):
            raise
        raise StorageError(
            f"the drive does not respond after {NUM_ATTEMPTS} attempts ({err.strerror}).",
            where=where,
            kept="everything that was written before",
            next_command="check the drive and its mount, then run the same command again",
        ) from err


def _iterate_pieces(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    import torch  # here, so that commands without tensors start fast

    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        # contiguous() also writes channels_last tensors in row-major order, as every reader expects.
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.numel():
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileDigest:
    digest, num_bytes = hashlib.sha256(), 0
    with write_atomically(path) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for piece in pieces:
                data = memoryview(piece)
                while data:  # a write may take a part of the data only
                    data = data[_write_once(descriptor, data) :]
                digest.update(piece)
                num_bytes += len(piece)
        finally:
            os.close(descriptor)
    return FileDigest(num_bytes, digest.hexdigest())


def _write_once(descriptor: int, data: memoryview) -> int:
    return retry(lambda: os.write(descriptor, data))


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        retry(lambda: os.fsync(descriptor))
    finally:
        os.close(descriptor)
