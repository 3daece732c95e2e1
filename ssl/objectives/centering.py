"""Centering of a teacher's answers, once per optimizer step: lightly's losses with their centers held still.

lightly moves the center at every call. Here a call only adds to a sum, and the center moves after the optimizer step
by lightly's rule with the mean over all micro-steps and processes. So 8 slices in one micro-step or 4 in two give the
same, looks at held-out slices change nothing, and processes talk once per step.

Shape letters: V = views, B = slices, N = tokens, D = outputs of the head.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.modules.center import center_momentum
from torch import nn


class StepCenter(nn.Module):
    """A center (D,) and what was seen since it last moved; the latter are buffers, so that a pre-flight can undo it."""

    center_D: torch.Tensor
    sum_D: torch.Tensor
    count: torch.Tensor

    def __init__(self, dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center_D", torch.zeros(dim))
        self.register_buffer("sum_D", torch.zeros(dim), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @property
    def value(self) -> torch.Tensor:
        """The center, for lightly."""
        return self.center_D

    def update(self, outputs: torch.Tensor) -> None:
        """Add answers (..., D) to the sum, while training only."""
        # lightly calls this from a loss; a look at held-out slices has no gradients.
        if torch.is_grad_enabled():
            rows_ND = outputs.detach().flatten(0, -2)
            self.sum_D += rows_ND.sum(0)
            self.count += len(rows_ND)

    @torch.no_grad()
    def step(self) -> None:
        """Move the center; a collective call, made equally often on every process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sum_D)
            torch.distributed.all_reduce(self.count)
        # Without any answer the center stays: a mean over nothing would make it NaN for ever.
        if self.count > 0:
            moved_D = center_momentum(self.center_D, self.sum_D / self.count, self.momentum)
            self.center_D.copy_(moved_D)
        self.sum_D.zero_()
        self.count.zero_()


class StepDINOLoss(DINOLoss):
    """lightly's DINO loss whose center moves in ``step_center.step()``."""

    def __init__(self, output_dim: int, *, student_temp: float, center_momentum: float) -> None:
        super().__init__(output_dim=output_dim, student_temp=student_temp, center_momentum=center_momentum)
        del self.center
        self.step_center = StepCenter(output_dim, momentum=center_momentum)

    @property
    def center(self) -> torch.Tensor:
        """What lightly subtracts from the teacher's answers; a buffer there."""
        return self.step_center.value

    def update_center(self, teacher_out: torch.Tensor) -> None:
        """Remember the teacher's answers (V, B, D)."""
        self.step_center.update(teacher_out)


class StepIBOTLoss(IBOTPatchLoss):
    """lightly's iBOT loss whose center moves in ``center.step()``."""

    def __init__(self, output_dim: int, *, student_temp: float, center_momentum: float) -> None:
        super().__init__(output_dim=output_dim, student_temp=student_temp, center_momentum=center_momentum)
        self.center: Any = StepCenter(output_dim, momentum=center_momentum)


def build_head(in_dim: int, *, hidden_dim: int, bottleneck_dim: int, output_dim: int) -> DINOProjectionHead:
    """Build lightly's DINO head; ``cancel_last_layer_gradients(0)`` holds its last layer still."""
    with warnings.catch_warnings():
        # lightly uses torch's old weight_norm, whose state it therefore keeps under its old names.
        warnings.simplefilter("ignore", FutureWarning)
        return DINOProjectionHead(
            in_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            output_dim=output_dim,
            freeze_last_layer=1,
        )
