"""What happens between two steps: periodic tasks, saving, stopping - and how a run starts again exactly there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from samgraft.shared.errors import NumericalError, StoppedAndSaved
from samgraft.shared.training.environment import software_versions, thread_count
from samgraft.shared.training.numerics import batch_tensors
from samgraft.shared.training.periodic import Boundary, EvaluationDropped, Periodic, run_periodic
from samgraft.shared.training.progress import Progress, format_duration
from samgraft.shared.training.resume import capture_rng, restore_rng, seed_process
from samgraft.shared.training.run_folder import RunFolder
from samgraft.shared.training.signals import StopRequest, listen
from samgraft.shared.training.state_tree import flatten_state, load_optimizer_state, unflatten_state
from samgraft.shared.training.step_log import StepLog
from samgraft.shared.training.training_state import (
    TrainingState,
    finished_states,
    prune_states,
    state_folder_name,
    write_state,
)
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
    monitor: str | None
    """Name of a periodic value; the state where it was best is kept."""
    higher_is_better: bool = True


@dataclass(kw_only=True)
class Bookkeeping:
    """Where the run stands; saved with every state."""

    seed: int
    batch_size: int
    accumulate: int
    samples_seen: int = 0
    best: dict[str, float] | None = None
    """``{"step": ..., "value": ...}`` of the monitored value."""
    pending: list[str] = field(default_factory=list)
    """Periodic tasks of this step that were dropped for a stop and run first after the resume."""
    data_fingerprint: str | None = None


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
        periodic: Sequence[Periodic],
        progress: Progress,
        step_log: StepLog,
        stop: StopRequest,
        state: TrainingState | None,
        exact: bool = True,
    ) -> None:
        self.run = run
        self.plan = plan
        self.books = books
        self.periodic = tuple(periodic)
        self.progress = progress
        self.step_log = step_log
        self.stop = stop
        self.exact = exact
        """False after a change of the number of processes: each then gets fresh generators."""
        self._state = state
        self._rng_to_restore: dict[str, Tensor] | None = None
        self._rng_of_step: dict[str, Tensor] = {}
        self._batch: Any = None
        self._micro_steps = 0
        self._last_save = time.monotonic()
        self._last_saved_step = state.step if state else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state, or seed a fresh run; then run what is due before the first step."""
        listen(self.stop)  # again: Lightning has just put its own SIGTERM handler on top
        state, self._state = self._state, None
        step = state.step if state else 0
        _check_same_on_all(trainer, step)
        # Logs first: loading may already warn.
        self.step_log.start(after_step=step)
        if state is not None:
            self._restore(trainer, pl_module, state)
        else:
            seed_process(self.books.seed, rank=trainer.global_rank)
        pending, self.books.pending = self.books.pending, []
        due = [t for t in self.periodic if (t.name in pending if state else t.is_due(0, max_steps=trainer.max_steps))]
        self._run_tasks(trainer, pl_module, due, step=step)
        if self.books.pending and self._agree(trainer, stop=self.stop.requested)[0]:
            self._save(trainer, pl_module, step)
            self._stop(step)
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
        self._batch = batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a whole step: run tasks, save, stop, as due."""
        self._micro_steps += 1
        self._batch = None
        if self._micro_steps % self.books.accumulate:
            return
        step, max_steps = trainer.global_step, trainer.max_steps
        self.books.samples_seen += self.books.accumulate * self.books.batch_size * trainer.world_size
        time_is_up = time.monotonic() - self._last_save >= self.plan.every_s
        stop, time_is_up = self._agree(trainer, stop=self.stop.requested, save=time_is_up)
        due = [task for task in self.periodic if task.is_due(step, max_steps=max_steps)]
        improved = self._run_tasks(trainer, pl_module, due, step=step)
        if due:
            stop, _ = self._agree(trainer, stop=self.stop.requested)
        at_save = step % self.plan.every_steps == 0 or step == max_steps
        if stop or improved or time_is_up or at_save:
            self._save(trainer, pl_module, step)
        elif step % self.step_log.every_steps == 0:
            self.step_log.flush()
        if stop and (step < max_steps or self.books.pending):
            self._stop(step)
        self.progress.steps_to_save = self.plan.every_steps - step % self.plan.every_steps
        self.progress.resume_clock()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the values that were collected."""
        self.step_log.close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the values that were collected."""
        self.step_log.close()

    def refuse_update(self, trainer: pl.Trainer, loss: float, grad_norm: float) -> None:
        """Keep the state before a step whose loss or gradient is not finite, and stop.

        Raises:
            NumericalError: Always.
        """
        step = trainer.global_step + 1
        name = f"nan-step-{step}"
        self.step_log.flush()
        self._write(
            trainer,
            trainer.lightning_module,
            step - 1,
            name=name,
            rng=self._rng_of_step,
            batch=batch_tensors(self._batch),
        )
        last = self._newest_name()
        raise NumericalError(
            f"loss is {loss:g} and gradient norm {grad_norm:g} at step {step} "
            f"(lr {max(g['lr'] for g in trainer.optimizers[0].param_groups):.1e}); stopped before the update. "
            "Lower the learning rate, lengthen the warm-up, or look at the batch.",
            where=f"{self.run.path.name}/{name} holds weights, optimizer, generators and batch of this step",
            kept=f"last good state: {last}" if last else f"the state before step {step}, in {name}",
            next_command=f"replay: {self.run.continue_command} trainer.resume_from={name}",
        )

    def describe_kept(self) -> str:
        """Return which state is safe now, in words."""
        last = self._newest_name()
        return f"the verified state {last}" if last else "nothing was saved yet"

    def _newest_name(self) -> str | None:
        paths = finished_states(self.run.checkpoints) if self.run.checkpoints.is_dir() else []
        return paths[-1].name if paths else None

    def _restore(self, trainer: pl.Trainer, module: pl.LightningModule, state: TrainingState) -> None:
        record = state.record
        module.load_state_dict(unflatten_state(record["model"], state.tensors), strict=True)
        load_optimizer_state(trainer.optimizers[0], unflatten_state(record["optimizer"], state.tensors))
        extra = unflatten_state(record["extra"], state.tensors)
        if extra:
            module.on_load_checkpoint(extra)
        # Lightning counts steps here; its own resume sets the same two numbers.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = state.step
        loop.automatic_optimization.optim_progress.optimizer.step.total.ready = state.step
        loop._batches_that_stepped = state.step
        if self.exact:
            self._rng_to_restore = state.rng(trainer.global_rank)
        else:
            seed_process(self.books.seed + state.step, rank=trainer.global_rank)

    def _run_tasks(
        self, trainer: pl.Trainer, module: pl.LightningModule, tasks: Sequence[Periodic], *, step: int
    ) -> bool:
        """Run tasks; note those that a stop request dropped. Return whether the monitored value improved."""
        boundary = Boundary(
            module=module,
            step=step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            stop=self.stop,
            log=self.step_log,
        )
        values: dict[str, float] = {}
        for position, task in enumerate(tasks):
            try:
                done, result = True, run_periodic(task, boundary)
            except EvaluationDropped:
                done, result = False, {}
            # All processes must agree on what is still to do; one may have heard the signal earlier.
            if self._agree(trainer, stop=not done)[0]:
                self.books.pending = [t.name for t in tasks[position:]]
                break
            values |= result
        if values:
            values = _from_first(trainer, values)
            self.step_log.record(step, values)
        return self._improved(values, step)

    def _improved(self, values: Mapping[str, float], step: int) -> bool:
        value = values.get(self.plan.monitor) if self.plan.monitor else None
        if value is None or value != value:
            return False
        best = self.books.best
        if best is not None and (value <= best["value"] if self.plan.higher_is_better else value >= best["value"]):
            return False
        self.books.best = {"step": step, "value": value}
        return step > 0

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self.step_log.flush()
        started = time.monotonic()
        rng = self._rng_to_restore or capture_rng()
        self._write(trainer, module, step, name=state_folder_name(step), rng=rng)
        self._last_save = time.monotonic()
        self._last_saved_step = step
        self.stop.kept = f"the verified state {state_folder_name(step)}"
        if trainer.is_global_zero:
            prune_states(
                self.run.checkpoints,
                keep_last=self.plan.keep_last,
                keep_steps={int(self.books.best["step"])} if self.books.best else set(),
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
        every_rng = _gather(trainer, rng)
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._write_first(trainer, module, step, name=name, every_rng=every_rng, batch=batch)
            except Exception as err:  # told to the other processes, which would wait forever, then raised on all
                error = err
        error = _from_first(trainer, error)
        if error is not None:
            raise error

    def _write_first(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: int,
        *,
        name: str,
        every_rng: Sequence[Mapping[str, Tensor]],
        batch: Mapping[str, Tensor] | None,
    ) -> None:
        tensors: dict[str, Tensor] = {}
        extra: dict[str, Any] = {}
        module.on_save_checkpoint(extra)
        record = {
            "model": flatten_state(dict(module.state_dict()), prefix="model", tensors=tensors),
            "optimizer": flatten_state(trainer.optimizers[0].state_dict(), prefix="optimizer", tensors=tensors),
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
            rng_per_rank=every_rng,
            attachments={} if batch is None else {"batch": batch},
        )

    def _stop(self, step: int) -> None:
        raise StoppedAndSaved(
            f"{self.stop.signal_name or 'another process'} asked to stop; everything is saved at step {step}.",
            where=f"{self.run.path.name}/checkpoints/{state_folder_name(step)}",
            kept="all of it: going on gives the same result as not stopping",
            next_command=self.run.continue_command,
        )

    def _agree(self, trainer: pl.Trainer, *, stop: bool, save: bool = False) -> tuple[bool, bool]:
        """Return whether any process wants to stop or save: all must do it at the same step."""
        if trainer.world_size == 1:
            return stop, save
        flags = torch.tensor([stop, save], dtype=torch.int32, device=trainer.strategy.root_device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])


def _gather(trainer: pl.Trainer, rng: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    if trainer.world_size == 1:
        return [rng]
    every: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(every, rng)
    return every


def _from_first(trainer: pl.Trainer, value: Any) -> Any:
    if trainer.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _check_same_on_all(trainer: pl.Trainer, step: int) -> None:
    first = _from_first(trainer, step)
    if first != step:
        raise RuntimeError(f"process {trainer.global_rank} would resume at step {step}, process 0 at {first}.")
