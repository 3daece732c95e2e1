"""Training loop of both stages.

Lightning's Trainer runs the loop, the processes and the precision. Its data order, checkpoints, loggers and signal
handling are switched off and replaced, because none of them resumes a run to the same bytes.
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
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from samgraft.shared.errors import SamgraftError, UsageError
from samgraft.shared.runs.environment import process_rank, slurm_starts_processes
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.runs.trackers import check_trackers, write_trackers
from samgraft.shared.runs.training_state import (
    TrainingState,
    load_module_state,
    newest_state_name,
    read_state,
    rewrite_record,
    unflatten_state,
)
from samgraft.shared.samples.sampler import BatchPart, StepBatchSampler
from samgraft.shared.training.boundary import StepBoundary, stopped_error
from samgraft.shared.training.config import Strategy, TrainerConfig
from samgraft.shared.training.device import DeviceChoice, retain_freed_memory, use_channels_last
from samgraft.shared.training.failures import explain_failure, find_first_failure
from samgraft.shared.training.loader import build_step_loader
from samgraft.shared.training.numerics import FiniteCheck
from samgraft.shared.training.optim import WeightAverage
from samgraft.shared.training.periodic import PeriodicTask, PeriodicTasks
from samgraft.shared.training.preflight import check_disk
from samgraft.shared.training.progress import ProgressMeter, StepLog
from samgraft.shared.training.resume import RunCounters, check_resumable
from samgraft.shared.training.signals import StopRequest, end_data_workers, handle_stop_signals
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitContext:
    """Run folder, data and settings of one training."""

    config: TrainerConfig
    """Settings of the training loop."""
    run: RunFolder
    """Folder that receives states, logs and results."""
    device: DeviceChoice
    """Device and precision, from ``choose_device``."""
    dataset: Dataset[Any]
    """Samples, indexed by ``(index, sample_counter)``. It has a length, and is picklable if there are workers."""
    collate_fn: Callable[[list[Any]], Any]
    """Module-level function that makes a batch of a list of samples."""
    batch_size: int
    """Slices per process and micro-step."""
    seed: int
    """Seed of the run."""
    ema_decay: float | None = None
    """Decay of the average of the weights, or None without one."""
    batch_parts: Sequence[BatchPart] = ()
    """Parts of the dataset with a fixed number of places in every batch. Empty draws from the whole dataset."""
    callbacks: Sequence[pl.Callback] = ()
    """Further Lightning callbacks, such as ``LearningRate``."""
    periodic: Sequence[PeriodicTask] = ()
    """Validation, linear probes and pictures."""
    data_fingerprint: str | None = None
    """Fingerprint of the store. A resumed run must have the same."""

    @property
    def slices_available(self) -> int:
        """Number of different slices of the training data."""
        return len(self.dataset)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Length and speed of a finished training."""

    step: int
    """Last step, below ``max_steps`` if a periodic task ended the training."""
    resumed_from_step: int | None
    """Step of the training state that this session began with, or None for a new run."""
    slices_seen: int
    """Number of slices seen by all processes in all sessions."""
    slices_available: int
    """Number of different slices of the training data."""
    world_size: int
    """Number of processes."""
    seconds: float
    """Duration of this session."""
    slices_per_s: float
    """Speed of this session without validation and saving."""
    data_wait_share: float
    """Fraction of the time that was spent waiting for data, 0 to 1."""

    @property
    def epochs(self) -> float:
        """Number of times that each slice was seen on average."""
        return self.slices_seen / self.slices_available


def fit(module: pl.LightningModule, context: FitContext) -> FitResult:
    """Train to ``max_steps`` from the newest verified state of the run.

    The module's ``training_step(batch)`` returns ``{"loss": ..., further scalars}``. Its ``configure_optimizers``
    returns one optimizer and no scheduler, because ``LearningRate`` is a callback. The module keeps no step counter of
    its own (``self.trainer.global_step``). On return it holds the final weights, with ``ema_decay`` their average.

    Raises:
        StoppedAndSaved: If a signal requested a stop.
        NumericalError: If the loss or the gradient is not finite.
        StorageError: If a state cannot be written.
        UsageError, DataError, WeightsError: If the run cannot be resumed from its state.
    """
    started = time.monotonic()
    config, run, device = context.config, context.run, context.device
    check_trackers(config.trackers)
    state = _find_starting_state(config, run)
    counters = RunCounters(
        seed=context.seed,
        batch_size=context.batch_size,
        accumulate=config.accumulate,
        data_fingerprint=context.data_fingerprint,
    )
    is_exact = True
    if state is not None:
        counters.restore(state.record)
        is_exact = check_resumable(
            state.record, config=config, device=device, counters=counters, continue_command=run.continue_command
        )
    stop, step_log = StopRequest(), StepLog(run, every_steps=config.log_every_steps)
    tasks = PeriodicTasks(
        tasks=context.periodic, counters=counters, stop=stop, step_log=step_log, max_steps=config.max_steps
    )
    meter = _build_meter(step_log, context, counters)
    boundary = StepBoundary(
        run=run,
        config=config,
        counters=counters,
        tasks=tasks,
        meter=meter,
        step_log=step_log,
        stop=stop,
        state=state,
        is_exact=is_exact,
        ema_decay=context.ema_decay,
    )
    try:
        step = _run_to_end(module, state, context, boundary)
    finally:
        write_trackers(config.trackers, run)
    return FitResult(
        step=step,
        resumed_from_step=state.step if state else None,
        slices_seen=counters.samples_seen,
        slices_available=context.slices_available,
        world_size=device.world_size,
        seconds=time.monotonic() - started,
        slices_per_s=meter.slices_per_s,
        data_wait_share=meter.data_wait_share,
    )


def _build_meter(step_log: StepLog, context: FitContext, counters: RunCounters) -> ProgressMeter:
    return ProgressMeter(
        step_log,
        context.config,
        counters=counters,
        slices_per_micro_step=context.batch_size * context.device.world_size,
        slices_available=context.slices_available,
    )


def _run_to_end(
    module: pl.LightningModule, state: TrainingState | None, context: FitContext, boundary: StepBoundary
) -> int:
    """Train, or finish a run that was trained to its end, and return the last step."""
    if state is not None and (state.step >= context.config.max_steps or boundary.counters.ended):
        _finish(module, state, context, boundary)
        return state.step
    return _train(module, context, boundary, first_step=state.step if state else 0)


def _train(module: pl.LightningModule, context: FitContext, boundary: StepBoundary, *, first_step: int) -> int:
    """Train from ``first_step`` and return the last step."""
    _check_module(module)
    config, run, stop = context.config, context.run, boundary.stop
    check_disk(module, config, run.path, has_average=context.ema_decay is not None)
    finite = FiniteCheck(clip_norm=config.clip_grad_norm, step_log=boundary.step_log, on_bad=boundary.refuse_update)
    callbacks = [*context.callbacks, boundary.meter, finite, boundary]
    trainer = build_trainer(config, run=run, device=context.device, callbacks=callbacks)
    retain_freed_memory()
    # The layout is set before the optimizer exists, so that its moments have the same one.
    if config.channels_last:
        use_channels_last(module)
    newest = newest_state_name(run.checkpoints)
    stop.kept = f"the verified state {newest}" if newest else stop.kept
    with handle_stop_signals(stop), quiet_lightning():
        try:
            trainer.fit(module, datamodule=StepData(context, counters=boundary.counters, first_step=first_step))
        except SamgraftError:
            raise
        except SystemExit as stop:
            # Lightning turns Ctrl-C into an exit and ignores the signal from then on, which a notebook would keep.
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            raise stop.__context__ from None
        except Exception as error:
            newest = newest_state_name(run.checkpoints)
            raise explain_failure(
                find_first_failure(error),
                batch_size=context.batch_size,
                accumulate=config.accumulate,
                num_workers=config.num_workers,
                kept=f"the verified state {newest}" if newest else "nothing was saved yet",
            ) from error
        finally:
            end_data_workers()
    if boundary.average is not None:
        boundary.average.copy_to_module()
    return int(trainer.global_step)


def _finish(module: pl.LightningModule, state: TrainingState, context: FitContext, boundary: StepBoundary) -> None:
    """Load the final weights and run the last periodic tasks if a stop interrupted them."""
    counters, stop = boundary.counters, boundary.stop
    with handle_stop_signals(stop):
        load_module_state(module, state.path)
        if context.ema_decay is not None:
            # Read again and not averaged further, so the decay does not matter.
            average = WeightAverage(module, decay=context.ema_decay)
            average.load(unflatten_state(state.record["average"], state.tensors))
            average.copy_to_module()
        if not counters.pending:
            return
        module.to(context.device.torch_device)
        boundary.step_log.start(after_step=state.step)
        boundary.tasks.run(boundary.tasks.take_pending(), module, state.step, rank=process_rank())
        boundary.step_log.close()
        if counters.pending:
            raise stopped_error(state.step, run=context.run, signal_name=stop.signal_name)
        if context.run.is_writer:
            rewrite_record(state, {"pending": []})


def _find_starting_state(config: TrainerConfig, run: RunFolder) -> TrainingState | None:
    path = run.latest_training_state()
    state = read_state(path) if path else None
    if config.resume_from:
        replayed = _read_replayed_state(config.resume_from, run)
        if state is None or state.step <= replayed.step:
            state = replayed
        else:
            # The user repeated the replay command after it had trained further. Restarting at the replayed state would
            # discard those steps.
            log.info("trainer.resume_from=%s is ignored, the run has reached %s", replayed.path.name, state.path.name)
    if process_rank() == 0:
        name = run.path.name
        if state is None:
            log.info("new run %s: %d steps", name, config.max_steps)
        elif state.step >= config.max_steps:
            log.info("%s has finished all %d steps (%s)", name, state.step, state.path.name)
        else:
            log.info("resuming %s at step %d of %d (%s)", name, state.step, config.max_steps, state.path.name)
    return state


def _read_replayed_state(name: str, run: RunFolder) -> TrainingState:
    path = run.path / Path(name).name
    if not path.is_dir():
        kept = sorted(found.name for found in run.path.glob("nan-step-*") if found.is_dir())
        raise UsageError(
            f"trainer.resume_from must name a kept state of the run ({', '.join(kept) or 'none'}), got {name!r}. "
            "Leave it out to resume from the newest state in checkpoints/.",
            where=run.path.name,
        )
    return read_state(path)


def _check_module(module: pl.LightningModule) -> None:
    hook = "on_train_batch_end"
    if getattr(type(module), hook) is not getattr(pl.LightningModule, hook):
        raise TypeError(
            f"{type(module).__name__} must not define {hook}, because Lightning calls it after the state was saved. "
            "Move this work to optimizer_step."
        )


def build_trainer(
    config: TrainerConfig, *, run: RunFolder, device: DeviceChoice, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Build the Lightning Trainer.

    ``callbacks`` must contain a ``StepBoundary``. Without one Lightning adds its own checkpoint callback.
    """
    is_distributed = device.world_size > 1
    strategy: Any = "auto"
    backend = "nccl" if device.accelerator == "cuda" else "gloo"
    if is_distributed and config.strategy is Strategy.FSDP:
        strategy = ModelParallelStrategy(
            data_parallel_size=device.world_size, tensor_parallel_size=1, process_group_backend=backend
        )
    elif is_distributed:
        strategy = DDPStrategy(find_unused_parameters=config.find_unused_parameters, process_group_backend=backend)
    with quiet_lightning():
        cluster = choose_cluster_environment(device)
        return pl.Trainer(
            accelerator=device.accelerator,
            devices=device.devices,
            num_nodes=device.num_nodes,
            strategy=strategy,
            precision=device.precision,  # type: ignore[arg-type]
            max_steps=config.max_steps,
            max_epochs=-1,  # One long epoch, whose end max_steps determines.
            accumulate_grad_batches=config.accumulate,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # The sampler addresses samples by step and rank itself.
            callbacks=list(callbacks),
            plugins=[cluster],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=run.path,
        )


def choose_cluster_environment(device: DeviceChoice) -> ClusterEnvironment:
    """Return Lightning's environment of torchrun, srun or Lightning's own launcher."""
    # Lightning's own detection treats every process with SLURM's variables as a task of srun. That includes processes
    # that torchrun starts in a batch job, and a single process that is about to start others.
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not slurm_starts_processes():
        return LightningEnvironment()
    # Lightning refuses tasks that were started without --ntasks-per-node. choose_device has counted them.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(device.devices))
    # With auto_requeue Lightning would requeue the job by itself and write a pickle.
    return SLURMEnvironment(auto_requeue=False)


class StepData(pl.LightningDataModule):
    """Loader of one long epoch that begins at the run's current step."""

    def __init__(self, context: FitContext, *, counters: RunCounters, first_step: int) -> None:
        super().__init__()
        self._context = context
        self._counters = counters
        self._num_steps = context.config.max_steps - first_step

    def train_dataloader(self) -> DataLoader[Any]:
        """Build the loader of this process after the process group exists."""
        assert self.trainer is not None
        context, world_size = self._context, self.trainer.world_size
        sampler = StepBatchSampler(
            context.slices_available,
            batch_size=context.batch_size,
            seed=context.seed,
            # The position is counted in samples, so that it stays valid after a change of the number of processes.
            start_micro_step=self._counters.samples_seen // (context.batch_size * world_size),
            num_micro_steps=self._num_steps * context.config.accumulate,
            rank=self.trainer.global_rank,
            world_size=world_size,
            parts=context.batch_parts,
        )
        return build_step_loader(
            context.dataset,
            batch_sampler=sampler,
            collate_fn=context.collate_fn,
            num_workers=context.config.num_workers,
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's advice that does not apply here.

    It concerns the number of workers, an unused GPU and modules in evaluation mode, all of which are chosen on purpose.
    """
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
