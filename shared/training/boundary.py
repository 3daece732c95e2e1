"""What happens between two steps: periodic tasks, saving, stopping - and how a run starts again exactly there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from samgraft.shared.errors import NumericalError, StoppedAndSaved
from samgraft.shared.runs.environment import software_versions, thread_count
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.runs.training_state import (
    TrainingState,
    flatten_state,
    load_optimizer_state,
    newest_name,
    prune_states,
    state_folder_name,
    unflatten_state,
    write_state,
)
from samgraft.shared.training.numerics import suspect_batch
from samgraft.shared.training.periodic import PeriodicTasks
from samgraft.shared.training.processes import any_process, from_first, full_state, gather, load_full_state
from samgraft.shared.training.progress import Progress, StepLog, format_duration
from samgraft.shared.training.resume import Bookkeeping, capture_rng, restore_rng, seed_process
from samgraft.shared.training.signals import StopRequest, listen
from torch import Tensor

log = logging.getLogger(__name__)

SLOW_SAVE_S = 30.0
"""SLURM's default time between SIGTERM and SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """When to save, what to keep."""

    every_steps: int
    every_s: float
    keep_last: int
    keep_every_steps: int | None


class StepBoundary(Checkpoint):
    """The last callback at every micro-step: acts when a step is whole.

    A subclass of Lightning's ``Checkpoint`` because those are called last, after everything that belongs to the step.
    Module state must be complete when ``optimizer_step`` returns: update an EMA teacher there, not in
    ``on_train_batch_end``, which Lightning calls after this.
    """

    def __init__(
        self,
        *,
        run: RunFolder,
        plan: SavePlan,
        books: Bookkeeping,
        tasks: PeriodicTasks,
        progress: Progress,
        step_log: StepLog,
        stop: StopRequest,
        state: TrainingState | None,
        exact: bool = True,
    ) -> None:
        self.run = run
        self.plan = plan
        self.books = books
        self.tasks = tasks
        self.progress = progress
        self.step_log = step_log
        self.stop = stop
        self.exact = exact
        """False after a change of the number of processes: each then gets fresh generators."""
        self._state = state
        self._rng_to_restore: dict[str, Tensor] | None = None
        self._rng_of_step: dict[str, Tensor] = {}
        self._buffers_of_step: dict[str, Tensor] = {}
        self._batches: list[Any] = []
        """The micro-batches of the step so far."""
        self._micro_steps = 0
        self._at_whole_step = False
        self._last_save = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state, or seed a fresh run; then run what is due before the first step."""
        listen(self.stop)  # again: Lightning has just put its own SIGTERM handler on top
        state, self._state = self._state, None
        step = state.step if state else 0
        if from_first(step) != step:
            raise RuntimeError(f"process {trainer.global_rank} would resume at step {step}, the first one elsewhere.")
        self.step_log.start(after_step=step)
        if state is not None:
            self._restore(trainer, pl_module, state)
        else:
            seed_process(self.books.seed, rank=trainer.global_rank)
        run = self.tasks.run_pending if state else self.tasks.run_due
        improved = run(pl_module, step, rank=trainer.global_rank, world_size=trainer.world_size)
        (stop,) = any_process(self.stop.requested)
        if improved or (stop and (state or self.books.pending)):
            self._save(trainer, pl_module, step)
        if stop:
            raise stopped(step, run=self.run, signal_name=self.stop.signal_name)
        self._last_save = time.monotonic()
        self.progress.resume_clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the generators where they were; remember them in case this step has to be replayed."""
        if self._rng_to_restore is not None:
            restore_rng(self._rng_to_restore)
            self._rng_to_restore = None
        if self._micro_steps % self.books.accumulate == 0:
            self._rng_of_step = capture_rng()
            # Batch norm's statistics change in the forward pass, before anyone can see that a loss is not finite.
            self._buffers_of_step = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
            self._batches.clear()
        self._batches.append(batch)
        self._at_whole_step = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a whole step: run tasks, save, stop, as due."""
        self._micro_steps += 1
        if self._micro_steps % self.books.accumulate:
            return
        self._batches.clear()
        step = trainer.global_step
        self.books.samples_seen += self.books.accumulate * self.books.batch_size * trainer.world_size
        improved = self.tasks.run_due(pl_module, step, rank=trainer.global_rank, world_size=trainer.world_size)
        long_ago = time.monotonic() - self._last_save >= self.plan.every_s
        stop, long_ago = any_process(self.stop.requested, long_ago)
        last = step == trainer.max_steps or self.books.ended is not None
        if stop or improved or long_ago or last or step % self.plan.every_steps == 0:
            self._save(trainer, pl_module, step)
        elif step % self.step_log.every_steps == 0:
            self.step_log.flush()
        if stop and (not last or self.books.pending):
            raise stopped(step, run=self.run, signal_name=self.stop.signal_name)
        if self.books.ended is not None and step < trainer.max_steps:
            log.info("training ends at step %d of %d: %s", step, trainer.max_steps, self.books.ended)
            trainer.should_stop = True
        self.progress.resume_clock()
        self._at_whole_step = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the last whole step if the loader failed after it; write the values that were collected."""
        if self._at_whole_step and trainer.world_size == 1 and isinstance(exception, Exception):
            try:
                self._save(trainer, pl_module, trainer.global_step)
            except OSError as err:
                log.warning("The last step could not be saved: %s", err)
        self.step_log.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the values that were collected."""
        self.step_log.close()

    def refuse_update(self, trainer: pl.Trainer, losses: Tensor, grad_norm: float) -> None:
        """Keep the state before a step whose loss or gradient is not finite, and stop.

        Raises:
            NumericalError: Always.
        """
        step = trainer.global_step + 1
        name = f"nan-step-{step}"
        self.step_log.flush()
        batch, which = suspect_batch(self._batches, losses, rank=trainer.global_rank)
        for buffer_name, buffer in trainer.lightning_module.named_buffers():
            buffer.copy_(self._buffers_of_step[buffer_name])
        self._write(trainer, trainer.lightning_module, step - 1, name=name, rng=self._rng_of_step, batch=batch)
        last = newest_name(self.run.checkpoints)
        loss = float(losses.sum())
        rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
        raise NumericalError(
            f"loss is {loss:g} and gradient norm {grad_norm:g} at step {step} (lr {rate:.1e}); stopped before the "
            "update. Lower the learning rate, lengthen the warm-up, or look at the batch.",
            where=f"{self.run.path.name}/{name} holds weights, optimizer and generators before this step, and {which}",
            kept=f"last good state: {last}" if last else f"the state before step {step}, in {name}",
            next_command=f"replay: {self.run.continue_command} trainer.resume_from={name}",
        )

    def _restore(self, trainer: pl.Trainer, module: pl.LightningModule, state: TrainingState) -> None:
        record = state.record
        load_full_state(module, unflatten_state(record["model"], state.tensors))
        load_optimizer_state(trainer.optimizers[0], unflatten_state(record["optimizer"], state.tensors))
        extra = unflatten_state(record["extra"], state.tensors)
        if extra:
            module.on_load_checkpoint(extra)
        # Lightning counts steps here; its own resume sets the same numbers.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state.step
        loop.automatic_optimization.optim_progress.optimizer.step.total.ready = state.step
        loop._batches_that_stepped = state.step
        if self.exact:
            self._rng_to_restore = state.rng(trainer.global_rank)
        else:
            seed_process(self.books.seed + state.step, rank=trainer.global_rank)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self.step_log.flush()
        started = time.monotonic()
        name = state_folder_name(step)
        self._write(trainer, module, step, name=name, rng=self._rng_to_restore or capture_rng())
        self._last_save = time.monotonic()
        self.stop.kept = f"the verified state {name}"
        if trainer.is_global_zero:
            best = {int(self.books.best["step"])} if self.books.best else set()
            prune_states(
                self.run.checkpoints,
                keep_last=self.plan.keep_last,
                keep_steps=best,
                keep_every=self.plan.keep_every_steps,
            )
        seconds = self._last_save - started
        if seconds > SLOW_SAVE_S:
            log.warning(
                "Saving took %s; schedulers often give 30 s after SIGTERM: ask for a longer notice.",
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
        rng_per_rank = gather(rng)
        # Sharded tensors are put together by all processes.
        model, optimizer = full_state(dict(module.state_dict())), full_state(trainer.optimizers[0].state_dict())
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._write_first(
                    trainer, module, step, name=name, rng_per_rank=rng_per_rank, batch=batch, states=(model, optimizer)
                )
            except Exception as err:  # told to the other processes, which would wait forever, then raised on all
                error = err
        error = from_first(error)
        if error is not None:
            raise error

    def _write_first(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: int,
        *,
        name: str,
        rng_per_rank: Sequence[Mapping[str, Tensor]],
        batch: Mapping[str, Tensor] | None,
        states: tuple[Any, Any],
    ) -> None:
        tensors: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        module.on_save_checkpoint(extra)
        record = {
            "model": flatten_state(states[0], prefix="model", tensors=tensors),
            "optimizer": flatten_state(states[1], prefix="optimizer", tensors=tensors),
            "extra": flatten_state(extra, prefix="extra", tensors=tensors),
            **vars(self.books),
            "world_size": trainer.world_size,
            "num_threads": thread_count(),
            "precision": str(trainer.precision),
            "versions": software_versions(),
        }
        write_state(
            self.run.checkpoints if batch is None else self.run.path,
            name,
            step=step,
            record=record,
            tensors=tensors,
            rng_per_rank=rng_per_rank,
            attachments={} if batch is None else {"batch": batch},
        )


def stopped(step: int, *, run: RunFolder, signal_name: str | None) -> StoppedAndSaved:
    """Return the message of a requested stop."""
    name = newest_name(run.checkpoints)
    return StoppedAndSaved(
        f"{signal_name or 'another process'} asked to stop; everything is saved at step {step}.",
        where=f"{run.path.name}/checkpoints/{name}" if name else None,
        kept="all of it: going on gives the same result as not stopping",
        next_command=run.continue_command,
    )
