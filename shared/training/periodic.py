"""Work at step boundaries - validation, probes, pictures - that changes nothing in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from samgraft.shared.training.resume import rng_untouched
from samgraft.shared.training.signals import StopRequest
from samgraft.shared.training.step_log import StepLog
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

    def check_stop(self) -> None:
        """Leave the task if somebody asked to stop; call it between the parts of a long one."""
        if self.stop.requested:
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

    def is_due(self, step: int, *, max_steps: int) -> bool:
        """Tell whether it runs at this step."""
        if step == 0:
            return self.at_start
        return step % self.every_steps == 0 or (self.at_end and step == max_steps)


def run_periodic(task: Periodic, boundary: Boundary) -> dict[str, float]:
    """Run a task with the module in evaluation mode, and put modes and generators back.

    Raises:
        EvaluationDropped: If a stop was requested.
    """
    boundary.check_stop()
    with rng_untouched(), evaluating(boundary.module), torch.no_grad():
        return {key: float(value) for key, value in task.run(boundary).items()}


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
