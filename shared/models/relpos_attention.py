"""Exact attention with decomposed relative positions, without any full-size attention map.

On a CPU: ``blocked_attention``. Elsewhere: the bias is written as extra channels of queries and keys, so that fused
kernels run without a bias tensor.

Shape letters: B = images; N = tokens; C = channels; X = windows; h = heads; x = (window, head) pairs in a block;
n = slots; q = queries in a block; d = channels per head; W = window side; L = 2 W - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from samgraft.shared.models.attention_windows import Windows
from samgraft.shared.models.blocked_attention import BlockedAttention
from samgraft.shared.models.window_attention import Bundle


def attend(
    qkv_BND: torch.Tensor,
    padding_D: torch.Tensor,
    rel_pos_h_Ld: torch.Tensor,
    rel_pos_w_Ld: torch.Tensor,
    bundles: Sequence[Bundle],
    *,
    num_heads: int,
) -> torch.Tensor:
    """Attend within each window of each bundle.

    Args:
        qkv_BND: Queries, keys and values, D = 3 C, laid out as segment_anything's ``qkv``.
        padding_D: The same of a zero token: what padding contributes.
        rel_pos_h_Ld: Relative positions of rows for the bundles' side.
        rel_pos_w_Ld: Of columns.
        bundles: Together they hold every token once.
        num_heads: Heads.

    Returns:
        Shape (B, N, C), before the output projection. Tokens that no bundle holds are 0.
    """
    if qkv_BND.device.type == "cpu" and not torch.compiler.is_compiling():
        out: torch.Tensor = BlockedAttention.apply(
            qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, tuple(bundles), num_heads
        )
        return out
    return attend_fused(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, bundles, num_heads=num_heads)


def attend_fused(
    qkv_BND: torch.Tensor,
    padding_D: torch.Tensor,
    rel_pos_h_Ld: torch.Tensor,
    rel_pos_w_Ld: torch.Tensor,
    bundles: Sequence[Bundle],
    *,
    num_heads: int,
) -> torch.Tensor:
    """The same through ``scaled_dot_product_attention``: for GPUs and ``torch.compile``."""
    num_images, num_tokens, width = qkv_BND.shape
    dim = width // 3
    flat = torch.cat([qkv_BND.reshape(-1, width), qkv_BND.new_zeros(1, width)])
    out = qkv_BND.new_zeros(num_images * num_tokens + 1, dim)
    tables = (rel_pos_h_Ld.to(flat.dtype), rel_pos_w_Ld.to(flat.dtype))
    for bundle in bundles:
        windows = Windows.gather(flat, padding_D.to(flat.dtype), tables, bundle, slice(None), num_heads)
        row_bias, col_bias = windows.bias_terms(slice(None), slice(None))
        query = torch.cat([windows.q * windows.scale, row_bias, col_bias], -1)
        key = windows.augmented_keys()
        value = windows.v
        if bundle.has_empty:
            query = F.pad(query, (0, 1), value=1.0)
        if bundle.has_padding:
            sink = windows.sink(row_bias, col_bias, windows.q).to(query.dtype)
            query = torch.cat([query, sink[..., None]], -1)
            one = F.pad(key.new_zeros(key.shape[0], 1, key.shape[2]), (0, 1), value=1.0)
            key = torch.cat([F.pad(key, (0, 1)), one], 1)
            value = torch.cat([value, windows.padding_value[:, None]], 1)
        pad = -query.shape[-1] % 8
        query, key = F.pad(query, (0, pad)), F.pad(key, (0, pad))
        value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
        shape = (-1, num_heads, *query.shape[1:])
        key, value = key.view(-1, num_heads, *key.shape[1:]), value.view(-1, num_heads, *value.shape[1:])
        mixed = F.scaled_dot_product_attention(query.view(shape), key, value, scale=1.0)
        rows = mixed[..., : dim // num_heads].transpose(1, 2).reshape(-1, dim)
        out = out.index_copy(0, bundle.tokens.flatten(), rows.to(out.dtype))
    return out[:-1].view(num_images, num_tokens, dim)
