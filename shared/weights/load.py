"""Strict loading of weights files of every layout, and a report of each tensor.

Loading compares the tensors of the file and the model in both directions. Anything missing, left over or of another
shape is a ``WeightsError``.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from samgraft.shared.encoders.base import MEDSAM_SHA256, EncoderSpec, ImageEncoder
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.checks import count_mask_outputs, recognise_encoder, to_float32
from samgraft.shared.weights.families import EXTRA_TENSORS, family_error, find_family
from samgraft.shared.weights.formats import PARTS, convert_to_sam
from samgraft.shared.weights.official import OFFICIAL, fetch_from_hub, is_hub_address, official_weights
from samgraft.shared.weights.positions import resize_positions as resize_table
from samgraft.shared.weights.run_files import (
    SSL_STATE_METADATA,
    card_of_state,
    encoder_of_ssl_state,
    find_weights_file,
    is_training_state,
)
from samgraft.shared.weights.safe_read import read_raw_weights, read_shards
from samgraft.shared.weights.tensor_report import ResizedTensor, TensorReport, shorten
from torch import nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

log = logging.getLogger(__name__)

Part = Literal["image_encoder", "sam"]


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """Weights file under segment_anything's names, not yet loaded into a model."""

    name: str
    """File name, without its folder."""
    format: str
    """Layout of the file, e.g. ``SAM`` or ``MAE-style ViT``."""
    spec: EncoderSpec
    image_size: int
    """Side in pixels of the images that the position tables were made for."""
    tensors: dict[str, torch.Tensor]
    """Tensors by name. All but counters are float32."""
    sha256: str
    card: Card | None = None
    is_partial: bool = False
    """True for a plain ViT (MAE, DINO), which has neither relative positions nor a neck."""
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of SAM 2's memory of videos as they are in the file. No model here has them, and a release returns
    them."""
    notes: list[str] = field(default_factory=list)
    """Conversions that were done and warnings."""

    @property
    def parts(self) -> set[str]:
        """Parts of a SAM in the file, a subset of image_encoder, prompt_encoder and mask_decoder."""
        return {p for p in PARTS if any(k.startswith(f"{p}.") for k in self.tensors)}


def read_weights(path: str | Path) -> WeightsFile:
    """Read a weights file, a run folder, a release folder or a transformers folder.

    Args:
        path: ``.pth``, ``.safetensors``, ``runs/NAME``, or a folder with weights. The content decides the layout. A
            name of official weights such as ``sam_vit_b``, where no file has it, is downloaded by its pinned hash, and
            an address such as ``hf://OWNER/NAME`` from the Hugging Face Hub.

    Raises:
        WeightsError: If it is no weights file, is damaged, unsafe, incomplete or of a foreign family, or contains NaN.
    """
    if is_hub_address(path):
        copy = fetch_from_hub(path)
        weights = read_weights(copy.path)
        return replace(weights, notes=[*weights.notes, f"from {copy.address}"])
    path = Path(path)
    if not path.exists() and str(path) in OFFICIAL:
        path = official_weights(str(path))
    elif not path.exists() and (close := difflib.get_close_matches(str(path), OFFICIAL, n=1, cutoff=0.75)):
        raise WeightsError(f"there is no such file. Did you mean the official weights {close[0]}?", where=str(path))
    file = find_weights_file(path)
    # From here on the name of the file does not matter: the bytes decide the container, tensor names the layout.
    raw = read_shards(file) if file.name.endswith(".index.json") else read_raw_weights(file)
    if raw.metadata == SSL_STATE_METADATA:
        return read_weights(encoder_of_ssl_state(file))
    found = convert_to_sam(raw)
    notes = list(found.notes)
    tensors = to_float32(found.tensors, notes, name=raw.name)
    spec, image_size = recognise_encoder(tensors, name=raw.name)
    if spec.assumptions is not None:
        notes.append(f"warning: {spec.assumptions}")
    card = _find_card(file, raw.content, notes)
    return WeightsFile(
        name=raw.name,
        format=found.format,
        spec=_with_pixel_statistics(spec, card, raw.sha256, notes),
        image_size=card.image_size if card else image_size,
        tensors=tensors,
        sha256=raw.sha256,
        card=card,
        is_partial=found.is_partial,
        memory=found.memory,
        notes=notes,
    )


def load_image_encoder(
    path: str | Path, *, image_size: int | None = None, base: str | Path | None = None
) -> tuple[ImageEncoder, Card]:
    """Load an image encoder of any known architecture.

    Args:
        path: Weights file or run folder.
        image_size: Side of the square input in pixels, by default the file's own. Position tables are resized and
            reported.
        base: Base SAM weights that supply relative positions and neck where the file is a plain ViT without them.

    Returns:
        The encoder in eval mode, and the file's card or one made from its tensors.

    Raises:
        WeightsError: If anything is missing, or the file is a plain ViT and ``base`` is not given.
    """
    weights = read_weights(path)
    size = weights.image_size if image_size is None else image_size
    if not weights.is_partial:
        encoder = weights.spec.build(image_size=size)
        load_into(encoder, weights, part="image_encoder", resize_positions=True)
    elif base is None:
        raise WeightsError(
            f"weights are a {weights.format} without SAM's relative positions and neck, which must come from a SAM. "
            "Give one with BASE=.",
            where=weights.name,
        )
    else:
        # The base fills the encoder first, then the plain ViT replaces all that it has.
        encoder, _ = load_image_encoder(base, image_size=size)
        load_into(encoder, weights, resize_positions=True, allow_missing=absent_by_nature(encoder))
    return encoder.eval(), card_of(weights, image_size=size)


def load_sam(path: str | Path, *, image_size: int | None = None) -> Sam:
    """Load a whole SAM (image encoder, prompt encoder, mask decoder) of any known architecture."""
    weights = read_weights(path)
    sam = build_sam(
        weights.spec,
        image_size=weights.image_size if image_size is None else image_size,
        num_multimask_outputs=count_mask_outputs(weights.tensors, name=weights.name),
    )
    load_into(sam, weights, part="sam", resize_positions=True)
    return sam.eval()


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
        weights: Result of ``read_weights``.
        part: Part of the SAM that must come from the file, all of it.
        resize_positions: Resize position tables to the model's grid. Otherwise another size is refused.
        allow_missing: Full names that may keep the values of ``module``.

    Returns:
        The report of every tensor, which is also logged.

    Raises:
        WeightsError: If a tensor is missing, left over, or of another shape. The model is unchanged then.
    """
    encoder = getattr(module, "image_encoder", module)
    target, prefix = (module, "") if part == "sam" else (encoder, "image_encoder.")
    assert isinstance(target, nn.Module)
    wanted = {f"{prefix}{k}": v for k, v in target.state_dict().items()}
    report = TensorReport(
        source=weights.name,
        source_sha256=weights.sha256,
        format=weights.format,
        part=part,
        unexpected=[k for k in weights.tensors if k.startswith(prefix) and k not in wanted],
        not_requested=[k for k in weights.tensors if not k.startswith(prefix)],
        notes=list(weights.notes),
    )
    loaded: dict[str, torch.Tensor] = {}
    misfits: list[str] = []
    for name, current in wanted.items():
        tensor = weights.tensors.get(name)
        if tensor is None:
            (report.left_at_base if name in allow_missing else report.missing).append(name)
            loaded[name] = current
        elif tensor.shape == current.shape:
            report.matched.append(name)
            loaded[name] = tensor
        elif resize_positions and _covers_the_grid(name, tensor, current, weights):
            size = current.shape[1] if current.ndim == 4 else (current.shape[0] + 1) // 2
            loaded[name] = resize_table(tensor, size)
            report.resized.append(
                ResizedTensor(name=name, file_shape=list(tensor.shape), model_shape=list(current.shape))
            )
        else:
            misfits.append(f"{name} {list(tensor.shape)} for {list(current.shape)}")
    # Everything is checked before the first tensor is copied, so a refused file leaves the model unchanged.
    if misfits or not report.is_complete:
        raise _incomplete(report, weights, misfits, getattr(encoder, "spec", None))
    target.load_state_dict({k.removeprefix(prefix): v for k, v in loaded.items()}, strict=True)
    log.info("%s", report.render(is_detailed=log.isEnabledFor(logging.DEBUG)))
    return report


def absent_by_nature(encoder: nn.Module) -> set[str]:
    """Return the full names of the tensors that a plain ViT lacks, relative positions and neck."""
    names = (f"image_encoder.{name}" for name in encoder.state_dict())
    return {name for name in names if ".rel_pos_" in name or name.startswith("image_encoder.neck.")}


def card_of(weights: WeightsFile, *, image_size: int | None = None) -> Card:
    """Return the file's card, or one made from its tensors, for images of ``image_size`` pixels if given."""
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


def _find_card(file: Path, content: Collection[object], notes: list[str]) -> Card | None:
    path = file.with_name("card.json")
    card = Card.read(path) if path.is_file() else None
    if is_training_state(content):
        notes.append(f"a training state ({file.parent.name}), not the result of a finished run")
        card = card or card_of_state(file)
    return card


def _with_pixel_statistics(spec: EncoderSpec, card: Card | None, sha256: str, notes: list[str]) -> EncoderSpec:
    if card is not None:
        mean, std = card.pixel_mean, card.pixel_std
    elif sha256 == MEDSAM_SHA256:
        # MedSAM's tensors have the names and shapes of SAM ViT-B, but it was trained on images in [0, 1].
        mean, std = [0.0] * 3, [255.0] * 3
        notes.append("MedSAM's own file: images in [0, 1], not SAM's pixel statistics")
    else:
        return spec
    return replace(spec, pixel_mean=(mean[0], mean[1], mean[2]), pixel_std=(std[0], std[1], std[2]))


def _is_position_table(name: str) -> bool:
    return name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))


def _covers_the_grid(name: str, tensor: torch.Tensor, current: torch.Tensor, weights: WeightsFile) -> bool:
    """Return whether a table belongs to the whole grid of the file, so that it follows the image size."""
    if not _is_position_table(name) or tensor.ndim != current.ndim or tensor.shape[-1] != current.shape[-1]:
        return False
    # Tables of windowed blocks have the size of the window at every image size. Resizing one would hide a damaged file.
    absolute = weights.tensors.get("image_encoder.pos_embed")
    return tensor.ndim == 4 or (absolute is not None and tensor.shape[0] == 2 * absolute.shape[1] - 1)


def _incomplete(
    report: TensorReport, weights: WeightsFile, misfits: list[str], spec: EncoderSpec | None
) -> WeightsError:
    """Return the error for a file that does not fill a model, with the most likely reason."""
    # Another architecture differs in nearly every tensor. Its name helps more than hundreds of tensor names.
    if spec is not None and not weights.is_partial and not spec.has_tensors_of(weights.spec):
        return WeightsError(
            f"the weights are of another architecture ({weights.spec.title}, expected {spec.title}). Use "
            f"MODEL={weights.spec.arch}.",
            where=weights.name,
        )
    if (family := find_family(report.unexpected, EXTRA_TENSORS)) is not None:
        return family_error(family, name=weights.name)
    num_requested = report.num_requested + len(misfits)
    problems = (("missing", report.missing), ("unexpected", report.unexpected), ("of another shape", misfits))
    found = [f"{len(names)} {what} ({shorten(names)})" for what, names in problems if names]
    hint = ""
    if misfits and all(_is_position_table(m.split(" ", 1)[0]) for m in misfits):
        hint = f" The file is for {weights.image_size} px: use image_size={weights.image_size} or allow resizing."
    elif weights.is_partial and report.missing:
        hint = f" A {weights.format} has no relative positions and no neck: give a SAM that supplies them with BASE=."
    return WeightsError(
        f"the weights do not fill {report.part} ({report.num_loaded} of {num_requested} tensors): "
        f"{'; '.join(found)}.{hint}",
        where=weights.name,
        kept="the model is unchanged",
    )
