"""Validation rounds of a run, with Dice on whole scans and the weights of the best round.

    runs/NAME/validation.json                zero_shot, start, and one entry per round
    runs/NAME/best/step-NNNNNN.safetensors   trained tensors of the best round

They are separate from the training state. A killed run repeats the rounds after its last training state and writes the
same files again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samgraft.finetune.ending import Ending, describe_ending
from samgraft.finetune.evaluation.validation import CaseResult, mean_dice
from samgraft.shared.errors import DataError, WeightsError
from samgraft.shared.files import write_json, write_tensors
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass
class Record:
    """Content of validation.json."""

    zero_shot: float | None = None
    """Foreground Dice of the base weights, without training."""
    start: float | None = None
    """Foreground Dice of the model before its first step."""
    rounds: dict[int, float] = field(default_factory=dict)
    """Foreground Dice by step."""

    @property
    def best_step(self) -> int | None:
        """Step of the highest Dice, and the earliest of equal ones."""
        return max(self.rounds, key=lambda step: (self.rounds[step], -step)) if self.rounds else None

    def summary(self) -> dict[str, Any]:
        """Return the Dice before training and at best, for ``task.json``, rounded to four decimals."""
        best = self.best_step
        values = {"zero_shot": self.zero_shot, "start": self.start, "best": None if best is None else self.rounds[best]}
        rounded = {name: None if value is None else round(value, 4) for name, value in values.items()}
        return {**rounded, "best_step": best}

    @property
    def ending(self) -> Ending:
        """Comparison of the best round with the start."""
        return describe_ending(self.summary()) or Ending(is_good=False, text="There was no validation round.")


class ValidationRounds:
    """Record of validation rounds and the best tensors, on disk.

    Args:
        run_path: Folder of the run.
        is_writer: True in the one process that writes. All processes keep the record in memory.
    """

    def __init__(self, run_path: Path, *, is_writer: bool = True) -> None:
        self.is_writer = is_writer
        self.path = run_path / "validation.json"
        self.best_folder = run_path / "best"
        self.record = self._read()

    def remove_after(self, step: int) -> None:
        """Remove rounds after a step, which a resumed run repeats."""
        self.record.rounds = {s: dice for s, dice in self.record.rounds.items() if s <= step}

    def set_reference(self, name: str, results: list[CaseResult]) -> float:
        """Record the Dice of ``zero_shot`` or ``start`` and return it."""
        dice = _dice_of(results)
        setattr(self.record, name, dice)
        self._write()
        return dice

    def add(self, step: int, results: list[CaseResult], trained: Callable[[], dict[str, Tensor]]) -> float:
        """Record a round, and write its tensors if it is the best so far."""
        dice = _dice_of(results)
        self.record.rounds[step] = dice
        # The earliest of equal rounds is the best one, so a later equal round does not replace its file.
        if self.record.best_step == step:
            # Called in every process, because all of them take part in gathering sharded tensors.
            tensors = trained()
            if self.is_writer:
                self.best_folder.mkdir(exist_ok=True)
                write_tensors(self._tensor_file(step), tensors)
        self._write()
        return dice

    def best_file(self) -> Path:
        """Return the path of the best round's tensors.

        Raises:
            WeightsError: If there was no round or its file is missing.
        """
        step = self.record.best_step
        if step is None or not self._tensor_file(step).is_file():
            raise WeightsError(
                "the tensors of the best validation round are missing. Restore the file or train again with "
                "another NAME=.",
                where="best/",
            )
        return self._tensor_file(step)

    def delete_others(self) -> None:
        """Delete the tensors of earlier best rounds. Call it when the run is finished, since a resume may need them."""
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
            "no validation scan shows a class, so no model can be chosen. Make another split.",
            where="split, part val",
        )
    return dice
