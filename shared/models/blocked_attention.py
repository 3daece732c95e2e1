"""Attention on a CPU: blocks of queries that fit the cache, recomputed in the backward pass.

No attention map is kept, as in flash attention; only queries, keys, values and the output are.

Shape letters: B = images; N = tokens; C = channels; X = windows; h = heads; x = (window, head) pairs in a block;
n = slots; q = queries in a block; d = channels per head; W = window side; L = 2 W - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from samgraft.shared.models.attention_windows import Windows, padding_logit, put, take
from samgraft.shared.models.window_attention import Bundle

BLOCK_ELEMENTS = 2**18
"""Logits per block: 1 MiB in float32, about what the cache of one core holds (2**17 to 2**21 were measured)."""


def _steps(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _window_steps(bundle: Bundle, num_heads: int) -> Iterator[slice]:
    count, slots = bundle.tokens.shape
    return _steps(count, max(1, BLOCK_ELEMENTS // (num_heads * slots * slots)))


def _block_steps(num_pairs: int, slots: int) -> Iterator[tuple[slice, slice]]:
    queries = min(slots, max(1, BLOCK_ELEMENTS // slots))
    pairs = max(1, BLOCK_ELEMENTS // (queries * slots))
    for pair_step in _steps(num_pairs, pairs):
        for query_step in _steps(slots, queries):
            yield pair_step, query_step


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Blocks are computed in float32 where the processor only emulates bfloat16: faster, and more exact."""
    if dtype in {torch.bfloat16, torch.float16} and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return dtype


class BlockedAttention(torch.autograd.Function):
    """Attention block by block; only qkv and the output are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BND: torch.Tensor,
        padding_D: torch.Tensor,
        rel_pos_h_Ld: torch.Tensor,
        rel_pos_w_Ld: torch.Tensor,
        bundles: tuple[Bundle, ...],
        num_heads: int,
    ) -> torch.Tensor:
        """Return (B, N, C)."""
        num_images, num_tokens, width = qkv_BND.shape
        flat, out = qkv_BND.reshape(-1, width), qkv_BND.new_zeros(num_images * num_tokens + 1, width // 3)
        cast = _Cast(qkv_BND.dtype, padding_D, rel_pos_h_Ld, rel_pos_w_Ld)
        with torch.autocast("cpu", enabled=False):
            for bundle in bundles:
                for chosen in _window_steps(bundle, num_heads):
                    windows = cast.gather(flat, bundle, chosen, num_heads)
                    put(out, bundle.tokens[chosen], [_mix(windows)], num_heads=num_heads)
        ctx.save_for_backward(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, out)
        ctx.bundles, ctx.num_heads = bundles, num_heads
        return out[:-1].view(num_images, num_tokens, -1)

    @staticmethod
    def backward(ctx: Any, grad_BNC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Recompute each block and return the gradients of the tensors."""
        qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, out = ctx.saved_tensors
        num_heads, width = ctx.num_heads, qkv_BND.shape[-1]
        flat, grad = qkv_BND.reshape(-1, width), grad_BNC.reshape(-1, width // 3)
        grad_qkv = flat.new_zeros(flat.shape[0] + 1, width)
        cast = _Cast(qkv_BND.dtype, padding_D, rel_pos_h_Ld, rel_pos_w_Ld)
        sums = _Sums.like(cast)
        with torch.autocast("cpu", enabled=False):
            for bundle in ctx.bundles:
                for chosen in _window_steps(bundle, num_heads):
                    windows = cast.gather(flat, bundle, chosen, num_heads)
                    tokens = bundle.tokens[chosen]
                    (grad_out,) = take(grad, tokens, parts=1, num_heads=num_heads)
                    (mixed,) = take(out, tokens, parts=1, num_heads=num_heads)
                    grad_out = grad_out.to(windows.q.dtype)
                    if bundle.has_empty:
                        empty = bundle.empty[chosen].repeat_interleave(num_heads, 0)
                        grad_out = grad_out.masked_fill(empty[..., None], 0.0)
                    parts = _mix_backward(windows, grad_out, mixed.to(windows.q.dtype), sums)
                    put(grad_qkv, tokens, parts, num_heads=num_heads)
        return (
            grad_qkv[:-1].view_as(qkv_BND),
            sums.padding.reshape(padding_D.shape).to(padding_D.dtype),
            sums.tables[0].to(rel_pos_h_Ld.dtype),
            sums.tables[1].to(rel_pos_w_Ld.dtype),
            None,
            None,
        )


class _Cast:
    """Brings everything to the type in which blocks are computed."""

    def __init__(self, dtype: torch.dtype, padding: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor) -> None:
        self.dtype = _compute_dtype(dtype)
        self.padding = padding.to(self.dtype)
        self.tables = (table_h.to(self.dtype), table_w.to(self.dtype))

    def gather(self, flat: torch.Tensor, bundle: Bundle, chosen: slice, num_heads: int) -> Windows:
        windows = Windows.gather(flat, self.padding, self.tables, bundle, chosen, num_heads)
        if flat.dtype != self.dtype:
            windows.q, windows.k, windows.v = (t.to(self.dtype) for t in (windows.q, windows.k, windows.v))
        return windows


@dataclass(kw_only=True)
class _Sums:
    """Gradients that every block adds to, at least in float32."""

    tables: list[torch.Tensor]
    padding: torch.Tensor  # (3 h d,), queries' third stays 0

    @classmethod
    def like(cls, cast: _Cast) -> _Sums:
        precise = torch.promote_types(cast.dtype, torch.float32)
        return cls(
            tables=[torch.zeros_like(t, dtype=precise) for t in cast.tables],
            padding=torch.zeros_like(cast.padding, dtype=precise),
        )


def _mix(windows: Windows) -> torch.Tensor:
    """Attention of some windows: (x, n, d)."""
    key_columns = windows.keys().transpose(1, 2).contiguous()
    mixed, slots = torch.empty_like(windows.q), windows.k.shape[1]
    for pairs, queries in _block_steps(windows.q.shape[0], slots):
        p, _, _ = windows.probabilities(pairs, queries, key_columns)
        block = torch.bmm(p[..., :slots], windows.v[pairs])
        if windows.bundle.has_padding:
            block.addcmul_(p[..., slots:], windows.padding_value[pairs, None])
        mixed[pairs, queries] = block
    return mixed


def _mix_backward(
    windows: Windows, grad_out: torch.Tensor, mixed: torch.Tensor, sums: _Sums
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values of some windows; adds to ``sums``."""
    # Keys and values as columns, (x, d, n), make every product below a plain or left-transposed one, the fast kinds.
    keys, value_columns = windows.keys(), windows.v.transpose(1, 2).contiguous()
    key_columns = keys.transpose(1, 2).contiguous()
    grad_q = torch.empty_like(windows.q)
    precise = torch.promote_types(windows.q.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros_like(value_columns, dtype=precise) for _ in range(2))
    weight = (grad_out * mixed).sum(-1, keepdim=True)
    slots = windows.k.shape[1]
    for pairs, queries in _block_steps(windows.q.shape[0], slots):
        p, row_bias, col_bias = windows.probabilities(pairs, queries, key_columns)
        grad, query = grad_out[pairs, queries], windows.q[pairs, queries]
        _accumulate(grad_v[pairs], grad, p[..., :slots])
        grad_p = torch.empty_like(p)
        torch.bmm(grad, value_columns[pairs], out=grad_p[..., :slots])
        if windows.bundle.has_padding:
            grad_p[..., slots] = (grad * windows.padding_value[pairs, None]).sum(-1)
        grad_p.sub_(weight[pairs, queries]).mul_(p)
        real = grad_p[..., :slots]
        _accumulate(grad_k[pairs], query, real, scale=windows.scale)
        block, grad_row, grad_col = _bias_backward(windows, real, keys[pairs])
        if windows.bundle.has_padding:
            sink = (grad_p[..., slots], p[..., slots])
            extra = _sink_backward(windows, sink, grad, (row_bias, col_bias), query, pairs, sums)
            block += extra[0]
            grad_row, grad_col = grad_row + extra[1], grad_col + extra[2]
        for axis, grad_bias in enumerate((grad_row, grad_col)):
            table = windows.tables[axis]
            index = windows.index(axis, pairs, queries).expand(*grad_bias.shape)
            spread = grad_bias.new_zeros(*grad_bias.shape[:2], table.shape[0]).scatter_(-1, index, grad_bias)
            block += spread @ table
            sums.tables[axis] += spread.flatten(0, 1).t() @ query.flatten(0, 1)
        grad_q[pairs, queries] = block
    return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scale: float = 1.0) -> None:
    """Add the product of ``left`` transposed and ``right``; a sum over many blocks is never kept in half precision."""
    if total.dtype == left.dtype:
        total.baddbmm_(left.transpose(1, 2), right, alpha=scale)
    else:
        total.add_(torch.bmm(left.transpose(1, 2), right), alpha=scale)


def _bias_backward(
    windows: Windows, grad_logits: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries (through keys) and of the two bias terms (x, q, W)."""
    side, dim = windows.bundle.side, windows.q.shape[-1]
    spread = torch.bmm(grad_logits, keys)
    grad_query = spread[..., :dim] * windows.scale
    if not windows.bundle.raster:
        return grad_query, spread[..., dim : dim + side], spread[..., dim + side : dim + 2 * side]
    rows, cols = windows.bundle.extent
    grid = grad_logits.unflatten(-1, (rows, cols))
    return grad_query, F.pad(grid.sum(-1), (0, side - rows)), F.pad(grid.sum(-2), (0, side - cols))


def _sink_backward(
    windows: Windows,
    sink: tuple[torch.Tensor, torch.Tensor],
    grad_out: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    pairs: slice,
    sums: _Sums,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients through the padding's logit to queries and bias terms; adds those of its key and value."""
    grad_sink, p_sink = sink
    with torch.enable_grad():
        leaves = tuple(bias.detach().requires_grad_() for bias in biases)
        logit = padding_logit(leaves[0], leaves[1], extent=windows.bundle.extent)
    grad_row, grad_col = torch.autograd.grad(logit, leaves, grad_sink.to(logit.dtype))
    scaled = grad_sink[..., None] * windows.scale
    per_pair = torch.stack([(scaled * query).sum(1), (p_sink[..., None] * grad_out).sum(1)])
    first = pairs.start % windows.num_heads
    heads = (torch.arange(per_pair.shape[1]) + first) % windows.num_heads
    by_head = sums.padding.view(3, windows.num_heads, -1)
    by_head[1].index_add_(0, heads, per_pair[0].to(by_head.dtype))
    by_head[2].index_add_(0, heads, per_pair[1].to(by_head.dtype))
    return scaled * windows.padding_key[pairs, None], grad_row, grad_col
