"""Segmentation losses with an overlap term, a pixel term and an optional boundary term of MONAI.

Exclusive classes: softmax with the background's logit fixed to 0. Overlapping classes and prompted objects: sigmoid.

Pixels of the target with ``IGNORE_LABEL`` change nothing: the loss is the one of the other pixels. Only the distance
maps of the boundary term count them, as pixels outside the structure.

Shape letters: N = slices, P = masks of prompts, C = foreground classes, S = side of the loss's grid, h, w = logits'
sides. All but ``MaskLoss`` work on volumes too, with one more axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import Enum
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from samgraft.finetune.classes import IGNORE_LABEL
from samgraft.shared.config import NonNegative, Positive
from samgraft.shared.errors import UsageError
from torch import Tensor, nn

NO_CLASS_LOGIT = -1e4
"""Logit of pixels that are not annotated, whose probability is then 0."""


class Overlap(Enum):
    """Overlap term of the loss."""

    DICE = "dice"
    """Soft Dice."""
    TVERSKY = "tversky"
    """Dice with separate weights of false positives and false negatives, for small lesions that are missed."""


class PixelTerm(Enum):
    """Pixel term of the loss."""

    CROSS_ENTROPY = "cross_entropy"
    FOCAL = "focal"
    """Cross-entropy with a small weight of pixels that are already correct."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the loss and their weights."""

    overlap: Overlap = Overlap.DICE
    """Overlap term, dice or tversky."""
    pixel: PixelTerm = PixelTerm.CROSS_ENTROPY
    """Pixel term, cross_entropy or focal."""
    dice_weight: NonNegative = 1.0
    """Weight of the overlap term, which is taken over the foreground of the whole batch (per mask with prompts)."""
    ce_weight: NonNegative = 1.0
    """Weight of the pixel term, which is taken over all pixels."""
    boundary_weight: NonNegative = 0.0
    """Weight of Kervadec's boundary loss (arXiv 1812.07032). Start near 0.01, together with an overlap term. It
    computes distance maps on the CPU in some milliseconds per slice and class."""
    focal_gamma: NonNegative = 2.0
    """Exponent of the focal term."""
    tversky_fp: Positive = 0.3
    """Weight of false positives."""
    tversky_fn: Positive = 0.7
    """Weight of false negatives. Misses cost more when it is above tversky_fp (arXiv 1706.05721)."""
    class_weights: list[Positive] = field(default_factory=list)
    """Weights of the classes in the order of data.classes or data.regions, relative to the background's 1. Empty
    weights all classes equally."""
    size: Annotated[int, Ge(8)] | None = None
    """Side of the grid of the loss in pixels. null takes the input's. Logits are resized bilinearly and labels by
    nearest neighbour. A grid smaller than the input can lose structures of single pixels."""

    def __post_init__(self) -> None:
        if self.dice_weight + self.ce_weight == 0:
            raise ValueError("loss.dice_weight and loss.ce_weight must not both be 0.")

    def check_classes(self, num_classes: int) -> None:
        """Refuse class weights that do not fit the classes.

        Raises:
            UsageError: If their number differs from the number of classes.
        """
        if self.class_weights and len(self.class_weights) != num_classes:
            raise UsageError(
                f"loss.class_weights must be one per class ({num_classes}), got {len(self.class_weights)}.",
                where="loss.class_weights",
            )


def with_background(logits_NCSS: Tensor) -> Tensor:
    """Prepend the background's logit 0. With one class the softmax of the result is a sigmoid."""
    return torch.cat([torch.zeros_like(logits_NCSS[:, :1]), logits_NCSS], dim=1)


class SegmentationLoss(nn.Module):
    """Loss of named classes, on logits that are upsampled to the grid of the labels.

    The overlap term is taken per foreground class over the whole batch. Per slice it would be constant, and its
    gradient noise, on every slice without the class.
    """

    def __init__(self, config: LossConfig | None = None, *, overlapping: bool = False) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.overlapping = overlapping
        activation: dict[str, Any] = {"sigmoid": True} if overlapping else {"softmax": True}
        # With a sigmoid, channel 0 is a class and not the background.
        options = {**activation, "to_onehot_y": not overlapping, "include_background": overlapping}
        self.overlap = _overlap_term(self.config, batch=True, **options)
        self.pixel = self._pixel_term()
        self.boundary = _boundary_term(self.config, **options)

    def forward(self, low_res_logits_NChw: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            low_res_logits_NChw: SAM's logits, of a quarter of the grid's size or any other.
            target: For exclusive classes the channel of each pixel (N, S, S), 0 = background, int64. For overlapping
                classes masks (N, C, S, S) of 0 and 1. Both with ``IGNORE_LABEL`` where nothing is annotated.
        """
        if target.ndim == low_res_logits_NChw.ndim - 1:
            target = target[:, None]
        logits, target = on_loss_grid(low_res_logits_NChw, target, size=self.config.size)
        logits, target, ignored = _neutralise_ignored(logits, target)
        target = target.float() if self.overlapping else target
        # Exclusive classes need the background as a channel of the softmax.
        filled = logits if self.overlapping else with_background(logits)
        loss = filled.new_zeros(())
        if self.config.dice_weight:
            per_class = self.overlap(filled, target).reshape(-1)
            loss = loss + self.config.dice_weight * self._mean_over_classes(per_class)
        if self.config.ce_weight:
            loss = loss + self.config.ce_weight * self.pixel(filled, target, ignored)
        if self.boundary is not None:
            per_class = self.boundary(filled, target).reshape(len(filled), -1)
            per_class = (per_class * _rescale(ignored)).mean(dim=0)
            loss = loss + self.config.boundary_weight * self._mean_over_classes(per_class)
        return loss

    def _mean_over_classes(self, per_class: Tensor) -> Tensor:
        if not self.config.class_weights:
            return per_class.mean()
        weights = per_class.new_tensor(self.config.class_weights)
        return (weights * per_class).sum() / weights.sum()

    def _pixel_term(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        config = self.config
        if config.pixel is PixelTerm.FOCAL:
            from monai.losses.focal_loss import FocalLoss

            focal = FocalLoss(
                gamma=config.focal_gamma,
                use_softmax=not self.overlapping,
                to_onehot_y=not self.overlapping,
                reduction="none",
            )

            def focal_term(logits: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
                # With a softmax only the term of the true class differs from 0, so the sum is one value per pixel.
                values: Tensor = focal(logits, target)
                values = (values * self._channel_weights(values)).sum(dim=1)
                return values.mean() * _rescale(ignored, batch=True) / (logits.shape[1] if self.overlapping else 1)

            return focal_term
        if self.overlapping:
            return lambda logits, target, ignored: (
                (
                    F.binary_cross_entropy_with_logits(logits, target, reduction="none") * self._channel_weights(logits)
                ).mean()
                * _rescale(ignored, batch=True)
            )

        def cross_entropy(logits: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
            # PyTorch divides by the sum of the weights of the pixels, so that they change the balance, not the size.
            weights = logits.new_tensor([1.0, *config.class_weights]) if config.class_weights else None
            known = target.masked_fill(ignored, IGNORE_LABEL)[:, 0]
            value = F.cross_entropy(logits, known, weight=weights, ignore_index=IGNORE_LABEL)
            # The mean over no pixel is NaN. Its gradient is 0.
            return torch.where(ignored.all(), torch.zeros_like(value), value)

        return cross_entropy

    def _channel_weights(self, like_NC: Tensor) -> Tensor:
        weights = self.config.class_weights or [1.0] * (like_NC.shape[1] - (not self.overlapping))
        full = weights if self.overlapping else [1.0, *weights]
        return like_NC.new_tensor(full).view(1, -1, *[1] * (like_NC.ndim - 2))


class MaskLoss(nn.Module):
    """Loss of single masks, one value per mask, so that the best of several can be chosen."""

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
            low_res_logits_Phw: Logits of one mask each.
            masks_PSS: True masks of 0 and 1, with ``IGNORE_LABEL`` where nothing is annotated.
        """
        logits, target = on_loss_grid(low_res_logits_Phw[:, None], masks_PSS[:, None], size=self.config.size)
        logits, target, ignored = _neutralise_ignored(logits, target)
        scale_P = _rescale(ignored).flatten()
        target = target.float()
        loss = logits.new_zeros(len(logits))
        if self.config.dice_weight:
            loss = loss + self.config.dice_weight * self.overlap(logits, target).flatten(1).mean(dim=1)
        if self.config.ce_weight:
            pixel = self.focal or _binary_cross_entropy
            loss = loss + self.config.ce_weight * pixel(logits, target).flatten(1).mean(dim=1) * scale_P
        if self.boundary is not None:
            loss = loss + self.config.boundary_weight * self.boundary(logits, target).flatten(1).mean(dim=1) * scale_P
        return loss


def on_loss_grid(logits_NChw: Tensor, target_NXSS: Tensor, *, size: int | None) -> tuple[Tensor, Tensor]:
    """Resize logits (bilinear, float32) and, with ``size``, labels (nearest) to one grid."""
    if size is not None and target_NXSS.shape[-1] != size:
        if target_NXSS.ndim != 4:
            raise ValueError("loss.size applies to slices only, got volumes. Set it to null.")
        # nearest-exact takes the pixel at the centre of each new one; nearest would shift labels by half a pixel.
        small = F.interpolate(target_NXSS.float(), size=(size, size), mode="nearest-exact")
        target_NXSS = small.to(target_NXSS.dtype)
    # bf16 logits are resized in float32: interpolation would lose most of their 8 bits.
    logits_NChw = logits_NChw.float()
    if logits_NChw.shape[2:] != target_NXSS.shape[2:]:
        logits_NChw = F.interpolate(logits_NChw, size=target_NXSS.shape[2:], mode="bilinear", align_corners=False)
    return logits_NChw, target_NXSS


def _neutralise_ignored(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make ignored pixels certain background, which adds nothing to any sum of a loss.

    Returns:
        Logits and target, and the ignored pixels (N, 1, ...).
    """
    ignored = target[:, :1] == IGNORE_LABEL
    # Sigmoid and softmax of this logit are exactly 0 in float32, and no gradient flows into a filled value.
    return logits.masked_fill(ignored, NO_CLASS_LOGIT), target.masked_fill(ignored, 0), ignored


def _rescale(ignored: Tensor, *, batch: bool = False) -> Tensor:
    """Return the factor from a mean over all pixels to one over the annotated pixels, 0 without any.

    Args:
        ignored: Ignored pixels (N, 1, ...).
        batch: Return one factor for all slices instead of one each (N, 1).
    """
    pixels = ignored.reshape(1 if batch else len(ignored), -1)
    known = (~pixels).sum(dim=1, keepdim=True)
    # Exactly 1 without ignored pixels, so that such losses keep their bytes.
    factor = pixels.shape[1] / known.clamp(min=1) * (known > 0)
    return factor[0, 0] if batch else factor


def _overlap_term(config: LossConfig, *, batch: bool, **options: Any) -> nn.Module:
    # MONAI takes seconds to import, and reading a configuration does not need it.
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
