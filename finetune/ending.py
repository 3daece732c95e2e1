"""Ending of a fine-tuning, which is good if validation Dice rose to a useful value.

It is stated wherever the model appears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALLEST_DICE = 0.0005
"""Dice below which a model segments nothing. It is shown as 0.000."""
LOW_DICE = 0.1
"""Dice below which a model segments hardly anything, however far it rose.

A model that marks whole scans already has a Dice of 0.1 if 5 % of the voxels belong to the class."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Comparison of a finished model with its start."""

    is_good: bool
    text: str
    """Sentence for terminal, reports and cards."""


def describe_ending(validation: Mapping[str, Any]) -> Ending | None:
    """Compare the best validation Dice with that before training.

    Args:
        validation: ``zero_shot``, ``start`` and ``best`` as foreground Dice or None, and ``best_step``. It is
            ``Task.validation``.

    Returns:
        None if there was no validation round.
    """
    dice = validation.get("best")
    if dice is None:
        return None
    before = max(validation.get("start") or 0.0, validation.get("zero_shot") or 0.0)
    if dice < SMALLEST_DICE:
        return Ending(
            is_good=False,
            text="The model segments nothing: its foreground Dice on validation is 0.000 at best. Train longer, check "
            "the labels, or change optim.lr.",
        )
    if dice < LOW_DICE:
        return Ending(
            is_good=False,
            text=f"The model segments hardly anything: its foreground Dice on validation is {dice:.3f} at best, "
            f"{before:.3f} before training. Train longer, check the labels, or change optim.lr.",
        )
    if dice <= before:
        return Ending(
            is_good=False,
            text=f"Foreground Dice on validation did not rise: {dice:.3f} at best, {before:.3f} before training. Train "
            "longer, check the labels, or lower optim.lr.",
        )
    step = validation.get("best_step")
    return Ending(
        is_good=True,
        text=f"Foreground Dice on validation rose from {before:.3f} to {dice:.3f} (best at step {step}).",
    )
