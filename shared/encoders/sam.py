"""SAM models around the image encoders, their pixel scale, and the decoding of masks.

Encoders of every family and the decoders of SAM and SAM 2 are used through the functions of this module. Images become
``ImageFeatures``, and prompts and features become masks.

Shape letters: B = images; S = image side (pixels); h, w = embedding grid; C = embedding channels; N = prompt tokens;
M = masks per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from samgraft.shared.encoders.base import EncoderSpec, ImageEncoder, ImageFeatures
from samgraft.shared.encoders.registry import arch_spec

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam


def build_sam_decoder(
    *, dim: int, num_multimask_outputs: int, **prompt_sizes: Any
) -> tuple[PromptEncoder, MaskDecoder]:
    """Build segment_anything's prompt encoder and mask decoder with fresh weights."""
    # segment_anything imports torchvision, which takes as long as torch. Code that reads only shapes does not need it.
    from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

    return PromptEncoder(embed_dim=dim, **prompt_sizes), MaskDecoder(
        num_multimask_outputs=num_multimask_outputs,
        transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=8 * dim, num_heads=8),
        transformer_dim=dim,
        iou_head_depth=3,
        iou_head_hidden_dim=dim,
    )


def build_sam2_decoder(
    *, dim: int, num_multimask_outputs: int, **prompt_sizes: Any
) -> tuple[PromptEncoder, MaskDecoder]:
    """Build SAM 2's prompt encoder and mask decoder with fresh weights."""
    from samgraft.shared.encoders.sam2_decoder import Sam2MaskDecoder, Sam2PromptEncoder

    mask_decoder = Sam2MaskDecoder(dim=dim, num_multimask_outputs=num_multimask_outputs)
    return Sam2PromptEncoder(embed_dim=dim, **prompt_sizes), mask_decoder


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Prompt encoder and mask decoder of one generation of SAM."""

    build: Callable[..., tuple[PromptEncoder, MaskDecoder]]
    """Function of ``dim``, ``num_multimask_outputs`` and the sizes that a prompt encoder takes, which builds both."""
    mlp: str
    """Linear layers of an MLP in its transformer, as a regular expression."""
    projections: tuple[str, ...] = ()
    """Layers of the mask decoder that are applied with the image encoder, by the names of the whole model. They count
    as part of the neck."""


DECODERS = {
    "sam": Decoder(build=build_sam_decoder, mlp="lin[12]"),
    "sam2": Decoder(
        build=build_sam2_decoder,
        mlp=r"layers\.[01]",
        projections=("mask_decoder.conv_s0", "mask_decoder.conv_s1"),
    ),
}
"""Decoders by the value of ``EncoderSpec.decoder``."""


def build_sam(
    arch: EncoderSpec | str,
    *,
    image_size: int | None = None,
    stem: str | None = None,
    num_multimask_outputs: int = 3,
) -> Sam:
    """Build a SAM with fresh weights, in eval mode.

    Args:
        arch: Name of the architecture, or a shape.
        image_size: Side of the square input in pixels; default the size of the published weights.
        stem: Stem of vit_t, LiteMedSAM's (default) or MobileSAM's. None for all others.
        num_multimask_outputs: Mask tokens besides the first one; 3 in every published SAM.

    Returns:
        ``segment_anything.modeling.Sam`` whose ``image_encoder`` is ours; every key as in segment_anything.
    """
    from segment_anything.modeling import Sam

    spec = arch_spec(arch, stem)
    image_size = spec.native_image_size if image_size is None else image_size
    image_encoder = spec.build(image_size=image_size)
    prompt_encoder, mask_decoder = DECODERS[spec.decoder].build(
        dim=spec.neck_dim,
        num_multimask_outputs=num_multimask_outputs,
        image_embedding_size=(image_size // spec.stride, image_size // spec.stride),
        input_image_size=(image_size, image_size),
        mask_in_chans=16,
    )
    sam = Sam(
        image_encoder=image_encoder,
        prompt_encoder=prompt_encoder,
        mask_decoder=mask_decoder,
        pixel_mean=list(spec.pixel_mean),
        pixel_std=list(spec.pixel_std),
    )
    return sam.eval()


def to_pixels(
    images_N1SS: torch.Tensor,
    spec: EncoderSpec,
    *,
    pixel_mean: tuple[float, float, float] | None = None,
    pixel_std: tuple[float, float, float] | None = None,
) -> torch.Tensor:
    """Convert slices in [0, 1] to the pixel scale that an image encoder was trained on.

    Args:
        images_N1SS: Slices in [0, 1], float, with one channel or three.
        spec: Shape of the encoder, with its pixel statistics.
        pixel_mean: Mean on the 0..255 scale; default that of the shape.
        pixel_std: Standard deviation on the 0..255 scale; default that of the shape.

    Returns:
        Shape (N, 3, S, S): (255 x - mean) / std per channel. For LiteMedSAM that is x itself.
    """
    mean = images_N1SS.new_tensor(pixel_mean or spec.pixel_mean).view(1, 3, 1, 1)
    std = images_N1SS.new_tensor(pixel_std or spec.pixel_std).view(1, 3, 1, 1)
    # One multiplication and one addition are exact for mean 0 and std 255, where the scale is 1.
    return images_N1SS * (255.0 / std) - mean / std


def encode_images(sam: Sam, pixels_B3SS: torch.Tensor, *, encoder: ImageEncoder | None = None) -> ImageFeatures:
    """Return what the mask decoder reads of images.

    Args:
        sam: Model whose mask decoder projects the finer maps if it reads any.
        pixels_B3SS: Images after :func:`to_pixels`.
        encoder: Image encoder; default that of ``sam``.
    """
    embeddings, high_res = (encoder or sam.image_encoder).forward_with_high_res(pixels_B3SS)
    # SAM 2 projects the maps once per image. Projected maps are an eighth of the size, in memory and in a cache.
    return ImageFeatures(embeddings, sam.mask_decoder.project_high_res(high_res) if high_res else ())


def feature_shapes(sam: Sam) -> list[tuple[int, int, int]]:
    """Return the shapes (C, h, w) of one image's features, the embeddings first."""
    from samgraft.shared.encoders.sam2_decoder import Sam2MaskDecoder

    grid = sam.image_encoder.img_size // sam.image_encoder.spec.stride
    finer = sam.mask_decoder.high_res_shapes(grid) if isinstance(sam.mask_decoder, Sam2MaskDecoder) else []
    return [(sam.image_encoder.spec.neck_dim, grid, grid), *finer]


def feature_tensors(sam: Sam) -> dict[str, torch.Tensor]:
    """Return all tensors that the features of an image depend on."""
    # The encoder's tensors have no prefix, because caches of embeddings have been named by their hash without it.
    layers = DECODERS[sam.image_encoder.spec.decoder].projections
    projections = {name: tensor for name, tensor in sam.state_dict().items() if name.startswith(layers)}
    return {**sam.image_encoder.state_dict(), **projections}


def decode_automatic(sam: Sam, features: ImageFeatures, *, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch of images without any prompt.

    segment_anything's decoder repeats the image embeddings for each prompt, so it fails for B images with B prompts.
    One empty prompt broadcasts against B embeddings and equals the loop over images.

    Args:
        sam: Model whose prompt encoder and mask decoder are used.
        features: Features of B images.
        multimask: True decodes all mask tokens but the first, False only the first (1 mask).

    Returns:
        ``low_res_logits`` (B, M, 4h, 4w) and ``iou_predictions`` (B, M).
    """
    return _decode(sam, features, *embed_prompts(sam), multimask=multimask)


def decode_boxes(
    sam: Sam, features: ImageFeatures, boxes_B4: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch of images with one box each.

    Args:
        sam: Model whose prompt encoder and mask decoder are used.
        features: Features of B images.
        boxes_B4: Boxes as XYXY in input-frame pixels.
        multimask: As in :func:`decode_automatic`.

    Returns:
        ``low_res_logits`` (B, M, 4h, 4w) and ``iou_predictions`` (B, M).
    """
    sparse_BNC, dense_BChw = embed_prompts(sam, boxes=boxes_B4.float())
    one_by_one = [slice(i, i + 1) for i in range(len(boxes_B4))]
    decoded = [
        _decode(sam, features.of_images(one), sparse_BNC[one], dense_BChw[one], multimask=multimask)
        for one in one_by_one
    ]
    return torch.cat([logits for logits, _ in decoded]), torch.cat([iou for _, iou in decoded])


def decode_pairs(
    sam: Sam, features: ImageFeatures, sparse_PNC: torch.Tensor, dense_PChw: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode embedded prompts, each on an image of its own.

    Args:
        sam: Model whose mask decoder is used.
        features: Features of P images, one per prompt. An image may occur several times.
        sparse_PNC: Result of :func:`embed_prompts`.
        dense_PChw: The same.
        multimask: As in :func:`decode_automatic`.

    Returns:
        ``low_res_logits`` (P, M, 4h, 4w) and ``iou_predictions`` (P, M).
    """
    # segment_anything's decoder repeats one image for all prompts and adds their dense embeddings. With zeros as the
    # image and each prompt's own image added to its dense embedding, it decodes any assignment bit-exactly.
    dense_PChw = features.embeddings + dense_PChw
    zeros = ImageFeatures(torch.zeros_like(dense_PChw[:1]), features.high_res)
    return _decode(sam, zeros, sparse_PNC, dense_PChw, multimask=multimask)


def embed_prompts(
    sam: Sam,
    *,
    points: tuple[torch.Tensor, torch.Tensor] | None = None,
    boxes: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sparse (P, N, C) and dense (P, C, h, w) embeddings of prompts.

    Without a prompt they are those of one empty prompt.

    Args:
        sam: Model whose prompt encoder is used.
        points: Coordinates (P, K, 2) as x, y in input-frame pixels and labels (P, K).
        boxes: Boxes (P, 4) as XYXY in input-frame pixels.
        masks: Logits (P, 1, 4h, 4w).
    """
    # Under bf16 autocast the prompt encoder would compute positions in bf16, with an error of 0.1.
    with torch.autocast(sam.device.type, enabled=False):
        sparse_PNC, dense_PChw = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    return sparse_PNC, dense_PChw


def _decode(
    sam: Sam, features: ImageFeatures, sparse_PNC: torch.Tensor, dense_PChw: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(sam.device.type, enabled=False):
        image_pe_1Chw = sam.prompt_encoder.get_dense_pe()
    logits, iou = sam.mask_decoder(
        image_embeddings=features.embeddings,
        image_pe=image_pe_1Chw,
        sparse_prompt_embeddings=sparse_PNC,
        dense_prompt_embeddings=dense_PChw,
        multimask_output=multimask,
        **({"high_res": features.high_res} if features.high_res else {}),
    )
    return logits, iou
