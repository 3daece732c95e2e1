"""SAM's weights run as a plain ViT: global attention in every block, no relative positions, no windows.

The layout in which the official MAE code would train them, and in which published SSL continuations of SAM most likely
were trained. For comparison: SAM itself, and stage 2, run the windowed layout with relative positions.

Shape letters: B = slices, N = visible tokens, C = channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.vit import ImageEncoder, PlannedBlock, cut_patches
from torch import nn
from torch.utils.checkpoint import checkpoint


def plain_forward(encoder: ImageEncoder, pixels_B3SS: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
    """Encode the visible tokens with global attention and absolute positions only; return (B, N, C) before the neck."""
    patches_BLP = cut_patches(pixels_B3SS, encoder.stride)
    places = ids_keep_BN[..., None].expand(-1, -1, patches_BLP.shape[-1])
    tokens_BNC = encoder.embed_patches(patches_BLP.gather(1, places), ids_keep_BN)
    for block in encoder.blocks:
        assert isinstance(block, PlannedBlock)
        if encoder.activation_checkpointing and torch.is_grad_enabled():
            tokens_BNC = checkpoint(_plain_block, block, tokens_BNC, use_reentrant=False)
        else:
            tokens_BNC = _plain_block(block, tokens_BNC)
    return tokens_BNC


def _plain_block(block: PlannedBlock, tokens_BNC: torch.Tensor) -> torch.Tensor:
    attention = block.attn
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in attention.qkv(block.norm1(tokens_BNC)).chunk(3, dim=-1)
    )
    mixed_BNC = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens_BNC = tokens_BNC + attention.proj(mixed_BNC)
    out_BNC: torch.Tensor = tokens_BNC + block.mlp(block.norm2(tokens_BNC))
    return out_BNC


def relative_positions(encoder: ImageEncoder) -> list[nn.Parameter]:
    """Return the tables that the plain layout leaves alone."""
    return [p for name, p in encoder.named_parameters() if name.endswith(("rel_pos_h", "rel_pos_w"))]
