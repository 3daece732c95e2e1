"""Health: numbers that show a collapse before the budget is spent, and what they mean in words.

Shape letters: N = slices, C = channels.
"""

from __future__ import annotations

import torch

ROUNDING = 1e-4
"""Differences between slices below this share of the features are rounding, not content: collapsed."""


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
