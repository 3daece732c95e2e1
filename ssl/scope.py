"""What of the encoder trains: everything, the last blocks, or low-rank updates (LoRA) that are merged when handed over.

Whatever the scope, the objective decides about the neck (its ``train_neck``) and trains its own decoder or heads whole.

LoRA sits in the four linear layers of every attention block, named by a full regular expression and counted
afterwards: peft ignores a name that matches nothing. While training, the encoder then has peft's layers inside; all
that leaves a run (encoder weights, ``ssl_state``) is merged back to SAM's own names by :func:`merged_state`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.errors import UsageError, WeightsError
from torch import nn

log = logging.getLogger(__name__)

ADAPTER = "default"
_LORA_PART = re.compile(r"\.lora_[A-Za-z_]+\.")


class Scope(Enum):
    """Which weights of the encoder train."""

    ALL = "all"
    """Every weight (down to ``num_frozen_depths``)."""
    LAST_BLOCKS = "last_blocks"
    """The last ``num_last_blocks`` blocks: nothing is kept for backward below them, the cheapest way."""
    LORA = "lora"
    """Low-rank updates beside frozen weights: a hundredth of the optimizer's memory, and close to the start."""


@dataclass(frozen=True, kw_only=True)
class ScopeConfig:
    """What of the encoder trains."""

    kind: Scope = Scope.ALL
    """all, last_blocks or lora."""
    num_last_blocks: int | None = None
    """For last_blocks: how many train."""
    lora_r: int = 8
    """For lora: rank of each update."""
    lora_alpha: int = 8
    """For lora: updates are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """For lora: dropout on the input of the update."""

    def __post_init__(self) -> None:
        if (self.kind is Scope.LAST_BLOCKS) != (self.num_last_blocks is not None):
            raise ValueError(
                "scope.num_last_blocks must be given for scope.kind=last_blocks and only then, got "
                f"{self.num_last_blocks} for {self.kind.value}."
            )
        if self.num_last_blocks is not None and self.num_last_blocks < 1:
            raise ValueError(f"scope.num_last_blocks must be at least 1, got {self.num_last_blocks}.")
        defaults = {name: f.default for name, f in type(self).__dataclass_fields__.items()}
        changed = [n for n in ("lora_r", "lora_alpha", "lora_dropout") if getattr(self, n) != defaults[n]]
        if changed and self.kind is not Scope.LORA:
            raise ValueError(
                f"scope.{changed[0]} is set but scope.kind is {self.kind.value}: it would be ignored. Use scope.kind="
                "lora, or remove it."
            )
        if self.lora_r < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError("scope.lora_r and lora_alpha must be positive and lora_dropout in [0, 1).")


def apply_scope(encoder: ImageEncoder, scope: ScopeConfig, *, num_frozen_depths: int) -> list[str]:
    """Make exactly the scope trainable, in place.

    Returns:
        Names of the encoder's trainable parameters, before an objective decides about the neck.

    Raises:
        UsageError: If nothing but the neck would train, or two settings contradict each other.
        WeightsError: If LoRA did not land in exactly the layers it was meant for.
    """
    if num_frozen_depths and scope.kind is not Scope.ALL:
        raise UsageError(
            f"num_frozen_depths goes with scope all, got {num_frozen_depths} with {scope.kind.value}. Set it to 0.",
            where="model.num_frozen_depths",
        )
    if scope.kind is Scope.LORA:
        add_lora(encoder, scope)
    else:
        freeze_depths(encoder, num_frozen_depths + frozen_below(encoder, scope))
    return [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]


def freeze_depths(encoder: ImageEncoder, num_frozen_depths: int) -> list[str]:
    """Stop training the lowest depths; return the names of the parameters that keep their weights.

    Raises:
        UsageError: If no depth but the neck would be left.
    """
    groups = list(encoder.layer_groups())
    deepest = max(depth for depth, _ in groups)
    if num_frozen_depths >= deepest:
        raise UsageError(
            f"num_frozen_depths must be below {deepest} for {encoder.spec.title}, got {num_frozen_depths}: nothing "
            "would be trained.",
            where="model.num_frozen_depths",
        )
    frozen = {id(p) for depth, parameters in groups if depth < num_frozen_depths for p in parameters}
    for parameter in encoder.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return [name for name, parameter in encoder.named_parameters() if id(parameter) in frozen]


def frozen_below(encoder: ImageEncoder, scope: ScopeConfig) -> int:
    """Return how many depths, counted from the stem, lie below the last blocks.

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
    """Freeze the encoder and put LoRA beside its linear layers, in place; it starts by changing nothing.

    Raises:
        WeightsError: If peft adapted other layers than the expression names.
    """
    from peft import LoraConfig, inject_adapter_in_model  # imports transformers: seconds

    pattern = encoder.spec.linear_pattern()
    expected = {name for name, module in encoder.named_modules() if re.fullmatch(pattern, name)}
    neck = [parameter.requires_grad for parameter in encoder.neck.parameters()]
    encoder.requires_grad_(False)
    config = LoraConfig(
        r=scope.lora_r, lora_alpha=scope.lora_alpha, lora_dropout=scope.lora_dropout, target_modules=pattern
    )
    inject_adapter_in_model(config, encoder, adapter_name=ADAPTER)
    adapted = set(lora_layers(encoder))
    if adapted != expected or not expected:
        raise WeightsError(f"LoRA must sit in {len(expected)} layers of the encoder, peft placed it in {len(adapted)}.")
    # peft freezes what it does not adapt; the neck is the objective's to decide.
    for parameter, trains in zip(encoder.neck.parameters(), neck, strict=True):
        parameter.requires_grad_(trains)
    log.info("LoRA of rank %d in %d layers of the encoder", scope.lora_r, len(adapted))


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """Return peft's layers by the name of the layer they adapt."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def merged_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state under the names it has without LoRA, updates added to the weights they adapt.

    The module itself is not changed and trains on. Without LoRA this is ``state_dict()``.
    """
    targets = plain_names(module)
    state = {name: tensor.detach() for name, tensor in targets.items()}
    for name, layer in lora_layers(module).items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).detach().to(weight)
    return state


def plain_names(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return the module's own tensors (weights without their updates) under the names they have without LoRA."""
    state = module.state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not _LORA_PART.search(name)}


def learns_mask_token(encoder: Any) -> bool:
    """Tell whether a mask token may train: if the stem or the depth above it does.

    Above frozen depths it would cost a backward pass through all of them, which they are frozen to avoid.
    """
    groups = encoder.layer_groups()
    return any(parameter.requires_grad for depth, parameters in groups if depth < 2 for parameter in parameters)
