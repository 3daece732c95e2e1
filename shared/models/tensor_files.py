"""Writing tensors: whole or not at all, equal tensors giving equal bytes; and what identifies them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors.torch import save_file

_TORCH_METADATA: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})
"""As every file of safetensors.torch has it."""


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, *, metadata: Mapping[str, str] = _TORCH_METADATA
) -> None:
    """Write safetensors through a temporary neighbour; ``metadata`` goes into the header."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(_plain(tensors), temporary, metadata=dict(metadata))
    _settle(temporary, path)


def save_pth(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write what ``torch.load`` opens in segment_anything: a flat dictionary of plain tensors."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(_plain(tensors), temporary)
    _settle(temporary, path)


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


def _settle(temporary: Path, path: Path) -> None:
    """Bring a written file to disk and to its name."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)
