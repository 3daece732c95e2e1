"""Work at step boundaries - validation, probes, pictures - that changes nothing in the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from samgraft.shared.training.processes import any_process, from_first
from samgraft.shared.training.progress import StepLog
from samgraft.shared.training.resume import Bookkeeping, rng_untouched
from samgraft.shared.training.signals import StopRequest
from torch import nn


class EvaluationDropped(Exception):
    """A stop was requested in the middle of a periodic task; it is run again after the resume."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What a periodic task gets: the module in evaluation mode, at a whole step."""

    module: pl.LightningModule
    step: int
    rank: int
    world_size: int
    stop: StopRequest
    log: StepLog
    books: Bookkeeping

    def end_training(self, reason: str) -> None:
        """Make this step the run's last one; it is saved, and a resumed run knows that it is done."""
        self.books.ended = reason

    def check_stop(self) -> None:
        """Leave the task if somebody asked any process to stop; call it between the parts of a long one.

        A collective call: every process must make it equally often. A task may itself be collective - sharded weights,
        a loss over all processes - so one that left it alone would leave the others waiting in it.

        Raises:
            EvaluationDropped: On every process at the same call.
        """
        if any_process(self.stop.requested)[0]:
            raise EvaluationDropped

    def add_image(self, tag: str, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Write a picture to TensorBoard, (H, W, 3) or (H, W) in 0..255."""
        self.log.add_image(self.step, tag, image_HWC)


@dataclass(frozen=True, kw_only=True)
class Periodic:
    """A task to run every so many steps, on every process; the first process's numbers count."""

    name: str
    every_steps: int
    run: Callable[[Boundary], Mapping[str, float]]
    """Returns numbers to log, e.g. ``{"val/dice": 0.81}``. Runs without gradients, in evaluation mode, and cannot
    disturb the random state of the training."""
    at_start: bool = False
    """Also before the first step: the value to beat."""
    at_end: bool = True
    """Also after the last step."""

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.every_steps < 1:
            raise ValueError(f"every_steps of {self.name} must be at least 1, got {self.every_steps}.")

    def is_due(self, step: int, *, max_steps: int) -> bool:
        """Tell whether it runs at this step."""
        if step == 0:
            return self.at_start
        return step % self.every_steps == 0 or (self.at_end and step == max_steps)


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """The periodic value whose best state is kept."""

    name: str
    higher_is_better: bool = True

    def is_better(self, value: float, best: float) -> bool:
        """Tell whether a value beats the best one; the first of equal ones stays."""
        return value > best if self.higher_is_better else value < best


class PeriodicTasks:
    """Runs the tasks that are due and keeps the books: what was dropped for a stop, which value was best."""

    def __init__(
        self,
        tasks: Sequence[Periodic],
        *,
        books: Bookkeeping,
        monitor: Monitor | None,
        stop: StopRequest,
        step_log: StepLog,
        max_steps: int,
    ) -> None:
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"periodic tasks must have different names, got {', '.join(names)}.")
        self._tasks = tuple(tasks)
        self._books = books
        self._monitor = monitor
        self._stop = stop
        self._log = step_log
        self._max_steps = max_steps

    def run_due(self, module: pl.LightningModule, step: int, *, rank: int = 0, world_size: int = 1) -> bool:
        """Run what is due at a step; return whether the monitored value improved."""
        due = [task for task in self._tasks if task.is_due(step, max_steps=self._max_steps)]
        return self._run(due, module, step, rank=rank, world_size=world_size)

    def run_pending(self, module: pl.LightningModule, step: int, *, rank: int = 0, world_size: int = 1) -> bool:
        """Run what a stop dropped at the step where the run was resumed; return whether the value improved."""
        names, self._books.pending = self._books.pending, []
        due = [task for task in self._tasks if task.name in names]
        return self._run(due, module, step, rank=rank, world_size=world_size)

    def _run(
        self, tasks: Sequence[Periodic], module: pl.LightningModule, step: int, *, rank: int, world_size: int
    ) -> bool:
        boundary = Boundary(
            module=module,
            step=step,
            rank=rank,
            world_size=world_size,
            stop=self._stop,
            log=self._log,
            books=self._books,
        )
        values: dict[str, float] = {}
        for position, task in enumerate(tasks):
            try:
                dropped, result = False, _run_one(task, boundary)
            except EvaluationDropped:
                dropped, result = True, {}
            # check_stop drops it on every process or on none, so all agree on what is still to do.
            if dropped:
                self._books.pending = [t.name for t in tasks[position:]]
                break
            values |= result
        self._books.ended = from_first(self._books.ended)
        if values:
            values = from_first(values)
            self._log.record(step, values)
        return self._note_best(values, step)

    def _note_best(self, values: Mapping[str, float], step: int) -> bool:
        # The start is the value to beat, but has no state of its own to keep.
        if self._monitor is None or step == 0:
            return False
        value = values.get(self._monitor.name)
        if value is None or math.isnan(value):
            return False
        best = self._books.best
        if best is not None and not self._monitor.is_better(value, best["value"]):
            return False
        self._books.best = {"step": step, "value": value}
        return True


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and give every part its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _run_one(task: Periodic, boundary: Boundary) -> dict[str, float]:
    boundary.check_stop()
    with rng_untouched(), evaluating(boundary.module), torch.no_grad():
        return {key: float(value) for key, value in task.run(boundary).items()}
