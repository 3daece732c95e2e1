"""Segmentation losses: an overlap term, a pixel term and, on request, a boundary term, all MONAI's.

Exclusive classes: softmax with the background's logit fixed to 0. Overlapping classes and prompted objects: sigmoid.

Shape letters: N = slices, P = masks of prompts, C = foreground classes, S = side of the loss's grid, h, w = logits'
sides. Everything but ``MaskLoss`` works on volumes (one more axis) too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from samgraft.shared.errors import UsageError
from torch import Tensor, nn


class Overlap(Enum):
    """How overlap of prediction and truth enters the loss."""

    DICE = "dice"
    """Soft Dice."""
    TVERSKY = "tversky"
    """Dice with false positives and false negatives weighted apart: for small lesions that are missed."""


class PixelTerm(Enum):
    """How single pixels enter the loss."""

    CROSS_ENTROPY = "cross_entropy"
    FOCAL = "focal"
    """Cross-entropy in which pixels that are right already hardly count."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Overlap term + pixel term + boundary term."""

    overlap: Overlap = Overlap.DICE
    """dice or tversky."""
    pixel: PixelTerm = PixelTerm.CROSS_ENTROPY
    """cross_entropy or focal."""
    dice_weight: float = 1.0
    """Of the overlap term: foreground only, over the whole batch (per mask with prompts)."""
    ce_weight: float = 1.0
    """Of the pixel term: over all pixels."""
    boundary_weight: float = 0.0
    """Of Kervadec's boundary loss (arXiv 1812.07032); start near 0.01, beside an overlap term. It needs distance maps
    on the CPU, some milliseconds per slice and class."""
    focal_gamma: float = 2.0
    """Exponent of the focal term."""
    tversky_fp: float = 0.3
    """Weight of false positives."""
    tversky_fn: float = 0.7
    """Weight of false negatives; above tversky_fp misses cost more (arXiv 1706.05721)."""
    class_weights: list[float] = field(default_factory=list)
    """One per class in the order of data.classes or data.regions, background counts 1; empty: all alike."""
    size: int | None = None
    """Side of the grid on which the loss is taken; null: the input's. Logits are resized bilinearly, labels by nearest
    neighbour, which can lose structures of single pixels when it is smaller than the input."""

    def __post_init__(self) -> None:
        weights = (self.dice_weight, self.ce_weight, self.boundary_weight)
        if min(weights) < 0 or self.dice_weight + self.ce_weight == 0:
            raise ValueError(
                "loss.dice_weight, ce_weight and boundary_weight must not be negative, the first two not both 0."
            )
        if self.tversky_fp <= 0 or self.tversky_fn <= 0 or self.focal_gamma < 0:
            raise ValueError("loss.tversky_fp and tversky_fn must be positive, loss.focal_gamma not negative.")
        if any(weight <= 0 for weight in self.class_weights):
            raise ValueError(f"loss.class_weights must be positive, got {self.class_weights}.")
        if self.size is not None and self.size < 8:
            raise ValueError(f"loss.size must be at least 8 or null, got {self.size}.")

    def check_classes(self, num_classes: int) -> None:
        """Refuse class weights that do not fit the classes.

        Raises:
            UsageError: Another number than classes.
        """
        if self.class_weights and len(self.class_weights) != num_classes:
            raise UsageError(
                f"loss.class_weights must be one per class ({num_classes}), got {len(self.class_weights)}.",
                where="loss.class_weights",
            )


def with_background(logits_NCSS: Tensor) -> Tensor:
    """Put the background's logit, 0, in front: softmax over the result is a sigmoid for one class."""
    return torch.cat([torch.zeros_like(logits_NCSS[:, :1]), logits_NCSS], dim=1)


class SegmentationLoss(nn.Module):
    """Loss of named classes on logits that are upsampled to the label's grid (never the label down to the logits').

    The overlap term runs over the whole batch per class, foreground only: per slice it would be constant, and its
    gradient noise, on every slice without the class.
    """

    def __init__(self, config: LossConfig | None = None, *, overlapping: bool = False) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.overlapping = overlapping
        activation: dict[str, Any] = {"sigmoid": True} if overlapping else {"softmax": True}
        # A single sigmoid channel is no background.
        options = {**activation, "to_onehot_y": not overlapping, "include_background": overlapping}
        self.overlap = _overlap_term(self.config, batch=True, **options)
        self.pixel = self._pixel_term()
        self.boundary = _boundary_term(self.config, **options)

    def forward(self, low_res_logits_NChw: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            low_res_logits_NChw: SAM's logits, a quarter of the grid or any size.
            target: Exclusive classes: channel index per pixel (N, S, S), 0 = background, int64. Overlapping classes:
                (N, C, S, S), bool.
        """
        if target.ndim == low_res_logits_NChw.ndim - 1:
            target = target[:, None]
        logits, target = on_loss_grid(low_res_logits_NChw, target, size=self.config.size)
        target = target.float() if self.overlapping else target
        filled = logits if self.overlapping else with_background(logits)
        loss = filled.new_zeros(())
        if self.config.dice_weight:
            per_class = self.overlap(filled, target).reshape(-1)
            loss = loss + self.config.dice_weight * self._mean_over_classes(per_class)
        if self.config.ce_weight:
            loss = loss + self.config.ce_weight * self.pixel(filled, target)
        if self.boundary is not None:
            per_class = self.boundary(filled, target).reshape(len(filled), -1).mean(dim=0)
            loss = loss + self.config.boundary_weight * self._mean_over_classes(per_class)
        return loss

    def _mean_over_classes(self, per_class: Tensor) -> Tensor:
        if not self.config.class_weights:
            return per_class.mean()
        weights = per_class.new_tensor(self.config.class_weights)
        return (weights * per_class).sum() / weights.sum()

    def _pixel_term(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        if config.pixel is PixelTerm.FOCAL:
            from monai.losses.focal_loss import FocalLoss

            focal = FocalLoss(
                gamma=config.focal_gamma,
                use_softmax=not self.overlapping,
                to_onehot_y=not self.overlapping,
                reduction="none",
            )

            def focal_term(logits: Tensor, target: Tensor) -> Tensor:
                # Softmax: only the true class's term differs from 0, so that the sum is one value per pixel.
                values: Tensor = focal(logits, target)
                values = (values * self._channel_weights(values)).sum(dim=1)
                return values.mean() / (logits.shape[1] if self.overlapping else 1)

            return focal_term
        if self.overlapping:
            return lambda logits, target: (
                F.binary_cross_entropy_with_logits(logits, target, reduction="none") * self._channel_weights(logits)
            ).mean()

        def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
            weights = logits.new_tensor([1.0, *config.class_weights]) if config.class_weights else None
            return F.cross_entropy(logits, target[:, 0], weight=weights)

        return cross_entropy

    def _channel_weights(self, like_NC: Tensor) -> Tensor:
        weights = self.config.class_weights or [1.0] * (like_NC.shape[1] - (not self.overlapping))
        full = weights if self.overlapping else [1.0, *weights]
        return like_NC.new_tensor(full).view(1, -1, *[1] * (like_NC.ndim - 2))


class MaskLoss(nn.Module):
    """The same terms for single masks: one value per mask, so that the best of several can be chosen."""

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.overlap = _overlap_term(self.config, batch=False, sigmoid=True)
        self.boundary = _boundary_term(self.config, sigmoid=True)
        self.focal: nn.Module | None = None
        if self.config.pixel is PixelTerm.FOCAL:
            from monai.losses.focal_loss import FocalLoss

            self.focal = FocalLoss(gamma=self.config.focal_gamma, reduction="none")

    def forward(self, low_res_logits_Phw: Tensor, masks_PSS: Tensor) -> Tensor:
        """Return one loss per mask, (P,).

        Args:
            low_res_logits_Phw: One mask each.
            masks_PSS: The objects, bool.
        """
        logits, target = on_loss_grid(low_res_logits_Phw[:, None], masks_PSS[:, None], size=self.config.size)
        target = target.float()
        loss = logits.new_zeros(len(logits))
        if self.config.dice_weight:
            loss = loss + self.config.dice_weight * self.overlap(logits, target).flatten(1).mean(dim=1)
        if self.config.ce_weight:
            pixel = self.focal or _binary_cross_entropy
            loss = loss + self.config.ce_weight * pixel(logits, target).flatten(1).mean(dim=1)
        if self.boundary is not None:
            loss = loss + self.config.boundary_weight * self.boundary(logits, target).flatten(1).mean(dim=1)
        return loss


def on_loss_grid(logits_NChw: Tensor, target_NXSS: Tensor, *, size: int | None) -> tuple[Tensor, Tensor]:
    """Bring logits (bilinear, float32) and labels (nearest, only if ``size`` says so) to one grid."""
    if size is not None and target_NXSS.shape[-1] != size:
        if target_NXSS.ndim != 4:
            raise ValueError("loss.size is for slices; volumes keep their grid.")
        small = F.interpolate(target_NXSS.float(), size=(size, size), mode="nearest-exact")
        target_NXSS = small.to(target_NXSS.dtype)
    logits_NChw = logits_NChw.float()
    if logits_NChw.shape[2:] != target_NXSS.shape[2:]:
        logits_NChw = F.interpolate(logits_NChw, size=target_NXSS.shape[2:], mode="bilinear", align_corners=False)
    return logits_NChw, target_NXSS


def _overlap_term(config: LossConfig, *, batch: bool, **options: Any) -> nn.Module:
    # Imported here: MONAI takes seconds, and configurations are read without it.
    if config.overlap is Overlap.TVERSKY:
        from monai.losses.tversky import TverskyLoss

        return TverskyLoss(alpha=config.tversky_fp, beta=config.tversky_fn, batch=batch, reduction="none", **options)
    from monai.losses.dice import DiceLoss

    return DiceLoss(batch=batch, reduction="none", **options)


def _boundary_term(config: LossConfig, **options: Any) -> nn.Module | None:
    if not config.boundary_weight:
        return None
    from monai.losses.boundary_loss import BoundaryLoss

    return BoundaryLoss(reduction="none", **options)


def _binary_cross_entropy(logits: Any, target: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
