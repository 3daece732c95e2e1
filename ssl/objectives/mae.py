"""Masked autoencoder for vit_b, vit_l, vit_h: the encoder runs on visible tokens only, hidden ones cost nothing.

A light decoder asks for hidden tokens: by default their positions attend to the encoded visible tokens, nothing else
(CrossMAE), and answer with the grey values of that token, normalised by their own mean and deviation. MAE's own
decoder over all tokens (``decoder: full``, 512 channels, 8 blocks, 16 heads) takes three times as long as the sparse
encoder at 1024 px; it is there for comparison.

The neck is never run: it keeps SAM's weights to the bit. Stage 2 trains it. With ``layout: plain_vit`` the relative
positions are not run either, and keep SAM's values.

Shape letters: B = slices, S = image size in pixels, N = visible tokens, M = hidden tokens, P = pixels per token,
C = channels of the encoder.

Source: He et al., Masked Autoencoders (CVPR 2022): ratio, normalised targets. Fu et al., Rethinking Patch Dependence
for Masked Autoencoders (2024): the decoder, answers for a part of the hidden tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
import torch.nn.functional as F
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.encoders.vit import ImageEncoder, MaskableEncoder
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.dataset import centre_channel
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.decoders import Decoder, DecoderKind, DecoderShape, chosen_ids
from samgraft.ssl.objectives.objective import (
    GIVEN_BRIGHTNESS,
    HIDDEN_IS_GREY,
    ObjectiveLoss,
    Panel,
    WithoutTeacher,
)
from samgraft.ssl.objectives.plain_layout import plain_forward, relative_positions
from samgraft.ssl.views.masking import MaskKind, hidden_count, token_masks, upsample_mask
from torch import nn

ANSWER_STREAM = 0x616E7377
"""Keeps the random numbers of the answered tokens apart from those of the masks."""


class Layout(Enum):
    """How the encoder attends while it learns."""

    SAM = "sam"
    """Windows, global blocks and relative positions, as the encoder is used afterwards."""
    PLAIN_VIT = "plain_vit"
    """Global attention without relative positions, as the official MAE code has it: for comparison. Relative positions
    are not trained; the encoder is handed on in SAM's layout, which it did not learn in."""


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Settings of the objective ``mae``."""

    mask_ratio: float = 0.75
    """Fraction of tokens hidden (MAE's value)."""
    mask_kind: MaskKind = MaskKind.RANDOM
    """random, block, or per_window: the same number hidden in every attention window, fastest."""
    layout: Layout = Layout.SAM
    """sam or plain_vit, see ``Layout``."""
    norm_pix_loss: bool = True
    """Normalise every hidden token's grey values by their own mean and deviation (MAE's better variant)."""
    decoder: DecoderKind = DecoderKind.CROSS
    """cross, windowed or full, see ``DecoderKind``."""
    decoder_dim: int = 384
    """Channels of the decoder."""
    num_decoder_blocks: int = 2
    """Depth of the decoder."""
    num_decoder_heads: int = 6
    """Attention heads of the decoder."""
    answered_share: float = 1.0
    """Share of the hidden tokens that the decoder answers for, drawn anew for every sample; with decoder cross the
    others cost nothing (CrossMAE: a third is nearly as good)."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}.")
        if not 0 < self.answered_share <= 1:
            raise ValueError(f"answered_share must lie in (0, 1], got {self.answered_share}.")
        self.decoder_shape()

    def decoder_shape(self) -> DecoderShape:
        """Return the size of the decoder."""
        return DecoderShape(
            kind=self.decoder,
            dim=self.decoder_dim,
            num_blocks=self.num_decoder_blocks,
            num_heads=self.num_decoder_heads,
        )


class MAE(WithoutTeacher, nn.Module):
    """The objective ``mae``. Exports ``encoder``; throws the decoder away."""

    def __init__(self, encoder: MaskableEncoder, config: MAEConfig, *, seed: int) -> None:
        super().__init__()
        if not isinstance(encoder, ImageEncoder):
            raise UsageError(
                f"METHOD=mae must have an encoder that can leave tokens out (vit_b, vit_l, vit_h), got "
                f"{encoder.arch.value}, whose convolutional stem cannot. Use METHOD=masked_image: the same task with "
                "mask tokens."
            )
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.grid = encoder.image_size // encoder.stride
        encoder.neck.requires_grad_(False)
        if config.layout is Layout.PLAIN_VIT:
            for table in relative_positions(encoder):
                table.requires_grad_(False)
        self.decoder = Decoder(encoder.feature_dim, config.decoder_shape(), grid=self.grid, out_dim=encoder.stride**2)

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the mean squared error over hidden tokens. ``step`` and ``planes`` are not used."""
        mask_Bhw = self._masks(sample_counters).to(images_B1SS.device)
        ids_hidden_BM = self._asked(mask_Bhw, sample_counters)
        guess_BMP, visible_BNC = self._guess(images_B1SS, mask_Bhw, ids_hidden_BM)
        target_BMP, _, std_BM1 = self._target(centre_channel(images_B1SS), ids_hidden_BM)
        error_BMP = guess_BMP - target_BMP
        grey_error = (error_BMP.detach() * std_BM1).abs().mean()
        return ObjectiveLoss(
            total=error_BMP.square().mean(),
            parts={"grey_error": grey_error},
            features_BC=visible_BNC.detach().float().mean(1),
        )

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return input, what the encoder saw, and its guess in the holes.

        With ``norm_pix_loss`` the guess is put back into grey values with the hidden token's own mean and deviation, as
        MAE's pictures are: brightness is given, structure is guessed.
        """
        mask_Bhw = self._masks(sample_counters).to(images_B1SS.device)
        ids_hidden_BM = chosen_ids(mask_Bhw.flatten(1))
        guess_BMP, _ = self._guess(images_B1SS, mask_Bhw, ids_hidden_BM)
        images_B1SS = centre_channel(images_B1SS)
        _, mean_BM1, std_BM1 = self._target(images_B1SS, ids_hidden_BM)
        grey_BMP = (guess_BMP * std_BM1 + mean_BM1).clamp(0, 1)
        patches_BLP = _patches(images_B1SS, self.encoder.stride)
        places = ids_hidden_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
        filled_BLP = patches_BLP.scatter(1, places, grey_BMP.to(patches_BLP.dtype))
        filled_B1SS = F.fold(filled_BLP.mT, images_B1SS.shape[-2:], self.encoder.stride, stride=self.encoder.stride)
        seen_B1SS = images_B1SS.masked_fill(upsample_mask(mask_Bhw, image_size=images_B1SS.shape[-1]), 0.5)
        pictures = torch.stack([images_B1SS, seen_B1SS, filled_B1SS]).squeeze(2)
        return Panel(
            columns=("input", "visible", "output"),
            images_KBHW=pictures.float().cpu(),
            caption=HIDDEN_IS_GREY + (GIVEN_BRIGHTNESS if self.config.norm_pix_loss else ""),
        )

    def references(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Mapping[str, float]:
        """Return nothing: no trivial answer is comparable in normalised units."""
        return {}

    def _masks(self, sample_counters: Sequence[int]) -> torch.Tensor:
        return token_masks(
            sample_counters,
            seed=self.seed,
            grid_hw=(self.grid, self.grid),
            mask_ratio=self.config.mask_ratio,
            kind=self.config.mask_kind,
            attn_window_size=self.encoder.attn_window_size,
        )

    def _asked(self, mask_Bhw: torch.Tensor, sample_counters: Sequence[int]) -> torch.Tensor:
        """Return the numbers of the hidden tokens that the decoder answers for."""
        ids_BM = chosen_ids(mask_Bhw.flatten(1))
        if self.config.answered_share == 1:
            return ids_BM
        num_asked = max(1, hidden_count(ids_BM.shape[1], self.config.answered_share))
        places = [
            np.random.default_rng([self.seed, ANSWER_STREAM, int(counter)]).permutation(ids_BM.shape[1])[:num_asked]
            for counter in sample_counters
        ]
        return ids_BM.gather(1, torch.from_numpy(np.sort(np.stack(places))).to(ids_BM.device))

    def _guess(
        self, images_B1SS: torch.Tensor, mask_Bhw: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the guess for the asked tokens and the encoded visible ones."""
        ids_keep_BN = chosen_ids(~mask_Bhw.flatten(1))
        pixels_B3SS = to_pixels(images_B1SS, self.encoder.spec)
        if self.config.layout is Layout.PLAIN_VIT:
            visible_BNC = plain_forward(self.encoder, pixels_B3SS, ids_keep_BN)
        else:
            visible_BNC = self.encoder.forward_visible(pixels_B3SS, ids_keep_BN)
        return self.decoder(visible_BNC, ids_keep_BN, ids_hidden_BM).float(), visible_BNC

    def _target(
        self, images_B1SS: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what should be guessed, and the mean and deviation that were taken out."""
        patches_BLP = _patches(images_B1SS, self.encoder.stride)
        grey_BMP = patches_BLP.gather(1, ids_hidden_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])).float()
        if not self.config.norm_pix_loss:
            return grey_BMP, torch.zeros_like(grey_BMP[..., :1]), torch.ones_like(grey_BMP[..., :1])
        mean_BM1 = grey_BMP.mean(-1, keepdim=True)
        # MAE's floor of the variance.
        std_BM1 = (grey_BMP.var(-1, keepdim=True) + 1e-6).sqrt()
        return (grey_BMP - mean_BM1) / std_BM1, mean_BM1, std_BM1


def _patches(images_B1SS: torch.Tensor, size: int) -> torch.Tensor:
    """Return the grey values of every token, shape (B, tokens in raster order, size * size)."""
    return F.unfold(images_B1SS, size, stride=size).mT
