"""EMA teacher, projection heads and centered losses of self-distillation.

lightly moves the center of a loss at every call. Here a call only adds to a sum, and the center moves once per
optimizer step, by lightly's rule, with the mean over all micro-steps and processes. Therefore one micro-step of 8
slices and two of 4 give the same center, held-out slices do not change it, and processes communicate once per step.

Shape letters: V = views, B = slices, C = channels, h, w = feature rows and columns, L = h w, N = tokens, D = outputs
of a head.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.modules.center import center_momentum
from torch import nn


class StepCenter(nn.Module):
    """A center (D,) that moves once per optimizer step."""

    center_D: torch.Tensor
    sum_D: torch.Tensor
    count: torch.Tensor

    def __init__(self, dim: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center_D", torch.zeros(dim))
        # Sum and count are empty between optimizer steps, so no training state stores them. They are buffers because
        # the pre-flight restores all buffers after its measured steps.
        self.register_buffer("sum_D", torch.zeros(dim), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @property
    def value(self) -> torch.Tensor:
        """The center, under the name that lightly's losses read."""
        return self.center_D

    def update(self, outputs: torch.Tensor) -> None:
        """Add outputs (..., D) to the sum, while training only."""
        # lightly calls this inside a loss; the losses of held-out slices are computed without gradients.
        if torch.is_grad_enabled():
            rows_ND = outputs.detach().flatten(0, -2)
            self.sum_D += rows_ND.sum(0)
            self.count += len(rows_ND)

    @torch.no_grad()
    def step(self) -> None:
        """Move the center by the mean of the collected outputs of all processes."""
        # A collective call, which every process must make equally often.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sum_D)
            torch.distributed.all_reduce(self.count)
        # Without any output the center stays, because a mean over nothing would make it NaN permanently.
        if self.count > 0:
            self.center_D.copy_(center_momentum(self.center_D, self.sum_D / self.count, self.momentum))
        self.sum_D.zero_()
        self.count.zero_()


class StepDINOLoss(DINOLoss):
    """lightly's DINO loss with a center that moves in ``step_center.step()``."""

    def __init__(self, output_dim: int, *, student_temp: float, center_momentum: float) -> None:
        super().__init__(output_dim=output_dim, student_temp=student_temp, center_momentum=center_momentum)
        del self.center
        self.step_center = StepCenter(output_dim, momentum=center_momentum)

    @property
    def center(self) -> torch.Tensor:
        """The center that lightly subtracts from the teacher's outputs."""
        return self.step_center.value

    def update_center(self, teacher_out: torch.Tensor) -> None:
        """Add the teacher's outputs (V, B, D) to the sum."""
        self.step_center.update(teacher_out)


class StepIBOTLoss(IBOTPatchLoss):
    """lightly's iBOT loss with a center that moves in ``center.step()``."""

    def __init__(self, output_dim: int, *, student_temp: float, center_momentum: float) -> None:
        super().__init__(output_dim=output_dim, student_temp=student_temp, center_momentum=center_momentum)
        self.center: Any = StepCenter(output_dim, momentum=center_momentum)


class Heads(nn.Module):
    """Projection heads, one for whole views (DINO) and one for tokens (iBOT)."""

    def __init__(self, in_dim: int, *, hidden_dim: int, bottleneck_dim: int, output_dim: int) -> None:
        super().__init__()
        self.sizes = (in_dim, hidden_dim, bottleneck_dim, output_dim)
        # SAM's features are a residual stream without a last norm; some channels are hundreds of times the others.
        self.norm = nn.LayerNorm(in_dim)
        self.view = build_head(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)
        self.token = build_head(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)

    def tokens(self, features_BChw: torch.Tensor) -> torch.Tensor:
        """Return normalised tokens (B, L, C)."""
        out: torch.Tensor = self.norm(features_BChw.flatten(2).mT)
        return out

    def copy_weights(self) -> Heads:
        """Return new heads of the same sizes with the same weights."""
        # Built anew because torch's old weight_norm, which lightly uses, cannot be deep-copied. The fork leaves the
        # run's random numbers as they were.
        in_dim, hidden_dim, bottleneck_dim, output_dim = self.sizes
        with torch.random.fork_rng(devices=[]):
            copied = Heads(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)
        copied.load_state_dict(self.state_dict())
        for ours, theirs in zip(self.parameters(), copied.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Heads:
        copied = memo[id(self)] = self.copy_weights()
        return copied


def build_head(in_dim: int, *, hidden_dim: int, bottleneck_dim: int, output_dim: int) -> DINOProjectionHead:
    """Build lightly's DINO head, whose last layer ``cancel_last_layer_gradients(0)`` freezes."""
    with warnings.catch_warnings():
        # lightly uses torch's old weight_norm, so that the state keeps its old tensor names.
        warnings.simplefilter("ignore", FutureWarning)
        return DINOProjectionHead(
            in_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            output_dim=output_dim,
            freeze_last_layer=1,
        )


class Teacher(nn.Module):
    """Encoder and heads that follow the student's without gradients.

    The teacher is always in evaluation mode, because its outputs are targets and dropout would add noise to them.
    """

    def __init__(self, encoder: Any, heads: Heads) -> None:
        super().__init__()
        self.encoder: Any = copy.deepcopy(encoder)
        self.heads = heads.copy_weights()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Keep evaluation mode whatever the mode."""
        super().train(False)
        return self


@torch.no_grad()
def update_ema(slow: nn.Module, fast: nn.Module, *, momentum: float) -> None:
    """Move every parameter of ``slow`` to momentum * slow + (1 - momentum) * fast and copy the buffers.

    lightly's ``update_momentum`` is not used. It matches parameters by position and leaves BatchNorm's statistics
    behind, and its product and sum let weights that both sides share drift by rounding, unlike an interpolation.
    """
    slow_parameters, fast_parameters = dict(slow.named_parameters()), dict(fast.named_parameters())
    assert slow_parameters.keys() == fast_parameters.keys()
    torch._foreach_lerp_(
        list(slow_parameters.values()), [fast_parameters[name] for name in slow_parameters], 1.0 - momentum
    )
    fast_buffers = dict(fast.named_buffers())
    for name, buffer in slow.named_buffers():
        buffer.copy_(fast_buffers[name])
