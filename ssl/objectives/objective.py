"""The one protocol that every objective fulfils, and what it returns per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from samgraft.shared.encoders.vit import MaskableEncoder
from samgraft.shared.scans.orientation import Plane
from torch import nn

HIDDEN_IS_GREY = "Hidden pixels are grey in the second column; the encoder never saw them."
GIVEN_BRIGHTNESS = " Brightness and contrast of every hidden square are given in the output, its structure is guessed."


@dataclass(frozen=True, kw_only=True)
class ObjectiveLoss:
    """The loss of one batch."""

    total: torch.Tensor
    """Scalar, float32; the one that is minimised."""
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further scalars to log, detached."""
    features_BC: torch.Tensor | None = None
    """One detached feature vector per sample, for the health measures."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What a person looks at: the same slices through every column, all in [0, 1]."""

    columns: Sequence[str]
    images_KBHW: torch.Tensor
    """Shape (K columns, B slices, H, W), float32."""
    caption: str = ""
    """What the columns are, in words for the report."""


class WithoutTeacher:
    """What objectives without a teacher share: the trained encoder is handed on, and nothing happens between steps."""

    encoder: Any

    @property
    def exported_encoder(self) -> MaskableEncoder:
        """The trained encoder."""
        encoder: MaskableEncoder = self.encoder
        return encoder

    def before_step(self, step: int) -> None:
        """Nothing to do."""

    def after_step(self, step: int) -> None:
        """Nothing to do."""


@runtime_checkable
class Objective(Protocol):
    """A module that owns the encoder being trained and everything that is thrown away with the objective."""

    @property
    def encoder(self) -> MaskableEncoder:
        """The encoder that is trained."""
        ...

    @property
    def exported_encoder(self) -> MaskableEncoder:
        """The encoder that is handed on: the trained one, or an EMA teacher that follows it."""
        ...

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the loss of a batch; a pure function of the weights, the images, the counters, the step and planes.

        The planes of the slices decide which mirror images exist; without them no view is mirrored.

        Without gradients (held-out slices) it changes nothing; with them it may collect statistics in buffers, which
        take effect in :meth:`after_step`.
        """
        ...

    def before_step(self, step: int) -> None:
        """Act on the gradients before optimizer step ``step`` (counted from 0): hold a layer still, or nothing."""
        ...

    def after_step(self, step: int) -> None:
        """Act after optimizer step ``step`` (counted from 0): move an EMA teacher and its centers, or nothing."""
        ...

    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return pictures that show whether the encoder learns."""
        ...

    def references(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Mapping[str, float]:
        """Return what trivial answers score on these slices, by name of a loss part and answer; may be empty."""
        ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module``."""
        ...
