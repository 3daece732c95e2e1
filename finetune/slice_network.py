"""Fine-tuned SAM as one plain module for bundles, from slices of any size to logits on the same pixels.

Shape letters: N = slices; X, Y = columns and rows; C = foreground classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from samgraft.finetune.loss import with_background
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.registry import spec_from_dict
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.samples.frame import fit_frame, image_to_frame, logits_to_native
from torch import Tensor, nn


class SliceNetwork(nn.Module):
    """Segmentation network that is built from plain values, as a bundle's configuration needs it."""

    def __init__(
        self,
        *,
        spec: Mapping[str, Any],
        image_size: int,
        num_classes: int,
        num_mask_tokens: int = 4,
        keep_aspect: bool = True,
    ) -> None:
        super().__init__()
        sam = build_sam(spec_from_dict(spec), image_size=image_size, num_multimask_outputs=max(1, num_mask_tokens - 1))
        self.segmenter = Segmenter(sam, num_classes=num_classes)
        self.image_size = image_size
        self.keep_aspect = keep_aspect

    @torch.no_grad()
    def forward(self, images_N1XY: Tensor) -> Tensor:
        """Return logits (N, 1 + C, X, Y), background first.

        Args:
            images_N1XY: Slices in [0, 1] with columns before rows, as in a volume in NIfTI order.
        """
        # Volumes in NIfTI order have columns first, and the network was trained with rows first.
        images_N1HW = torch.as_tensor(images_N1XY).transpose(2, 3)
        native_hw = (images_N1HW.shape[2], images_N1HW.shape[3])
        frame = fit_frame(native_hw, image_size=self.image_size, keep_aspect=self.keep_aspect)
        logits = logits_to_native(self.segmenter(image_to_frame(images_N1HW.float(), frame)).float(), frame)
        return with_background(logits).transpose(2, 3)
