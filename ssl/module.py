"""The training step of stage 1 as Lightning wants it; everything that differs between objectives is the objective's.

Batch norm's running statistics where several processes train: every process goes on with the mean of all.

Only ``vit_t`` from random weights has batch norms that move (:func:`samgraft.ssl.start.load_start`). Each batch is
normalised by its own process's statistics, as without this module: torch's SyncBatchNorm needs a GPU. Averaged after
every step the running ones are the same everywhere, under DDP (which would take the first process's) and under FSDP
(which would leave each process its own), so that looks, states and results do not depend on who computes them.
"""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.samples.dataset import SliceBatch, batch_to_input
from samgraft.shared.training.processes import is_distributed, is_sharded, mark_fsdp_root, shard_module
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.moments import Moments, take_up_moments
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.optimizer import build_pretrain_optimizer
from torch import nn

log = logging.getLogger(__name__)


class PretrainModule(pl.LightningModule):
    """One objective, its optimizer and its schedule."""

    def __init__(self, objective: Objective, config: PretrainConfig, *, moments: Moments | None = None) -> None:
        super().__init__()
        self.objective = objective
        self.config = config
        self._moments = moments

    def configure_model(self) -> None:
        """With trainer.strategy=fsdp: cut blocks, neck, encoder and the rest into parts; otherwise leave all whole."""
        mesh = self.device_mesh
        if mesh is None or is_sharded(self):
            return
        part = mesh["data_parallel"]
        encoders = [m for m in self.objective.modules() if isinstance(m, ImageEncoder)]
        for encoder in encoders:
            for unit in [*encoder.units(), encoder.neck]:
                shard_module(unit, part)
            shard_module(encoder, part, methods=encoder.entry_points)
        shard_module(self.objective, part, methods=("loss", "panel"))

    def on_fit_start(self) -> None:
        """Name the objective as the whole of what is sharded, before a look asks a part of it first."""
        if is_sharded(self):
            mark_fsdp_root(self.objective)

    def training_step(self, batch: SliceBatch, batch_idx: int) -> dict[str, torch.Tensor]:
        """Return the loss of one micro-step and its parts; the progress callback logs them."""
        images_B1SS, _, _ = batch_to_input(
            batch,
            image_size=self.config.model.image_size,
            keep_aspect=self.config.data.keep_aspect,
            device=self.device,
        )
        counters = batch["sample_counter"].tolist()
        result = self.objective.loss(
            images_B1SS, sample_counters=counters, step=self.global_step, planes=batch["planes"]
        )
        return {"loss": result.total, **result.parts}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the objective act on the gradients of a whole step."""
        self.objective.before_step(self.global_step)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Update the weights, then let the objective act: an EMA teacher moves once per update, not per micro-step."""
        super().optimizer_step(*arguments, **keywords)
        average_statistics(self.objective)  # before a teacher copies them
        self.objective.after_step(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; the learning rate is set by a callback, as a function of the step."""
        optimizer = build_pretrain_optimizer(self.objective, self.config.optim)
        moments, self._moments = self._moments, None  # copied: twice the weights need not stay in memory
        if moments is not None:
            log.info(take_up_moments(optimizer, self.objective, moments))
        return optimizer


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics of the batch norms in training mode over all processes, in place."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    own = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if not own or not is_distributed():
        return
    every = torch.cat(own)
    dist.all_reduce(every)
    every /= dist.get_world_size()
    for buffer, mean in zip(own, every.split([len(buffer) for buffer in own]), strict=True):
        buffer.copy_(mean)
