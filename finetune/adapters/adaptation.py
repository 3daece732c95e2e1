"""Freeze a SAM and make exactly the configured tensors trainable."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from samgraft.finetune.adapters.config import (
    LORA_FAMILY,
    WHOLE_MODEL,
    AdapterConfig,
    Heads,
    Method,
    Scope,
    Targets,
)
from samgraft.finetune.adapters.placement import (
    chosen_blocks,
    head_names,
    is_everywhere,
    target_pattern,
    whole_modules,
)
from samgraft.finetune.adapters.saving import remember_base, remember_start
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.save import tensors_sha256
from segment_anything.modeling import Sam
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)


def adapt(
    sam: Sam,
    config: AdapterConfig,
    *,
    num_classes: int,
    max_steps: int | None = None,
    prompted_tokens: Sequence[int] = (),
) -> PeftModel | None:
    """Freeze ``sam``, then make exactly the configured tensors trainable, in place.

    BatchNorm of vit_t keeps its running statistics whatever the method: they would drift with few slices, and an
    adapter file does not carry them.

    Args:
        sam: Any of our SAMs, with its final head.
        config: What trains.
        num_classes: Foreground classes; decides which heads the loss reaches.
        max_steps: Length of the run, for adalora.
        prompted_tokens: Mask tokens that answer prompts; empty without prompts.

    Returns:
        The peft wrapper around the same ``sam`` (for saving and merging); None for ``full`` and ``bitfit``.

    Raises:
        UsageError: If the configuration does not fit the architecture; the model is unchanged then.
    """
    if unused := config.unused_options():
        log.warning(
            "%s is not read by adapter.method=%s", ", ".join(f"adapter.{u}" for u in unused), config.method.value
        )
    spec: EncoderSpec = sam.image_encoder.spec
    blocks = chosen_blocks(spec, config)
    if config.method in WHOLE_MODEL:
        _unfreeze(sam, config, blocks, used=head_names(num_classes, prompted_tokens=prompted_tokens))
        return None
    from peft import get_peft_model
    from samgraft.finetune.adapters.layers import without_warnings_of_peft
    from samgraft.finetune.adapters.methods import peft_config_of

    pattern = target_pattern(spec, config)
    expected = {name: module for name, module in sam.named_modules() if re.fullmatch(pattern, name)}
    _check_sizes(expected, config)
    whole = whole_modules(
        spec,
        config,
        num_classes=num_classes,
        num_mask_tokens=int(sam.mask_decoder.num_mask_tokens),
        prompted_tokens=prompted_tokens,
    )
    made = peft_config_of(config, spec, pattern=pattern, modules_to_save=whole, max_steps=max_steps)
    sam.requires_grad_(False)
    base_sha256 = _identity(sam)
    with without_warnings_of_peft():
        peft_model = get_peft_model(sam, made)
    if base_sha256 is not None:
        remember_base(peft_model, base_sha256)
    names: Any = peft_model.base_model.targeted_module_names
    if set(names) != set(expected) or not expected:
        raise WeightsError(f"updates must sit in {len(expected)} layers, peft placed them in {len(set(names))}.")
    if config.targets is Targets.QV and blocks:
        hold_keys(sam, spec, r=config.r)
    if config.method is Method.PISSA:
        remember_start(peft_model)
    return peft_model


def _identity(sam: Sam) -> str | None:
    """Return what identifies the base; None on the meta device, where models are counted and never saved."""
    tensors = sam.state_dict()
    return None if any(tensor.is_meta for tensor in tensors.values()) else tensors_sha256(tensors)


def can_merge(method: Method) -> bool:
    """Tell whether the result can be written as plain SAM weights."""
    return method is not Method.ADAPTER


def hold_keys(sam: nn.Module, spec: EncoderSpec, *, r: int) -> None:
    """Make the encoder's rank-2r updates of qkv what SAMed has: rank r for queries, rank r for values, none for keys.

    lora_B starts at 0, and its gradient is zeroed where a row of the queries meets a factor of the values and the
    other way round, and in all rows of the keys. Weight decay keeps 0.

    Source:
        SAMed, arXiv 2304.13785: ``_LoRA_qkv``.
    """
    for name, attention in sam.named_modules():
        if not (name.startswith("image_encoder.") and name.endswith(".attn") and hasattr(attention, "qkv")):
            continue
        if not hasattr(attention.qkv, "lora_B"):
            continue
        weight = attention.qkv.lora_B["default"].weight
        sizes = {"out_features": weight.shape[0], "num_heads": attention.num_heads}
        free = torch.zeros(weight.shape, dtype=torch.bool)
        free[spec.qkv_rows(0, **sizes), :r] = True
        free[spec.qkv_rows(2, **sizes), r:] = True
        _hold(weight, free)
        magnitudes = getattr(attention.qkv, "lora_magnitude_vector", None) or {}
        for magnitude in magnitudes.values():
            _hold(magnitude.weight, free.any(dim=1))


def _hold(parameter: nn.Parameter, free: Tensor) -> None:
    """Zero the gradient where ``free`` is False; ``num_held`` keeps the count for the tables."""
    parameter.register_hook(lambda grad: grad * free.to(grad))
    parameter.num_held = int((~free).sum())  # type: ignore[attr-defined]


def _check_sizes(targets: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse a rank above what a layer can have, and rotations that do not divide it."""
    sides = {name: shape for name, module in targets.items() if (shape := _sides(module)) is not None}
    if not sides:
        return
    if config.method in LORA_FAMILY | {Method.ADALORA, Method.HRA}:
        name, smallest = min(((n, min(shape)) for n, shape in sides.items()), key=lambda item: item[1])
        if config.r > smallest:
            raise UsageError(
                f"adapter.r must be at most {smallest}, the smaller side of {name}, got {config.r}: a larger rank is a "
                "full update. Use a smaller one, or adapter.method=full.",
                where="adapter.r",
            )
    if config.method is Method.BOFT:
        odd = [f"{name} ({shape[0]})" for name, shape in sides.items() if shape[0] % config.boft_block_size]
        if odd:
            raise UsageError(
                f"adapter.boft_block_size must divide the inputs of every layer, {config.boft_block_size} does not "
                f"divide those of {len(odd)}, e.g. {odd[0]}. Use 2 or 4.",
                where="adapter.boft_block_size",
            )


def _sides(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels * module.kernel_size[0] * module.kernel_size[1], module.out_channels
    return None


def _unfreeze(sam: Sam, config: AdapterConfig, blocks: Iterable[str], *, used: Sequence[str]) -> None:
    """Unfreeze parts of SAM's own tensors; without what no loss reaches, unless the study's code trained it."""
    sam.requires_grad_(False)
    prefixes = ["mask_decoder."]
    if is_everywhere(config):
        prefixes.append("image_encoder.")
    elif config.scope is Scope.ENCODER_DECODER:
        prefixes += [f"{name}." for name in blocks] + ["image_encoder.neck."]
    elif config.scope is Scope.NECK_DECODER:
        prefixes.append("image_encoder.neck.")
    released = config.heads is Heads.RELEASED
    if released:
        prefixes.append("prompt_encoder.")
    for name, parameter in sam.named_parameters():
        if not name.startswith(tuple(prefixes)):
            continue
        if not released and _is_unreached(name, used):
            continue
        if config.method is Method.BITFIT:
            whole = name.startswith(tuple(f"{head}." for head in used))
            whole |= config.scope is Scope.NECK_DECODER and name.startswith("image_encoder.neck.")
            parameter.requires_grad_(whole or name.endswith(".bias"))
        else:
            parameter.requires_grad_(True)


def _is_unreached(name: str, used: Iterable[str]) -> bool:
    """The IoU head without prompts, and hypernetworks of no class."""
    heads = ("mask_decoder.iou_prediction_head.", "mask_decoder.output_hypernetworks_mlps.")
    return name.startswith(heads) and not name.startswith(tuple(f"{head}." for head in used))
