"""Writers of SAM weights, and the hash that identifies tensors."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_atomically, write_tensors
from samgraft.shared.weights.card import Card
from torch import nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def save_encoder(encoder: nn.Module | Mapping[str, torch.Tensor], folder: Path, card: Card) -> Path:
    """Write ``encoder.safetensors`` (keys ``image_encoder.*``) and ``card.json``.

    Args:
        encoder: The encoder, or its state under segment_anything's names.
        folder: Target folder, created if it is missing.
        card: Facts about the weights. Their sha256 is added.

    Returns:
        Path of the weights file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "encoder.safetensors"
    state = encoder.state_dict() if isinstance(encoder, nn.Module) else encoder
    digest = write_tensors(path, {f"image_encoder.{k}": v for k, v in state.items()})
    Card.from_dict({**card.to_dict(), "weights_sha256": digest.sha256}).write(folder / "card.json")
    return path


def save_sam(sam: Sam, path: Path) -> Path:
    """Write a whole SAM under segment_anything's names, as ``.pth`` or ``.safetensors`` by the file's ending.

    Returns:
        ``path``. ``load_state_dict(strict=True)`` of the matching stock builder accepts the file.

    Raises:
        WeightsError: If the file has another ending.
    """
    if path.suffix == ".safetensors":
        write_tensors(path, sam.state_dict())
    elif path.suffix == ".pth":
        write_pth(path, sam.state_dict())
    else:
        raise WeightsError(
            f"the weights file has an unknown ending ({path.suffix!r}, expected .pth or .safetensors).", where=path.name
        )
    return path


def write_pth(path: Path, tensors: Mapping[str, torch.Tensor], *, key: str | None = None) -> None:
    """Write a dictionary of plain tensors atomically, as ``torch.load`` reads it in segment_anything.

    Args:
        path: File to write.
        tensors: Tensors by name.
        key: Key of a dictionary around them, such as the ``model`` of SAM 2's files.

    Raises:
        OSError: If the file cannot be written. ``path`` is unchanged then.
    """
    # Clones do not share storage, so equal tensors give equal bytes whatever they were views of.
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    with write_atomically(path) as draft:
        try:
            torch.save(plain if key is None else {key: plain}, draft)
        except RuntimeError as err:
            # torch reports a full disk as an "unexpected pos" inside its archive, without the system's error.
            if shutil.disk_usage(path.parent).free > sum(t.numel() * t.element_size() for t in plain.values()):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from err


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a sha256 over names, shapes, types and values of tensors, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # Bytes instead of numbers, because NumPy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
