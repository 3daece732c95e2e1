"""Few-shot runs: how many patients or slices to train on, which draw, and when such a run may end early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from samgraft.shared.samples.slices import select_few_shot
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore


class Unit(Enum):
    """What ``num`` counts."""

    PATIENTS = "patients"
    """All slices of so many patients."""
    SLICES = "slices"
    """So many slices with a label, from any patients."""


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """A drawn part of the training data; validation and test stay whole."""

    num: int | None = None
    """Patients or slices to train on; null takes all."""
    unit: Unit = Unit.PATIENTS
    """patients or slices."""
    repeat: int = 0
    """Number of the draw: 0, 1, 2 ... draw anew. Draws of one number are nested, 5 holds 3."""

    def __post_init__(self) -> None:
        if (self.num is not None and self.num < 1) or self.repeat < 0:
            raise ValueError(
                f"data.few_shot.num must be at least 1 or null and repeat at least 0, got {self.num} and {self.repeat}."
            )


def draw_few_shot(split: Split, store: SliceStore, config: FewShotConfig) -> Split:
    """Return the split with the drawn part of its training data.

    Raises:
        DataError: If there are fewer patients or slices.
    """
    if config.num is None:
        return split
    return select_few_shot(split, store, num=config.num, unit=config.unit.value, repeat=config.repeat)


def may_end(rounds: Mapping[int, float], *, patience_rounds: int | None, min_steps: int, warmup_steps: int) -> bool:
    """Tell whether training may end after the newest validation round.

    Rounds inside warm-up never count: with few slices it can be longer than the patience, and a run would end before
    it began. The best round of all is kept whatever counts here.

    Args:
        rounds: Step to foreground Dice, the newest included.
        patience_rounds: Rounds without a higher Dice that end a run; None never does.
        min_steps: Floor given by the user.
        warmup_steps: Of the learning rate.
    """
    if patience_rounds is None or not rounds:
        return False
    steps = sorted(step for step in rounds if step > warmup_steps)
    if not steps or steps[-1] < min_steps or len(steps) <= patience_rounds:
        return False
    best_before = max(rounds[step] for step in steps[:-patience_rounds])
    return max(rounds[step] for step in steps[-patience_rounds:]) <= best_before
