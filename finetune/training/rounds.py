"""Validation rounds of a run: Dice on whole scans every so many steps, and the best weights kept.

    runs/NAME/validation.json      zero_shot, start, and one entry per round
    runs/NAME/best/step-NNNNNN.safetensors   trained tensors of the best round

Both are files of their own, so that a killed run computes the rounds after its last training state again and gets the
same file back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from samgraft.finetune.evaluation.validation import CaseResult, mean_dice
from samgraft.shared.errors import DataError, WeightsError
from samgraft.shared.files import write_json, write_tensors
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass
class Record:
    """What validation.json holds."""

    zero_shot: float | None = None
    """Base weights, no prompt."""
    start: float | None = None
    """The model to tune, before its first step."""
    rounds: dict[int, float] = field(default_factory=dict)
    """Step to foreground Dice."""

    @property
    def best_step(self) -> int | None:
        """Step of the highest Dice; the earliest of equals."""
        return max(self.rounds, key=lambda step: (self.rounds[step], -step)) if self.rounds else None


class ValidationRounds:
    """Keeps the record and the best tensors on disk.

    Args:
        run_path: Folder of the run.
        is_writer: Every process keeps the record, one of them writes it.
    """

    def __init__(self, run_path: Path, *, is_writer: bool = True) -> None:
        self.is_writer = is_writer
        self.path = run_path / "validation.json"
        self.best_folder = run_path / "best"
        self.record = self._read()

    def forget_after(self, step: int) -> None:
        """Drop rounds after a step: a resumed run computes them again."""
        self.record.rounds = {s: dice for s, dice in self.record.rounds.items() if s <= step}

    def set_reference(self, name: str, results: list[CaseResult]) -> float:
        """Record ``zero_shot`` or ``start``."""
        dice = _dice_of(results)
        setattr(self.record, name, dice)
        self._write()
        return dice

    def add(self, step: int, results: list[CaseResult], trained: Callable[[], dict[str, Tensor]]) -> float:
        """Record a round; keep its tensors if it is the best so far."""
        dice = _dice_of(results)
        self.record.rounds[step] = dice
        if self.record.best_step == step:
            tensors = trained()  # on every process: sharded ones are put together by all
            if self.is_writer:
                self.best_folder.mkdir(exist_ok=True)
                write_tensors(self._tensor_file(step), tensors)
        self._write()
        return dice

    def best_file(self) -> Path:
        """Return the tensors of the best round.

        Raises:
            WeightsError: If there was no round or its file is gone.
        """
        step = self.record.best_step
        if step is None or not self._tensor_file(step).is_file():
            raise WeightsError("the run must have the tensors of its best round, they are missing.", where="best/")
        return self._tensor_file(step)

    def discard_others(self) -> None:
        """Delete tensors that were the best for a while; only once the run is finished, a resume may need them."""
        for path in self.best_folder.glob("step-*.safetensors"):
            if path != self.best_file():
                path.unlink()

    def _tensor_file(self, step: int) -> Path:
        return self.best_folder / f"step-{step:06d}.safetensors"

    def _read(self) -> Record:
        if not self.path.is_file():
            return Record()
        values = json.loads(self.path.read_text(encoding="utf-8"))
        rounds = {int(step): float(dice) for step, dice in values["rounds"].items()}
        return Record(zero_shot=values["zero_shot"], start=values["start"], rounds=rounds)

    def _write(self) -> None:
        if not self.is_writer:
            return
        write_json(self.path, asdict(self.record), sort_keys=False)


def _dice_of(results: list[CaseResult]) -> float:
    dice = mean_dice(results)
    if dice is None:
        raise DataError(
            "no validation scan shows a class, so no model could be chosen. Make another split.",
            where="split, part val",
        )
    return dice
