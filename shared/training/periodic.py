"""Periodic tasks at step boundaries, such as validation, linear probes and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from samgraft.shared.training.optim import WeightAverage
from samgraft.shared.training.processes import any_across_processes, broadcast_first
from samgraft.shared.training.progress import StepLog
from samgraft.shared.training.resume import RunCounters, evaluation_mode, preserve_rng
from samgraft.shared.training.signals import StopRequest


class TaskStopped(Exception):
    """A stop request that arrived during a periodic task. The task runs again after the resume."""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Module and run at a finished step, as a periodic task receives them."""

    module: pl.LightningModule
    """The trained module, in evaluation mode."""
    step: int
    rank: int
    world_size: int
    stop: StopRequest
    log: StepLog
    counters: RunCounters

    def end_training(self, reason: str) -> None:
        """Make this step the last one of the run.

        The step is saved, and the resumed run does not train beyond it.
        """
        self.counters.ended = reason

    def check_stop(self) -> None:
        """Leave the task if a stop was requested in any process.

        Call it between the parts of a long task. It is a collective call, so that every process must make it equally
        often.

        Raises:
            TaskStopped: In every process at the same call.
        """
        # The signal may reach one process only. If that process left the task alone, the others would wait for it in
        # the next collective operation of the task (sharded weights, a loss over all processes).
        if any_across_processes(self.stop.requested)[0]:
            raise TaskStopped

    def add_image(self, tag: str, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Write an image to TensorBoard, (H, W, 3) or (H, W) in 0..255."""
        self.log.add_image(self.step, tag, image_HWC)


@dataclass(frozen=True, kw_only=True)
class PeriodicTask:
    """A task that runs at fixed intervals in every process."""

    name: str
    every_steps: int
    """Interval in steps."""
    run: Callable[[TaskContext], Mapping[str, float]]
    """Function that returns numbers to log by name, of which those of the first process are used. It runs without
    gradients, in evaluation mode, and cannot change the random state of the training."""
    at_start: bool = False
    """True to run before the first step as well, for the value to improve on."""
    at_end: bool = True
    """True to run after the last step as well."""

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.every_steps < 1:
            raise ValueError(f"every_steps of {self.name} must be at least 1, got {self.every_steps}.")

    def is_due(self, step: int, *, max_steps: int) -> bool:
        """Return True if the task runs at this step."""
        if step == 0:
            return self.at_start
        return step % self.every_steps == 0 or (self.at_end and step == max_steps)


@dataclass(frozen=True, kw_only=True)
class PeriodicTasks:
    """Runner of all periodic tasks. It records which of them a stop interrupted."""

    tasks: Sequence[PeriodicTask]
    counters: RunCounters
    stop: StopRequest
    step_log: StepLog
    max_steps: int

    def __post_init__(self) -> None:
        """Check that the names differ, because interrupted tasks are recorded by name."""
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"periodic tasks must have different names, got {', '.join(names)}.")

    def due(self, step: int) -> list[PeriodicTask]:
        """Return the tasks that are due at a step."""
        return [task for task in self.tasks if task.is_due(step, max_steps=self.max_steps)]

    def take_pending(self) -> list[PeriodicTask]:
        """Return the tasks that a stop interrupted, and record none as interrupted."""
        names, self.counters.pending = self.counters.pending, []
        return [task for task in self.tasks if task.name in names]

    def run(
        self,
        tasks: Sequence[PeriodicTask],
        module: pl.LightningModule,
        step: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        average: WeightAverage | None = None,
    ) -> None:
        """Run tasks at a step, with the averaged weights if there are any."""
        context = TaskContext(
            module=module,
            step=step,
            rank=rank,
            world_size=world_size,
            stop=self.stop,
            log=self.step_log,
            counters=self.counters,
        )
        values: dict[str, float] = {}
        # Most steps have no task, and exchanging all weights takes time.
        with average.applied() if average is not None and tasks else nullcontext():
            for position, task in enumerate(tasks):
                try:
                    values |= _run_one(task, context)
                except TaskStopped:
                    # check_stop raises in every process or in none, so that all have the same list of pending tasks.
                    self.counters.pending = [t.name for t in tasks[position:]]
                    break
        self.counters.ended = broadcast_first(self.counters.ended)
        if values:
            self.step_log.record(step, broadcast_first(values))


def _run_one(task: PeriodicTask, context: TaskContext) -> dict[str, float]:
    context.check_stop()
    with preserve_rng(), evaluation_mode(context.module), torch.no_grad():
        return {key: float(value) for key, value in task.run(context).items()}
