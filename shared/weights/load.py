"""Weights in and out: one strict loader for every layout, and files that stock tools open.

Loading accounts for every tensor both ways and prints it; less than all that was asked for is a ``WeightsError``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from samgraft.shared.encoders.base import MEDSAM_SHA256, EncoderSpec, ImageEncoder
from samgraft.shared.encoders.registry import image_size_from_tensors, spec_from_tensors
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.adapter_base import refuse_lone_adapter
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.formats import PARTS, recognise
from samgraft.shared.weights.official import OFFICIAL, official_weights
from samgraft.shared.weights.positions import resize_positions as resize_table
from samgraft.shared.weights.safe_read import read_file
from samgraft.shared.weights.tensor_report import ResizedTensor, TensorReport, shorten
from samgraft.shared.weights.unfinished import (
    SSL_STATE_METADATA,
    STATE_FILE,
    card_of_state,
    encoder_of_ssl_state,
    is_training_state,
    newest_state_file,
)
from segment_anything.modeling import Sam
from torch import nn

__all__ = [
    "TensorReport",
    "WeightsFile",
    "absent_by_nature",
    "card_of",
    "load_image_encoder",
    "load_into",
    "load_sam",
    "read_weights",
]

log = logging.getLogger(__name__)

Part = Literal["image_encoder", "sam"]
# Where weights lie in our folders and in transformers'; the first that exists is taken.
FOLDER_FILES = (
    "encoder/encoder.safetensors",
    "model/sam.safetensors",
    "encoder.safetensors",
    "sam.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    STATE_FILE,
)


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """One weights file, recognised and brought to segment_anything's names; nothing loaded into a model yet."""

    name: str
    """File name, without its folder."""
    format: str
    spec: EncoderSpec
    image_size: int
    tensors: dict[str, torch.Tensor]
    """Float tensors are float32."""
    sha256: str
    card: Card | None = None
    is_partial: bool = False
    """True for a plain ViT (MAE, DINO): relative positions and neck are not part of it by nature."""
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> set[str]:
        """Which of image_encoder, prompt_encoder and mask_decoder are in the file."""
        return {p for p in PARTS if any(k.startswith(f"{p}.") for k in self.tensors)}


def read_weights(path: str | Path) -> WeightsFile:
    """Read a weights file, a run folder or a transformers folder.

    Args:
        path: ``.pth``, ``.safetensors``, ``runs/NAME`` or a folder with ``card.json``, told by content, not by name.
            Where there is none of that name, official weights such as ``sam_vit_b`` are fetched by pinned hash.

    Raises:
        WeightsError: If it is no weights, is damaged or unsafe, or holds NaN.
    """
    file = _find_file(Path(path))
    raw = read_file(file)
    if raw.metadata == SSL_STATE_METADATA:
        return read_weights(encoder_of_ssl_state(file))
    found = recognise(raw)
    notes = list(found.notes)
    tensors = _as_float32(found.tensors, notes, name=raw.name)
    spec = spec_from_tensors(tensors)
    card_path = file.with_name("card.json")
    card = Card.read(card_path) if card_path.is_file() else None
    if is_training_state(raw.content):
        notes.append(f"a training state ({file.parent.name}), not the result of a finished run")
        card = card or card_of_state(file)
    image_size = card.image_size if card else image_size_from_tensors(tensors, spec)
    spec = _with_pixel_statistics(spec, card, raw.sha256, notes)
    return WeightsFile(
        name=raw.name,
        format=found.format,
        spec=spec,
        image_size=image_size,
        tensors=tensors,
        sha256=raw.sha256,
        card=card,
        is_partial=found.is_partial,
        notes=notes,
    )


def load_into(
    module: nn.Module,
    weights: WeightsFile,
    *,
    part: Part = "image_encoder",
    resize_positions: bool = False,
    allow_missing: Collection[str] = (),
) -> TensorReport:
    """Load a file into a model, strictly.

    Args:
        module: A SAM, or an image encoder for ``part="image_encoder"``.
        weights: From ``read_weights``.
        part: What must come from the file, all of it.
        resize_positions: Resize position tables to the model's grid; otherwise another size is refused.
        allow_missing: Full names that may stay at the values ``module`` has.

    Returns:
        The account of every tensor, which is also logged.

    Raises:
        WeightsError: If anything asked for is missing, left over, or of another shape. The model is unchanged then.
    """
    target, prefix = _target(module, part)
    report = TensorReport(
        source=weights.name, source_sha256=weights.sha256, format=weights.format, part=part, notes=list(weights.notes)
    )
    wanted = {f"{prefix}{k}": v for k, v in target.state_dict().items()}
    report.unexpected = [k for k in weights.tensors if k.startswith(prefix) and k not in wanted]
    report.not_asked = [k for k in weights.tensors if not k.startswith(prefix)]
    loaded: dict[str, torch.Tensor] = {}
    wrong: list[str] = []
    for name, current in wanted.items():
        tensor = weights.tensors.get(name)
        if tensor is None:
            (report.left_at_base if name in allow_missing else report.missing).append(name)
            loaded[name] = current
        elif tensor.shape == current.shape:
            report.matched.append(name)
            loaded[name] = tensor
        elif resize_positions and _is_position(name) and tensor.ndim == current.ndim:
            size = current.shape[1] if current.ndim == 4 else (current.shape[0] + 1) // 2
            loaded[name] = resize_table(tensor, size)
            report.resized.append(
                ResizedTensor(name=name, file_shape=list(tensor.shape), model_shape=list(current.shape))
            )
        else:
            wrong.append(f"{name} {list(tensor.shape)} for {list(current.shape)}")
    _refuse_incomplete(report, weights, wrong, module)
    target.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items()}, strict=True)
    log.info("%s", report.render())
    return report


def load_image_encoder(
    path: str | Path, *, image_size: int | None = None, base: str | Path | None = None
) -> tuple[ImageEncoder, Card]:
    """Load an image encoder of whatever architecture the file holds.

    Args:
        path: Weights file or run folder.
        image_size: Side of the square input in pixels; default the file's own. Positions are resized and reported.
        base: SAM weights that give relative positions and neck where the file is a plain ViT without them.

    Returns:
        The encoder in eval mode, and its card (made from what is known if the file has none).

    Raises:
        WeightsError: If anything is missing. A plain ViT without ``base`` would start from random weights in part.
    """
    weights = read_weights(path)
    size = weights.image_size if image_size is None else image_size
    if not weights.is_partial:
        encoder = weights.spec.build(image_size=size)
        load_into(encoder, weights, part="image_encoder", resize_positions=True)
    elif base is None:
        raise WeightsError(
            f"weights are a {weights.format} without SAM's relative positions and neck: they must come from a SAM. "
            "Give one with BASE=.",
            where=weights.name,
        )
    else:
        encoder, _ = load_image_encoder(base, image_size=size)
        load_into(encoder, weights, resize_positions=True, allow_missing=absent_by_nature(encoder))
    return encoder.eval(), card_of(weights, image_size=size)


def absent_by_nature(encoder: nn.Module) -> set[str]:
    """Return the full names of what a plain ViT does not have: relative positions and neck."""
    names = (f"image_encoder.{name}" for name in encoder.state_dict())
    return {name for name in names if ".rel_pos_" in name or name.startswith("image_encoder.neck.")}


def load_sam(path: str | Path, *, image_size: int | None = None) -> Sam:
    """Load a whole SAM (encoder, prompt encoder and mask decoder) of whatever architecture the file holds."""
    weights = read_weights(path)
    size = weights.image_size if image_size is None else image_size
    tokens = weights.tensors.get("mask_decoder.mask_tokens.weight")
    sam = build_sam(
        weights.spec, image_size=size, num_multimask_outputs=3 if tokens is None else int(tokens.shape[0]) - 1
    )
    load_into(sam, weights, part="sam", resize_positions=True)
    return sam.eval()


def card_of(weights: WeightsFile, *, image_size: int | None = None) -> Card:
    """Return the file's card, or one made from what its tensors tell; at ``image_size`` if given."""
    size = weights.image_size if image_size is None else image_size
    if weights.card is not None:
        return Card.from_dict({**weights.card.to_dict(), "image_size": size})
    spec = weights.spec
    return Card(
        arch=spec.arch,
        stem=spec.variant,
        image_size=size,
        pixel_mean=list(spec.pixel_mean),
        pixel_std=list(spec.pixel_std),
        base_name=weights.name,
        base_sha256=weights.sha256,
    )


def _find_file(path: Path) -> Path:
    if not path.exists() and str(path) in OFFICIAL:
        return official_weights(str(path))
    if not path.is_dir():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    if (state := newest_state_file(path)) is not None:
        return state
    if (path / ".metadata").exists() or any(path.glob("*.distcp")):
        raise WeightsError(
            "weights must be one file, got a distributed checkpoint folder, whose table is a pickle. Convert it where "
            "you trust it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.",
            where=path.name,
        )
    for folder in (path, path / "model"):
        if (folder / "base.safetensors").is_file() and (folder / "adapter").is_dir():
            raise WeightsError(
                "weights folder holds base weights and an adapter that cannot be merged into them: no plain SAM file "
                "says what it learnt. evaluate, predict and release read the run; for one file train with METHOD=lora.",
                where=path.name,
            )
    refuse_lone_adapter(path)
    raise WeightsError(
        f"weights folder must hold one of {', '.join(FOLDER_FILES)}, and has none. Did the run finish?", where=path.name
    )


def _as_float32(tensors: dict[str, torch.Tensor], notes: list[str], *, name: str) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    converted: dict[str, int] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            if tensor.dtype != torch.float32:
                kind = str(tensor.dtype).removeprefix("torch.")
                converted[kind] = converted.get(kind, 0) + 1
            tensor = tensor.float()
            if not bool(torch.isfinite(tensor).all()):
                raise WeightsError(
                    f"weights must be finite, got NaN or Inf in {key}. The training run diverged.", where=name
                )
            if (
                tensor.ndim > 1
                and tensor.numel() > 1
                and "rel_pos" not in key
                and bool((tensor == tensor.flatten()[0]).all())
            ):
                notes.append(f"warning: {key} is constant ({float(tensor.flatten()[0]):g})")
        out[key] = tensor
    notes += [f"{count} tensors converted from {kind} to float32" for kind, count in converted.items()]
    return out


def _target(module: nn.Module, part: Part) -> tuple[nn.Module, str]:
    if part == "sam":
        return module, ""
    encoder = module.image_encoder if isinstance(module, Sam) else module
    assert isinstance(encoder, nn.Module)
    return encoder, "image_encoder."


def _with_pixel_statistics(spec: EncoderSpec, card: Card | None, sha256: str, notes: list[str]) -> EncoderSpec:
    """Take the pixel statistics from the card, or from what is known of the file; else the architecture's stay."""
    if card is not None:
        mean, std = card.pixel_mean, card.pixel_std
    elif sha256 == MEDSAM_SHA256:
        mean, std = [0.0] * 3, [255.0] * 3
        notes.append("MedSAM's own file: images in [0, 1], not SAM's pixel statistics")
    else:
        return spec
    return replace(spec, pixel_mean=(mean[0], mean[1], mean[2]), pixel_std=(std[0], std[1], std[2]))


def _is_position(name: str) -> bool:
    return name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))


def _refuse_incomplete(report: TensorReport, weights: WeightsFile, wrong: list[str], module: nn.Module) -> None:
    if report.is_complete and not wrong:
        return
    encoder = module.image_encoder if isinstance(module, Sam) else module
    spec = getattr(encoder, "spec", None)
    if isinstance(spec, EncoderSpec) and not weights.is_partial and not spec.has_tensors_of(weights.spec):
        raise WeightsError(
            f"weights must be of the model's architecture {spec.title}, the file is {weights.spec.title}. "
            f"Use MODEL={weights.spec.arch}.",
            where=weights.name,
        )
    problems = (("missing", report.missing), ("unexpected", report.unexpected), ("of another shape", wrong))
    found = [f"{len(names)} {what} ({shorten(names)})" for what, names in problems if names]
    hint = ""
    if wrong and all(_is_position(w.split(" ", 1)[0]) for w in wrong):
        size = weights.image_size
        hint = f" The file is for {size} px: allow resizing of positions, or use image_size={size}."
    if weights.is_partial and not wrong:
        hint = f" A {weights.format} has no relative positions and no neck: give a SAM to take them from with BASE=."
    raise WeightsError(
        f"weights must hold all of {report.part}, got {report.num_loaded}/{report.num_asked}: "
        f"{'; '.join(found)}.{hint}",
        where=weights.name,
        kept="the model is unchanged",
    )
