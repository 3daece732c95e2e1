"""The one protocol that every objective fulfils, and what it returns per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from samgraft.shared.models.image_encoder import MaskableEncoder
from torch import nn


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


@runtime_checkable
class Objective(Protocol):
    """A module that owns the encoder being trained and everything that is thrown away with the objective."""

    @property
    def encoder(self) -> MaskableEncoder:
        """The encoder that is exported; an objective with a teacher says which of the two."""
        ...

    def loss(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int], step: int) -> ObjectiveLoss:
        """Return the loss of a batch; a pure function of the weights, the images, the counters and the step."""
        ...

    def after_step(self, step: int) -> None:
        """Act after an optimizer step: move an EMA teacher, cancel gradients, or nothing."""
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
