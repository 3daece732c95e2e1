"""The engine of both stages: Lightning's Trainer, driven by steps, that resumes to the same bytes.

Lightning's Trainer with everything switched off that we do ourselves: data order, saving, logging, signals.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from samgraft.shared.errors import SamgraftError, UsageError
from samgraft.shared.runs.environment import process_rank, slurm_starts_processes
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.runs.training_state import (
    TrainingState,
    load_module_state,
    newest_name,
    read_state,
    rewrite_record,
)
from samgraft.shared.training.boundary import SavePlan, StepBoundary, stopped
from samgraft.shared.training.config import Strategy, TrainerConfig
from samgraft.shared.training.device import DeviceChoice, tune_cpu
from samgraft.shared.training.failures import explain_failure, first_failure
from samgraft.shared.training.numerics import FiniteOnly
from samgraft.shared.training.periodic import Monitor, Periodic, PeriodicTasks
from samgraft.shared.training.preflight import check_disk, state_bytes
from samgraft.shared.training.progress import Progress, StepLog
from samgraft.shared.training.resume import Bookkeeping, LoaderPosition, check_resumable
from samgraft.shared.training.signals import StopRequest, end_data_workers, listening
from torch.utils.data import DataLoader

__all__ = ["FitResult", "LoaderFactory", "TrainerConfig", "check_disk", "fit", "state_bytes"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a finished training went."""

    step: int
    """The last one; below ``max_steps`` if a periodic task ended the training."""
    resumed_from_step: int | None
    slices_seen: int
    """By all processes and sessions together."""
    world_size: int
    """Number of processes."""
    seconds: float
    """Of this session."""
    slices_per_s: float
    data_wait_share: float
    best: dict[str, float] | None
    """``{"step", "value"}`` of the monitored value."""


def fit(
    module: pl.LightningModule,
    *,
    config: TrainerConfig,
    run: RunFolder,
    device: DeviceChoice,
    loader_factory: LoaderFactory,
    batch_size: int,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    periodic: Sequence[Periodic] = (),
    monitor: str | None = None,
    higher_is_better: bool = True,
    data_fingerprint: str | None = None,
) -> FitResult:
    """Train to ``config.max_steps``, from the newest verified state of the run if there is one.

    The module's ``training_step(batch)`` returns ``{"loss": ..., further scalars}``, its ``configure_optimizers`` one
    optimizer and no scheduler (``schedule.LearningRate`` is a callback). It keeps no count of its own: the step is
    ``self.trainer.global_step``. On return the module holds the final weights.

    Args:
        module: The stage's module.
        config: How to train.
        run: Where.
        device: From ``choose_device``.
        loader_factory: Makes the loader that starts at a given micro-step.
        batch_size: Slices per process and micro-step.
        seed: Of the run.
        callbacks: Further Lightning callbacks, e.g. ``LearningRate``.
        periodic: Validation, probes, pictures.
        monitor: Periodic value whose best state is kept.
        higher_is_better: Direction of ``monitor``.
        data_fingerprint: Of the store; a resumed run must have the same.

    Raises:
        StoppedAndSaved: A signal asked to stop.
        NumericalError: Loss or gradient not finite.
        StorageError: A state could not be written.
        UsageError, DataError, WeightsError: The run cannot go on from its state.
    """
    started = time.monotonic()
    _check_module(module)
    state = _starting_state(config, run)
    books = Bookkeeping(
        seed=seed, batch_size=batch_size, accumulate=config.accumulate, data_fingerprint=data_fingerprint
    )
    exact = _take_up(state, books, config=config, device=device, run=run)
    stop = StopRequest()
    step_log = StepLog(run, every_steps=config.log_every_steps)
    tasks = PeriodicTasks(
        periodic,
        books=books,
        monitor=Monitor(name=monitor, higher_is_better=higher_is_better) if monitor else None,
        stop=stop,
        step_log=step_log,
        max_steps=config.max_steps,
    )
    progress = _progress(step_log, config=config, slices_per_micro_step=batch_size * device.world_size)
    if state is not None and (state.step >= config.max_steps or books.ended):
        step = state.step
        with listening(stop):
            _finish(module, state, run=run, device=device, tasks=tasks, books=books, step_log=step_log, stop=stop)
    else:
        check_disk(module, config, run.path)
        boundary = StepBoundary(
            run=run,
            plan=_save_plan(config),
            books=books,
            tasks=tasks,
            progress=progress,
            step_log=step_log,
            stop=stop,
            state=state,
            exact=exact,
        )
        finite = FiniteOnly(clip_norm=config.clip_grad_norm, step_log=step_log, on_bad=boundary.refuse_update)
        trainer = build_trainer(config, run=run, device=device, callbacks=[*callbacks, progress, finite, boundary])
        data = StepData(loader_factory, books=books, first_step=state.step if state else 0, max_steps=config.max_steps)
        _run(trainer, module, data, config=config, run=run, batch_size=batch_size, stop=stop)
        step = int(trainer.global_step)
    return FitResult(
        step=step,
        resumed_from_step=state.step if state else None,
        slices_seen=books.samples_seen,
        world_size=device.world_size,
        seconds=time.monotonic() - started,
        slices_per_s=progress.slices_per_s,
        data_wait_share=progress.data_wait_share,
        best=books.best,
    )


def _take_up(
    state: TrainingState | None, books: Bookkeeping, *, config: TrainerConfig, device: DeviceChoice, run: RunFolder
) -> bool:
    """Go on with the books of ``state``; tell whether the rest of the run can be bit-exact."""
    if state is None:
        return True
    books.take_up(state.record)
    return check_resumable(
        state.record, config=config, device=device, books=books, continue_command=run.continue_command
    )


def _progress(step_log: StepLog, *, config: TrainerConfig, slices_per_micro_step: int) -> Progress:
    return Progress(
        step_log,
        max_steps=config.max_steps,
        slices_per_micro_step=slices_per_micro_step,
        accumulate=config.accumulate,
        save_every_steps=config.save_every_steps,
    )


def _run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: StepData,
    *,
    config: TrainerConfig,
    run: RunFolder,
    batch_size: int,
    stop: StopRequest,
) -> None:
    tune_cpu()
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    newest = newest_name(run.checkpoints)
    stop.kept = f"the verified state {newest}" if newest else stop.kept
    with listening(stop), quiet_lightning():
        try:
            trainer.fit(module, datamodule=data)
        except SamgraftError:
            raise
        except Exception as error:
            newest = newest_name(run.checkpoints)
            raise explain_failure(
                first_failure(error),
                batch_size=batch_size,
                accumulate=config.accumulate,
                num_workers=config.num_workers,
                kept=f"the verified state {newest}" if newest else "nothing was saved yet",
            ) from error
        finally:
            end_data_workers()


def _finish(
    module: pl.LightningModule,
    state: TrainingState,
    *,
    run: RunFolder,
    device: DeviceChoice,
    tasks: PeriodicTasks,
    books: Bookkeeping,
    step_log: StepLog,
    stop: StopRequest,
) -> None:
    """Load the weights of a run whose last step is done; run the final tasks if a stop had dropped them."""
    load_module_state(module, state.path)
    if not books.pending:
        return
    module.to(device.torch_device)
    step_log.start(after_step=state.step)
    tasks.run_pending(module, state.step, rank=process_rank())
    step_log.close()
    if books.pending:
        raise stopped(state.step, run=run, signal_name=stop.signal_name)
    if run.is_writer:
        rewrite_record(state, {"best": books.best, "pending": []})


def _starting_state(config: TrainerConfig, run: RunFolder) -> TrainingState | None:
    path = run.latest_training_state()
    state = read_state(path) if path else None
    if config.resume_from:
        replayed = _state_to_replay(config.resume_from, run)
        if state is None or state.step <= replayed.step:
            state = replayed
        else:  # the command of a replay was given again: what it reached is not thrown away
            log.info("trainer.resume_from=%s: the run has gone on since, to %s", replayed.path.name, state.path.name)
    if process_rank() == 0:
        name = run.path.name
        if state is None:
            log.info("new run %s: %d steps", name, config.max_steps)
        elif state.step >= config.max_steps:
            log.info("%s has done all its %d steps (%s)", name, state.step, state.path.name)
        else:
            log.info("resuming %s at step %d of %d (%s)", name, state.step, config.max_steps, state.path.name)
    return state


def _state_to_replay(name: str, run: RunFolder) -> TrainingState:
    path = run.path / Path(name).name
    if not path.is_dir():
        kept = sorted(found.name for found in run.path.glob("nan-step-*") if found.is_dir())
        raise UsageError(
            f"trainer.resume_from must name a kept state of the run ({', '.join(kept) or 'none'}), got {name!r}. "
            "States in checkpoints/ are taken up without it, the newest first.",
            where=run.path.name,
            next_command=run.continue_command,
        )
    return read_state(path)


def _check_module(module: pl.LightningModule) -> None:
    hook = "on_train_batch_end"
    if getattr(type(module), hook) is not getattr(pl.LightningModule, hook):
        raise TypeError(
            f"{type(module).__name__} must not define {hook}: Lightning calls it after the state was saved. "
            "Put what belongs to the step into optimizer_step."
        )


def _save_plan(config: TrainerConfig) -> SavePlan:
    return SavePlan(
        every_steps=config.save_every_steps,
        every_s=60 * config.save_every_min,
        keep_last=config.keep_last,
        keep_every_steps=config.keep_every_steps,
    )


LoaderFactory = Callable[[LoaderPosition], DataLoader[Any]]


def build_trainer(
    config: TrainerConfig, *, run: RunFolder, device: DeviceChoice, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Build the Trainer; ``callbacks`` must hold a ``StepBoundary``, or Lightning adds its own checkpoints."""
    several = device.world_size > 1
    strategy: Any = "auto"
    backend = "nccl" if device.accelerator == "cuda" else "gloo"
    if several and config.strategy is Strategy.FSDP:
        strategy = ModelParallelStrategy(
            data_parallel_size=device.world_size, tensor_parallel_size=1, process_group_backend=backend
        )
    elif several:
        strategy = DDPStrategy(find_unused_parameters=config.find_unused_parameters, process_group_backend=backend)
    with quiet_lightning():
        cluster = cluster_environment(device)
        return pl.Trainer(
            accelerator=device.accelerator,
            devices=device.devices,
            num_nodes=device.num_nodes,
            strategy=strategy,
            precision=device.precision,  # type: ignore[arg-type]
            max_steps=config.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
            plugins=[cluster],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=run.path,
        )


def cluster_environment(device: DeviceChoice) -> ClusterEnvironment:
    """Return who started the processes: torchrun, srun, or Lightning itself.

    Lightning's own choice takes every process with SLURM's variables for a task of srun: also the processes that
    torchrun starts in a batch job, and a single one that is to start others.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not slurm_starts_processes():
        return LightningEnvironment()
    # Lightning refuses tasks that were started without --ntasks-per-node; choose_device has counted them.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(device.devices))
    return SLURMEnvironment(auto_requeue=False)  # it would requeue the job itself and write a pickle


class StepData(pl.LightningDataModule):
    """Hands Lightning one long epoch that begins where the run stands."""

    def __init__(self, factory: LoaderFactory, *, books: Bookkeeping, first_step: int, max_steps: int) -> None:
        super().__init__()
        self._factory = factory
        self._books = books
        self._num_steps = max_steps - first_step

    def train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of this process; called when the processes know each other."""
        assert self.trainer is not None
        world = self.trainer.world_size
        return self._factory(
            LoaderPosition(
                # In samples, so that it means the same after a change of the number of processes.
                start_micro_step=self._books.samples_seen // (self._books.batch_size * world),
                num_micro_steps=self._num_steps * self._books.accumulate,
                rank=self.trainer.global_rank,
                world_size=world,
            )
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence advice that does not apply: our loader is step-addressed, our workers are chosen, eval mode is meant."""
    names = ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for module in ("pytorch_lightning", "lightning_fabric"):
            warnings.filterwarnings("ignore", module=module)
        for text in (".*does not have many workers.*", ".*GPU available but not used.*", ".*modules? in eval mode.*"):
            warnings.filterwarnings("ignore", message=text)
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
