"""Work between two optimizer steps.

At a step boundary the periodic tasks run, training states are saved and stop requests take effect. A run that is
resumed from a boundary computes the same bytes as one that was not interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from samgraft.shared.errors import NumericalError, StoppedAndSaved
from samgraft.shared.invocation import repeat_command
from samgraft.shared.machine import format_duration
from samgraft.shared.runs.environment import software_versions, thread_count
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.runs.training_state import (
    TrainingState,
    flatten_state,
    load_optimizer_state,
    newest_state_name,
    prune_states,
    state_folder_name,
    unflatten_state,
    write_state,
)
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.numerics import find_suspect_batch
from samgraft.shared.training.optim import WeightAverage
from samgraft.shared.training.periodic import PeriodicTask, PeriodicTasks
from samgraft.shared.training.processes import (
    any_across_processes,
    broadcast_first,
    full_state,
    gather_from_processes,
    load_full_state,
)
from samgraft.shared.training.progress import ProgressMeter, StepLog
from samgraft.shared.training.resume import RunCounters, capture_rng, restore_rng, seed_process
from samgraft.shared.training.signals import StopRequest, install_stop_handlers
from torch import Tensor

log = logging.getLogger(__name__)

SLOW_SAVE_S = 30.0
"""Default time in seconds between SLURM's SIGTERM and SIGKILL."""


@dataclass(eq=False, kw_only=True)
class StepBoundary(Checkpoint):
    """Callback that acts after the last micro-step of each step.

    Module state must be complete when ``optimizer_step`` returns. An EMA teacher is therefore updated there and not in
    ``on_train_batch_end``, which Lightning calls after this callback.
    """

    # Lightning calls subclasses of Checkpoint after all other callbacks, so that their work belongs to the saved step.

    run: RunFolder
    config: TrainerConfig
    counters: RunCounters
    tasks: PeriodicTasks
    meter: ProgressMeter
    step_log: StepLog
    stop: StopRequest
    state: TrainingState | None
    """Training state to restore, or None for a new run."""
    is_exact: bool = True
    """False after a change of the number of processes. Each process then gets new generators."""
    ema_decay: float | None = None
    """Decay of the average of the weights, or None without one."""
    average: WeightAverage | None = field(default=None, init=False)
    _rng_to_restore: dict[str, Tensor] | None = field(default=None, init=False)
    _rng_of_step: dict[str, Tensor] = field(default_factory=dict, init=False)
    _buffers_of_step: dict[str, Tensor] = field(default_factory=dict, init=False)
    _batches: list[Any] = field(default_factory=list, init=False)
    """Micro-batches of the current step so far."""
    _micro_steps: int = field(default=0, init=False)
    _is_at_boundary: bool = field(default=False, init=False)
    _last_save: float = field(default_factory=time.monotonic, init=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training state or seed a new run, then run the tasks due at this step."""
        # Lightning has just installed its own SIGTERM handler over ours.
        install_stop_handlers(self.stop)
        state, self.state = self.state, None  # The state is released after the restore.
        step = state.step if state else 0
        # A shared disk may show the newest state to one process and not yet to another.
        if broadcast_first(step) != step:
            raise RuntimeError(f"process {trainer.global_rank} would resume at another step ({step}) than the first.")
        self.step_log.start(after_step=step)
        if self.ema_decay is not None:
            # Only here the parameters are on their device and sharded.
            self.average = WeightAverage(pl_module, decay=self.ema_decay)
        if state is not None:
            self._restore(trainer, pl_module, state)
        else:
            seed_process(self.counters.seed, rank=trainer.global_rank)
        self._run_tasks(self.tasks.take_pending() if state else self.tasks.due(step), trainer, pl_module, step)
        (stop,) = any_across_processes(self.stop.requested)
        if stop:
            # A new run that has done nothing yet needs no state, unless a task was interrupted.
            if state or self.counters.pending:
                self._save(trainer, pl_module, step)
            raise stopped_error(step, run=self.run, signal_name=self.stop.signal_name)
        self._last_save = time.monotonic()
        self.meter.resume_clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the generators and buffers of the step's beginning, in case it has to be replayed."""
        # The generators are restored here and not in on_train_start, because building the loader and starting its
        # workers in between draws random numbers.
        if self._rng_to_restore is not None:
            restore_rng(self._rng_to_restore)
            self._rng_to_restore = None
        if self._micro_steps % self.counters.accumulate == 0:
            self._rng_of_step = capture_rng()
            # The forward pass changes batch norm's statistics before a non-finite loss can be detected.
            self._buffers_of_step = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
            self._batches.clear()
        self._batches.append(batch)
        self._is_at_boundary = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run tasks, save and stop as due after the last micro-step of a step."""
        self._micro_steps += 1
        if self._micro_steps % self.counters.accumulate:
            return
        self._batches.clear()
        step = trainer.global_step
        self.counters.samples_seen += self.counters.accumulate * self.counters.batch_size * trainer.world_size
        if self.average is not None:
            self.average.update(step)
        self._run_tasks(self.tasks.due(step), trainer, pl_module, step)
        # Clocks and signals differ between processes. All must decide alike, because saving is collective.
        is_old = time.monotonic() - self._last_save >= 60 * self.config.save_every_min
        stop, is_old = any_across_processes(self.stop.requested, is_old)
        is_last = step == trainer.max_steps or self.counters.ended is not None
        if stop or is_old or is_last or step % self.config.save_every_steps == 0:
            self._save(trainer, pl_module, step)
        elif step % self.step_log.every_steps == 0:
            self.step_log.flush()
        if stop and (not is_last or self.counters.pending):
            raise stopped_error(step, run=self.run, signal_name=self.stop.signal_name)
        if self.counters.ended is not None and step < trainer.max_steps:
            log.info("training ends at step %d of %d: %s", step, trainer.max_steps, self.counters.ended)
            trainer.should_stop = True
        self.meter.resume_clock()
        self._is_at_boundary = True

    def _run_tasks(
        self, tasks: Sequence[PeriodicTask], trainer: pl.Trainer, pl_module: pl.LightningModule, step: int
    ) -> None:
        self.tasks.run(
            tasks, pl_module, step, rank=trainer.global_rank, world_size=trainer.world_size, average=self.average
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last finished step if the loader failed after it, and write the collected values."""
        # Between two steps the state is complete. With several processes the others may be inside the next step, and a
        # collective save would wait for them without end.
        if self._is_at_boundary and trainer.world_size == 1 and isinstance(exception, Exception):
            try:
                self._save(trainer, pl_module, trainer.global_step)
            except OSError as err:
                log.warning("The last step could not be saved: %s", err)
        self.step_log.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the collected values."""
        self.step_log.close()

    def refuse_update(self, trainer: pl.Trainer, losses: Tensor, grad_norm: float) -> None:
        """Save the state before a step with a non-finite loss or gradient, and stop.

        Raises:
            NumericalError: Always.
        """
        step = trainer.global_step + 1
        name = f"nan-step-{step}"
        self.step_log.flush()
        batch, description = find_suspect_batch(self._batches, losses, rank=trainer.global_rank)
        for buffer_name, buffer in trainer.lightning_module.named_buffers():
            buffer.copy_(self._buffers_of_step[buffer_name])
        self._write(trainer, trainer.lightning_module, step - 1, name=name, rng=self._rng_of_step, batch=batch)
        last = newest_state_name(self.run.checkpoints)
        loss = float(losses.sum())
        rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
        raise NumericalError(
            f"loss is {loss:g} and gradient norm {grad_norm:g} at step {step} (lr {rate:.1e}). Training stopped before "
            "the update. Lower the learning rate, lengthen the warm-up, or examine the batch.",
            where=f"{self.run.path.name}/{name} has weights, optimizer and generators before this step, and "
            f"{description}",
            kept=f"last good state: {last}" if last else f"the state before step {step}, in {name}",
            next_command=repeat_command(f"trainer.resume_from={name}"),
        )

    def _restore(self, trainer: pl.Trainer, module: pl.LightningModule, state: TrainingState) -> None:
        record = state.record
        load_full_state(module, unflatten_state(record["model"], state.tensors))
        load_optimizer_state(trainer.optimizers[0], unflatten_state(record["optimizer"], state.tensors))
        extra = unflatten_state(record["extra"], state.tensors)
        if extra:
            module.on_load_checkpoint(extra)
        if self.average is not None:
            self.average.load(unflatten_state(record["average"], state.tensors))
        # global_step is derived from these counters. Lightning's own resume sets the same ones.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state.step
        loop.automatic_optimization.optim_progress.optimizer.step.total.ready = state.step
        loop._batches_that_stepped = state.step
        if self.is_exact:
            self._rng_to_restore = state.rng(trainer.global_rank)
        else:
            seed_process(self.counters.seed + state.step, rank=trainer.global_rank)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self.step_log.flush()
        started = time.monotonic()
        name = state_folder_name(step)
        # Before the first step after a resume the generators in use are not yet those of the run.
        self._write(trainer, module, step, name=name, rng=self._rng_to_restore or capture_rng())
        self._last_save = time.monotonic()
        self.stop.kept = f"the verified state {name}"
        if trainer.is_global_zero:
            prune_states(self.run.checkpoints, keep_last=self.config.keep_last, keep_every=self.config.keep_every_steps)
        seconds = self._last_save - started
        if seconds > SLOW_SAVE_S:
            log.warning(
                "Saving took %s, but schedulers often allow 30 s after SIGTERM. Request an earlier signal.",
                format_duration(seconds),
            )

    def _write(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: int,
        *,
        name: str,
        rng: dict[str, Tensor],
        batch: Mapping[str, Tensor] | None = None,
    ) -> None:
        # Collective calls, so they come before only the first process continues.
        rng_per_rank = gather_from_processes(rng)
        model, optimizer = full_state(dict(module.state_dict())), full_state(trainer.optimizers[0].state_dict())
        average = full_state(self.average.state()) if self.average is not None else None
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                tensors: dict[str, Tensor] = {}
                extra: dict[str, Any] = {}
                module.on_save_checkpoint(extra)
                record = {
                    "model": flatten_state(model, prefix="model", tensors=tensors),
                    "optimizer": flatten_state(optimizer, prefix="optimizer", tensors=tensors),
                    "extra": flatten_state(extra, prefix="extra", tensors=tensors),
                    **vars(self.counters),
                    "world_size": trainer.world_size,
                    "num_threads": thread_count(),
                    "precision": str(trainer.precision),
                    "versions": software_versions(),
                }
                if average is not None:
                    record["average"] = flatten_state(average, prefix="average", tensors=tensors)
                write_state(
                    self.run.checkpoints if batch is None else self.run.path,
                    name,
                    step=step,
                    record=record,
                    tensors=tensors,
                    rng_per_rank=rng_per_rank,
                    attachments={} if batch is None else {"batch": batch},
                )
            except Exception as err:
                # Raised in all processes below. Otherwise the others would wait for the first one without end.
                error = err
        error = broadcast_first(error)
        if error is not None:
            raise error


def stopped_error(step: int, *, run: RunFolder, signal_name: str | None) -> StoppedAndSaved:
    """Return the error that ends a command after a requested stop."""
    name = newest_state_name(run.checkpoints)
    return StoppedAndSaved(
        f"{signal_name or 'another process'} requested a stop; everything is saved at step {step}.",
        where=f"{run.path.name}/checkpoints/{name}" if name else None,
        kept="everything: resuming gives the same result as an uninterrupted run",
        next_command=run.continue_command,
    )
