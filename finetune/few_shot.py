"""Few-shot training data, and the early end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegativeInt, PositiveInt
from samgraft.shared.samples.slices import select_few_shot
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore


class Unit(Enum):
    """Unit of ``num``."""

    PATIENTS = "patients"
    """Patients, with all their slices."""
    SLICES = "slices"
    """Slices with a label, from any patients."""


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Random part of the training data. Validation and test data stay complete."""

    num: PositiveInt | None = None
    """Number of patients or slices to train on. null takes all."""
    unit: Unit = Unit.PATIENTS
    """Unit of ``num``, patients or slices."""
    repeat: NonNegativeInt = 0
    """Number of the draw, 0, 1, 2, ... Draws of one number are nested, so that 5 patients include the 3 of a smaller
    draw."""


def draw_few_shot(split: Split, store: SliceStore, config: FewShotConfig) -> Split:
    """Return the split with a random part of its training data.

    Raises:
        DataError: If the split has fewer patients or slices.
    """
    if config.num is None:
        return split
    return select_few_shot(split, store, num=config.num, unit=config.unit.value, repeat=config.repeat)


def may_end(rounds: Mapping[int, float], *, patience_rounds: int | None, min_steps: int, warmup_steps: int) -> bool:
    """Return True when training may end after the newest validation round.

    Args:
        rounds: Foreground Dice by step, including the newest round.
        patience_rounds: Number of rounds without a higher Dice that end a run; None never ends it early.
        min_steps: Step before which a run does not end.
        warmup_steps: Length of the learning rate's warm-up in steps.
    """
    if patience_rounds is None or not rounds:
        return False
    # Rounds during warm-up do not count. With few slices it can be longer than the patience, and the run would end
    # before it has trained at the full learning rate. The best of all rounds is kept in any case.
    steps = sorted(step for step in rounds if step > warmup_steps)
    if not steps or steps[-1] < min_steps or len(steps) <= patience_rounds:
        return False
    # Rounds older than the patience set the mark that the recent ones have to exceed.
    best_before = max(rounds[step] for step in steps[:-patience_rounds])
    return max(rounds[step] for step in steps[-patience_rounds:]) <= best_before
