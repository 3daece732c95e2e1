"""The training step of stage 2 as Lightning wants it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from samgraft.finetune.adapters import trainable_tensors
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.data.dataset import SliceBatch, batch_to_input
from samgraft.shared.training.optimizer import build_optimizer
from torch import Tensor


class FinetuneModule(pl.LightningModule):
    """A segmenter, its loss and its optimizer."""

    def __init__(self, segmenter: Segmenter, config: FinetuneConfig, classes: ClassTable) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.config = config
        self.classes = classes
        self.loss = SegmentationLoss(config.loss, overlapping=classes.is_overlapping)

    def training_step(self, batch: SliceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of one micro-step."""
        images_N1SS, labels_NSS, _ = batch_to_input(
            batch,
            image_size=self.segmenter.image_size,
            keep_aspect=self.config.data.keep_aspect,
            device=self.device,
        )
        assert labels_NSS is not None
        return {"loss": self.loss(self.segmenter(images_N1SS), self.classes.to_target(labels_NSS))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what trains; mask tokens that no class uses must not decay."""
        encoder: Any = self.segmenter.sam.image_encoder
        optimizer = build_optimizer(self.segmenter, self.config.optim, layer_groups=_trainable_groups(encoder))
        tokens = [p for name, p in trainable_tensors(self.segmenter.sam).items() if "mask_tokens" in name]
        _exempt_from_decay(optimizer, tokens)
        return optimizer


def _trainable_groups(encoder: Any) -> list[tuple[int, list[torch.nn.Parameter]]]:
    return [(depth, [p for p in parameters if p.requires_grad]) for depth, parameters in encoder.layer_groups()]


def _exempt_from_decay(optimizer: torch.optim.Optimizer, exempt: list[torch.nn.Parameter]) -> None:
    wanted = {id(p) for p in exempt}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in wanted]
        if moved and group["weight_decay"]:
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": moved, "weight_decay": 0.0})
