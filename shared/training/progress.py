"""One line of progress: on a terminal it stays in place, elsewhere one plain line per minute.

Numbers and pictures of every step: buffered, then written to ``metrics.jsonl`` and TensorBoard together.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from samgraft.shared.runs.metrics import TensorBoardFile
from samgraft.shared.runs.run_folder import RunFolder
from torch import Tensor

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 60.0
FIRST_PLAIN_LINE_AFTER_S = 10.0
BAR_EVERY_S = 0.5


class Progress(pl.Callback):
    """Measures, logs and shows what ``training_step`` returns.

    A ``training_step`` returns ``{"loss": loss, "loss/part": ..., ...}``, scalars only. Under accumulation their
    mean is logged, under the names ``train/...``.

    Args:
        step_log: Where values go.
        max_steps: Length of the run.
        slices_per_micro_step: Of all processes together.
        accumulate: Micro-steps per step.
        save_every_steps: Interval of saving, shown as the steps to go.
    """

    def __init__(
        self,
        step_log: StepLog,
        *,
        max_steps: int,
        slices_per_micro_step: int,
        accumulate: int = 1,
        save_every_steps: int = 1,
    ) -> None:
        self.step_log = step_log
        self.max_steps = max_steps
        self.slices_per_micro_step = slices_per_micro_step
        self.accumulate = accumulate
        self.save_every_steps = save_every_steps
        self.wait_s = 0.0
        """Seconds spent waiting for data so far."""
        self.work_s = 0.0
        """Seconds spent on training steps so far."""
        self.startup_s = 0.0
        """Seconds until the first batch was there."""
        self.micro_steps = 0
        self._sums: dict[str, float | Tensor] = {}
        self._in_step = 0
        self._mark: float | None = None
        self._started = time.monotonic()
        self._last_line = 0.0
        self._window = (0.0, 0.0, 0)
        self._rates = (0.0, 0.0)
        self._bar: _BarLine | None = None

    @property
    def data_wait_share(self) -> float:
        """Share of the time that went into waiting for data."""
        return self.wait_s / max(1e-9, self.wait_s + self.work_s)

    @property
    def slices_per_s(self) -> float:
        """Mean speed of this session, without validation and saving."""
        return self.micro_steps * self.slices_per_micro_step / max(1e-9, self.wait_s + self.work_s)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._started = self._mark = time.monotonic()
        self._last_line = self._started + FIRST_PLAIN_LINE_AFTER_S - PLAIN_LINE_EVERY_S
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = _BarLine(self.max_steps)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop the waiting clock."""
        now = time.monotonic()
        waited = now - self._mark if self._mark is not None else 0.0
        if self.micro_steps == 0:
            self.startup_s = waited
            self._started = now  # looks and workers before the first batch come once: an ETA must not multiply them
        else:
            self.wait_s += waited
        self._mark = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the values; at a whole step, log and show them."""
        now = time.monotonic()
        if self._mark is not None:
            self.work_s += now - self._mark
        self._mark = now
        self.micro_steps += 1
        self._in_step += 1
        for key, value in _scalars(outputs, accumulate=self.accumulate).items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        if self._in_step == self.accumulate:
            self._finish_step(trainer, now)

    def resume_clock(self) -> None:
        """Start waiting for the next batch now: what lay between (validation, saving) counts as neither."""
        self._mark = time.monotonic()

    def stop(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar off the terminal."""
        self.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar off the terminal before the message comes."""
        self.stop()

    def _finish_step(self, trainer: pl.Trainer, now: float) -> None:
        step = trainer.global_step
        values: dict[str, float | Tensor] = {f"train/{k}": v / self._in_step for k, v in self._sums.items()}
        values["train/lr"] = max(float(g["lr"]) for g in trainer.optimizers[0].param_groups)
        self._sums, self._in_step = {}, 0
        if step % self.step_log.every_steps == 0:
            self._rates = self._measure()
            values["perf/slices_per_s"], values["perf/data_wait_percent"] = self._rates
        self.step_log.record(step, values)
        # Not at every step: reading the loss makes a GPU wait.
        if now - self._last_line < (PLAIN_LINE_EVERY_S if self._bar is None else BAR_EVERY_S) and step < self.max_steps:
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
        steps_here = max(1, self.micro_steps // self.accumulate)
        eta_s = (time.monotonic() - self._started) / steps_here * (self.max_steps - step)
        to_save = min(self.save_every_steps - step % self.save_every_steps, self.max_steps - step)
        return (
            f"step {step}/{self.max_steps}  loss {float(values.get('train/loss', float('nan'))):.4g}  "
            f"lr {float(values['train/lr']):.1e}  {format_rate(self.slices_per_s)} slices/s  "
            f"data wait {100 * self.data_wait_share:.0f} %  ETA {format_duration(eta_s)}  "
            f"next save in {to_save} step{'s' * (to_save != 1)}"
        )


class _BarLine:
    """A rich bar that keeps log lines above itself."""

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
            handler.setStream(sys.stderr)  # rich's, which prints above the bar

    def update(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        for handler in self._handlers:
            handler.setStream(self._plain)
        self._bar.stop()


def format_rate(rate: float) -> str:
    """Return a rate with three digits, or whole numbers from 100 on."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def format_duration(seconds: float) -> str:
    """Return ``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    minutes = int(seconds // 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _scalars(outputs: Any, *, accumulate: int) -> dict[str, Tensor]:
    if not isinstance(outputs, Mapping):
        return {}
    values = {str(k): v.detach() for k, v in outputs.items() if isinstance(v, Tensor) and v.numel() == 1}
    if "loss" in values:
        values["loss"] = values["loss"] * accumulate  # Lightning has divided it, and it alone
    return values


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
