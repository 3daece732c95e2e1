"""Parameter groups and AdamW: no decay where it harms, smaller steps for earlier layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from samgraft.shared.errors import UsageError
from torch import nn

log = logging.getLogger(__name__)

NO_DECAY_NAMES = ("pos_embed", "rel_pos_h", "rel_pos_w", "attention_biases", "mask_token", "cls_token")
"""Ends of names of position tables and learned tokens, which weight decay pulls to zero for no gain."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate of the last layer."""
    weight_decay: float = 0.05
    """AdamW's decay of weight matrices; never of norms, biases, positions and tokens (MAE's value)."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients (0.95: MAE, arXiv 2111.06377, table 8)."""
    layer_decay: float = 1.0
    """Factor on the learning rate per layer towards the input; 1 is off, 0.75 is usual for fine-tuning."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    final_lr_factor: float = 0.0
    """Share of ``lr`` that is left at the last step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.lr <= 1:
            raise ValueError(f"optim.lr must be in (0, 1], got {self.lr}.")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay}.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"optim.beta1 and beta2 must be in [0, 1), got {self.beta1} and {self.beta2}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be in (0, 1], got {self.layer_decay}.")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps must be at least 0, got {self.warmup_steps}.")
        if not 0 <= self.final_lr_factor <= 1:
            raise ValueError(f"optim.final_lr_factor must be in [0, 1], got {self.final_lr_factor}.")


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    *,
    layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]] = (),
) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters of ``module``.

    Args:
        module: Everything that trains.
        config: Rates and decay.
        layer_groups: ``encoder.layer_groups()``: parameters with their depth, 0 next to the input. Only used with
            ``layer_decay`` below 1. Parameters not in it (decoder, heads) take the full rate.

    Raises:
        UsageError: If nothing is trainable.
    """
    groups = parameter_groups(module, config, layer_groups=layer_groups)
    if not groups:
        raise UsageError("at least one parameter must be trainable, got none.", where="model")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    count = sum(p.numel() for g in groups for p in g["params"])
    total = sum(p.numel() for p in module.parameters())
    log.info("training %.2f of %.2f million parameters (%.1f %%)", count / 1e6, total / 1e6, 100 * count / total)
    return optimizer


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, *, layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]] = ()
) -> list[dict[str, Any]]:
    """Sort the trainable parameters by decay and depth; ``peak_lr`` is what the schedule multiplies."""
    depth_of = _depths(layer_groups) if config.layer_decay < 1 else {}
    deepest = max(depth_of.values(), default=0)
    in_norm = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of.get(id(parameter), deepest)
        decays = parameter.ndim > 1 and id(parameter) not in in_norm and not name.endswith(NO_DECAY_NAMES)
        rate = config.lr * config.layer_decay ** (deepest - depth)
        group = groups.setdefault(
            (depth, decays),
            {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _depths(layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]]) -> Mapping[int, int]:
    depth_of: dict[int, int] = {}
    for depth, parameters in layer_groups:
        for parameter in parameters:
            if depth_of.setdefault(id(parameter), depth) != depth:
                raise ValueError(f"a parameter must be in one layer group, got {depth} and {depth_of[id(parameter)]}.")
    return depth_of


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
