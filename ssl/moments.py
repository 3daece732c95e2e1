"""AdamW's running means by parameter name, in ``ssl_state/``: more SSL from a run need not gather them again.

Names instead of AdamW's own numbering, so that a run with other groups or frozen depths takes what is still trained.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.runs.training_state import load_optimizer_state, read_state, unflatten_state
from samgraft.ssl.config import PretrainOptimizerConfig
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.optimizer import pretrain_groups
from samgraft.ssl.scope import lora_layers
from samgraft.ssl.ssl_state import find_state

log = logging.getLogger(__name__)

MOMENTS_FILE = "optimizer.safetensors"
PARTS = ("exp_avg", "exp_avg_sq", "step")

Moments = Mapping[str, torch.Tensor]
"""``{parameter}/{part}`` for each of ``PARTS``."""


def write_moments(training_state: Path, objective: Objective, config: PretrainOptimizerConfig, folder: Path) -> bool:
    """Write the optimizer of a run's last training state by name.

    Args:
        training_state: Verified folder of the last step.
        objective: Whole, as the run trained it.
        config: Of the run: it decides AdamW's numbering.
        folder: ``ssl_state`` of the run.

    Returns:
        False, and nothing is written, if LoRA was trained: it is merged when it is handed on, its means fit nothing.
    """
    if lora_layers(objective):
        return False
    state = read_state(training_state)
    saved = unflatten_state(state.record["optimizer"], state.tensors)["state"]
    numbered = _numbered(objective, pretrain_groups(objective, config))
    write_tensors(
        folder / MOMENTS_FILE,
        {f"{numbered[number][0]}/{part}": values[part] for number, values in saved.items() for part in PARTS},
    )
    return True


def read_moments(base: str) -> Moments | None:
    """Return the moments beside the encoder that a run starts from; None if there are none."""
    folder = find_state(base)
    path = None if folder is None else folder / MOMENTS_FILE
    if path is None or not path.is_file():
        return None
    try:
        return dict(load_file(path))
    except SafetensorError as err:
        raise WeightsError(
            "the optimizer's file is damaged.",
            where=f"{path.parent.name}/{path.name}",
            next_command="... ARGS='model.ssl_state=ignore'",
        ) from err


def take_up_moments(optimizer: torch.optim.AdamW, objective: Objective, moments: Moments) -> str:
    """Give every parameter that is trained under the same name and shape its moments; say how many in words.

    Raises:
        WeightsError: If a value is not finite: it would spoil the first update.
    """
    state, numbered = optimizer.state_dict(), _numbered(objective, optimizer.param_groups)
    for number, (name, parameter) in enumerate(numbered):
        values = {part: moments[f"{name}/{part}"] for part in PARTS if f"{name}/{part}" in moments}
        if len(values) < len(PARTS) or values["exp_avg"].shape != parameter.shape:
            continue
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            raise WeightsError(f"the optimizer's state must be finite, got NaN or Inf for {name}.", where=MOMENTS_FILE)
        state["state"][number] = values
    load_optimizer_state(optimizer, state)
    return f"AdamW goes on with the running means of {len(state['state'])}/{len(numbered)} trained tensors"


def _numbered(objective: Objective, groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return names and parameters in the order in which an optimizer's state numbers them."""
    name_of = {id(parameter): name for name, parameter in objective.named_parameters()}
    return [(name_of[id(parameter)], parameter) for group in groups for parameter in group["params"]]
