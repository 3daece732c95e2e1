"""Masked autoencoder for encoders that can leave tokens out (vit_b, vit_l, vit_h, sam2_*).

A token is here what the encoder can leave out, a patch of 16 px of the windowed ViTs or a mask unit of 32 px of Hiera,
whose output joins all tokens of its last two stages. The encoder runs on visible tokens only, so hidden ones cost
nothing. A light decoder predicts the grey values of hidden tokens, normalised by their own mean and deviation. By
default the positions of hidden tokens attend to the encoded visible tokens only (CrossMAE). MAE's own decoder over all
tokens (``decoder: full``, 512 channels, 8 blocks, 16 heads) takes three times as long as the sparse encoder at 1024 px
and exists for comparison.

The neck is never run and keeps SAM's weights exactly; stage 2 trains it. With ``layout: plain_vit`` the relative
positions are not used either and keep SAM's values.

Shape letters: B = slices, S = image size in pixels, N = visible tokens, M = hidden tokens, L = all tokens, P = pixels
per token, C = channels of the encoder.

Source: He et al., Masked Autoencoders (CVPR 2022): ratio, normalised targets. Fu et al., Rethinking Patch Dependence
for Masked Autoencoders (2024): the decoder, predictions for a part of the hidden tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from samgraft.shared.config import OpenShare, PositiveInt, PositiveShare
from samgraft.shared.encoders.base import FixedGridEncoder, TokenDroppingEncoder
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.dataset import centre_channel
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.decoders import Decoder, DecoderKind, DecoderShape, chosen_ids, place_tokens
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss
from samgraft.ssl.objectives.panels import GIVEN_BRIGHTNESS, HIDDEN_IS_GREY, Panel
from samgraft.ssl.views.masking import MaskKind, hidden_count, upsample_mask

PREDICTION_STREAM = 0x616E7377
"""Random stream of the predicted tokens, separate from that of the masks."""


class Layout(Enum):
    """Attention layout of the encoder during training."""

    SAM = "sam"
    """Windows, global blocks and relative positions, as the encoder is used afterwards."""
    PLAIN_VIT = "plain_vit"
    """Global attention without relative positions, as in the official MAE code, for comparison (windowed ViTs only).
    Relative positions are not trained, and the encoder is exported in SAM's layout, in which it was not trained."""


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Settings of the objective ``mae``."""

    mask_ratio: OpenShare = 0.75
    """Fraction of tokens hidden (MAE)."""
    mask_kind: MaskKind = MaskKind.RANDOM
    """Spread of the hidden tokens, random, block, or per_window, which hides the same number in every attention window
    and is fastest."""
    layout: Layout = Layout.SAM
    """Attention layout, sam or plain_vit, see ``Layout``."""
    norm_pix_loss: bool = True
    """True normalises every hidden token's grey values by their own mean and deviation (MAE's better variant)."""
    decoder: DecoderKind = DecoderKind.CROSS
    """Attention pattern of the decoder, cross, windowed or full, see ``DecoderKind``."""
    decoder_dim: PositiveInt = 384
    """Channels of the decoder."""
    num_decoder_blocks: PositiveInt = 2
    """Depth of the decoder."""
    num_decoder_heads: PositiveInt = 6
    """Attention heads of the decoder."""
    answered_share: PositiveShare = 1.0
    """Share of the hidden tokens that the decoder predicts, drawn anew for every sample. With decoder cross the others
    cost nothing (CrossMAE: a third is nearly as good)."""

    def __post_init__(self) -> None:
        self.decoder_shape()

    def decoder_shape(self) -> DecoderShape:
        """Return the size of the decoder."""
        return DecoderShape(
            kind=self.decoder,
            dim=self.decoder_dim,
            num_blocks=self.num_decoder_blocks,
            num_heads=self.num_decoder_heads,
        )


class MAE(Objective):
    """The objective ``mae``, which exports the trained encoder."""

    settings_type = MAEConfig
    config: MAEConfig

    def __init__(self, encoder: Any, config: MAEConfig, *, seed: int, max_steps: int = 1) -> None:
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        if not isinstance(encoder, TokenDroppingEncoder):
            raise UsageError(
                f"METHOD=mae must have an encoder that can leave tokens out, such as vit_b, got {encoder.arch}, whose "
                "convolutional stem cannot. Use METHOD=masked_image, which is the same task with mask tokens."
            )
        self.grid, self.token_px = encoder.grid, encoder.unit_px
        # Frozen because it is not run, and DDP would wait for its gradients.
        encoder.neck.requires_grad_(False)
        if config.layout is Layout.PLAIN_VIT:
            if not isinstance(encoder, FixedGridEncoder):
                raise UsageError(
                    f"layout must be sam for {encoder.arch}, which has no relative positions to leave out, got "
                    "plain_vit. Remove the setting.",
                    where="objective.mae.layout",
                )
            for table in encoder.relative_position_tables():
                table.requires_grad_(False)
        self.decoder = Decoder(encoder.unit_dim, config.decoder_shape(), grid=self.grid, out_dim=self.token_px**2)

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the mean squared error over hidden tokens. ``step`` and ``planes`` are not used."""
        mask_Bhw = self.draw_masks(sample_counters, side=self.grid).to(images_B1SS.device)
        ids_hidden_BM = self._predicted_ids(mask_Bhw, sample_counters)
        predicted_BMP, visible_BNC = self._predict(images_B1SS, mask_Bhw, ids_hidden_BM)
        target_BMP, _, std_BM1 = self._target(centre_channel(images_B1SS), ids_hidden_BM)
        error_BMP = predicted_BMP - target_BMP
        # Back in grey values, so that runs with and without normalised targets can be compared.
        grey_error = (error_BMP.detach() * std_BM1).abs().mean()
        loss = ObjectiveLoss(
            total=error_BMP.square().mean(),
            parts={"grey_error": grey_error},
            features_BC=visible_BNC.detach().float().mean(1),
        )
        ids_keep_BN = chosen_ids(~mask_Bhw.flatten(1))

        def put_on_grid(tokens_BNC: torch.Tensor) -> torch.Tensor:
            tokens_BLC = place_tokens(tokens_BNC, ids_keep_BN, num_tokens=self.grid**2)
            features_BChw: torch.Tensor = self.encoder.units_to_features(tokens_BLC)
            return features_BChw

        return self.anchored(
            loss,
            put_on_grid(visible_BNC),
            lambda encoder: put_on_grid(self._encode(encoder, images_B1SS, ids_keep_BN)),
            hidden_Bhw=mask_Bhw,
        )

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the input, its visible part, and the prediction in the holes.

        With ``norm_pix_loss`` the prediction is converted to grey values with the hidden token's own mean and
        deviation, as in MAE's pictures. Brightness is then given, and only the structure is predicted.
        """
        mask_Bhw = self.draw_masks(sample_counters, side=self.grid).to(images_B1SS.device)
        ids_hidden_BM = chosen_ids(mask_Bhw.flatten(1))
        predicted_BMP, _ = self._predict(images_B1SS, mask_Bhw, ids_hidden_BM)
        images_B1SS = centre_channel(images_B1SS)
        _, mean_BM1, std_BM1 = self._target(images_B1SS, ids_hidden_BM)
        grey_BMP = (predicted_BMP * std_BM1 + mean_BM1).clamp(0, 1)
        patches_BLP = _pixels_of_tokens(images_B1SS, self.token_px)
        places = ids_hidden_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
        filled_BLP = patches_BLP.scatter(1, places, grey_BMP.to(patches_BLP.dtype))
        filled_B1SS = F.fold(filled_BLP.mT, images_B1SS.shape[-2:], self.token_px, stride=self.token_px)
        seen_B1SS = images_B1SS.masked_fill(upsample_mask(mask_Bhw, image_size=images_B1SS.shape[-1]), 0.5)
        pictures = torch.stack([images_B1SS, seen_B1SS, filled_B1SS]).squeeze(2)
        return Panel(
            columns=("input", "visible", "output"),
            images_KBHW=pictures.float().cpu(),
            caption=HIDDEN_IS_GREY + (GIVEN_BRIGHTNESS if self.config.norm_pix_loss else ""),
        )

    def _predicted_ids(self, mask_Bhw: torch.Tensor, sample_counters: Sequence[int]) -> torch.Tensor:
        """Return the indices of the hidden tokens that the decoder predicts."""
        ids_BM = chosen_ids(mask_Bhw.flatten(1))
        if self.config.answered_share == 1:
            return ids_BM
        # Drawn per sample from its counter, as the mask is, so that a resumed run predicts the same tokens.
        num_hidden = ids_BM.shape[1]
        num_predicted = max(1, hidden_count(num_hidden, self.config.answered_share))
        places = [
            np.random.default_rng([self.seed, PREDICTION_STREAM, int(counter)]).permutation(num_hidden)[:num_predicted]
            for counter in sample_counters
        ]
        return ids_BM.gather(1, torch.from_numpy(np.sort(np.stack(places))).to(ids_BM.device))

    def _predict(
        self, images_B1SS: torch.Tensor, mask_Bhw: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predictions of the given hidden tokens and the encoded visible tokens."""
        ids_keep_BN = chosen_ids(~mask_Bhw.flatten(1))
        visible_BNC = self._encode(self.encoder, images_B1SS, ids_keep_BN)
        return self.decoder(visible_BNC, ids_keep_BN, ids_hidden_BM).float(), visible_BNC

    def _encode(self, encoder: Any, images_B1SS: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
        """Return the encoded visible tokens (B, N, C)."""
        pixels_B3SS = to_pixels(images_B1SS, encoder.spec)
        if self.config.layout is Layout.PLAIN_VIT:
            plain_BNC: torch.Tensor = encoder.forward_visible(pixels_B3SS, ids_keep_BN, relative_positions=False)
            return plain_BNC
        visible_BNC: torch.Tensor = encoder.forward_visible(pixels_B3SS, ids_keep_BN)
        return visible_BNC

    def _target(
        self, images_B1SS: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the target and the mean and deviation that normalised it."""
        patches_BLP = _pixels_of_tokens(images_B1SS, self.token_px)
        grey_BMP = patches_BLP.gather(1, ids_hidden_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])).float()
        if not self.config.norm_pix_loss:
            return grey_BMP, torch.zeros_like(grey_BMP[..., :1]), torch.ones_like(grey_BMP[..., :1])
        mean_BM1 = grey_BMP.mean(-1, keepdim=True)
        # MAE adds 1e-6 to the variance, so that uniform tokens (air) do not divide by zero.
        std_BM1 = (grey_BMP.var(-1, keepdim=True) + 1e-6).sqrt()
        return (grey_BMP - mean_BM1) / std_BM1, mean_BM1, std_BM1


def _pixels_of_tokens(images_B1SS: torch.Tensor, size: int) -> torch.Tensor:
    """Return the grey values of every token, shape (B, tokens in raster order, size * size)."""
    return F.unfold(images_B1SS, size, stride=size).mT
