"""Progress line and the log of every step's values."""

from __future__ import annotations

import logging
import sys
import time
from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from samgraft.shared.counting import counted
from samgraft.shared.machine import format_duration
from samgraft.shared.runs.metrics import TensorBoardFile, add_to_curves, curves_of
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.optim import describe_rates
from samgraft.shared.training.resume import RunCounters
from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 60.0
"""Interval in seconds of the progress line in a log file."""
FIRST_PLAIN_LINE_AFTER_S = 10.0
ETA_STEPS = 50
"""Number of newest steps whose mean duration gives the ETA."""
MIN_ETA_STEPS = 3
"""Number of steps after the first one before an ETA is shown. The first one is slow on most devices."""
BAR_EVERY_S = 0.5
"""Interval in seconds of updates on a terminal."""


@dataclass(eq=False)
class ProgressMeter(pl.Callback):
    """Callback that measures the speed and shows progress.

    A ``training_step`` returns ``{"loss": loss, "loss/part": ..., ...}``, scalars only. Their mean over the
    micro-steps of a step is logged under the names ``train/...``.
    """

    step_log: StepLog
    config: TrainerConfig
    counters: RunCounters
    """Counters of the run, which count a step after this callback has seen it."""
    slices_per_micro_step: int
    """Slices of all processes together."""
    slices_available: int
    """Number of different slices of the training data."""
    wait_s: float = field(default=0.0, init=False)
    """Seconds spent waiting for data so far."""
    work_s: float = field(default=0.0, init=False)
    """Seconds spent on training steps so far."""
    micro_steps: int = field(default=0, init=False)
    _sums: dict[str, float | Tensor] = field(default_factory=dict, init=False)
    _in_step: int = field(default=0, init=False)
    _mark: float = field(default_factory=time.monotonic, init=False)
    _step_ends: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS + 1), init=False)
    _last_line: float = field(default=0.0, init=False)
    _window: tuple[float, float, int] = field(default=(0.0, 0.0, 0), init=False)
    _bar: _BarLine | None = field(default=None, init=False)

    @property
    def data_wait_share(self) -> float:
        """Fraction of the time that was spent waiting for data, 0 to 1."""
        return self.wait_s / max(1e-9, self.wait_s + self.work_s)

    @property
    def slices_per_s(self) -> float:
        """Mean speed of this session without validation and saving."""
        return self.micro_steps * self.slices_per_micro_step / max(1e-9, self.wait_s + self.work_s)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and on a terminal the progress bar."""
        self._mark = time.monotonic()
        self._step_ends.clear()
        self._last_line = self._mark + FIRST_PLAIN_LINE_AFTER_S - PLAIN_LINE_EVERY_S
        if trainer.is_global_zero:
            log.info("learning rates at their peak: %s", describe_rates(pl_module, trainer.optimizers[0]))
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = _BarLine(self.config.max_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop the waiting clock."""
        now = time.monotonic()
        # The start of workers before the first batch happens once and is no sign of a slow data path.
        if self.micro_steps > 0:
            self.wait_s += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the values. Log and show them after the last micro-step of a step."""
        now = time.monotonic()
        self.work_s += now - self._mark
        self._mark = now
        self.micro_steps += 1
        self._in_step += 1
        for key, value in _scalars(outputs, accumulate=self.config.accumulate).items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        if self._in_step == self.config.accumulate:
            self._finish_step(trainer, now)

    def resume_clock(self) -> None:
        """Start the waiting clock now, so that validation and saving count as neither waiting nor work."""
        self._mark = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar from the terminal."""
        self._close_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bar from the terminal before the error is printed."""
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _finish_step(self, trainer: pl.Trainer, now: float) -> None:
        step = trainer.global_step
        values: dict[str, float | Tensor] = {f"train/{k}": v / self._in_step for k, v in self._sums.items()}
        seen = self.counters.samples_seen + self.config.accumulate * self.slices_per_micro_step
        values["train/epochs"] = seen / self.slices_available
        rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        values["train/lr"] = max(rates)
        if min(rates) < max(rates):
            values["train/lr_min"] = min(rates)
        self._step_ends.append(now)
        self._sums, self._in_step = {}, 0
        if step % self.step_log.every_steps == 0:
            values["perf/slices_per_s"], values["perf/data_wait_percent"] = self._measure()
        self.step_log.record(step, values)
        # The line is not shown at every step, because reading the loss makes the CPU wait for the GPU.
        interval = PLAIN_LINE_EVERY_S if self._bar is None else BAR_EVERY_S
        if now - self._last_line < interval and step < self.config.max_steps:
            return
        self._last_line = now
        if self._bar is not None:
            self._bar.update(step, self._line(step, values))
        elif trainer.is_global_zero:
            log.info("%s", self._line(step, values))

    def _measure(self) -> tuple[float, float]:
        wait, work, count = self._window
        self._window = (self.wait_s, self.work_s, self.micro_steps)
        seconds = max(1e-9, self.wait_s - wait + self.work_s - work)
        slices = (self.micro_steps - count) * self.slices_per_micro_step
        return slices / seconds, 100 * (self.wait_s - wait) / seconds

    def _line(self, step: int, values: Mapping[str, float | Tensor]) -> str:
        max_steps, save_every = self.config.max_steps, self.config.save_every_steps
        to_save = min(save_every - step % save_every, max_steps - step)
        return (
            f"step {step}/{max_steps}  epoch {float(values['train/epochs']):.2f}  loss "
            f"{float(values.get('train/loss', float('nan'))):.4g}  lr {_rates(values)}  "
            f"{format_rate(self.slices_per_s)} slices/s  data wait {100 * self.data_wait_share:.0f} %  ETA "
            f"{self._eta(max_steps - step)}  next save in {counted(to_save, 'step')}"
        )

    def _eta(self, steps_left: int) -> str:
        """Return the expected time for the rest of the run, from the newest steps with their validation and saving."""
        measured = len(self._step_ends) - 1
        if steps_left > 0 and measured < MIN_ETA_STEPS:
            return "unknown"
        return format_duration((self._step_ends[-1] - self._step_ends[0]) / max(1, measured) * steps_left)


class _BarLine:
    """A rich bar below the log lines."""

    def __init__(self, max_steps: int) -> None:
        self._bar = Bar(BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(stderr=True))
        plain = sys.stderr
        self._bar.start()
        self._task: TaskID = self._bar.add_task("starting", total=max_steps)
        self._handlers = [
            h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and h.stream is plain
        ]
        self._plain = plain
        for handler in self._handlers:
            handler.setStream(sys.stderr)  # replaced by rich, which prints above the bar

    def update(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        for handler in self._handlers:
            handler.setStream(self._plain)
        self._bar.stop()


def format_rate(rate: float) -> str:
    """Return a rate with three significant digits, or a whole number from 100 on."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _rates(values: Mapping[str, float | Tensor]) -> str:
    highest, lowest = float(values["train/lr"]), float(values.get("train/lr_min", values["train/lr"]))
    return f"{highest:.1e}" if lowest == highest else f"{lowest:.1e} to {highest:.1e}"


def _scalars(outputs: Any, *, accumulate: int) -> dict[str, Tensor]:
    if not isinstance(outputs, Mapping):
        return {}
    values = {str(k): v.detach() for k, v in outputs.items() if isinstance(v, Tensor) and v.numel() == 1}
    if "loss" in values:
        # Lightning divides the loss by the number of micro-steps, and no other value.
        values["loss"] = values["loss"] * accumulate
    return values


class StepLog:
    """Log of every step's values and images.

    Values are collected and written to ``metrics.jsonl`` and TensorBoard together, one line per step. They may be
    tensors on a GPU, which are read only when they are written, so that logging does not make the device wait.
    """

    def __init__(self, run: RunFolder, *, every_steps: int) -> None:
        self.every_steps = every_steps
        self._run = run
        self._tensorboard = TensorBoardFile(run.tb)
        self._pending: dict[int, dict[str, float | Tensor]] = {}
        self._curves: dict[str, array[float]] | None = None
        """Values of the written lines from the first call of ``curves`` on."""
        self._written_before: frozenset[str] | set[str] = frozenset()

    def start(self, *, after_step: int) -> None:
        """Delete the values of steps after ``after_step``, which are computed again."""
        if self._run.is_writer:
            # The last line is loaded again, because a validation that was interrupted at this step adds values to it.
            last = self._run.metrics.truncate_after(after_step)
            if last is not None:
                self._pending[after_step] = {k: v for k, v in last.items() if k != "step"}
                self._written_before = set(self._pending[after_step])
            self._tensorboard.start(after_step=after_step)

    def record(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Add values of one step."""
        if self._run.is_writer:
            self._pending.setdefault(step, {}).update(values)

    def curves(self) -> dict[str, array[float]]:
        """Return the values of every metric in step order, also those not yet written, in the writing process."""
        if self._curves is None:
            # The file is read once per session. Reading it in every monitoring round would take hours in a long run.
            written = self._run.metrics.read() if self._run.is_writer else ()
            # A value that is collected again is added with the other collected ones.
            self._curves = curves_of(
                {key: value for key, value in line.items() if key not in self._pending.get(line["step"], ())}
                for line in written
            )
        curves = {name: values[:] for name, values in self._curves.items()}
        add_to_curves(curves, self._pending_lines())
        return curves

    def add_image(self, step: int, tag: str, image_HWC: npt.NDArray[np.uint8]) -> None:
        """Write an image to TensorBoard."""
        if self._run.is_writer:
            self._tensorboard.add_image(step, tag, image_HWC)

    def flush(self) -> None:
        """Write all collected values."""
        lines = self._pending_lines()
        for line in lines:
            new = {key: value for key, value in line.items() if key != "step" and key not in self._written_before}
            self._written_before = frozenset()
            # metrics.jsonl has every step. TensorBoard gets fewer, which is enough for a curve on a screen.
            if new and (line["step"] % self.every_steps == 0 or any(not key.startswith("train/") for key in new)):
                self._tensorboard.add_scalars(line["step"], new)
        if self._curves is not None:
            add_to_curves(self._curves, lines)
        self._pending.clear()
        self._run.metrics.append_many(lines)
        self._tensorboard.flush()

    def close(self) -> None:
        """Write all collected values and close the files."""
        self.flush()
        self._tensorboard.close()

    def _pending_lines(self) -> list[dict[str, Any]]:
        return [
            {"step": step, **{key: _number(value) for key, value in self._pending[step].items()}}
            for step in sorted(self._pending)
        ]


def _number(value: float | Tensor) -> float:
    return float(value.detach().float().item()) if isinstance(value, Tensor) else value
