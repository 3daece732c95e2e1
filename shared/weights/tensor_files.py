"""Writing tensors: whole or not at all, equal tensors giving equal bytes; and what identifies them."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_TORCH_METADATA: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})
"""As every file of safetensors.torch has it."""


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, *, metadata: Mapping[str, str] = _TORCH_METADATA
) -> None:
    """Write safetensors through a temporary neighbour; ``metadata`` goes into the header."""
    temporary = path.with_name(path.name + ".tmp")
    with _whole_or_gone(temporary, tensors):
        save_file(_plain(tensors), temporary, metadata=dict(metadata))
    follow_umask(temporary)
    _settle(temporary, path)


def save_pth(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write what ``torch.load`` opens in segment_anything: a flat dictionary of plain tensors."""
    temporary = path.with_name(path.name + ".tmp")
    with _whole_or_gone(temporary, tensors):
        torch.save(_plain(tensors), temporary)
    _settle(temporary, path)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors writes 0600 whatever the umask, so no group could read it.

    The umask can only be asked by setting it, for all threads: a file beside it is made and looked at instead.
    """
    sample = path.with_name(path.name + ".mode")
    sample.unlink(missing_ok=True)
    sample.touch()
    mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the identity of tensors by name, shape, type and value, wherever and in whatever order they lie."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # channels_last parameters are written row-major, like everybody's; clones share no storage.
    return {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}


@contextmanager
def _whole_or_gone(temporary: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Leave no half file; say what the disk refused as the system says it, where the libraries have words of their own.

    safetensors puts the number of the system's error into its text, torch says that a position is unexpected.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as err:
        temporary.unlink(missing_ok=True)
        number = re.search(r"\(os error (\d+)\)", str(err))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if number is None and (isinstance(err, OSError) or shutil.disk_usage(temporary.parent).free > size):
            raise
        code = int(number[1]) if number else errno.ENOSPC
        raise OSError(code, os.strerror(code), temporary.name.removesuffix(".tmp")) from err


def _settle(temporary: Path, path: Path) -> None:
    """Bring a written file to disk and to its name."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)
