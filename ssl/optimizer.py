"""AdamW of stage 1, and its state by parameter name for later runs.

The encoder's layers have rates that decay with depth; decoder and heads, which start from random weights, have a higher
one. A finished run stores AdamW's moments in ``ssl_state/`` by parameter name instead of AdamW's own numbers, so that a
run with other parameter groups or frozen depths can restore those that it still trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.runs.training_state import load_optimizer_state, read_state, unflatten_state
from samgraft.shared.training.optim import LearningRate, parameter_groups
from samgraft.ssl.config import PretrainOptimizerConfig
from samgraft.ssl.objectives import Objective
from samgraft.ssl.scope import lora_layers
from samgraft.ssl.ssl_state import find_state

MOMENTS_FILE = "optimizer.safetensors"
MOMENT_PARTS = ("exp_avg", "exp_avg_sq", "step")

Moments = Mapping[str, torch.Tensor]
"""Tensors named ``{parameter}/{part}``, for each of ``MOMENT_PARTS``."""


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
    """Return the parameter groups of the encoder, then those of the heads."""
    # A group of one depth can contain parameters of the encoder and of heads, which get different rates.
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


def write_moments(training_state: Path, objective: Objective, config: PretrainOptimizerConfig, folder: Path) -> bool:
    """Write the optimizer of a run's last training state by parameter name.

    Args:
        training_state: Verified folder of the last step.
        objective: The unsharded objective as the run trained it.
        config: Optimizer settings of the run, which determine AdamW's numbering.
        folder: ``ssl_state`` of the run.

    Returns:
        False if LoRA was trained. Nothing is written then, because merged weights have no moments.
    """
    if lora_layers(objective):
        return False
    state = read_state(training_state)
    saved = unflatten_state(state.record["optimizer"], state.tensors)["state"]
    named = _named_parameters(objective, pretrain_groups(objective, config))
    write_tensors(
        folder / MOMENTS_FILE,
        {f"{named[number][0]}/{part}": values[part] for number, values in saved.items() for part in MOMENT_PARTS},
    )
    return True


def read_moments(initial_weights: str) -> Moments | None:
    """Return the moments next to the initial encoder weights, or None if there are none.

    Raises:
        WeightsError: If the file is damaged.
    """
    folder = find_state(initial_weights)
    path = None if folder is None else folder / MOMENTS_FILE
    if path is None or not path.is_file():
        return None
    try:
        return dict(load_file(path))
    except SafetensorError as err:
        raise WeightsError(
            f"{MOMENTS_FILE} cannot be read: the file is damaged. Train without it.",
            where=f"{path.parent.name}/{path.name}",
            next_command="... ARGS='model.ssl_state=ignore'",
        ) from err


def restore_moments(optimizer: torch.optim.AdamW, objective: Objective, moments: Moments) -> str:
    """Restore the moments of every trained parameter that has some under its name and shape.

    Returns:
        A sentence with the number of restored tensors.

    Raises:
        WeightsError: If a value is not finite, because it would corrupt the first update.
    """
    # AdamW has no state before its first step. The moments are written into its state dictionary under its numbers.
    state, named = optimizer.state_dict(), _named_parameters(objective, optimizer.param_groups)
    for number, (name, parameter) in enumerate(named):
        # Frozen depths, new heads or other sizes leave parameters without moments; AdamW then begins with zeros.
        values = {part: moments[f"{name}/{part}"] for part in MOMENT_PARTS if f"{name}/{part}" in moments}
        if len(values) < len(MOMENT_PARTS) or values["exp_avg"].shape != parameter.shape:
            continue
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            raise WeightsError(f"the optimizer state must be finite, got NaN or Inf for {name}.", where=MOMENTS_FILE)
        state["state"][number] = values
    load_optimizer_state(optimizer, state)
    return f"optimizer moments restored for {len(state['state'])}/{len(named)} trained tensors"


def _named_parameters(objective: Objective, groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return names and parameters in the order in which an optimizer's state numbers them."""
    name_of = {id(parameter): name for name, parameter in objective.named_parameters()}
    return [(name_of[id(parameter)], parameter) for group in groups for parameter in group["params"]]
