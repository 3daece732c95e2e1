"""Health: numbers that show a collapse before the budget is spent, and what they mean in words.

Shape letters: N = slices, C = channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROUNDING = 1e-4
"""Differences between slices below this share of the features are rounding, not content: collapsed."""
COLLAPSED_SHARE = 0.3
"""Of the start's effective rank or deviation; healthy masked modelling of pretrained weights keeps more than half."""
LEARNED_SHARE = 0.98
"""Of the start's held-out loss: above it nothing was learned."""
RISEN_SHARE = 1.1
"""Of the best held-out loss: above it the run overfits or diverges."""


def feature_health(features_NC: torch.Tensor) -> dict[str, float]:
    """Measure how varied the features of different slices are.

    Args:
        features_NC: One vector per slice.

    Returns:
        ``effective_rank``: how many directions the slices really spread over, between 1 and N; ``feature_std``: mean
        standard deviation per channel between slices. Both fall towards their minimum when an encoder collapses.

    Source:
        Roy and Vetterli, The effective rank (EUSIPCO 2007): exp of the entropy of the normalised singular values.
    """
    features_NC = features_NC.float()
    centred_NC = features_NC - features_NC.mean(dim=0)
    spread = float(centred_NC.std(dim=0, correction=0).mean())
    if spread <= ROUNDING * float(features_NC.abs().mean()):
        return {"effective_rank": 1.0, "feature_std": 0.0}
    values = torch.linalg.svdvals(centred_NC)
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {"effective_rank": float(entropy.exp()), "feature_std": spread}


def warnings_in_words(
    *, held_out_loss: Sequence[float], effective_rank: Sequence[float], feature_std: Sequence[float]
) -> list[str]:
    """Say what a person should worry about, from the values at the start and since.

    Args:
        held_out_loss: On the held-out slices, first value before training.
        effective_rank: As measured by :func:`feature_health`, at the same steps.
        feature_std: Likewise.
    """
    words = []
    if len(effective_rank) > 1 and effective_rank[-1] < COLLAPSED_SHARE * effective_rank[0]:
        words.append(
            f"Collapse: the features of different slices spread over {effective_rank[-1]:.1f} directions, "
            f"{effective_rank[0]:.1f} at the start. Lower optim.lr; do not fine-tune from this encoder."
        )
    if len(feature_std) > 1 and feature_std[-1] < COLLAPSED_SHARE * feature_std[0]:
        words.append(
            f"Collapse: slices differ by {feature_std[-1]:.2g} in feature space, {feature_std[0]:.2g} at the start: "
            "the encoder answers nearly the same for every slice."
        )
    if len(held_out_loss) > 1 and held_out_loss[-1] >= LEARNED_SHARE * held_out_loss[0]:
        words.append(
            f"Dead loss: {held_out_loss[-1]:.4g} on held-out slices, {held_out_loss[0]:.4g} at the start: nothing was "
            "learned that carries over to unseen patients. Use more slices, another optim.lr, or more steps."
        )
    if len(held_out_loss) > 2 and held_out_loss[-1] > RISEN_SHARE * min(held_out_loss):
        words.append(
            f"The held-out loss rose from its best, {min(held_out_loss):.4g}, to {held_out_loss[-1]:.4g}: the run "
            "overfits or diverges. Stop earlier, or use more patients."
        )
    return words
