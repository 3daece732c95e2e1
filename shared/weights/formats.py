"""Layouts of weights files, recognised by their keys and brought to segment_anything's names.

Plain vision transformers (official MAE, DINO, DINOv2, MRI-CORE) under segment_anything's names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from samgraft.shared.encoders.registry import encoder_anchors
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.safe_read import RawFile, iterate_tensors
from samgraft.shared.weights.transformers_format import SHARED_POSITIONS, from_transformers
from samgraft.shared.weights.unfinished import FINISH_RUN

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
_TRANSFORMERS_ANCHOR = "vision_encoder.patch_embed.projection.weight"
_WRAPPING = frozenset({"module", "_orig_mod"})
# Of several encoders in one file the first of these is taken, and said.
_PREFERRED_ROOTS = ("teacher", "ema", "model", "state_dict", "student")
# A copy of the encoder as it was before training (objective ``feature``): never what a file is read for.
FROZEN_COPY = "frozen_copy"
_NOT_SAM = re.compile(
    r"(pixel_mean|pixel_std|image_encoder\.(norm_head|head)\..*|image_encoder\..*attention_bias_idxs)$"
)


@dataclass(kw_only=True)
class SamTensors:
    """Tensors under segment_anything's names, and what was done to get there."""

    format: str
    tensors: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)
    is_partial: bool = False
    """True if the layout has no relative positions and no neck by nature."""


def recognise(raw: RawFile) -> SamTensors:
    """Tell the layout of a file by its keys and convert it.

    Raises:
        WeightsError: If no known layout fits, or the file is an adapter without its base.
    """
    notes: list[str] = []
    flat = _without_wrapping(dict(iterate_tensors(raw.content)), notes)
    _refuse_adapter(flat, raw.name)
    root = _find_root(flat, _TRANSFORMERS_ANCHOR, notes)
    if root is not None:
        inside = _under(flat, root, notes, also=(SHARED_POSITIONS,))
        return SamTensors(format="transformers SamModel", tensors=from_transformers(inside, notes), notes=notes)
    for anchor in encoder_anchors():
        root = _find_root(flat, anchor, notes)
        if root is not None:
            return _from_encoder_root(flat, root, notes)
    parts = Counter(key.split(".", 1)[0] for key in flat)
    raise WeightsError(
        f"weights must hold an image encoder of a known layout, and 0 of {len(flat)} tensors belong to one. Found: "
        f"{', '.join(f'{part} {count}' for part, count in parts.most_common(4)) or 'nothing'}.",
        where=raw.name,
    )


def _from_encoder_root(flat: dict[str, torch.Tensor], root: str, notes: list[str]) -> SamTensors:
    if root.endswith("image_encoder."):
        tensors = _under(flat, root.removesuffix("image_encoder."), notes)
        return _finish("SAM", tensors, notes)
    tensors = _under(flat, root, notes)
    if is_plain_vit(tensors):
        kind = "DINO-style ViT" if "teacher" in root or "student" in root else "MAE-style ViT"
        return SamTensors(format=kind, tensors=from_plain_vit(tensors, notes), notes=notes, is_partial=True)
    return _finish("SAM encoder without prefix", {f"image_encoder.{k}": v for k, v in tensors.items()}, notes)


def _finish(name: str, tensors: dict[str, torch.Tensor], notes: list[str]) -> SamTensors:
    dropped = [key for key in tensors if _NOT_SAM.match(key)]
    if dropped:
        notes.append(f"left out, not part of SAM: {', '.join(dropped[:6])}")
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    adapters = [key for key in kept if re.search(r"\.?(Space_|MLP_|Depth_)?Adapter\.D_fc", key)]
    if adapters:
        name = "finetune-SAM with bottleneck adapters"
        notes.append(f"{len(adapters)} adapter tensors: SAM has no place for them, what they learned cannot be merged")
    merged = _merge_lora(kept)
    if len(merged) != len(kept):
        name = "finetune-SAM with LoRA"
        notes.append(f"{len(kept) - len(merged)} LoRA tensors merged into the layers they adapt")
    return SamTensors(format=name, tensors=merged, notes=notes)


def _merge_lora(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge finetune-SAM's LoRA (scale 1) and restore the names of the layers it wraps.

    The wrapper adds its query term to the first C and its value term to the last C outputs of ``qkv``.
    """
    out = dict(tensors)
    for key in tensors:
        if key.endswith(".qkv.qkv.weight"):
            base, weight = key.removesuffix("qkv.weight"), out.pop(key).clone()
            dim = weight.shape[1]
            for rows, letter in ((slice(0, dim), "q"), (slice(-dim, None), "v")):
                down, up = (out.pop(f"{base}linear_{half}_{letter}.weight") for half in "ab")
                weight[rows] += up.to(weight) @ down.to(weight)
            out[f"{base}weight"] = weight
            out[f"{base}bias"] = out.pop(f"{base}qkv.bias")
        elif key.endswith(("_proj.proj.weight",)):
            base = key.removesuffix("proj.weight")
            down, up = out.pop(f"{base}w_a.weight"), out.pop(f"{base}w_b.weight")
            weight = out.pop(key)
            out[f"{base}weight"] = weight + up.to(weight) @ down.to(weight)
            out[f"{base}bias"] = out.pop(f"{base}proj.bias")
    return out


def _without_wrapping(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Drop the name parts that DDP and torch.compile add, wherever they stand."""
    found: set[str] = set()
    out = {}
    for key, value in tensors.items():
        words = key.split(".")
        found |= _WRAPPING & set(words)
        out[".".join(word for word in words if word not in _WRAPPING)] = value
    if found:
        notes.append(f"prefix removed: {', '.join(sorted(found))}")
    return out


def _find_root(flat: Mapping[str, torch.Tensor], anchor: str, notes: list[str]) -> str | None:
    """Return the prefix before an anchor, the preferred one if there are several; None without any."""
    roots = [k[: -len(anchor)] for k in flat if k == anchor or k.endswith(f".{anchor}")]
    roots = [root for root in roots if not root.startswith("optimizer") and FROZEN_COPY not in root.split(".")]
    if not roots:
        return None

    def rank(root: str) -> tuple[int, int]:
        words = root.split(".")
        places = [i for i, name in enumerate(_PREFERRED_ROOTS) if name in words]
        return (min(places, default=len(_PREFERRED_ROOTS)), len(root))

    chosen = min(roots, key=rank)
    if len(roots) > 1:
        others = ", ".join(sorted(set(roots) - {chosen}))
        notes.append(f"of several encoders {chosen!r} was taken, not {others}")
    return chosen


def _under(
    flat: Mapping[str, torch.Tensor], root: str, notes: list[str], *, also: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Return what lies under a prefix; say what lies beside it."""
    inside = {key.removeprefix(root): value for key, value in flat.items() if key.startswith(root)}
    beside = Counter(key.split(".", 1)[0] for key in flat if not key.startswith(root) and key not in also)
    if root:
        notes.append(f"taken from {root.rstrip('.')!r}")
    if beside:
        notes.append("beside it: " + ", ".join(f"{name} {count} tensors" for name, count in beside.items()))
    return inside


def _refuse_adapter(flat: Mapping[str, torch.Tensor], name: str) -> None:
    if any(".lora_A." in key or ".lora_embedding_A." in key for key in flat) and not any(
        key.endswith((".base_layer.weight", "patch_embed.proj.weight", "patch_embed.seq.0.c.weight")) for key in flat
    ):
        raise WeightsError(
            f"weights are an adapter alone ({len(flat)} tensors): it needs the base it was trained on. Give the run or "
            "release folder, or the base with BASE=.",
            where=name,
        )
    layers = {key.rsplit(".base_layer.", 1)[0] for key in flat if ".base_layer." in key}
    if layers:
        raise WeightsError(
            f"weights must have adapters added to the layers they adapt, got {len(layers)} layers with an adapter "
            "beside them: a run (scope lora, or stage 2) that was not finished, which it must be first, or a peft "
            "model before merge_and_unload().",
            where=name,
            next_command=FINISH_RUN,
        )


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
