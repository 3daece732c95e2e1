"""Numbers and pictures of every step: buffered, then written to ``metrics.jsonl`` and TensorBoard together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.shared.training.run_folder import RunFolder
from samgraft.shared.training.tensorboard_file import TensorBoardFile
from torch import Tensor


class StepLog:
    """Collects values by step; ``flush`` writes one line per step.

    Values may be tensors on a GPU: they are read only when written, so logging does not stall the device.
    """

    def __init__(self, run: RunFolder, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self._run = run
        self._tensorboard = TensorBoardFile(run.tb)
        self._pending: dict[int, dict[str, float | Tensor]] = {}

    def start(self, *, after_step: int) -> None:
        """Drop what earlier sessions logged of steps after ``after_step``; those are computed again."""
        if self._run.is_writer:
            # The last line is taken up: a validation that was interrupted at this step still adds to it.
            last = self._run.metrics.truncate_after(after_step)
            if last is not None:
                self._pending[after_step] = {k: v for k, v in last.items() if k != "step"}
                self._written_before = set(self._pending[after_step])
            self._tensorboard.start(after_step=after_step)

    _written_before: frozenset[str] | set[str] = frozenset()

    def record(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Remember values of one step."""
        if self._run.is_writer:
            self._pending.setdefault(step, {}).update(values)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield every line so far in step order, those not yet written included; on the writing process only."""
        pending = dict(self._pending)
        for line in self._run.metrics.read() if self._run.is_writer else ():
            yield {**line, **{k: _number(v) for k, v in pending.pop(line["step"], {}).items()}}
        for step in sorted(pending):
            yield {"step": step, **{k: _number(v) for k, v in pending[step].items()}}

    def add_image(self, step: int, tag: str, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Write a picture to TensorBoard."""
        if self._run.is_writer:
            self._tensorboard.add_image(step, tag, image_HWC)

    def flush(self) -> None:
        """Write everything that was recorded."""
        lines: list[dict[str, Any]] = []
        for step in sorted(self._pending):
            values = {key: _number(value) for key, value in self._pending[step].items()}
            lines.append({"step": step, **values})
            new = {key: value for key, value in values.items() if key not in self._written_before}
            self._written_before = frozenset()
            # Every step is in metrics.jsonl; for a curve on a screen every few are enough.
            if new and (step % self.every_steps == 0 or any(not key.startswith("train/") for key in new)):
                self._tensorboard.add_scalars(step, new)
        self._pending.clear()
        self._run.metrics.append_many(lines)
        self._tensorboard.flush()

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._tensorboard.close()


def _number(value: float | Tensor) -> float:
    return float(value.detach().float().item()) if isinstance(value, Tensor) else value
