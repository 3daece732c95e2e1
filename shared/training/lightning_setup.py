"""Lightning's Trainer with everything switched off that we do ourselves: data order, saving, logging, signals."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from samgraft.shared.training.bookkeeping import Bookkeeping
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.environment import slurm_starts_processes
from samgraft.shared.training.resume import LoaderPosition
from samgraft.shared.training.run_folder import RunFolder
from samgraft.shared.training.trainer_config import Strategy, TrainerConfig
from torch.utils.data import DataLoader

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
