"""SAM 2's image encoder by the book, on the tensors of ours, and the original one of package ``sam2``."""

import pytest
import torch
import torch.nn.functional as F
from original_encoders import hiera_original
from samgraft.shared.encoders.hiera import HieraEncoder, HieraSpec

NO_SAM2 = "package sam2 is not installed (SAM2_BUILD_CUDA=0 pip install --no-build-isolation 'samgraft[sam2]')"


def masked_stages(encoder: HieraEncoder, images: torch.Tensor, visible_Bgg: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps (B, H, W, C) of all stages in raster order, with hidden tokens outside of every softmax.

    ``visible_Bgg`` is a mask of units (True = kept). Hidden pixels are zero. The zero padding of windows stays visible.
    """
    trunk, sizes = encoder.trunk, encoder.spec.attn_window_sizes
    pixels = visible_Bgg.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    tokens = trunk.patch_embed(images * pixels).permute(0, 2, 3, 1)
    positions = F.interpolate(trunk.pos_embed, size=tokens.shape[1:3], mode="bicubic")
    window = trunk.pos_embed_window
    positions = positions + window.repeat(1, 1, *(n // window.shape[-1] for n in tokens.shape[1:3]))
    tokens, stage, maps = tokens + positions.permute(0, 2, 3, 1), 0, []
    stages = encoder.spec.stage_of_block()
    for index, block in enumerate(trunk.blocks):
        side = 0 if index in encoder.spec.global_blocks else sizes[stage]
        starts = stages[index] != stage
        visible = visible_Bgg.repeat_interleave(tokens.shape[1] // visible_Bgg.shape[1], 1)
        visible = visible.repeat_interleave(tokens.shape[2] // visible_Bgg.shape[2], 2)
        normed = block.norm1(tokens)
        residual = pool(block.proj(normed)) if starts else tokens
        tokens = residual + masked_attention(block.attn, normed, visible, side=side, pools=starts)
        hidden = F.gelu(block.mlp.layers[0](block.norm2(tokens)))
        tokens, stage = tokens + block.mlp.layers[1](hidden), stages[index]
        if stages[index + 1 : index + 2] != [stage]:
            maps.append(tokens)
    return maps


def masked_attention(
    attn: torch.nn.Module, normed: torch.Tensor, visible: torch.Tensor, *, side: int, pools: bool
) -> torch.Tensor:
    """Mix tokens (B, H, W, C) window by window, each as a loop step."""
    count, height, width, _ = normed.shape
    rows, columns = side or height, side or width
    step = 2 if pools else 1
    out = normed.new_zeros(count, height // step, width // step, attn.proj.out_features)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            part = normed[:, top : top + rows, left : left + columns]
            seen = visible[:, top : top + rows, left : left + columns]
            below, right = rows - part.shape[1], columns - part.shape[2]
            part, seen = F.pad(part, (0, 0, 0, right, 0, below)), F.pad(seen, (0, right, 0, below), value=True)
            qkv = attn.qkv(part).unflatten(-1, (3, attn.num_heads, -1))
            query, key, value = qkv.unbind(-3)
            if pools:
                query = pool(query.flatten(-2)).unflatten(-1, (attn.num_heads, -1))
            query_rows, query_columns = query.shape[1:3]
            query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            # A window without any visible key has no softmax; its rows are hidden and never read.
            hidden = ~seen.flatten(1)[:, None, None] & seen.flatten(1).any(1)[:, None, None, None]
            mixed = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).flatten(2)
            mixed = attn.proj(mixed).unflatten(1, (query_rows, query_columns))
            place = out[:, top // step : (top + rows) // step, left // step : (left + columns) // step]
            place.copy_(mixed[:, : place.shape[1], : place.shape[2]])
    return out


def pool(tokens: torch.Tensor) -> torch.Tensor:
    """Return the maximum of every 2 x 2 tokens of (B, H, W, C)."""
    return F.max_pool2d(tokens.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def original_encoder(spec: HieraSpec) -> torch.nn.Module:
    """Return SAM 2's own image encoder of this shape, or skip the test where the package is not installed."""
    pytest.importorskip("sam2", reason=NO_SAM2)
    return hiera_original(spec)
