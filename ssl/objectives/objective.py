"""Base class of the objectives and the loss that they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.anchor import Anchor, AnchorConfig, AnchorKind
from samgraft.ssl.objectives.panels import Panel
from samgraft.ssl.views.masking import token_masks
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ObjectiveLoss:
    """The loss of one batch."""

    total: torch.Tensor
    """Loss to minimise, a float32 scalar."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further scalars to log, detached."""
    features_BC: torch.Tensor | None = None
    """One detached feature vector per sample, for the health measures."""


class Objective(nn.Module, ABC):
    """A self-supervised loss with the encoder that it trains and its own decoder or heads.

    A new objective is a subclass with its settings in one file of this folder, a line in ``OBJECTIVES``, and the
    presets ``configs/pretrain/NAME-cpu.yaml`` and ``NAME-gpu.yaml``.
    """

    settings_type: ClassVar[type[Any]]
    """Frozen dataclass of the section ``objective.NAME`` of a configuration. Every setting has a default."""
    encoder: Any
    """The image encoder that is trained, an ``ImageEncoder``."""

    def __init__(self, encoder: Any, config: Any, *, seed: int, max_steps: int = 1) -> None:
        """Keep the encoder and the settings.

        Args:
            encoder: The encoder to train.
            config: An instance of ``settings_type``.
            seed: Seed of the run; masks, crops and random directions follow from it.
            max_steps: Number of optimizer steps of the run, for schedules.
        """
        # The encoder is registered first. Names and order of the parameters are part of training states and of the
        # numbering of the optimizer state.
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.max_steps = max_steps
        self.anchor: Anchor | None = None
        self.anchor_weight = 0.0

    @property
    def exported_encoder(self) -> Any:
        """The encoder that the run exports, which is the trained one unless an EMA teacher follows it."""
        return self.encoder

    @abstractmethod
    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the loss of a batch.

        The loss is a pure function of the weights and the arguments, so that a resumed run repeats it. Without
        gradients (held-out slices) nothing changes; with gradients, statistics may be collected in buffers, which take
        effect in :meth:`after_step`.

        Args:
            images_B1SS: Slices in [0, 1] at the size of the encoder's input.
            sample_counters: Position of each sample in the run.
            step: Optimizer steps taken so far.
            planes: Plane of each slice. It decides which flips are anatomically valid; None flips nothing.
        """

    @abstractmethod
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return pictures that show what the encoder has learned."""

    def references(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Mapping[str, float]:
        """Return the grey error of predictions that need no network, by name, if there are any."""
        return {}

    def set_anchor(self, config: AnchorConfig) -> None:
        """Copy the present encoder as the anchor of the training, if the settings want one."""
        if config.kind is not AnchorKind.NONE:
            self.anchor, self.anchor_weight = Anchor(self.encoder, config.kind), config.weight

    def anchored(
        self,
        loss: ObjectiveLoss,
        features_BChw: torch.Tensor,
        encode: Callable[[Any], torch.Tensor],
        *,
        hidden_Bhw: torch.Tensor | None = None,
    ) -> ObjectiveLoss:
        """Add the anchor's penalty to a loss.

        Every :meth:`loss` returns its result through this method.

        Args:
            loss: Loss of the objective alone.
            features_BChw: Features of the trained encoder before the neck.
            encode: Function that computed them from the trained encoder.
            hidden_Bhw: True = hidden, on the grid of the features or a coarser one. None hides nothing.
        """
        if self.anchor is None:
            return loss
        distance = self.anchor.distance(self.encoder, features_BChw, encode, hidden_Bhw=hidden_Bhw)
        parts = {**loss.parts, "anchor": distance.detach()}
        # On held-out slices the loss is the objective's own, so that runs with and without an anchor can be compared.
        total = loss.total + self.anchor_weight * distance if torch.is_grad_enabled() else loss.total
        return replace(loss, total=total, parts=parts)

    def draw_masks(self, sample_counters: Sequence[int], *, side: int) -> torch.Tensor:
        """Return one token mask (B, side, side) per sample by the settings ``mask_ratio`` and ``mask_kind``."""
        return token_masks(
            sample_counters,
            seed=self.seed,
            grid_hw=(side, side),
            mask_ratio=self.config.mask_ratio,
            kind=self.config.mask_kind,
            # Only encoders that can leave tokens out have attention windows that masks can follow.
            attn_window_size=getattr(self.encoder, "attn_window_size", None),
        )

    def before_step(self, step: int) -> None:
        """Change the gradients before optimizer step ``step``, counted from 0."""

    def after_step(self, step: int) -> None:
        """Update an EMA teacher and its centers after optimizer step ``step``, counted from 0."""


def freeze_unused_neck(encoder: Any, *, train_neck: bool) -> int:
    """Freeze the neck unless it trains, and return the number of channels that decoder or heads read.

    With ``train_neck`` they read the image embeddings behind SAM's neck. Otherwise they read the features before it,
    and the neck keeps SAM's weights exactly.
    """
    if not train_neck:
        encoder.neck.requires_grad_(False)
    # No objective runs them, and DDP would wait for their gradients.
    for layer in encoder.high_res_layers():
        layer.requires_grad_(False)
    channels: int = encoder.spec.neck_dim if train_neck else encoder.feature_dim
    return channels
