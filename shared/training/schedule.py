"""Schedules as pure functions of the step: nothing to save, nothing that a resume could shift."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from samgraft.shared.training.trainer_config import check_warmup
from torch import Tensor


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, final_factor: float = 0.0) -> float:
    """Return the factor on the peak learning rate for the update that follows ``step`` finished ones.

    Rises linearly to 1 over ``warmup_steps`` (the first update already has 1/warmup_steps), then falls along half a
    cosine to ``final_factor`` at ``max_steps``.

    Source:
        Loshchilov and Hutter, SGDR, arXiv 1608.03983, eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return cosine(step, start=1.0, end=final_factor, first_step=warmup_steps, last_step=max_steps)


def warmup_poly(step: int, *, warmup_steps: int, max_steps: int, power: float) -> float:
    """Return the factor of a linear warm-up and then ``(1 - (step - warmup_steps) / max_steps) ** power``.

    It does not reach 0: ``max_steps`` counts the warm-up too.

    Source:
        finetune-SAM at e41f732, SingleGPU_train_finetune_noprompt.py.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return float((1.0 - (step - warmup_steps) / max_steps) ** power)


def cosine(step: int, *, start: float, end: float, first_step: int = 0, last_step: int) -> float:
    """Return the point at ``step`` of half a cosine from ``start`` to ``end``; constant outside of it."""
    share = min(max((step - first_step) / max(1, last_step - first_step), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


class LearningRate(pl.Callback):
    """Sets the learning rate of every group before each step: ``peak_lr * factor(step)``.

    Args:
        warmup_steps: Length of the warm-up.
        max_steps: Length of the run.
        final_factor: Share of the peak at the end.
        poly_power: A polynomial decay with this power instead of the cosine.
    """

    def __init__(
        self, *, warmup_steps: int, max_steps: int, final_factor: float = 0.0, poly_power: float | None = None
    ) -> None:
        check_warmup(warmup_steps, max_steps)
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.final_factor = final_factor
        self.poly_power = poly_power

    def factor(self, step: int) -> float:
        """Return the factor for the update that follows ``step`` finished ones."""
        if self.poly_power is not None:
            return warmup_poly(step, warmup_steps=self.warmup_steps, max_steps=self.max_steps, power=self.poly_power)
        return warmup_cosine(
            step, warmup_steps=self.warmup_steps, max_steps=self.max_steps, final_factor=self.final_factor
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rates; every micro-step of one step sets the same."""
        factor = self.factor(trainer.global_step)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                peak = group.setdefault("peak_lr", group["lr"])
                group["lr"] = _plain(peak) * factor


def _plain(value: float | Tensor) -> float:
    return float(value)
