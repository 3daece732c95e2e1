"""Durable files: tensors as safetensors and JSON, hashed while written, on the disk before anyone relies on them.

Reading that outlasts a short fault of a network drive.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from samgraft.shared.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}

TRANSIENT_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR})
"""What network file systems answer now and then; worth another try. A full disk or quota is not."""

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class FileDigest:
    """Size and sha256 of what was written."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileDigest:
    """Write a safetensors file, hash it in the same pass, and flush it to the disk.

    Our own writer, because the library's one holds a second copy of everything in memory, turns a full disk into an
    error without ``errno``, and refuses tensors that share memory.

    Raises:
        OSError: With ``errno`` set; the file may be incomplete then.

    Source:
        The format: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md#format
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, _pieces(text, tensors))


def write_json(path: Path, value: Mapping[str, Any]) -> FileDigest:
    """Write JSON with sorted keys, hash it, flush it to the disk. Floats keep every bit."""
    return _write(path, iter([json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"]))


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one atomic move: a reader sees the old or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.tmp")
    _write(draft, iter([text.encode()]))
    draft.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, without which a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    import torch

    yield len(header).to_bytes(8, "little")
    yield header
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        if tensor.numel():
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(data), CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]


def _write(path: Path, pieces: Iterator[bytes | memoryview]) -> FileDigest:
    digest, num_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            _write_all(descriptor, memoryview(piece))
            digest.update(piece)
            num_bytes += len(piece)
        _retry(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return FileDigest(num_bytes, digest.hexdigest())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[_retry(os.write, descriptor, data) :]


def _retry(call: Any, *arguments: Any) -> Any:
    for attempt in range(3):
        try:
            return call(*arguments)
        except OSError as err:
            if err.errno not in TRANSIENT_ERRORS or attempt == 2:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable")


Result = TypeVar("Result")

READ_TRANSIENT_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})
"""What NFS and failing disks answer for a while. A missing or forbidden file is no fault and is said at once."""
NUM_ATTEMPTS = 3
FIRST_WAIT_S = 0.2


def read_patiently(read: Callable[[], Result], *, where: str) -> Result:
    """Return what ``read`` returns, asking again after a transient fault.

    Raises:
        StorageError: If the fault stays.
        OSError: Every other one, unchanged.
    """
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return read()
        except OSError as err:
            if err.errno not in READ_TRANSIENT_ERRORS:
                raise
            if attempt == NUM_ATTEMPTS:
                raise StorageError(
                    f"the drive does not answer ({err.strerror}) after {NUM_ATTEMPTS} attempts.",
                    where=where,
                    kept="everything that was written before",
                    next_command="look at the drive or its mount, then run the same command again",
                ) from err
            time.sleep(FIRST_WAIT_S * attempt)
    raise AssertionError("unreachable")
