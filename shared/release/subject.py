"""The weights of a release, and the probe that compares a released file with the run's model.

Shape letters: N = probe images; S = image side (pixels); h, w = embedding grid; M = masks; 4 = a box, XYXY.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.base import EncoderSpec, ImageEncoder, ImageFeatures
from samgraft.shared.encoders.sam import build_sam, decode_automatic, decode_boxes, encode_images, to_pixels
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

NUM_PROBES = 2
STOCK_MASK_TOKENS = 4
"""Number of mask tokens that segment_anything's registry builds."""
ENCODER_PREFIX = "image_encoder."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to release under segment_anything's names, of a whole SAM or SAM 2 or of its image encoder."""

    tensors: Mapping[str, Tensor]
    """Tensors ``image_encoder.*``, and ``prompt_encoder.*`` and ``mask_decoder.*`` for a whole SAM."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of SAM 2's memory of videos under its own names. They are released as they came."""
    spec: EncoderSpec
    image_size: int
    """Side of the square input in pixels."""

    @property
    def is_whole(self) -> bool:
        """True for a SAM, False for an image encoder alone."""
        return "mask_decoder.mask_tokens.weight" in self.tensors

    @property
    def num_mask_tokens(self) -> int:
        """Number of mask tokens of the decoder, which is 4 in every published SAM."""
        return int(self.tensors["mask_decoder.mask_tokens.weight"].shape[0])

    @property
    def why_not_stock(self) -> str | None:
        """Reason why segment_anything's registry cannot load these weights, or None if it can."""
        # The registry loads strictly. It builds three shapes, at one image size and with one number of mask tokens.
        if self.spec.registry_name is None:
            return f"it has no entry for {self.spec.arch}"
        if self.image_size != self.spec.native_image_size:
            native = self.spec.native_image_size
            return f"it builds a model for {native} px and these weights are for {self.image_size} px"
        if self.is_whole and self.num_mask_tokens != STOCK_MASK_TOKENS:
            return f"it builds {STOCK_MASK_TOKENS} mask tokens and these weights have {self.num_mask_tokens}"
        return None

    def build(self) -> Sam:
        """Build the SAM, load it strictly, and set eval mode."""
        sam = build_sam(self.spec, image_size=self.image_size, num_multimask_outputs=self.num_mask_tokens - 1)
        sam.load_state_dict(dict(self.tensors), strict=True)
        return sam.eval()

    def build_encoder(self) -> ImageEncoder:
        """Build the image encoder, load it strictly, and set eval mode."""
        encoder = self.spec.build(image_size=self.image_size)
        encoder.load_state_dict(self.encoder_tensors(), strict=True)
        return encoder.eval()

    def encoder_tensors(self) -> dict[str, Tensor]:
        """Return the encoder's tensors without their prefix."""
        return {k.removeprefix(ENCODER_PREFIX): v for k, v in self.tensors.items() if k.startswith(ENCODER_PREFIX)}


def make_probe(subject: Subject) -> dict[str, Tensor]:
    """Return seeded images and one box each.

    ``images_NSS3`` is uint8 for ``SamPredictor``. ``pixels_N3SS`` is the same after SAM's normalisation, for encoders.
    """
    size, generator = subject.image_size, torch.Generator().manual_seed(0)
    # Smooth and without symmetry, as slices are. With noise alone, a shifted or mirrored image could give almost the
    # same outputs. The noise finds a wrong resizing.
    coarse = torch.rand(NUM_PROBES, 1, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    noise = torch.rand(NUM_PROBES, 1, size, size, generator=generator)
    images_N1SS = ((0.9 * smooth + 0.1 * noise) * 255).round()
    images_NSS3 = images_N1SS.to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).contiguous()
    pixels = to_pixels(images_N1SS / 255, subject.spec).expand(-1, 3, -1, -1).contiguous()
    boxes = torch.tensor([[0.2, 0.25, 0.7, 0.8], [0.1, 0.4, 0.55, 0.6]]) * size
    return {"images_NSS3": images_NSS3, "pixels_N3SS": pixels, "boxes_N4": boxes.round()}


@torch.inference_mode()
def expected_outputs(subject: Subject, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the outputs for the probe that every client must reproduce.

    They are ``embeddings``, and for a whole SAM also ``automatic`` and ``boxes``.
    ``automatic`` (N, 1 + M, 4h, 4w) and ``boxes`` (N, M, 4h, 4w) are logits at SAM's own resolution.
    """
    if not subject.is_whole:
        return {"embeddings": subject.build_encoder()(probe["pixels_N3SS"])}
    sam = subject.build()
    return sam_outputs(sam, probe)


def sam_outputs(sam: Sam, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute image embeddings and all logits for the probe."""
    features = encode_images(sam, probe["pixels_N3SS"])
    return {"embeddings": features.embeddings, **decoder_outputs(sam, features, probe["boxes_N4"])}


def decoder_outputs(sam: Sam, features: ImageFeatures, boxes_N4: Tensor) -> dict[str, Tensor]:
    """Compute the logits without prompt (first token, then all others) and with one box per image."""
    automatic = [decode_automatic(sam, features, multimask=multimask)[0] for multimask in (False, True)]
    boxes, _ = decode_boxes(sam, features, boxes_N4, multimask=True)
    return {"automatic": torch.cat(automatic, dim=1), "boxes": boxes}
