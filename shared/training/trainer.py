"""The engine of both stages: Lightning's Trainer, driven by steps, that resumes to the same bytes."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy
from samgraft.shared.errors import SamgraftError, StorageError
from samgraft.shared.training.device import Device, DeviceChoice, Precision, tune_cpu
from samgraft.shared.training.environment import process_rank
from samgraft.shared.training.failures import explain_failure
from samgraft.shared.training.numerics import FiniteOnly
from samgraft.shared.training.periodic import Periodic
from samgraft.shared.training.progress import Progress
from samgraft.shared.training.resume import LoaderPosition
from samgraft.shared.training.resume_check import check_resumable
from samgraft.shared.training.run_folder import MAY_CHANGE, RunFolder
from samgraft.shared.training.signals import StopRequest, end_data_workers, listening
from samgraft.shared.training.step_boundary import Bookkeeping, SavePlan, StepBoundary
from samgraft.shared.training.step_log import StepLog
from samgraft.shared.training.training_state import TrainingState, load_module_state, read_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

LoaderFactory = Callable[[LoaderPosition], DataLoader[Any]]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, and how safely to train."""

    max_steps: int
    """Optimizer steps of the whole run."""
    accumulate: int = 1
    """Micro-steps whose gradients make one step: the global batch is batch_size * accumulate * processes."""
    clip_grad_norm: float | None = 1.0
    """Largest gradient norm; null does not clip."""
    device: Device = Device.AUTO
    """auto takes a GPU if one works."""
    devices: int | None = field(default=None, metadata=MAY_CHANGE)
    """Processes on this machine; null takes what torchrun or SLURM say, else 1. Another number than before is refused
    unless allow_resize."""
    precision: Precision = Precision.AUTO
    """auto takes bf16 where it is fast."""
    channels_last: bool = False
    """Memory layout in which convolutions are faster, 1.4x for vit_t on a CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: a third slower, far less memory. The stage applies it."""
    find_unused_parameters: bool = False
    """For several processes, when a step leaves some trainable parameters without gradient."""
    num_workers: int = field(default=0, metadata=MAY_CHANGE)
    """Processes that load data; 0 loads in the training process. Does not change the numbers."""
    log_every_steps: int = field(default=10, metadata=MAY_CHANGE)
    """Steps between points in TensorBoard; metrics.jsonl has every step."""
    save_every_steps: int = field(default=500, metadata=MAY_CHANGE)
    """Steps between saved training states."""
    save_every_min: float = field(default=10.0, metadata=MAY_CHANGE)
    """A state is also saved after this many minutes without one."""
    keep_last: int = field(default=2, metadata=MAY_CHANGE)
    """Newest states to keep, at least 2; the best one is kept as well."""
    keep_every_steps: int | None = field(default=None, metadata=MAY_CHANGE)
    """States at multiples of this are never deleted; null deletes them."""
    allow_resize: bool = field(default=False, metadata=MAY_CHANGE)
    """Go on with another number of processes; not bit-exact from there."""
    resume_from: str | None = field(default=None, metadata=MAY_CHANGE)
    """A state of this run's folder to start from instead of the newest, e.g. nan-step-120 to replay it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        positive = ("max_steps", "accumulate", "log_every_steps", "save_every_steps", "save_every_min")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"trainer.{name} must be positive, got {getattr(self, name)}.")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ValueError(f"trainer.clip_grad_norm must be positive or null, got {self.clip_grad_norm}.")
        if self.num_workers < 0 or self.num_workers > 256:
            raise ValueError(f"trainer.num_workers must be 0 to 256, got {self.num_workers}.")
        if self.keep_last < 2:
            raise ValueError(f"trainer.keep_last must be at least 2, got {self.keep_last}: one may be damaged.")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"trainer.devices must be at least 1 or null, got {self.devices}.")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a finished training went."""

    step: int
    resumed_from_step: int | None
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
    path = run.path / Path(config.resume_from).name if config.resume_from else run.latest_training_state()
    state = read_state(path) if path else None
    _announce(run, state, config)
    books = _bookkeeping(state, config, batch_size=batch_size, seed=seed, data_fingerprint=data_fingerprint)
    step_log = StepLog(run, every_steps=config.log_every_steps)
    world_size = device.devices * device.num_nodes
    progress = Progress(
        step_log,
        max_steps=config.max_steps,
        slices_per_micro_step=batch_size * world_size,
        accumulate=config.accumulate,
    )
    exact = state is None or check_resumable(
        state.record,
        world_size=world_size,
        batch_size=batch_size,
        accumulate=config.accumulate,
        precision=device.precision,
        data_fingerprint=data_fingerprint,
        allow_resize=config.allow_resize,
        continue_command=run.continue_command,
    )
    if state is not None and state.step >= config.max_steps and not books.pending:
        load_module_state(module, state.path)
        return _result(progress, books, step=state.step, resumed=state.step, started=started)
    check_disk(module, config, run)
    stop = StopRequest()
    boundary = StepBoundary(
        run=run,
        plan=_save_plan(config, monitor=monitor, higher_is_better=higher_is_better),
        books=books,
        periodic=periodic,
        progress=progress,
        step_log=step_log,
        stop=stop,
        state=state,
        exact=exact,
    )
    stop.kept = boundary.describe_kept()
    finite = FiniteOnly(clip_norm=config.clip_grad_norm, step_log=step_log, on_bad=boundary.refuse_update)
    trainer = build_trainer(config, run=run, device=device, callbacks=[*callbacks, progress, finite, boundary])
    data = StepData(loader_factory, books=books, first_step=state.step if state else 0, max_steps=config.max_steps)
    tune_cpu()
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    with listening(stop), _quiet_lightning():
        try:
            trainer.fit(module, datamodule=data)
        except SamgraftError:
            raise
        except Exception as error:
            raise explain_failure(
                error,
                batch_size=batch_size,
                accumulate=config.accumulate,
                num_workers=config.num_workers,
                kept=boundary.describe_kept(),
            ) from error
        finally:
            end_data_workers()
    return _result(progress, books, step=trainer.global_step, resumed=state.step if state else None, started=started)


def build_trainer(
    config: TrainerConfig, *, run: RunFolder, device: DeviceChoice, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Build a Lightning Trainer that leaves data order, saving, logging and signals to us."""
    several = device.devices * device.num_nodes > 1
    strategy: Any = "auto"
    if several:
        strategy = DDPStrategy(
            find_unused_parameters=config.find_unused_parameters,
            process_group_backend="nccl" if device.accelerator == "cuda" else "gloo",
        )
    # Lightning would requeue the job itself and write a pickle.
    plugins: list[Any] | None = (
        [SLURMEnvironment(auto_requeue=False)] if several and SLURMEnvironment.detect() else None
    )
    with _quiet_lightning():
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
            plugins=plugins,
            logger=False,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=run.path,
        )


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


def state_bytes(module: nn.Module) -> int:
    """Return the size of one training state: weights, buffers, and AdamW's two moments of what trains."""

    def size(tensors: Iterator[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trainable = size(p for p in module.parameters() if p.requires_grad)
    return size(module.parameters()) + size(module.buffers()) + 2 * trainable


def check_disk(module: nn.Module, config: TrainerConfig, run: RunFolder) -> int:
    """Say how much disk the run will need and refuse to start if it is not there.

    Returns:
        Bytes needed.

    Raises:
        StorageError: If less is free.
    """
    one = state_bytes(module)
    milestones = config.max_steps // config.keep_every_steps if config.keep_every_steps else 0
    # The newest ones, the best, the one being written, and the weights that are handed on.
    need = one * (config.keep_last + 2 + milestones) + 2**26
    place = next(p for p in (run.path, *run.path.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if process_rank() == 0:
        log.info("disk: %.2f GB for training states, %.1f GB free", need / 1e9, free / 1e9)
    if need > free:
        raise StorageError(
            f"the run needs {need / 1e9:.2f} GB for its training states ({one / 1e9:.2f} GB each), but only "
            f"{free / 1e9:.2f} GB are free.",
            where=run.path.name,
            kept="nothing was written yet",
            next_command="free space" + (", or unset trainer.keep_every_steps" if milestones else ""),
        )
    return need


def _check_module(module: pl.LightningModule) -> None:
    hook = "on_train_batch_end"
    if getattr(type(module), hook) is not getattr(pl.LightningModule, hook):
        raise TypeError(
            f"{type(module).__name__} must not define {hook}: Lightning calls it after the state was saved. "
            "Put what belongs to the step into optimizer_step."
        )


def _announce(run: RunFolder, state: TrainingState | None, config: TrainerConfig) -> None:
    if process_rank() != 0:
        return
    if state is None:
        log.info("new run %s: %d steps", run.path.name, config.max_steps)
    else:
        log.info("resuming %s at step %d of %d (%s)", run.path.name, state.step, config.max_steps, state.path.name)


def _bookkeeping(
    state: TrainingState | None,
    config: TrainerConfig,
    *,
    batch_size: int,
    seed: int,
    data_fingerprint: str | None,
) -> Bookkeeping:
    books = Bookkeeping(
        seed=seed, batch_size=batch_size, accumulate=config.accumulate, data_fingerprint=data_fingerprint
    )
    if state is not None:
        books.samples_seen = int(state.record["samples_seen"])
        books.best = state.record["best"]
        books.pending = list(state.record["pending"])
    return books


def _save_plan(config: TrainerConfig, *, monitor: str | None, higher_is_better: bool) -> SavePlan:
    return SavePlan(
        every_steps=config.save_every_steps,
        every_s=60 * config.save_every_min,
        keep_last=config.keep_last,
        keep_every_steps=config.keep_every_steps,
        monitor=monitor,
        higher_is_better=higher_is_better,
    )


def _result(progress: Progress, books: Bookkeeping, *, step: int, resumed: int | None, started: float) -> FitResult:
    return FitResult(
        step=step,
        resumed_from_step=resumed,
        seconds=time.monotonic() - started,
        slices_per_s=progress.slices_per_s,
        data_wait_share=progress.data_wait_share,
        best=books.best,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence advice that does not apply: our loader is step-addressed, our workers are chosen, eval mode is meant."""
    with warnings.catch_warnings():
        for module in ("pytorch_lightning", "lightning_fabric"):
            warnings.filterwarnings("ignore", module=module)
        for text in (".*does not have many workers.*", ".*GPU available but not used.*", ".*modules? in eval mode.*"):
            warnings.filterwarnings("ignore", message=text)
        noisy = [
            logging.getLogger(n)
            for n in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero")
        ]
        levels = [logger.level for logger in noisy]
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
