"""SAM as an automatic segmenter of named classes, without prompts and with one logit map per class.

Shape letters: N = slices, C = foreground classes, S = side of the encoder's input, h, w = sides of the logits.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import decode_automatic, encode_images, to_pixels
from torch import Tensor, nn

if TYPE_CHECKING:
    from samgraft.finetune.embedding_cache import EmbeddingMemory
    from segment_anything.modeling import Sam

SAM_MULTIMASK_OUTPUTS = 3
"""Number of multimask tokens of every published SAM."""


class Segmenter(nn.Module):
    """SAM, adapted or not, whose mask tokens are the classes."""

    def __init__(self, sam: Sam, *, num_classes: int) -> None:
        super().__init__()
        self.sam = sam
        self.num_classes = num_classes
        self.embedding_memory: EmbeddingMemory | None = None

    @property
    def network(self) -> nn.Module:
        """Network that is trained and saved."""
        network: nn.Module = self.sam
        return network

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return int(self.sam.image_encoder.image_size)

    def forward(self, images_N1SS: Tensor) -> Tensor:
        """Return logits (N, C, h, w) at SAM's lower resolution, without the background, whose logit is 0.

        Args:
            images_N1SS: Slices in [0, 1].
        """
        return self.decode(self.embed(images_N1SS))

    def embed(self, images_N1SS: Tensor) -> ImageFeatures:
        """Return what the decoder reads of slices, in eval mode from ``embedding_memory`` if there is one."""
        # In training every batch has another augmentation, so nothing repeats.
        if self.embedding_memory is not None and not self.training:
            return self.embedding_memory.lookup(images_N1SS, self._encode)
        return self._encode(images_N1SS)

    def decode(self, features: ImageFeatures) -> Tensor:
        """Return the logits of ``forward`` for slices with these features."""
        logits, _ = decode_automatic(self.sam, features, multimask=self.num_classes > 1)
        return logits[:, : self.num_classes]

    def _encode(self, images_N1SS: Tensor) -> ImageFeatures:
        return encode_images(self.sam, to_pixels(images_N1SS, self.sam.image_encoder.spec))


def add_class_tokens(sam: Sam, *, num_classes: int) -> None:
    """Add mask tokens to the mask decoder when there are more classes than SAM has tokens, in place.

    Up to three classes change nothing, and the released file has stock SAM's shape. New tokens, hypernetworks and rows
    of the IoU head start as copies of SAM's multimask ones in turn. Training makes them different.
    """
    decoder = sam.mask_decoder
    present = decoder.num_mask_tokens - 1
    if num_classes <= max(1, present):
        return
    # Source token of every new token: SAM's own in place, then tokens 1, 2, 3, 1, ... Token 0 stays the single mask.
    sources = [*range(present + 1), *(1 + i % present for i in range(num_classes - present))]
    tokens = nn.Embedding(num_classes + 1, decoder.transformer_dim)
    last = decoder.iou_prediction_head.layers[-1]
    iou_last = nn.Linear(last.in_features, num_classes + 1)
    with torch.no_grad():
        tokens.weight.copy_(decoder.mask_tokens.weight[sources])
        iou_last.weight.copy_(last.weight[sources])
        iou_last.bias.copy_(last.bias[sources])
    hypernetworks = decoder.output_hypernetworks_mlps
    decoder.output_hypernetworks_mlps = nn.ModuleList(
        hypernetworks[s] if place <= present else copy.deepcopy(hypernetworks[s]) for place, s in enumerate(sources)
    )
    decoder.mask_tokens = tokens
    decoder.iou_prediction_head.layers[-1] = iou_last
    decoder.num_multimask_outputs = num_classes
    decoder.num_mask_tokens = num_classes + 1
