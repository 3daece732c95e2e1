"""Prompt encoder and mask decoder of SAM 2, for still images.

Both have the tensors of SAM 2's files under the names ``prompt_encoder.*`` and ``mask_decoder.*``. The memory of videos
is not part of them: an image is decoded as ``SAM2ImagePredictor`` decodes it.

Shape letters: B = images; P = prompts; N = prompt tokens; M = masks per prompt; C = channels; h, w = embedding grid.

Source:
    sam2 1.1.0: modeling/sam/mask_decoder.py, modeling/sam/prompt_encoder.py, sam2_image_predictor.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98
"""Logit and IoU by which ``build_sam2(apply_postprocessing=True)`` tests a single mask."""


class Sam2PromptEncoder(PromptEncoder):
    """Prompt encoder of SAM 2, in which a box is two labelled points and therefore followed by a padding token."""

    def _embed_boxes(self, boxes_P4: Tensor) -> Tensor:
        corners_P2C: Tensor = super()._embed_boxes(boxes_P4)
        padding_P1C = self.not_a_point_embed.weight.expand(len(corners_P2C), 1, -1)
        return torch.cat([corners_P2C, padding_P1C], dim=1)


class Sam2Upscaling(nn.Sequential):
    """Upscaling by 4 with the layers of segment_anything's, which adds the encoder's finer maps on the way."""

    def forward(self, image_PChw: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:  # type: ignore[override]
        """Return the upscaled image. ``fine`` and ``coarse`` are projected maps of 4 and 2 times its size."""
        # One module with all its layers, because peft wraps it as a whole.
        up_1, norm, gelu_1, up_2, gelu_2 = self
        half = gelu_1(norm(up_1(image_PChw) + coarse))
        out: Tensor = gelu_2(up_2(half) + fine)
        return out


class Sam2MaskDecoder(MaskDecoder):
    """Mask decoder of SAM 2, with an object score, high-resolution maps and a learned embedding for "no memory".

    Args:
        dim: Channels of the image embeddings.
        num_multimask_outputs: Mask tokens besides the first one; 3 in every published SAM 2.
    """

    output_upscaling: nn.Sequential

    def __init__(self, *, dim: int, num_multimask_outputs: int = 3) -> None:
        transformer = TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=8 * dim, num_heads=8)
        for layer in transformer.layers:
            # The same layers as segment_anything's MLPBlock, under the names of SAM 2's files.
            layer.mlp = MLP(dim, 8 * dim, dim, 2)
        super().__init__(
            transformer_dim=dim,
            transformer=transformer,
            num_multimask_outputs=num_multimask_outputs,
            iou_head_depth=3,
            iou_head_hidden_dim=dim,
        )
        self.output_upscaling = Sam2Upscaling(*self.output_upscaling)
        self.iou_prediction_head.sigmoid_output = True
        self.obj_score_token = nn.Embedding(1, dim)
        self.pred_obj_score_head = MLP(dim, dim, 1, 3)
        self.conv_s0 = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.dynamic_multimask = False
        """True replaces an unstable single mask by the best of the others in eval mode, as ``build_sam2`` does by
        default. Off here, because fine-tuning may train the first mask token only."""

    def project_high_res(self, high_res: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reduce the encoder's maps at stride 4 and 8 to the channels that the upscaling adds."""
        # Done once per image as in SAM 2. The projected maps have an eighth and a quarter of the channels.
        fine, coarse = high_res
        return self.conv_s0(fine), self.conv_s1(coarse)

    def high_res_shapes(self, grid: int) -> list[tuple[int, int, int]]:
        """Return the shapes (C, h, w) of projected maps for an embedding grid of ``grid`` x ``grid``."""
        return [(self.transformer_dim // 8, 4 * grid, 4 * grid), (self.transformer_dim // 4, 2 * grid, 2 * grid)]

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        high_res: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Predict masks as segment_anything's decoder does, from the image embeddings and projected maps.

        Args:
            image_embeddings: Shape (B, C, h, w), without the "no memory" embedding.
            image_pe: Shape (1, C, h, w).
            sparse_prompt_embeddings: Shape (P, N, C). B and P are equal, or one of them is 1.
            dense_prompt_embeddings: Shape (P, C, h, w) or (1, C, h, w).
            multimask_output: False returns the first mask (M = 1), True all the others.
            high_res: Result of :meth:`project_high_res`, one per image or per prompt.

        Returns:
            Logits (B or P, M, 4h, 4w) and predicted IoU (B or P, M).
        """
        masks, iou, _ = self.predict_all(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, high_res
        )
        if multimask_output:
            return masks[:, 1:], iou[:, 1:]
        if self.dynamic_multimask and not self.training:
            return _stable_or_best(masks, iou)
        return masks[:, :1], iou[:, :1]

    def predict_all(
        self,
        embeddings_BChw: Tensor,
        pe_1Chw: Tensor,
        sparse_PNC: Tensor,
        dense_PChw: Tensor,
        high_res: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (P, 1 + M, 4h, 4w), IoU (P, 1 + M) and object score logits (P, 1) of all mask tokens."""
        image_Bhw = embeddings_BChw + self.no_mem_embed.view(1, -1, 1, 1) + dense_PChw
        count = max(len(image_Bhw), len(sparse_PNC))
        # The order of the tokens is that of SAM 2: object score, predicted IoU, masks, prompts.
        own_KC = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens_PNC = torch.cat([own_KC.expand(count, -1, -1), sparse_PNC.expand(count, -1, -1)], dim=1)
        image_PChw = image_Bhw.expand(count, -1, -1, -1)
        out_PNC, image_PLC = self.transformer(image_PChw, pe_1Chw.expand_as(image_PChw), tokens_PNC)
        upscaled_PDhw = self.output_upscaling(image_PLC.transpose(1, 2).reshape(image_PChw.shape), *high_res)
        tokens_out = out_PNC[:, 2 : 2 + self.num_mask_tokens]
        heads = [head(tokens_out[:, i]) for i, head in enumerate(self.output_hypernetworks_mlps)]
        masks = (torch.stack(heads, dim=1) @ upscaled_PDhw.flatten(2)).view(count, -1, *upscaled_PDhw.shape[2:])
        return masks, self.iou_prediction_head(out_PNC[:, 1]), self.pred_obj_score_head(out_PNC[:, 0])


def _stable_or_best(masks_PMhw: Tensor, iou_PM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first mask where it is stable, else the one of the others with the highest predicted IoU."""
    first_Phw = masks_PMhw[:, 0].flatten(1)
    inner = (first_Phw > STABILITY_DELTA).sum(dim=1)
    outer = (first_Phw > -STABILITY_DELTA).sum(dim=1)
    is_stable = (outer == 0) | (inner / outer.clamp(min=1) >= STABILITY_THRESHOLD)
    best_P = torch.where(is_stable, 0, 1 + iou_PM[:, 1:].argmax(dim=1))
    rows = torch.arange(len(best_P), device=best_P.device)
    return masks_PMhw[rows, best_P][:, None], iou_PM[rows, best_P][:, None]
