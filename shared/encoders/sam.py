"""SAM models around the image encoders, their pixel scale, and their mask decoder.

Shape letters: B = images; S = image side (pixels); h, w = embedding grid; C = embedding channels; N = prompt tokens;
M = masks per prompt.
"""

from __future__ import annotations

import torch
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.registry import arch_spec
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer


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
    spec = arch_spec(arch, stem)
    image_size = spec.native_image_size if image_size is None else image_size
    encoder = spec.build(image_size=image_size)
    grid = image_size // spec.stride
    sam = Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=spec.neck_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=num_multimask_outputs,
            transformer=TwoWayTransformer(depth=2, embedding_dim=spec.neck_dim, mlp_dim=8 * spec.neck_dim, num_heads=8),
            transformer_dim=spec.neck_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=spec.neck_dim,
        ),
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


def decode_automatic(
    sam: Sam, image_embeddings_BChw: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch of images without any prompt.

    segment_anything's decoder repeats the image embeddings for each prompt, so it fails for B images with B prompts.
    One empty prompt broadcasts against B embeddings and equals the loop over images.

    Args:
        sam: Model whose prompt encoder and mask decoder are used.
        image_embeddings_BChw: Output of ``sam.image_encoder``.
        multimask: True decodes all mask tokens but the first, False only the first (1 mask).

    Returns:
        ``low_res_logits`` (B, M, 4h, 4w) and ``iou_predictions`` (B, M).
    """
    # Under bf16 autocast the prompt encoder would compute positions in bf16, with an error of 0.1.
    with torch.autocast(image_embeddings_BChw.device.type, enabled=False):
        sparse_1NC, dense_1Chw = sam.prompt_encoder(points=None, boxes=None, masks=None)
        image_pe_1Chw = sam.prompt_encoder.get_dense_pe()
    logits, iou = sam.mask_decoder(
        image_embeddings=image_embeddings_BChw,
        image_pe=image_pe_1Chw,
        sparse_prompt_embeddings=sparse_1NC,
        dense_prompt_embeddings=dense_1Chw,
        multimask_output=multimask,
    )
    return logits, iou


def decode_boxes(
    sam: Sam, image_embeddings_BChw: torch.Tensor, boxes_B4: torch.Tensor, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch of images with one box each.

    Args:
        sam: Model whose prompt encoder and mask decoder are used.
        image_embeddings_BChw: Output of ``sam.image_encoder``.
        boxes_B4: Boxes as XYXY in input-frame pixels.
        multimask: As in :func:`decode_automatic`.

    Returns:
        ``low_res_logits`` (B, M, 4h, 4w) and ``iou_predictions`` (B, M).
    """
    with torch.autocast(image_embeddings_BChw.device.type, enabled=False):
        sparse_BNC, dense_BChw = sam.prompt_encoder(points=None, boxes=boxes_B4.float(), masks=None)
        image_pe_1Chw = sam.prompt_encoder.get_dense_pe()
    decoded = [
        sam.mask_decoder(
            image_embeddings=image_embeddings_BChw[i : i + 1],
            image_pe=image_pe_1Chw,
            sparse_prompt_embeddings=sparse_BNC[i : i + 1],
            dense_prompt_embeddings=dense_BChw[i : i + 1],
            multimask_output=multimask,
        )
        for i in range(len(boxes_B4))
    ]
    return torch.cat([logits for logits, _ in decoded]), torch.cat([iou for _, iou in decoded])
