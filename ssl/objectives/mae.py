"""Masked autoencoder for vit_b, vit_l, vit_h: the encoder runs on visible tokens only, hidden ones cost nothing.

A light decoder asks for every hidden token: its position attends to the encoded visible tokens, nothing else
(CrossMAE), and answers with the grey values of that token, normalised by their own mean and deviation. MAE's own
decoder over all tokens would take three times as long as the sparse encoder at 1024 px.

The neck is never run: it keeps SAM's weights to the bit. Stage 2 trains it.

Shape letters: B = slices, S = image size in pixels, N = visible tokens, M = hidden tokens, P = pixels per token,
C, D = channels of encoder and decoder.

Source: He et al., Masked Autoencoders (CVPR 2022): ratio, normalised targets. Fu et al., Rethinking Patch Dependence
for Masked Autoencoders (2024): the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from samgraft.shared.data.dataset import centre_channel
from samgraft.shared.errors import UsageError
from samgraft.shared.models.image_encoder import ImageEncoder, MaskableEncoder
from samgraft.shared.models.sam import to_pixels
from samgraft.ssl.masking import MaskKind, token_masks, upsample_mask
from samgraft.ssl.objectives.objective import ObjectiveLoss, Panel
from torch import nn


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Settings of the objective ``mae``."""

    mask_ratio: float = 0.75
    """Fraction of tokens hidden (MAE's value)."""
    mask_kind: MaskKind = MaskKind.RANDOM
    """random, block, or per_window: the same number hidden in every attention window, fastest."""
    norm_pix_loss: bool = True
    """Normalise every hidden token's grey values by their own mean and deviation (MAE's better variant)."""
    decoder_dim: int = 384
    """Channels of the decoder."""
    num_decoder_blocks: int = 2
    """Depth of the decoder."""
    num_decoder_heads: int = 6
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {self.mask_ratio}.")
        if self.decoder_dim % (4 * self.num_decoder_heads):
            raise ValueError(
                f"decoder_dim must be a multiple of 4 times num_decoder_heads, got {self.decoder_dim} and "
                f"{self.num_decoder_heads}."
            )
        if self.num_decoder_blocks < 1:
            raise ValueError(f"num_decoder_blocks must be at least 1, got {self.num_decoder_blocks}.")


class CrossBlock(nn.Module):
    """Hidden tokens attend to the visible ones, then an MLP; both with residuals."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden_BMD: torch.Tensor, visible_BND: torch.Tensor) -> torch.Tensor:
        """Return the hidden tokens with what they learned from the visible ones."""
        query = self._heads(self.to_query(self.norm1(hidden_BMD)))
        key, value = (self._heads(part) for part in self.to_key_value(visible_BND).chunk(2, dim=-1))
        mixed_BMD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_BMD = hidden_BMD + self.proj(mixed_BMD)
        out_BMD: torch.Tensor = hidden_BMD + self.mlp(self.norm2(hidden_BMD))
        return out_BMD

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads


class CrossDecoder(nn.Module):
    """Visible tokens (B, N, C) and the numbers of the hidden ones -> grey values (B, M, P) of the hidden ones."""

    positions_LD: torch.Tensor

    def __init__(self, in_dim: int, config: MAEConfig, *, grid: int, num_pixels: int) -> None:
        super().__init__()
        dim = config.decoder_dim
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions_LD", sincos_positions(grid, dim), persistent=False)
        self.context_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            CrossBlock(dim, num_heads=config.num_decoder_heads) for _ in range(config.num_decoder_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.to_pixels = nn.Linear(dim, num_pixels)

    def forward(
        self, visible_BNC: torch.Tensor, ids_keep_BN: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> torch.Tensor:
        """Return the guessed grey values of the hidden tokens."""
        visible_BND = self.context_norm(self.embed(visible_BNC) + self.positions_LD[ids_keep_BN])
        hidden_BMD = self.mask_token + self.positions_LD[ids_hidden_BM]
        for block in self.blocks:
            hidden_BMD = block(hidden_BMD, visible_BND)
        out_BMP: torch.Tensor = self.to_pixels(self.norm(hidden_BMD))
        return out_BMP


class MAE(nn.Module):
    """The objective ``mae``. Exports ``encoder``; throws the decoder away."""

    def __init__(self, encoder: MaskableEncoder, config: MAEConfig, *, seed: int) -> None:
        super().__init__()
        if not isinstance(encoder, ImageEncoder):
            raise UsageError(
                f"METHOD=mae must have an encoder that can leave tokens out (vit_b, vit_l, vit_h), got "
                f"{encoder.arch.value}. Use METHOD=masked_image."
            )
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.grid = encoder.image_size // encoder.stride
        encoder.neck.requires_grad_(False)
        self.decoder = CrossDecoder(encoder.feature_dim, config, grid=self.grid, num_pixels=encoder.stride**2)

    def loss(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int], step: int) -> ObjectiveLoss:
        """Return the mean squared error over hidden tokens. ``step`` is not used."""
        mask_Bhw = self._masks(sample_counters).to(images_B1SS.device)
        guess_BMP, visible_BNC, ids_hidden_BM = self._guess(images_B1SS, mask_Bhw)
        target_BMP, _, std_BM1 = self._target(centre_channel(images_B1SS), ids_hidden_BM)
        error_BMP = guess_BMP - target_BMP
        grey_error = (error_BMP.detach() * std_BM1).abs().mean()
        return ObjectiveLoss(
            total=error_BMP.square().mean(),
            parts={"grey_error": grey_error},
            features_BC=visible_BNC.detach().float().mean(1),
        )

    def after_step(self, step: int) -> None:
        """Nothing to do: there is no teacher."""

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return input, what the encoder saw, and its guess in the holes.

        With ``norm_pix_loss`` the guess is put back into grey values with the hidden token's own mean and deviation, as
        MAE's pictures are: brightness is given, structure is guessed.
        """
        mask_Bhw = self._masks(sample_counters).to(images_B1SS.device)
        guess_BMP, _, ids_hidden_BM = self._guess(images_B1SS, mask_Bhw)
        images_B1SS = centre_channel(images_B1SS)
        _, mean_BM1, std_BM1 = self._target(images_B1SS, ids_hidden_BM)
        grey_BMP = (guess_BMP * std_BM1 + mean_BM1).clamp(0, 1)
        patches_BLP = _patches(images_B1SS, self.encoder.stride)
        places = ids_hidden_BM[..., None].expand(-1, -1, patches_BLP.shape[-1])
        filled_BLP = patches_BLP.scatter(1, places, grey_BMP.to(patches_BLP.dtype))
        filled_B1SS = F.fold(filled_BLP.mT, images_B1SS.shape[-2:], self.encoder.stride, stride=self.encoder.stride)
        seen_B1SS = images_B1SS.masked_fill(upsample_mask(mask_Bhw, image_size=images_B1SS.shape[-1]), 0.5)
        pictures = torch.stack([images_B1SS, seen_B1SS, filled_B1SS]).squeeze(2)
        return Panel(columns=("input", "visible", "output"), images_KBHW=pictures.float().cpu())

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

    def _guess(
        self, images_B1SS: torch.Tensor, mask_Bhw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the guess, the encoded visible tokens and the numbers of the hidden ones."""
        mask_BL = mask_Bhw.flatten(1)
        ids_keep_BN, ids_hidden_BM = _ids(~mask_BL), _ids(mask_BL)
        visible_BNC = self.encoder.forward_visible(to_pixels(images_B1SS, self.encoder.spec), ids_keep_BN)
        guess_BMP = self.decoder(visible_BNC, ids_keep_BN, ids_hidden_BM).float()
        return guess_BMP, visible_BNC, ids_hidden_BM

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


def sincos_positions(grid: int, dim: int) -> torch.Tensor:
    """Return fixed positions (grid * grid, dim): half the channels for the row, half for the column."""
    quarter = dim // 4
    rates = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves_gD = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves_gD[:, None, :].expand(grid, grid, -1)
    columns = waves_gD[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def _ids(chosen_BL: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the chosen tokens, ascending; every row must choose as many."""
    return chosen_BL.nonzero()[:, 1].view(len(chosen_BL), -1)


def _patches(images_B1SS: torch.Tensor, size: int) -> torch.Tensor:
    """Return the grey values of every token, shape (B, tokens in raster order, size * size)."""
    return F.unfold(images_B1SS, size, stride=size).mT
