"""Layouts of weights files, recognised by their keys and brought to segment_anything's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from samgraft.shared.errors import WeightsError
from samgraft.shared.models.safe_read import RawFile

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher", "student", "module")
_PREFIXES = ("module.", "_orig_mod.", "sam.")


@dataclass(kw_only=True)
class SamTensors:
    """Tensors under segment_anything's names, and what was done to get there."""

    format: str
    tensors: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


def recognise(raw: RawFile) -> SamTensors:
    """Tell the layout of a file by its keys and convert it.

    Raises:
        WeightsError: If no known layout fits.
    """
    notes: list[str] = []
    tensors = _strip_prefixes(_unwrap(raw.content, notes), notes)
    if any(k.startswith("image_encoder.") for k in tensors):
        return SamTensors(format="sam", tensors=_sam(tensors, notes), notes=notes)
    if "pos_embed" in tensors and any(k.startswith("blocks.0.attn.rel_pos") for k in tensors):
        return SamTensors(
            format="sam-encoder", tensors={f"image_encoder.{k}": v for k, v in tensors.items()}, notes=notes
        )
    raise WeightsError(
        f"weights must be of a known layout, and 0 of {len(tensors)} tensors are SAM's "
        f"(first: {', '.join(list(tensors)[:3])}).",
        where=raw.name,
    )


def _unwrap(content: Mapping[Any, Any], notes: list[str]) -> dict[str, torch.Tensor]:
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and any(isinstance(v, torch.Tensor) for v in inner.values()):
            notes.append(f"taken from the dictionary entry {name!r}; beside it: {', '.join(map(str, content))}")
            return {str(k): v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    return {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def _strip_prefixes(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    stripped = True
    while stripped and tensors:
        stripped = False
        for prefix in _PREFIXES:
            if all(k.startswith(prefix) for k in tensors):
                tensors = {k[len(prefix) :]: v for k, v in tensors.items()}
                notes.append(f"prefix {prefix!r} removed")
                stripped = True
    return tensors


def _sam(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    dropped = [
        k for k in tensors if re.match(r"image_encoder\.(norm_head|head)\.", k) or k in {"pixel_mean", "pixel_std"}
    ]
    if dropped:
        notes.append(f"left out, not part of SAM: {', '.join(dropped)}")
    return {k: v for k, v in tensors.items() if k not in dropped}
