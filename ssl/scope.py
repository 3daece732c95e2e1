"""Trained part of the encoder, which is everything, the last blocks, or low-rank updates (LoRA).

Whatever the scope, the objective decides about the neck (its ``train_neck``) and trains all of its decoder or heads.

LoRA is in the four linear layers of every attention block. They are named by a full regular expression and counted
afterwards, because peft ignores a name that matches nothing. During training the encoder contains peft's layers.
Encoder weights and ``ssl_state`` have SAM's own names, because :func:`merged_state` merges the updates.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from samgraft.shared.config import PositiveInt, ShareBelowOne
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.errors import UsageError, WeightsError
from torch import nn

log = logging.getLogger(__name__)

ADAPTER = "default"
_LORA_PART = re.compile(r"\.lora_[A-Za-z_]+\.")


class Scope(Enum):
    """Trained weights of the encoder."""

    ALL = "all"
    """Every weight above ``num_frozen_depths``."""
    LAST_BLOCKS = "last_blocks"
    """The last ``num_last_blocks`` blocks, which is cheapest because nothing below them is saved for backward."""
    LORA = "lora"
    """Low-rank updates of frozen weights, with a hundredth of the optimizer's memory and small changes."""


@dataclass(frozen=True, kw_only=True)
class ScopeConfig:
    """Settings of the trained part of the encoder."""

    kind: Scope = Scope.ALL
    """Trained weights, all, last_blocks or lora, see ``Scope``."""
    num_last_blocks: PositiveInt | None = None
    """Number of trained blocks for last_blocks."""
    lora_r: PositiveInt = 8
    """Rank of each update for lora."""
    lora_alpha: PositiveInt = 8
    """Scale of the updates for lora, which are multiplied by lora_alpha / lora_r."""
    lora_dropout: ShareBelowOne = 0.0
    """Dropout probability on the input of the updates for lora."""

    def __post_init__(self) -> None:
        if (self.kind is Scope.LAST_BLOCKS) != (self.num_last_blocks is not None):
            raise ValueError(
                "scope.num_last_blocks must be given for scope.kind=last_blocks and only then, got "
                f"{self.num_last_blocks} for {self.kind.value}."
            )
        defaults = {name: f.default for name, f in type(self).__dataclass_fields__.items()}
        changed = [n for n in ("lora_r", "lora_alpha", "lora_dropout") if getattr(self, n) != defaults[n]]
        if changed and self.kind is not Scope.LORA:
            raise ValueError(
                f"scope.{changed[0]} is set but scope.kind is {self.kind.value}, so it would be ignored. Use "
                "scope.kind=lora, or remove it."
            )


def apply_scope(encoder: ImageEncoder, scope: ScopeConfig, *, num_frozen_depths: int) -> list[str]:
    """Make exactly the configured part of the encoder trainable, in place.

    Returns:
        Names of the trainable parameters; an objective may freeze the neck later.

    Raises:
        UsageError: If nothing but the neck would train, or two settings contradict each other.
        WeightsError: If peft placed LoRA in other layers than intended.
    """
    if num_frozen_depths and scope.kind is not Scope.ALL:
        raise UsageError(
            f"num_frozen_depths must be 0 with scope.kind={scope.kind.value}, got {num_frozen_depths}. Set it to 0.",
            where="model.num_frozen_depths",
        )
    if scope.kind is Scope.LORA:
        add_lora(encoder, scope)
    else:
        freeze_depths(encoder, num_frozen_depths + depths_below_last_blocks(encoder, scope))
    return [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]


def freeze_depths(encoder: ImageEncoder, num_frozen_depths: int) -> list[str]:
    """Freeze the lowest depths and return the names of their parameters.

    Raises:
        UsageError: If nothing but the neck would train.
    """
    # The neck is the deepest group, and an objective may freeze it later.
    groups = list(encoder.layer_groups())
    deepest = max(depth for depth, _ in groups)
    if num_frozen_depths >= deepest:
        raise UsageError(
            f"num_frozen_depths must be below {deepest} for {encoder.spec.title}, got {num_frozen_depths}, which "
            "leaves nothing to train.",
            where="model.num_frozen_depths",
        )
    frozen = {id(p) for depth, parameters in groups if depth < num_frozen_depths for p in parameters}
    for parameter in encoder.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return [name for name, parameter in encoder.named_parameters() if id(parameter) in frozen]


def depths_below_last_blocks(encoder: ImageEncoder, scope: ScopeConfig) -> int:
    """Return the number of depths below the last blocks.

    Raises:
        UsageError: If the encoder has fewer blocks.
    """
    if scope.num_last_blocks is None:
        return 0
    deepest = max(depth for depth, _ in encoder.layer_groups())  # the neck's
    if scope.num_last_blocks >= deepest:
        raise UsageError(
            f"scope.num_last_blocks must be at most {deepest - 1} for {encoder.spec.title}, got "
            f"{scope.num_last_blocks}.",
            where="model.scope.num_last_blocks",
        )
    return deepest - scope.num_last_blocks


def add_lora(encoder: ImageEncoder, scope: ScopeConfig) -> None:
    """Freeze the encoder and add LoRA to its linear layers, in place, with updates of zero.

    Raises:
        WeightsError: If peft adapted other layers than those that the expression names.
    """
    # Imported here because peft imports transformers, which takes seconds.
    from peft import LoraConfig, inject_adapter_in_model

    pattern = encoder.spec.linear_pattern()
    expected = {name for name, module in encoder.named_modules() if re.fullmatch(pattern, name)}
    neck = [parameter.requires_grad for parameter in encoder.neck.parameters()]
    encoder.requires_grad_(False)
    # The pattern matches whole names. A suffix would also match layers of the neck or of the stem.
    config = LoraConfig(
        r=scope.lora_r, lora_alpha=scope.lora_alpha, lora_dropout=scope.lora_dropout, target_modules=pattern
    )
    inject_adapter_in_model(config, encoder, adapter_name=ADAPTER)
    adapted = set(lora_layers(encoder))
    if adapted != expected or not expected:
        raise WeightsError(f"LoRA must be in {len(expected)} layers of the encoder, got {len(adapted)} from peft.")
    # peft freezes all other layers, but the objective decides about the neck.
    for parameter, trains in zip(encoder.neck.parameters(), neck, strict=True):
        parameter.requires_grad_(trains)
    log.info("LoRA of rank %d in %d layers of the encoder", scope.lora_r, len(adapted))


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Return peft's layers by the name of the layer they adapt."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def merged_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state under the names without LoRA, with the updates added to the weights.

    The module itself is not changed. Without LoRA this is ``state_dict()``.
    """
    state = {name: tensor.detach() for name, tensor in unadapted_tensors(module).items()}
    for name, layer in lora_layers(module).items():
        # Out of place, because training continues with separate weights and updates.
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).detach().to(weight)
    return state


def unadapted_tensors(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return the tensors of the module without the updates, under the names without LoRA."""
    state = module.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not _LORA_PART.search(name)}


def learns_mask_token(encoder: Any) -> bool:
    """Return True if the stem or the depth above it trains, so that a mask token may train too.

    With more frozen depths a trained token would need a backward pass through all of them, which freezing avoids.
    """
    groups = encoder.layer_groups()
    return any(parameter.requires_grad for depth, parameters in groups if depth < 2 for parameter in parameters)
