"""What trains: LoRA through peft in encoder and decoder, or whole parts, and the heads of the mask decoder.

Every target is named by a full regular expression and asserted afterwards: peft takes a list of suffixes wherever it
matches, also in parts that were to stay frozen, and ignores entries that match nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from samgraft.shared.errors import WeightsError
from samgraft.shared.models.architecture import ArchSpec
from segment_anything.modeling import Sam
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

ENCODER_LINEAR = {
    "vit_t": r"image_encoder\.layers\.\d+\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
    "plain": r"image_encoder\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))",
}
ENCODER_QKV = {
    "vit_t": r"image_encoder\.layers\.\d+\.blocks\.\d+\.attn\.qkv",
    "plain": r"image_encoder\.blocks\.\d+\.attn\.qkv",
}
_DECODER_ATTENTION = r"mask_decoder\.transformer\.(layers\.\d+\.\w*attn\w*|final_attn_token_to_image)"
DECODER_LINEAR = rf"({_DECODER_ATTENTION}\.([qkv]_proj|out_proj)|mask_decoder\.transformer\.layers\.\d+\.mlp\.lin[12])"
DECODER_QV = rf"{_DECODER_ATTENTION}\.[qv]_proj"


class Method(Enum):
    """How weights change."""

    LORA = "lora"
    """Low-rank updates beside frozen weights, merged for release."""
    FULL = "full"
    """Every weight of the scope that the loss reaches."""


class Scope(Enum):
    """Which parts of SAM change. The prompt encoder never does."""

    ENCODER_DECODER = "encoder_decoder"
    DECODER = "decoder"


class LoraTargets(Enum):
    """Which linear layers get an update."""

    ALL_LINEAR = "all_linear"
    """qkv, proj and both MLP layers of every block; all projections and MLPs of the decoder."""
    QV = "qv"
    """Queries and values only, as in SAMed. In the encoder's fused qkv the rows of the keys are held at 0."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What trains and how."""

    method: Method = Method.LORA
    """lora or full."""
    scope: Scope = Scope.ENCODER_DECODER
    """The study's best models tune both parts."""
    lora_targets: LoraTargets = LoraTargets.ALL_LINEAR
    """all_linear needs fewer steps than qv at the same rank; its cost is the same, the update is merged."""
    r: int = 8
    """Rank of each update."""
    lora_alpha: int = 8
    """Updates are scaled by lora_alpha / r; 1 as in SAMed."""
    lora_dropout: float = 0.0
    """Dropout on the input of the update."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise ValueError(f"adapter.r and adapter.lora_alpha must be positive, got {self.r} and {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"adapter.lora_dropout must lie in [0, 1), got {self.lora_dropout}.")


def adapt(sam: Sam, config: AdapterConfig, *, num_classes: int) -> PeftModel | None:
    """Freeze ``sam``, then make exactly the configured tensors trainable, in place.

    BatchNorm of vit_t keeps its running statistics whatever the method: they would drift with few slices, and an
    adapter file does not carry them.

    Returns:
        The peft wrapper around the same ``sam`` (for saving and merging); None for ``full``.
    """
    sam.requires_grad_(False)
    heads = head_names(num_classes)
    if config.method is Method.FULL:
        _unfreeze_reached(sam, config.scope, num_classes=num_classes)
        return None
    from peft import LoraConfig, get_peft_model  # imports transformers: seconds

    spec: ArchSpec = sam.image_encoder.spec
    pattern = target_pattern(spec, config)
    expected = {name for name, module in sam.named_modules() if re.fullmatch(pattern, name)}
    peft_config = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=pattern,
        modules_to_save=heads,
    )
    peft_model = get_peft_model(sam, peft_config)
    names: Any = peft_model.base_model.targeted_module_names
    targeted = set(names)
    if targeted != expected or not targeted:
        raise WeightsError(f"LoRA must sit in {len(expected)} layers, peft placed it in {len(targeted)}.")
    if config.lora_targets is LoraTargets.QV and config.scope is Scope.ENCODER_DECODER:
        _hold_keys(sam, spec)
    return peft_model


def target_pattern(spec: ArchSpec, config: AdapterConfig) -> str:
    """Return the full regular expression of the layers that get an update."""
    family = "plain" if spec.plain is not None else "vit_t"
    everywhere = config.lora_targets is LoraTargets.ALL_LINEAR
    decoder = DECODER_LINEAR if everywhere else DECODER_QV
    if config.scope is Scope.DECODER:
        return decoder
    encoder = (ENCODER_LINEAR if everywhere else ENCODER_QKV)[family]
    return f"({encoder}|{decoder})"


def head_names(num_classes: int) -> list[str]:
    """Return the modules that turn mask tokens into logits; they train whole with every method.

    One class uses SAM's first mask token, several its multimask tokens 1, 2, ...: what stock SAM shows for
    ``multimask_output`` False and True.
    """
    first = 0 if num_classes == 1 else 1
    hypernetworks = [f"mask_decoder.output_hypernetworks_mlps.{first + i}" for i in range(num_classes)]
    return ["mask_decoder.mask_tokens", "mask_decoder.output_upscaling", *hypernetworks]


def trainable_tensors(sam: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name inside ``sam``."""
    return {name: parameter for name, parameter in sam.named_parameters() if parameter.requires_grad}


def trainable_table(sam: nn.Module) -> list[tuple[str, int, int]]:
    """Return (part, trainable, all) parameter counts; peft's frozen copies of trained heads are not counted."""
    counts: dict[str, list[int]] = {}
    for name, parameter in sam.named_parameters():
        if ".original_module." in name:
            continue
        entry = counts.setdefault(name.split(".")[0], [0, 0])
        entry[0] += parameter.numel() * parameter.requires_grad
        entry[1] += parameter.numel()
    return [(part, trainable, total) for part, (trainable, total) in counts.items()]


def key_rows(spec: ArchSpec, *, out_features: int, num_heads: int) -> Tensor:
    """Return which output rows of a fused qkv layer are keys.

    segment_anything stacks all queries, all keys, all values. timm's TinyViT stacks query, key, value per head: taking
    the same thirds there would adapt some heads whole and others not at all.
    """
    rows = torch.arange(out_features)
    if spec.plain is not None:
        third = out_features // 3
        return rows[third : 2 * third]
    head_dim = out_features // num_heads // 3
    return rows[(rows % (3 * head_dim)) // head_dim == 1]


def _hold_keys(sam: nn.Module, spec: ArchSpec) -> None:
    """Zero the gradient of the keys' rows of every encoder update: they start at 0 and weight decay keeps 0."""
    for name, attention in sam.named_modules():
        if not (name.startswith("image_encoder.") and name.endswith(".attn") and hasattr(attention, "qkv")):
            continue
        for lora_B in attention.qkv.lora_B.values():
            rows = key_rows(spec, out_features=lora_B.weight.shape[0], num_heads=attention.num_heads)
            lora_B.weight.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows.to(grad.device), 0.0))


def _unfreeze_reached(sam: Sam, scope: Scope, *, num_classes: int) -> None:
    """Unfreeze the parts of the scope without what no loss reaches: the IoU head and unused hypernetworks."""
    if scope is Scope.ENCODER_DECODER:
        sam.image_encoder.requires_grad_(True)
    sam.mask_decoder.requires_grad_(True)
    sam.mask_decoder.iou_prediction_head.requires_grad_(False)
    used = set(head_names(num_classes))
    for index, hypernetwork in enumerate(sam.mask_decoder.output_hypernetworks_mlps):
        if f"mask_decoder.output_hypernetworks_mlps.{index}" not in used:
            hypernetwork.requires_grad_(False)
