"""Plain vision transformers (official MAE, DINO, DINOv2, MRI-CORE) under segment_anything's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from samgraft.shared.errors import WeightsError

_NOT_ENCODER = re.compile(r"(decoder_|head\.|fc_norm\.|norm\.|mask_token$|cls_token$|register_tokens$|dist_token$)")
_RENAMED = {"mlp.fc1": "mlp.lin1", "mlp.fc2": "mlp.lin2"}


def from_plain_vit(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Rename and reshape the tensors of a plain ViT; SAM's relative positions and neck are not among them.

    Layer scale (DINOv2) is multiplied into the projections before it, which is exact.

    Raises:
        WeightsError: If the patch is not 16 px or the MLP is gated: neither fits SAM.
    """
    kernel = tensors["patch_embed.proj.weight"].shape[-1]
    if kernel != 16:
        raise WeightsError(f"weights must have patches of 16 px to become a SAM encoder, got {kernel} px.")
    if any(".mlp.w12." in key for key in tensors):
        raise WeightsError("weights must have a plain MLP to become a SAM encoder, got a gated one (SwiGLU).")
    dropped = [key for key in tensors if _NOT_ENCODER.match(key)]
    if dropped:
        notes.append(f"left out, SAM has no place for them: {_short(dropped)}")
    kept = {_unchunk(key): value for key, value in tensors.items() if key not in dropped}
    scales = {key: kept.pop(key) for key in list(kept) if re.search(r"\.ls[12]\.gamma$", key)}
    for key, gamma in scales.items():
        layer = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        kept[f"{layer}.weight"] = kept[f"{layer}.weight"] * gamma[:, None]
        kept[f"{layer}.bias"] = kept[f"{layer}.bias"] * gamma
    if scales:
        notes.append(f"{len(scales)} layer scales multiplied into the layers before them")
    out = {}
    for key, value in kept.items():
        for old, new in _RENAMED.items():
            key = key.replace(f".{old}.", f".{new}.")
        out[f"image_encoder.{key}"] = value
    out["image_encoder.pos_embed"] = _grid_positions(out["image_encoder.pos_embed"], notes)
    notes.append("a plain ViT has no relative positions and no neck: they stay at the base weights")
    return out


def is_plain_vit(tensors: Mapping[str, torch.Tensor]) -> bool:
    """True for timm-style names without SAM's relative positions."""
    return any(key.startswith("blocks.") for key in tensors) and not any("rel_pos" in key for key in tensors)


def _unchunk(key: str) -> str:
    """Turn DINOv2's ``blocks.CHUNK.INDEX.`` into ``blocks.INDEX.``; INDEX counts through all chunks."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)


def _grid_positions(positions: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """Turn (1, [1 +] g g, C) into (1, g, g, C), dropping the class token's position."""
    if positions.ndim == 4:
        return positions
    length = positions.shape[1]
    for extra in (0, 1):
        side = round((length - extra) ** 0.5)
        if side * side == length - extra:
            if extra:
                notes.append("position of the class token dropped")
            return positions[:, extra:].reshape(1, side, side, -1)
    raise WeightsError(f"pos_embed must cover a square grid, got {length} positions.")


def _short(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... {len(names) - 4} more" if len(names) > 4 else "")
