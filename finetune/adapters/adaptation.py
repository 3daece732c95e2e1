"""Freezing of a SAM, and the updates that make exactly the configured tensors trainable."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from samgraft.finetune.adapters.choices import Heads, Targets, TuningScope
from samgraft.finetune.adapters.methods import AdapterConfig, AdapterRequest
from samgraft.finetune.adapters.placement import (
    chosen_blocks,
    head_names,
    is_everywhere,
    parallel_pattern,
    target_pattern,
    whole_modules,
)
from samgraft.finetune.adapters.saving import keep_base_sha256, keep_initial_factors
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.sam import DECODERS
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.save import tensors_sha256
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel
    from segment_anything.modeling import Sam

log = logging.getLogger(__name__)


_OBJECT_SCORE = "mask_decoder.pred_obj_score_head."
"""Head of SAM 2's object score, which no loss of this project reads."""


def adapt(
    sam: Sam,
    config: AdapterConfig,
    *,
    num_classes: int,
    max_steps: int | None = None,
    prompted_tokens: Sequence[int] = (),
) -> PeftModel | None:
    """Freeze ``sam``, then make exactly the configured tensors trainable, in place.

    The BatchNorm layers of vit_t keep their running statistics with every method: few slices would shift them, and an
    adapter file does not contain them.

    Args:
        sam: Any of our SAMs, with its final head.
        config: Method, scope and options.
        num_classes: Foreground classes; decides which heads the loss reaches.
        max_steps: Length of the run in optimizer steps, for adalora.
        prompted_tokens: Mask tokens whose masks belong to prompts; empty without prompts.

    Returns:
        The peft wrapper around the same ``sam``, for saving and merging. None when SAM's own tensors train.

    Raises:
        UsageError: If the configuration does not fit the architecture. The model is unchanged then.
    """
    for option in config.unused_options():
        log.warning("adapter.%s is not read by adapter.method=%s", option, config.method)
    spec: EncoderSpec = sam.image_encoder.spec
    blocks = chosen_blocks(spec, config)
    if config.spec.build is None:
        _unfreeze(sam, config, blocks, used=head_names(num_classes, prompted_tokens=prompted_tokens))
        return None
    pattern = target_pattern(spec, config)
    expected = {name: module for name, module in sam.named_modules() if re.fullmatch(pattern, name)}
    sizes = {name: size for name, module in expected.items() if (size := _layer_size(module)) is not None}
    if config.spec.check_layers is not None:
        config.spec.check_layers(config, sizes)
    whole = whole_modules(
        spec,
        config,
        num_classes=num_classes,
        num_mask_tokens=int(sam.mask_decoder.num_mask_tokens),
        prompted_tokens=prompted_tokens,
    )
    places = {"target_modules": pattern, "modules_to_save": whole or None}
    request = AdapterRequest(
        config=config, places=places, parallel_modules=parallel_pattern(spec, config), max_steps=max_steps
    )
    peft_model = _wrap(sam, config.spec.build(request))
    placed: Any = peft_model.base_model.targeted_module_names
    # peft ignores a pattern that matches nothing, so the result is compared with the expected layers.
    if set(placed) != set(expected) or not expected:
        raise WeightsError(f"updates must be in {len(expected)} layers, peft placed them in {len(set(placed))}.")
    if config.targets is Targets.QV and blocks:
        separate_qv(sam, spec, r=config.r)
    if config.spec.changes_base:
        keep_initial_factors(peft_model)
    return peft_model


def _wrap(sam: Sam, peft_config: Any) -> PeftModel:
    """Freeze ``sam`` and put the updates into it. The hash of the weights without them is kept in the wrapper."""
    from peft import get_peft_model
    from samgraft.finetune.adapters.layers import without_peft_warnings

    sam.requires_grad_(False)
    tensors = sam.state_dict()
    # Models on the meta device are only counted, never saved: their tensors have no values to hash.
    sha256 = None if any(tensor.is_meta for tensor in tensors.values()) else tensors_sha256(tensors)
    with without_peft_warnings():
        peft_model: PeftModel = get_peft_model(sam, peft_config)
    if sha256 is not None:
        keep_base_sha256(peft_model, sha256)
    return peft_model


def separate_qv(sam: nn.Module, spec: EncoderSpec, *, r: int) -> None:
    """Turn the encoder's rank-2r updates of qkv into rank r for queries and rank r for values, as in SAMed.

    ``lora_B`` starts at 0. Its gradient is set to zero where a row of the queries meets a factor of the values, where a
    row of the values meets a factor of the queries, and in all rows of the keys. Weight decay keeps these entries at 0.

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
        _zero_gradient(weight, ~free)
        # DoRA's magnitude of a row may only change where the row can change.
        magnitudes = getattr(attention.qkv, "lora_magnitude_vector", None) or {}
        for magnitude in magnitudes.values():
            _zero_gradient(magnitude.weight, ~free.any(dim=1))


def _zero_gradient(parameter: nn.Parameter, fixed: Tensor) -> None:
    """Set the gradient to zero where ``fixed`` is True. The tables subtract ``num_fixed`` numbers."""
    free = ~fixed
    parameter.register_hook(lambda grad: grad * free.to(grad))
    parameter.num_fixed = int(fixed.sum())  # type: ignore[attr-defined]


def _layer_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels * module.kernel_size[0] * module.kernel_size[1], module.out_channels
    return None


def _unfreeze(sam: Sam, config: AdapterConfig, blocks: Iterable[str], *, used: Sequence[str]) -> None:
    """Unfreeze SAM's own tensors of the scope.

    Tensors that no loss reaches stay frozen, except with ``heads: released``, because the study's code trained them.
    """
    sam.requires_grad_(False)
    prefixes, frozen = ["mask_decoder."], DECODERS[sam.image_encoder.spec.decoder].projections
    if is_everywhere(config):
        prefixes.append("image_encoder.")
    elif config.scope is TuningScope.ENCODER_DECODER:
        prefixes += [f"{name}." for name in blocks] + ["image_encoder.neck."]
    elif config.scope is TuningScope.NECK_DECODER:
        prefixes.append("image_encoder.neck.")
    if config.scope is not TuningScope.DECODER:
        frozen = ()
    # The study's code trained these parts whole, even where no loss reaches them. heads=released keeps its counts.
    released = config.heads is Heads.RELEASED
    if released:
        prefixes.append("prompt_encoder.")
    for name, parameter in sam.named_parameters():
        if not name.startswith(tuple(prefixes)) or name.startswith(frozen):
            continue
        if not released and _is_unreached(name, used):
            continue
        if config.spec.biases_only:
            whole = name.startswith(tuple(f"{head}." for head in used))
            whole |= config.scope is TuningScope.NECK_DECODER and name.startswith("image_encoder.neck.")
            parameter.requires_grad_(whole or name.endswith(".bias"))
        else:
            parameter.requires_grad_(True)


def _is_unreached(name: str, used: Iterable[str]) -> bool:
    """Return True for SAM 2's object score, the IoU head without prompts and hypernetworks of no class."""
    heads = ("mask_decoder.iou_prediction_head.", "mask_decoder.output_hypernetworks_mlps.", _OBJECT_SCORE)
    return name.startswith(heads) and not name.startswith(tuple(f"{head}." for head in used))
