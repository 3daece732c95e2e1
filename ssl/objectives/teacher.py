"""The EMA teacher: a slow average of the student, a plain submodule that no gradient reaches.

Shape letters: B = views, C = channels, h, w = feature rows and columns, L = h w, D = outputs of a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from samgraft.shared.encoders.vit import MaskableEncoder
from samgraft.ssl.objectives.centering import build_head
from torch import nn


class Heads(nn.Module):
    """From features to answers: one head for whole views (DINO), one for tokens (iBOT)."""

    def __init__(self, in_dim: int, *, hidden_dim: int, bottleneck_dim: int, output_dim: int) -> None:
        super().__init__()
        self.sizes = (in_dim, hidden_dim, bottleneck_dim, output_dim)
        # SAM's features are a residual stream without a last norm: some channels are hundreds of times the others.
        self.norm = nn.LayerNorm(in_dim)
        self.view = build_head(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)
        self.token = build_head(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)

    def tokens(self, features_BChw: torch.Tensor) -> torch.Tensor:
        """Return normalised tokens (B, L, C)."""
        out: torch.Tensor = self.norm(features_BChw.flatten(2).mT)
        return out

    def fresh_copy(self) -> Heads:
        """Return heads of the same sizes with the same weights."""
        # Built anew: torch's old weight_norm, which lightly uses, cannot be deep-copied.
        in_dim, hidden_dim, bottleneck_dim, output_dim = self.sizes
        with torch.random.fork_rng(devices=[]):
            copied = Heads(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)
        copied.load_state_dict(self.state_dict())
        for ours, theirs in zip(self.parameters(), copied.parameters(), strict=True):
            theirs.requires_grad_(ours.requires_grad)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Heads:
        copied = memo[id(self)] = self.fresh_copy()
        return copied


class Teacher(nn.Module):
    """Encoder and heads that follow the student's; always in eval mode: its answers are targets, without dropout."""

    def __init__(self, encoder: MaskableEncoder, heads: Heads) -> None:
        super().__init__()
        self.encoder: Any = copy.deepcopy(encoder)
        self.heads = heads.fresh_copy()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode whatever the mode."""
        super().train(False)
        return self


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, *, momentum: float) -> None:
    """Move every parameter of ``slow`` to momentum * slow + (1 - momentum) * fast; copy the buffers.

    By name, and as an interpolation: lightly's ``update_momentum`` goes by position, leaves BatchNorm's statistics
    behind, and its product and sum would let weights that both sides share drift by rounding.
    """
    slow_parameters, fast_parameters = dict(slow.named_parameters()), dict(fast.named_parameters())
    assert slow_parameters.keys() == fast_parameters.keys()
    torch._foreach_lerp_(
        list(slow_parameters.values()), [fast_parameters[name] for name in slow_parameters], 1.0 - momentum
    )
    fast_buffers = dict(fast.named_buffers())
    for name, buffer in slow.named_buffers():
        buffer.copy_(fast_buffers[name])
