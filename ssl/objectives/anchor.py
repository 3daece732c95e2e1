"""Anchor of an objective, which keeps the trained encoder near its initial weights.

Self-supervision improves the features for its own task and moves them away from what SAM's decoder was trained with. An
anchor is a penalty on that movement. It is the same for every objective, is zero before the first step, and its size
relative to the objective's loss is ``objective.anchor.weight``.

For features and relations, a frozen copy of the initial encoder receives what the trained encoder receives (the same
views with the same hidden tokens). Visible tokens are compared before and behind the neck, because the mask decoder
reads the neck's output and stage 2 begins at both. LoRA (``model.scope.kind=lora``) restricts the movement too, by
its rank.

Shape letters: B = slices or views, C = channels, h, w = feature rows and columns, T = compared tokens.

Source: Romero et al., FitNets (ICLR 2015), and Li and Hoiem, Learning without Forgetting (ECCV 2016): features of a
frozen copy. Simeoni et al., DINOv3 (2025), section 4.2: relations between tokens (Gram anchoring). Li et al., Explicit
inductive bias for transfer learning (ICML 2018): distance to the initial weights (L2-SP).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from samgraft.shared.config import Positive
from samgraft.ssl.views.masking import upsample_mask
from torch import Tensor, nn

MAX_RELATED_TOKENS = 1024
"""Number of tokens of a batch, evenly spread, whose relations are compared. All pairs of a batch at 1024 px would not
fit in memory."""


class AnchorKind(Enum):
    """Quantity of the initial encoder that the anchor keeps."""

    NONE = "none"
    """No anchor."""
    FEATURES = "features"
    """Features of the visible tokens, before and behind the neck."""
    RELATIONS = "relations"
    """Cosines between visible tokens, so that features may turn together."""
    WEIGHTS = "weights"
    """Trained weights of the encoder. It costs no forward pass."""


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Settings of the anchor."""

    kind: AnchorKind = AnchorKind.NONE
    """Quantity that is kept, none, features, relations or weights, see ``AnchorKind``."""
    weight: Positive = 1.0
    """Factor of the penalty in the loss. The penalty is a share of the variance of the initial features or relations,
    or of the squared size of the initial weights, so that a change of all of it costs 1 times this factor."""

    def __post_init__(self) -> None:
        if self.kind is AnchorKind.NONE and self.weight != type(self).weight:
            raise ValueError(
                "objective.anchor.weight is set but objective.anchor.kind is none, so it would be ignored. Use "
                "objective.anchor.kind=features, or remove it."
            )


class Anchor(nn.Module):
    """Frozen copy of the initial encoder, and the distance of the trained encoder to it."""

    def __init__(self, encoder: Any, kind: AnchorKind) -> None:
        super().__init__()
        self.kind = kind
        self.frozen_copy: Any = copy.deepcopy(encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Anchor:
        """Keep evaluation mode whatever the mode, because dropout would add noise to the target."""
        return super().train(False)

    def distance(
        self,
        encoder: Any,
        features_BChw: Tensor,
        encode: Callable[[Any], Tensor],
        *,
        hidden_Bhw: Tensor | None = None,
    ) -> Tensor:
        """Return the distance of the trained encoder to the frozen copy, 0 for equal weights.

        Args:
            encoder: The trained encoder.
            features_BChw: Its features before the neck.
            encode: Function that returned ``features_BChw`` for the trained encoder. It is called with the frozen copy.
            hidden_Bhw: True = hidden, on the grid of the features or a coarser one. None hides nothing.
        """
        if self.kind is AnchorKind.WEIGHTS:
            return weight_distance(encoder, self.frozen_copy)
        with torch.no_grad():
            kept_BChw = encode(self.frozen_copy)
            kept = (kept_BChw, self.frozen_copy.neck(kept_BChw))
        trained = (features_BChw, encoder.neck(features_BChw))
        compare = token_error if self.kind is AnchorKind.FEATURES else relation_error
        errors = []
        # Differences of large features lose their digits in bf16.
        with torch.autocast(features_BChw.device.type, enabled=False):
            for is_before_neck, ours_BChw, theirs_BChw in zip((True, False), trained, kept, strict=True):
                ours, theirs = (_visible_tokens(x.float(), hidden_Bhw) for x in (ours_BChw, theirs_BChw))
                if is_before_neck:
                    ours, theirs = normalise_tokens(ours), normalise_tokens(theirs)
                errors.append(compare(ours, theirs).mean())
        return torch.stack(errors).mean()


def weight_distance(encoder: nn.Module, frozen_copy: nn.Module) -> Tensor:
    """Return the squared distance of the trained weights as a share of the initial weights' squared size."""
    initial = dict(frozen_copy.named_parameters())
    pairs = [(p, initial[name]) for name, p in encoder.named_parameters() if p.requires_grad]
    moved = torch.stack([(p - p0).square().sum() for p, p0 in pairs]).sum()
    size = torch.stack([p0.square().sum() for _, p0 in pairs]).sum()
    return moved / size


def token_error(predicted_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """Return the squared error per token over the target's variance, shape (B, h, w).

    Predicting the mean scores 1 on average.
    """
    # The batch's own variance, so that the error is a share and does not depend on the size of the features.
    variance = (target_BChw - target_BChw.mean((0, 2, 3), keepdim=True)).square().mean()
    return (predicted_BChw - target_BChw).square().mean(1) / variance.clamp_min(1e-6)


def relation_error(predicted_1C1T: Tensor, target_1C1T: Tensor) -> Tensor:
    """Return the squared error of the cosines between tokens over the variance of the target's cosines."""
    stride = -(-target_1C1T.shape[-1] // MAX_RELATED_TOKENS)
    ours_TT, theirs_TT = (_cosines(x[0, :, 0, ::stride].T) for x in (predicted_1C1T, target_1C1T))
    return (ours_TT - theirs_TT).square().mean() / theirs_TT.var(correction=0).clamp_min(1e-6)


def normalise_tokens(features_BChw: Tensor) -> Tensor:
    """Normalise every token to mean 0 and deviation 1.

    A few channels before the neck would dominate every comparison otherwise.
    """
    return F.layer_norm(features_BChw.movedim(1, -1), features_BChw.shape[1:2]).movedim(-1, 1)


def _visible_tokens(features_BChw: Tensor, hidden_Bhw: Tensor | None) -> Tensor:
    """Return the visible tokens of a batch in the layout of features, shape (1, C, 1, T)."""
    tokens_BhwC = features_BChw.movedim(1, -1)
    if hidden_Bhw is None:
        return tokens_BhwC.flatten(0, 2).T[None, :, None]
    shown_Bhw = ~upsample_mask(hidden_Bhw, image_size=features_BChw.shape[-1])[:, 0]
    return tokens_BhwC[shown_Bhw].T[None, :, None]


def _cosines(tokens_TC: Tensor) -> Tensor:
    unit_TC = F.normalize(tokens_TC, dim=-1)
    return unit_TC @ unit_TC.T
