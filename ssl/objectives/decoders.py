"""Light decoders of masked modelling, which predict hidden tokens from visible ones and are not exported.

A decoder must cost less than the tokens that the encoder leaves out. Its cost as a multiple of the encoder's training
step at 1024 px (ViT-B, 75 % hidden), measured on a CPU, is 3.6 for 512 channels x 8 blocks over all tokens (MAE's own),
0.23 for 512 x 2 in windows, and 0.17 for cross-attention with 384 x 2.

Shape letters: B = slices, N = visible tokens, M = predicted hidden tokens, L = all tokens, g = grid side, C, D =
channels of encoder and decoder, P = numbers per predicted token, W = side of a decoder window.

Source: He et al., Masked Autoencoders (CVPR 2022): the decoder over all tokens, fixed sine-cosine positions. Fu et al.,
Rethinking Patch Dependence for Masked Autoencoders (2024): cross-attention, any part of the hidden tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn

MAX_WINDOW = 16
"""Largest number of tokens along a side of a decoder window, in which all tokens attend to each other."""


class DecoderKind(Enum):
    """Attention pattern of the decoder."""

    CROSS = "cross"
    """Hidden tokens attend to the visible ones only, so that the cost follows the predicted tokens."""
    WINDOWED = "windowed"
    """All tokens, hidden ones as mask tokens, attend to each other within windows."""
    FULL = "full"
    """All tokens attend to all. With decoder_dim 512, 8 blocks and 16 heads this is MAE's official decoder."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Size of a decoder."""

    kind: DecoderKind
    dim: int
    num_blocks: int
    num_heads: int

    def __post_init__(self) -> None:
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"decoder_dim must be a multiple of 4 times num_decoder_heads, got {self.dim} and {self.num_heads}."
            )


class CrossBlock(nn.Module):
    """Transformer block in which hidden tokens attend to the visible ones."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _mlp(dim)

    def forward(self, hidden_BMD: torch.Tensor, visible_BND: torch.Tensor) -> torch.Tensor:
        """Return the hidden tokens after attention to the visible ones and an MLP, both with residuals."""
        query = _heads(self.to_query(self.norm1(hidden_BMD)), self.num_heads)
        key, value = (_heads(part, self.num_heads) for part in self.to_key_value(visible_BND).chunk(2, dim=-1))
        mixed_BMD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_BMD = hidden_BMD + self.proj(mixed_BMD)
        out_BMD: torch.Tensor = hidden_BMD + self.mlp(self.norm2(hidden_BMD))
        return out_BMD


class SelfBlock(nn.Module):
    """Transformer block in which all given tokens attend to each other."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _mlp(dim)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """Return the tokens after attention among them and an MLP, both with residuals."""
        query, key, value = (_heads(part, self.num_heads) for part in self.qkv(self.norm1(tokens_BLD)).chunk(3, dim=-1))
        mixed_BLD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens_BLD = tokens_BLD + self.proj(mixed_BLD)
        out_BLD: torch.Tensor = tokens_BLD + self.mlp(self.norm2(tokens_BLD))
        return out_BLD


class Decoder(nn.Module):
    """Decoder from visible tokens (B, N, C) to predictions (B, M, P) of hidden ones."""

    positions_LD: torch.Tensor

    def __init__(self, in_dim: int, shape: DecoderShape, *, grid: int, out_dim: int) -> None:
        super().__init__()
        dim = shape.dim
        self.is_cross = shape.kind is DecoderKind.CROSS
        self.grid = grid
        self.window = grid if shape.kind is DecoderKind.FULL else window_side(grid)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        # Not stored, because the positions follow from grid and width.
        self.register_buffer("positions_LD", sincos_positions(grid, dim), persistent=False)
        self.context_norm = nn.LayerNorm(dim) if self.is_cross else nn.Identity()
        block = CrossBlock if self.is_cross else SelfBlock
        self.blocks = nn.ModuleList(block(dim, num_heads=shape.num_heads) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(dim)
        # The name of this layer is part of the ssl_state of earlier runs.
        self.to_answer = nn.Linear(dim, out_dim)

    def forward(
        self, visible_BNC: torch.Tensor, ids_keep_BN: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> torch.Tensor:
        """Return the predictions of the given hidden tokens, in their order."""
        visible_BND = self.embed(visible_BNC) + self.positions_LD[ids_keep_BN]
        if self.is_cross:
            # Keys and values of all blocks come from the same context, which is normalised once.
            visible_BND = self.context_norm(visible_BND)
            hidden_BMD = self.mask_token + self.positions_LD[ids_hidden_BM]
            for block in self.blocks:
                hidden_BMD = block(hidden_BMD, visible_BND)
        else:
            hidden_BMD = self._among_all(visible_BND, ids_keep_BN, ids_hidden_BM)
        out_BMP: torch.Tensor = self.to_answer(self.norm(hidden_BMD))
        return out_BMP

    def _among_all(
        self, visible_BND: torch.Tensor, ids_keep_BN: torch.Tensor, ids_hidden_BM: torch.Tensor
    ) -> torch.Tensor:
        # Mask tokens everywhere first; the visible tokens then overwrite their own positions.
        tokens_BLD = (self.mask_token + self.positions_LD).to(visible_BND.dtype).repeat(len(visible_BND), 1, 1)
        tokens_BLD = tokens_BLD.scatter(1, ids_keep_BN[..., None].expand_as(visible_BND), visible_BND)
        windows = to_windows(tokens_BLD, self.grid, self.window)
        for block in self.blocks:
            windows = block(windows)
        tokens_BLD = from_windows(windows, self.grid, self.window)
        return tokens_BLD.gather(1, ids_hidden_BM[..., None].expand(-1, -1, tokens_BLD.shape[-1]))


def window_side(grid: int) -> int:
    """Return the largest side up to 16 that divides the grid, or the grid itself if only 1 does."""
    side = max(side for side in range(1, min(grid, MAX_WINDOW) + 1) if grid % side == 0)
    return side if side > 1 else grid


def to_windows(tokens_BLD: torch.Tensor, grid: int, window: int) -> torch.Tensor:
    """Cut a grid of tokens (B, g g, D) into windows (B g g / W W, W W, D)."""
    across = grid // window
    cut = tokens_BLD.unflatten(1, (across, window, across, window)).transpose(2, 3)
    windows: torch.Tensor = cut.flatten(0, 2).flatten(1, 2)
    return windows


def from_windows(windows: torch.Tensor, grid: int, window: int) -> torch.Tensor:
    """Put the windows of ``to_windows`` together again."""
    across = grid // window
    cut = windows.unflatten(1, (window, window)).unflatten(0, (-1, across, across))
    tokens_BLD: torch.Tensor = cut.transpose(2, 3).flatten(1, 4)
    return tokens_BLD


def sincos_positions(grid: int, dim: int) -> torch.Tensor:
    """Return fixed sine-cosine positions (grid * grid, dim), half the channels per axis."""
    quarter = dim // 4
    # Computed in float64, as in MAE's code, and stored as float32.
    rates = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves_gD = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves_gD[:, None, :].expand(grid, grid, -1)
    columns = waves_gD[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def chosen_ids(chosen_BL: torch.Tensor) -> torch.Tensor:
    """Return the indices (B, N) of the chosen tokens, ascending, of which every row has the same number."""
    return chosen_BL.nonzero()[:, 1].view(len(chosen_BL), -1)


def place_tokens(tokens_BNC: torch.Tensor, ids_BN: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Put tokens at their places among all tokens, which are 0 elsewhere, shape (B, L, C)."""
    channels = tokens_BNC.shape[-1]
    tokens_BLC = tokens_BNC.new_zeros(len(tokens_BNC), num_tokens, channels)
    return tokens_BLC.scatter(1, ids_BN[..., None].expand(-1, -1, channels), tokens_BNC)


def _mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def _heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    heads: torch.Tensor = tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return heads
