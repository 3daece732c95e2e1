"""Lightning module of stage 2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import pytorch_lightning as pl
import torch
from samgraft.finetune.adapters import RankUpdates, trainable_tensors
from samgraft.finetune.baselines.networks import SliceBaseline
from samgraft.finetune.classes import ClassTable, mark_ignored
from samgraft.finetune.config import FinetuneConfig, SelftrainMode
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.prompting.prompted_loss import PromptedLoss
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.training.cached_slices import CachedBatch
from samgraft.finetune.training.online import OnlineTeacher
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.samples.dataset import SliceBatch, batch_to_input
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.training.boundary import StepBoundary
from samgraft.shared.training.optim import build_optimizer
from torch import Tensor


class FinetuneModule(pl.LightningModule):
    """Segmenter with its loss and its optimizer."""

    def __init__(
        self,
        segmenter: Segmenter,
        config: FinetuneConfig,
        classes: ClassTable,
        *,
        rank_updates: RankUpdates | None = None,
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.config = config
        self.classes = classes
        self.rank_updates = rank_updates
        self.loss = SegmentationLoss(config.loss, overlapping=classes.is_overlapping)
        self.teacher: OnlineTeacher | None = None
        if config.selftrain.mode is SelftrainMode.ONLINE:
            self.teacher = OnlineTeacher(config)
        self.prompted_loss = PromptedLoss(config.prompt, config.loss, seed=config.seed)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of one micro-step."""
        if self.teacher is not None:
            return self._penalised(self._online_losses(batch, self.teacher))
        if isinstance(self.segmenter, SliceBaseline):
            inputs, label = self._plain(batch)
            return {"loss": self.loss(self.segmenter(inputs), self.classes.to_target(label))}
        features, labels_NSS = self._embedded(batch)
        if self.config.prompt.is_prompted:
            masks_NCSS = mark_ignored(self.classes.to_masks(labels_NSS), labels_NSS)
            counters = batch["sample_counter"].tolist()
            losses: dict[str, Tensor] = self.prompted_loss(self.segmenter.sam, features, masks_NCSS, counters)
        else:
            logits_NChw = self.segmenter.decode(features)
            losses = {"loss": self.loss(logits_NChw, self.classes.to_target(labels_NSS))}
        return self._penalised(losses)

    def _penalised(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        # peft adds this penalty in its own forward, which is not called here.
        if self.rank_updates is not None:
            losses["loss"] = losses["loss"] + self.rank_updates.penalty()
        return losses

    def _online_losses(self, batch: SliceBatch, teacher: OnlineTeacher) -> dict[str, Tensor]:
        """Return the losses on labels and on the teacher's labels."""
        images_NCSS, labels_NSS = self._framed(batch)
        num_labelled = len(images_NCSS) - self.config.num_pseudo_per_batch
        with self._averaged_weights():
            pseudo_USS = teacher.label(self.segmenter, images_NCSS[num_labelled:])
        target_NSS = self.classes.to_target(labels_NSS)
        counters = batch["sample_counter"].tolist()
        mixed = teacher.mix(images_NCSS, target_NSS, pseudo_USS, counters=counters, planes=batch["planes"])
        logits_NChw = self.segmenter(mixed.images_NCSS)
        known, pseudo = self.loss(logits_NChw, mixed.known_NSS), self.loss(logits_NChw, mixed.pseudo_NSS)
        # Before a trainer exists, the pre-flight measures a step.
        step = self.trainer.global_step if self._trainer is not None else 0
        share = (mixed.pseudo_NSS != IGNORE_LABEL).float().mean()
        total = known + teacher.weight(step) * pseudo
        return {"loss": total, "loss/labels": known.detach(), "loss/pseudo": pseudo.detach(), "pseudo_share": share}

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the module has the averaged weights of the run."""
        # Before a trainer exists, the pre-flight measures a step, which costs the same with any weights.
        callbacks: list[Any] = self.trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]
        averages = [c.average for c in callbacks if isinstance(c, StepBoundary) and c.average is not None]
        return averages[0].applied() if averages else nullcontext()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, then the ranks of adalora."""
        # Lightning raises global_step in the call below; adalora counts the step that is being done.
        step = self.trainer.global_step + 1
        super().optimizer_step(*args, **kwargs)
        if self.rank_updates is not None:
            self.rank_updates.after_update(step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rank state of adalora to the training state."""
        if self.rank_updates is not None:
            checkpoint["rank_updates"] = self.rank_updates.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the rank state of adalora."""
        if self.rank_updates is not None:
            self.rank_updates.load(checkpoint["rank_updates"])

    def _plain(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and label ids for a baseline, as slices or as patches of volumes."""
        if "volume" in batch:
            return batch["volume"], batch["label"]
        return self._framed(batch)

    def _embedded(self, batch: SliceBatch | CachedBatch) -> tuple[ImageFeatures, Tensor]:
        """Return features and label ids from the encoder or from the cache."""
        if "features" in batch:
            cached = cast(CachedBatch, batch)
            return cached["features"], cached["labels_NSS"]
        images_NCSS, labels_NSS = self._framed(batch)
        return self.segmenter.embed(images_NCSS), labels_NSS

    def _framed(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return slices and label ids in the input frame."""
        images_NCSS, labels_NSS, _ = batch_to_input(
            batch,
            image_size=self.segmenter.image_size,
            keep_aspect=self.config.data.keep_aspect,
            device=self.device,
        )
        assert labels_NSS is not None
        return images_NCSS, labels_NSS

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trainable tensors."""
        if isinstance(self.segmenter, SliceBaseline):
            return build_optimizer(self.segmenter, self.config.optim)
        encoder: Any = self.segmenter.sam.image_encoder
        optimizer = build_optimizer(self.segmenter, self.config.optim, layer_groups=_trainable_groups(encoder))
        # All mask tokens are one tensor. Weight decay would shrink the tokens that no class uses, which get no
        # gradient.
        tokens = [p for name, p in trainable_tensors(self.segmenter.sam).items() if "mask_tokens" in name]
        _exempt_from_decay(optimizer, tokens)
        return optimizer


def _trainable_groups(encoder: Any) -> list[tuple[int, list[torch.nn.Parameter]]]:
    return [(depth, [p for p in parameters if p.requires_grad]) for depth, parameters in encoder.layer_groups()]


def _exempt_from_decay(optimizer: torch.optim.Optimizer, exempt: list[torch.nn.Parameter]) -> None:
    # By identity, because == on tensors compares their values.
    wanted = {id(p) for p in exempt}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in wanted]
        if moved and group["weight_decay"]:
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": moved, "weight_decay": 0.0})
