"""Exact attention with decomposed relative positions, without any full-size attention map.

On a CPU: ``blocked_attention``. Elsewhere: the bias is written as extra channels of queries and keys, so that fused
kernels run without a bias tensor.

Shape letters: as in ``attention_windows``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from samgraft.shared.models.attention_windows import operands, take
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
        q, k, v = take(flat, bundle.tokens, parts=3, num_heads=num_heads)
        given = operands(q, k, v, padding_D.to(flat.dtype), tables, bundle, chosen=slice(None), as_raster=False)
        assert given.codes_xmE is not None
        query = torch.cat([given.queries_xnd, given.terms_xnE], -1)
        key = torch.cat([given.keys_xmd, given.codes_xmE], -1)
        pad = -query.shape[-1] % 8  # the multiple that fused kernels take
        query, key = F.pad(query, (0, pad)), F.pad(key, (0, pad))
        value = F.pad(given.values_xmd, (0, query.shape[-1] - given.values_xmd.shape[-1]))
        query, key, value = (t.unflatten(0, (-1, num_heads)) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        rows = mixed[..., : dim // num_heads].transpose(1, 2).reshape(-1, dim)
        out = out.index_copy(0, bundle.tokens.flatten(), rows.to(out.dtype))
    return out[:-1].view(num_images, num_tokens, dim)
