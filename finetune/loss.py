"""Segmentation loss: Dice and cross-entropy over softmax with the background's logit fixed to 0.

Shape letters: N = slices, C = foreground classes, S = side of the encoder's input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn


def with_background(logits_NCSS: Tensor) -> Tensor:
    """Put the background's logit, 0, in front: softmax over the result is a sigmoid for one class."""
    return torch.cat([torch.zeros_like(logits_NCSS[:, :1]), logits_NCSS], dim=1)


class SegmentationLoss(nn.Module):
    """MONAI's DiceCE on logits that are upsampled to the label's grid (never the label down to the logits').

    Dice runs over the whole batch per class, foreground only: per slice it would be constant, and its gradient noise,
    on every slice without the class.
    """

    def __init__(self, *, dice_weight: float = 1.0, ce_weight: float = 1.0) -> None:
        super().__init__()
        self.dice_ce = DiceCELoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            batch=True,
            lambda_dice=dice_weight,
            lambda_ce=ce_weight,
        )

    def forward(self, low_res_logits_NChw: Tensor, channels_NSS: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            low_res_logits_NChw: SAM's logits, a quarter of the grid or any size.
            channels_NSS: Channel index per pixel (0 = background), int64.
        """
        logits = F.interpolate(
            low_res_logits_NChw.float(), size=channels_NSS.shape[-2:], mode="bilinear", align_corners=False
        )
        loss: Tensor = self.dice_ce(with_background(logits), channels_NSS[:, None])
        return loss
