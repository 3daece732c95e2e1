"""Layouts of weights files, recognised by tensor names and converted to the names of segment_anything.

Shape letters: g = tokens along a side; C = channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.registry import encoder_anchors
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.families import ADAPTERS_ALONE, OTHER_ENCODERS, family_error, find_family
from samgraft.shared.weights.run_files import FINISH_RUN
from samgraft.shared.weights.safe_read import RawFile, iterate_tensors
from samgraft.shared.weights.sam2_format import from_sam2, from_sam2_transformers, split_memory
from samgraft.shared.weights.tensor_report import shorten
from samgraft.shared.weights.transformers_format import SHARED_POSITIONS, from_transformers

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
FROZEN_COPY = "frozen_copy"
"""Name of the encoder's copy from before training (objective ``feature``), which is never read."""
Tensors = dict[str, torch.Tensor]

_SAM2_TRANSFORMERS_ANCHOR = "vision_encoder.backbone.patch_embed.projection.weight"
_TRANSFORMERS_ANCHOR = "vision_encoder.patch_embed.projection.weight"
_WRAPPING = frozenset({"module", "_orig_mod"})
# If a file contains several encoders, the first of these is read, and a note names the others.
_PREFERRED_ROOTS = ("teacher", "ema", "model", "state_dict", "student")
_NOT_SAM = re.compile(
    r"(pixel_mean|pixel_std|image_encoder\.(norm_head|head)\..*|image_encoder\..*attention_bias_idxs)$"
)
_NOT_ENCODER = re.compile(
    r"(decoder_|(dino_|ibot_)?head\.|fc_norm\.|norm\.|(mask_token|cls_token|reg_token|register_tokens|dist_token)$)"
)
_LAYER_SCALE = re.compile(r"\.ls[12]\.gamma$")


@dataclass(kw_only=True)
class SamTensors:
    """Tensors under segment_anything's names, and the steps of their conversion."""

    format: str
    tensors: Tensors
    notes: list[str] = field(default_factory=list)
    is_partial: bool = False
    """True for a plain ViT, which has neither relative positions nor a neck."""
    memory: Tensors = field(default_factory=dict)
    """Tensors of SAM 2's memory of videos, which images do not use, under their own names."""


def convert_to_sam(raw: RawFile) -> SamTensors:
    """Recognise the layout of a file by its tensor names and convert it.

    Raises:
        WeightsError: If no known layout fits, tensors of the layout are missing, or the file is of a foreign family.
    """
    notes: list[str] = []
    # Training programs nest the weights in dictionaries of any depth. Joined names make them all look the same.
    flat = _without_wrapping(dict(iterate_tensors(raw.content)), notes)
    _refuse_adapters(flat, raw.name)
    is_registered = any(f"image_encoder.{anchor}" in flat for anchor in encoder_anchors())
    if not is_registered and (family := find_family(flat, OTHER_ENCODERS)) is not None:
        raise family_error(family, name=raw.name)
    try:
        return _convert(flat, notes)
    except KeyError as err:  # a conversion needs a tensor that the file lacks
        raise WeightsError(f"weights are incomplete, {err.args[0]} is missing.", where=raw.name) from err
    except (RuntimeError, IndexError) as err:  # tensors that belong together have shapes that do not fit
        first = (str(err).splitlines() or [""])[0]
        raise WeightsError(f"tensors of the file do not fit together ({first[:160]}).", where=raw.name) from err
    except WeightsError as err:
        raise WeightsError(err.what, where=raw.name, next_command=err.next_command) from err


def _convert(flat: Tensors, notes: list[str]) -> SamTensors:
    # transformers first: its names contain those of other layouts, such as pos_embed.
    root = _find_root(flat, _TRANSFORMERS_ANCHOR, notes)
    if root is not None:
        inside = _select(flat, root, notes, also=(SHARED_POSITIONS,))
        return SamTensors(format="transformers SamModel", tensors=from_transformers(inside, notes), notes=notes)
    root = _find_root(flat, _SAM2_TRANSFORMERS_ANCHOR, notes)
    if root is not None:
        inside = _select(flat, root, notes, also=(SHARED_POSITIONS,))
        return _with_memory("transformers Sam2Model", from_sam2_transformers(inside, notes), notes)
    # Several anchors per family, so that a file without one of them is still recognised and its lack reported.
    for anchor in encoder_anchors():
        root = _find_root(flat, anchor, notes)
        if root is not None:
            return _convert_encoder(flat, root, notes)
    parts = Counter(key.split(".", 1)[0] for key in flat)
    found = ", ".join(f"{part} {count}" for part, count in parts.most_common(4)) or "no tensors"
    raise WeightsError(f"weights contain no image encoder of a known layout (found {found}).")


def _convert_encoder(flat: Tensors, root: str, notes: list[str]) -> SamTensors:
    is_sam = root.endswith("image_encoder.")
    encoder = {key.removeprefix(root): value for key, value in flat.items() if key.startswith(root)}
    if _is_plain_vit(encoder):
        _select(flat, root, notes)
        kind = "DINO-style ViT" if "teacher" in root or "student" in root else "MAE-style ViT"
        return SamTensors(format=kind, tensors=from_plain_vit(encoder, notes), notes=notes, is_partial=True)
    if is_sam and HieraSpec.recognises(encoder):
        return _with_memory("SAM 2", from_sam2(_select(flat, root.removesuffix("image_encoder."), notes)), notes)
    if is_sam:
        return _finish("SAM", _select(flat, root.removesuffix("image_encoder."), notes), notes)
    tensors = {f"image_encoder.{key}": value for key, value in _select(flat, root, notes).items()}
    return _finish("SAM encoder without prefix", tensors, notes)


def _with_memory(name: str, tensors: Tensors, notes: list[str]) -> SamTensors:
    images, memory = split_memory(tensors)
    if memory:
        notes.append(f"{len(memory)} tensors of the memory of videos kept aside, for release")
    return SamTensors(format=name, tensors=images, memory=memory, notes=notes)


def _finish(name: str, tensors: Tensors, notes: list[str]) -> SamTensors:
    dropped = [key for key in tensors if _NOT_SAM.match(key)]
    if dropped:
        notes.append(f"left out, not part of SAM: {shorten(dropped)}")
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    if any(re.match(r"image_encoder\.blocks\.\d+\.mlp\.fc1\.", key) for key in kept):  # the ViT of timm's SAM
        notes.append("renamed from timm")
        kept = {_rename_mlp(key): value for key, value in kept.items()}
    merged = _merge_lora(kept)
    if len(merged) != len(kept):
        name = "finetune-SAM with LoRA"
        notes.append(f"{len(kept) - len(merged)} LoRA tensors merged into the layers they adapt")
    _check_relative_positions(merged)
    return SamTensors(format=name, tensors=merged, notes=notes)


def _check_relative_positions(tensors: Mapping[str, torch.Tensor]) -> None:
    # Without any table, heads and windows leave no trace in the tensors, and a guess would give a wrong encoder.
    has_blocks = any(key.startswith("image_encoder.blocks.") for key in tensors)
    if has_blocks and not any(".rel_pos_" in key for key in tensors):
        raise WeightsError(
            "the image encoder has no relative positions (use_rel_pos=False), so its heads and windows cannot be "
            "recognised. Add tables of zeros, which do not change its output: blocks.N.attn.rel_pos_h and rel_pos_w of "
            "shape (2 g - 1, channels per head), where g is the window size or, in global blocks, the tokens along a "
            "side."
        )


def _check_float(tensors: Mapping[str, torch.Tensor], pattern: str) -> None:
    # Merging would convert other types without notice, before all types are checked.
    for key, tensor in tensors.items():
        if re.search(pattern, key) and not tensor.is_floating_point():
            raise WeightsError(f"{key} is of type {tensor.dtype}, expected a floating-point type.")


def _merge_lora(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Merge finetune-SAM's LoRA (scale 1) and restore the names of the layers it wraps.

    The wrapper adds its query term to the first C and its value term to the last C outputs of ``qkv``.
    """
    _check_float(tensors, r"(\.linear_[ab]_[qv]|\.w_[ab]|\.qkv\.qkv|_proj\.proj)\.weight$")
    out = dict(tensors)
    for key in tensors:
        if key.endswith(".qkv.qkv.weight"):
            base, weight = key.removesuffix("qkv.weight"), out.pop(key).clone()
            # A layer with C inputs has 3 C outputs, which are the queries, the keys and the values of all heads.
            dim = weight.shape[1]
            for rows, letter in ((slice(0, dim), "q"), (slice(-dim, None), "v")):
                down, up = (out.pop(f"{base}linear_{half}_{letter}.weight") for half in "ab")
                weight[rows] += _multiply(up, down, like=weight[rows], name=f"{base}linear_b_{letter}")
            out[f"{base}weight"] = weight
            out[f"{base}bias"] = out.pop(f"{base}qkv.bias")
        elif key.endswith("_proj.proj.weight"):
            base = key.removesuffix("proj.weight")
            down, up = out.pop(f"{base}w_a.weight"), out.pop(f"{base}w_b.weight")
            weight = out.pop(key)
            out[f"{base}weight"] = weight + _multiply(up, down, like=weight, name=f"{base}w_b")
            out[f"{base}bias"] = out.pop(f"{base}proj.bias")
    return out


def _multiply(up: torch.Tensor, down: torch.Tensor, *, like: torch.Tensor, name: str) -> torch.Tensor:
    product = up.to(like) @ down.to(like)
    if product.shape != like.shape:  # broadcasting would add it all the same
        raise WeightsError(f"{name} gives a change of shape {list(product.shape)}, expected {list(like.shape)}.")
    return product


def _without_wrapping(tensors: Tensors, notes: list[str]) -> Tensors:
    """Drop the name parts that DDP and torch.compile add, at any place of a name."""
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
    """Return the prefix before an anchor, the preferred one if there are several, or None."""
    roots = [k[: -len(anchor)] for k in flat if k == anchor or k.endswith(f".{anchor}")]
    # Optimizer states can have the names of the parameters too.
    roots = [root for root in roots if not root.startswith("optimizer") and FROZEN_COPY not in root.split(".")]
    if not roots:
        return None

    def rank(root: str) -> tuple[int, int]:
        # Among equal ranks the shortest prefix is the outermost model.
        words = root.split(".")
        places = [i for i, name in enumerate(_PREFERRED_ROOTS) if name in words]
        return (min(places, default=len(_PREFERRED_ROOTS)), len(root))

    chosen = min(roots, key=rank)
    if len(roots) > 1:
        others = ", ".join(sorted(set(roots) - {chosen}))
        notes.append(f"of several encoders {chosen!r} was taken, not {others}")
    return chosen


def _select(flat: Mapping[str, torch.Tensor], root: str, notes: list[str], *, also: tuple[str, ...] = ()) -> Tensors:
    """Return the tensors under a prefix, and note the others."""
    inside = {key.removeprefix(root): value for key, value in flat.items() if key.startswith(root)}
    others = Counter(key.split(".", 1)[0] for key in flat if not key.startswith(root) and key not in also)
    if root:
        notes.append(f"taken from {root.rstrip('.')!r}")
    if others:
        notes.append("beside it: " + ", ".join(f"{name} {count} tensors" for name, count in others.items()))
    return inside


def _refuse_adapters(flat: Mapping[str, torch.Tensor], name: str) -> None:
    has_layers = any(
        key.endswith((".base_layer.weight", ".qkv.weight", "patch_embed.proj.weight", "patch_embed.seq.0.c.weight"))
        for key in flat
    )
    if not has_layers and (family := find_family(flat, ADAPTERS_ALONE)) is not None:
        raise family_error(family, name=name)
    layers = {key.rsplit(".base_layer.", 1)[0] for key in flat if ".base_layer." in key}
    if layers:
        raise WeightsError(
            f"weights contain {len(layers)} layers with adapters that are not merged. Finish the run first (scope "
            "lora, or stage 2), or save a peft model after merge_and_unload().",
            where=name,
            next_command=FINISH_RUN,
        )


def from_plain_vit(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> Tensors:
    """Rename and reshape the tensors of a plain ViT (MAE, DINO, DINOv2, MRI-CORE, timm).

    SAM's relative positions and neck are not among them. Layer scale (DINOv2) is multiplied into the projections before
    it, which is exact.

    Raises:
        WeightsError: If the patch is not 16 px, the MLP is gated, or there is no position table.
    """
    kernel = tensors["patch_embed.proj.weight"].shape[-1]
    if kernel != 16:
        raise WeightsError(f"the ViT has patches of {kernel} px, expected 16 px as SAM's encoder. Use such a ViT.")
    if any(".mlp.w12." in key for key in tensors):
        raise WeightsError("the ViT has a gated MLP (SwiGLU), for which SAM has no place. Use a ViT with a plain MLP.")
    if "pos_embed" not in tensors:
        raise WeightsError(
            "the ViT has no position table (pos_embed), which SAM's encoder needs. Some MAE programs compute it and do "
            "not save it. Add it to the file, of shape (1, g g, C) or, with a class token, (1, g g + 1, C)."
        )
    dropped = [key for key in tensors if _NOT_ENCODER.match(key)]
    if dropped:
        notes.append(f"left out, SAM has no place for them: {shorten(dropped)}")
    # DINOv2 writes blocks.CHUNK.INDEX, where INDEX counts through all chunks.
    kept = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value
        for key, value in tensors.items()
        if key not in dropped
    }
    scales = {key: kept.pop(key) for key in list(kept) if _LAYER_SCALE.search(key)}
    _check_float(tensors, r"(\.ls[12]\.gamma|attn\.proj\.\w+|mlp\.(fc|lin)2\.\w+)$")
    for key, gamma in scales.items():
        # y = gamma * (W x + b) equals (gamma W) x + gamma b, one factor per output channel.
        layer = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        layer = layer if f"{layer}.weight" in kept else _rename_mlp(layer)
        weight, bias = kept[f"{layer}.weight"], kept[f"{layer}.bias"]
        if gamma.ndim != 1 or not gamma.shape == bias.shape == weight.shape[:1]:  # broadcasting would accept others
            raise WeightsError(f"{key} has shape {list(gamma.shape)}, which does not fit {layer}.")
        kept[f"{layer}.weight"] = weight * gamma[:, None]
        kept[f"{layer}.bias"] = bias * gamma
    if scales:
        notes.append(f"{len(scales)} layer scales multiplied into the layers before them")
    out = {f"image_encoder.{_rename_mlp(key)}": value for key, value in kept.items()}
    out["image_encoder.pos_embed"] = _to_grid(out["image_encoder.pos_embed"], notes)
    notes.append("a plain ViT has no relative positions and no neck: they stay at the base weights")
    return out


def _is_plain_vit(encoder: Mapping[str, torch.Tensor]) -> bool:
    """Return whether an encoder has timm's blocks without SAM's relative positions and neck."""
    has_blocks = any(key.startswith("blocks.") for key in encoder)
    return has_blocks and not any("rel_pos" in key or key.startswith("neck.") for key in encoder)


def _rename_mlp(key: str) -> str:
    return re.sub(r"\bmlp\.fc([12])\b", r"mlp.lin\1", key)


def _to_grid(positions: torch.Tensor, notes: list[str]) -> torch.Tensor:
    """Reshape a position table (1, g g, C) to (1, g, g, C), without the position of a class token."""
    if positions.ndim == 4:
        return positions
    # A square number of positions has no class token. With one more, the first position is that of the class token.
    length = positions.shape[1] if positions.ndim == 3 and positions.shape[0] == 1 else 0
    for extra in (0, 1):
        side = round(max(0, length - extra) ** 0.5)
        if side > 0 and side * side == length - extra:
            if extra:
                notes.append("position of the class token dropped")
            return positions[:, extra:].reshape(1, side, side, -1)
    raise WeightsError(f"pos_embed has shape {list(positions.shape)}, expected positions of a square grid.")
