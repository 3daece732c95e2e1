"""Rank allocation of adalora, as a part of a training step that resumes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Moving averages of peft's allocator, by the name of the parameter."""


class RankUpdates:
    """Moves ranks between layers after every step and keeps factors close to orthogonal."""

    def __init__(self, peft_model: PeftModel) -> None:
        self.tuner: Any = peft_model.base_model
        self.config: Any = peft_model.peft_config["default"]

    @classmethod
    def of(cls, peft_model: PeftModel | None) -> RankUpdates | None:
        """Return the rank updates of a model made with ``adalora``, and None for other methods."""
        if peft_model is None or not hasattr(peft_model.base_model, "rankallocator"):
            return None
        return cls(peft_model)

    def penalty(self) -> Tensor:
        """Return the mean distance of the factors from orthogonal ones, weighted, to be added to the loss.

        Source:
            AdaLoRA, arXiv 2303.10512, eq. 4; peft adds it only to models that return their own loss.
        """
        distances = []
        for name, parameter in self.tuner.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                distances.append(torch.linalg.norm(product - torch.eye(len(product)).to(product)))
        return torch.stack(distances).mean() * float(self.config.orth_reg_weight)

    def after_update(self, step: int) -> None:
        """Move ranks after step number ``step``, while its gradients still exist."""
        # peft measures the importance of a rank by weight times gradient, so it must run before zero_grad.
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs in addition to the weights."""
        allocator = self.tuner.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in _AVERAGES}
        pattern = self.config.rank_pattern
        return {**averages, "rank_pattern": dict(pattern) if pattern else None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state``."""
        allocator = self.tuner.rankallocator
        parameters = dict(self.tuner.model.named_parameters())
        # The state comes from a file on the CPU; the averages must be where their parameters are.
        for name in _AVERAGES:
            setattr(allocator, name, {key: value.to(parameters[key].device) for key, value in state[name].items()})
        self.config.rank_pattern = dict(state["rank_pattern"]) if state["rank_pattern"] else {}
