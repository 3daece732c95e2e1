"""Training step of stage 1 as a Lightning module."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.dataset import SliceBatch, batch_to_input
from samgraft.shared.training.processes import is_distributed, is_sharded, mark_fsdp_root, shard_module
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives import Objective
from samgraft.ssl.optimizer import Moments, build_pretrain_optimizer, restore_moments
from torch import nn

log = logging.getLogger(__name__)


class PretrainModule(pl.LightningModule):
    """One objective, its optimizer and its schedule."""

    def __init__(self, objective: Objective, config: PretrainConfig, *, moments: Moments | None = None) -> None:
        """Store the objective.

        Raises:
            UsageError: If an average of the weights would change nothing.
        """
        if config.optim.ema_decay is not None and objective.exported_encoder is not objective.encoder:
            raise UsageError(
                f"optim.ema_decay has no effect on objective={config.objective.name}, which exports a teacher that is "
                "an average already. Remove it.",
                where="optim.ema_decay",
            )
        super().__init__()
        self.objective = objective
        self.config = config
        self._moments = moments

    def configure_model(self) -> None:
        """Shard blocks, neck, encoder and the rest of the objective for ``trainer.strategy=fsdp``."""
        mesh = self.device_mesh
        if mesh is None or is_sharded(self):
            return
        part = mesh["data_parallel"]
        # A module is sharded after its submodules, and each unit gathers its weights for its own forward pass only.
        for encoder in [m for m in self.objective.modules() if isinstance(m, ImageEncoder)]:
            for unit in encoder.units():
                shard_module(unit, part)
            shard_module(encoder.neck, part, methods=encoder.neck_entry_points)
            shard_module(encoder, part, methods=encoder.entry_points)
        shard_module(self.objective, part, methods=("loss", "panel"))

    def on_fit_start(self) -> None:
        """Mark the objective as the FSDP root."""
        # FSDP takes the first module that runs as the root. Without the mark this would be a part of the objective,
        # because monitoring at the start runs the encoder alone.
        if is_sharded(self):
            mark_fsdp_root(self.objective)

    def training_step(self, batch: SliceBatch, batch_idx: int) -> dict[str, torch.Tensor]:
        """Return the loss of one micro-step and its parts, which the progress callback logs."""
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
        # An objective that does not pass its loss through ``anchored`` would ignore the anchor.
        assert self.objective.anchor is None or "anchor" in result.parts
        return {"loss": result.total, **result.parts}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the objective change the gradients of a whole step."""
        self.objective.before_step(self.global_step)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Update the weights, then let the objective update its teacher."""
        super().optimizer_step(*arguments, **keywords)
        # The order matters. The teacher copies the student's running statistics, so they are averaged first, and it
        # moves once per optimizer step and not per micro-step.
        average_statistics(self.objective)
        self.objective.after_step(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with restored moments. A callback sets the learning rate as a function of the step."""
        optimizer = build_pretrain_optimizer(self.objective, self.config.optim)
        # The optimizer has its own copy, so twice the size of the weights need not stay in memory.
        moments, self._moments = self._moments, None
        if moments is not None:
            log.info(restore_moments(optimizer, self.objective, moments))
        return optimizer


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics of the batch norms in training mode over all processes, in place.

    Only ``vit_t`` from random weights has batch norms whose statistics change. Each batch is normalised by the
    statistics of its own process, because torch's SyncBatchNorm needs a GPU. Averaging the running statistics after
    every step makes them equal everywhere. Otherwise DDP would keep those of the first process and FSDP those of each
    process, and monitoring, training states and results would depend on the process that computes them.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    own = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if not own or not is_distributed():
        return
    mean = torch.cat(own)
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for buffer, average in zip(own, mean.split([len(buffer) for buffer in own]), strict=True):
        buffer.copy_(average)
