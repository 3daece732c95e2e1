"""AdamW for an objective: the encoder's layers with decay by depth, and a faster rate for what starts from random."""

from __future__ import annotations

from typing import Any

import torch
from samgraft.shared.errors import UsageError
from samgraft.shared.training.optim import LearningRate, parameter_groups
from samgraft.ssl.config import PretrainOptimizerConfig
from samgraft.ssl.objectives.objective import Objective


def build_pretrain_optimizer(objective: Objective, config: PretrainOptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over everything trainable of an objective.

    Raises:
        UsageError: If nothing is trainable.
    """
    groups = pretrain_groups(objective, config)
    if not groups:
        raise UsageError("at least one parameter must be trainable, got none.", where="model.num_frozen_depths")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def pretrain_groups(objective: Objective, config: PretrainOptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameter groups: the encoder's, then those of the heads with ``head_lr_factor`` times the rate."""
    in_encoder = {id(p) for p in objective.encoder.parameters()}
    encoder_groups, head_groups = [], []
    for group in parameter_groups(objective, config, layer_groups=objective.encoder.layer_groups()):
        inside = [p for p in group["params"] if id(p) in in_encoder]
        outside = [p for p in group["params"] if id(p) not in in_encoder]
        if inside:
            encoder_groups.append({**group, "params": inside})
        if outside:
            rate = config.lr * config.head_lr_factor
            head_groups.append({**group, "params": outside, "lr": rate, "peak_lr": rate})
    return [*encoder_groups, *head_groups]


def build_schedule(config: PretrainOptimizerConfig, *, max_steps: int) -> LearningRate:
    """Return warm-up and cosine decay as functions of the step."""
    return LearningRate(warmup_steps=config.warmup_steps, max_steps=max_steps, final_factor=config.final_lr_factor)
