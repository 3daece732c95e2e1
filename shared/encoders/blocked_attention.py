"""Attention on a CPU: blocks of queries that fit the cache, recomputed in the backward pass.

No attention map is kept, as in flash attention; only queries, keys and values are.

Shape letters: as in ``attention_windows``; also b = (window, head) pairs in a block; q = queries in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from samgraft.shared.encoders.attention_windows import Operands, Tables, operands, put, take
from samgraft.shared.encoders.windows import Bundle
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**21
"""Logits per block: 4 MiB in bfloat16. Smaller blocks pack the keys anew more often, larger ones leave the cache."""
STEP_TOKENS = 2**13
"""Tokens whose queries, keys and values are gathered at once: few calls for windows, one large image at a time."""
RASTER_COLS = 48
"""From this many columns on, adding the row and column terms of a raster in bfloat16 is faster than multiplying with
codes; in narrower grids the additions are too short to vectorise (1.1 against 0.15 ns per logit at 16 columns)."""


def _steps(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Blocks are computed in float32 where the processor only emulates the type: faster, and more exact."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return dtype


class BlockedAttention(torch.autograd.Function):
    """Attention block by block; only its inputs are kept for the backward pass."""

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
        cast = _Cast(qkv_BND.dtype, padding_D, (rel_pos_h_Ld, rel_pos_w_Ld))
        with torch.autocast("cpu", enabled=False):
            for bundle in bundles:
                for chosen in _window_steps(bundle):
                    parts = cast.take(flat, bundle.tokens[chosen], parts=3, num_heads=num_heads)
                    given = cast.operands((*parts, cast.padding, *cast.tables), bundle, chosen)
                    put(out, bundle.tokens[chosen], (_mix(given).unflatten(0, (-1, num_heads)),))
        ctx.save_for_backward(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld)
        ctx.bundles, ctx.num_heads = bundles, num_heads
        return out[:-1].view(num_images, num_tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Recompute each block and return the gradients of the tensors."""
        qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld = ctx.saved_tensors
        num_heads, width = ctx.num_heads, qkv_BND.shape[-1]
        flat, grad = qkv_BND.reshape(-1, width), grad_BNC.reshape(-1, width // 3)
        grad_qkv = flat.new_zeros(flat.shape[0] + 1, width)
        cast = _Cast(qkv_BND.dtype, padding_D, (rel_pos_h_Ld, rel_pos_w_Ld))
        shared = (cast.padding, *cast.tables)
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in shared]
        with torch.autocast("cpu", enabled=False):
            for bundle in ctx.bundles:
                for chosen in _window_steps(bundle):
                    tokens = bundle.tokens[chosen]
                    (grad_out,) = cast.take(grad, tokens, parts=1, num_heads=num_heads)
                    if bundle.has_empty:
                        grad_out.masked_fill_(bundle.empty[chosen][:, None, :, None], 0.0)
                    parts = cast.take(flat, tokens, parts=3, num_heads=num_heads)
                    grads = _through_operands(cast, parts, bundle, chosen, grad_out.flatten(0, 1))
                    put(grad_qkv, tokens, grads[:3])
                    for total, part in zip(sums, grads[3:], strict=True):
                        total += part
        sums = [total.to(t.dtype) for total, t in zip(sums, (padding_D, rel_pos_h_Ld, rel_pos_w_Ld), strict=True)]
        return (grad_qkv[:-1].view_as(qkv_BND), *sums, None, None)


class _Cast:
    """Brings everything to the type in which blocks are computed, and picks the form of the bias for it."""

    def __init__(self, dtype: torch.dtype, padding: torch.Tensor, tables: Tables) -> None:
        self.dtype = _compute_dtype(dtype)
        self.padding = padding.to(self.dtype)
        self.tables = (tables[0].to(self.dtype), tables[1].to(self.dtype))

    def take(self, flat: torch.Tensor, tokens: torch.Tensor, *, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.to(self.dtype) for part in take(flat, tokens, parts=parts, num_heads=num_heads))

    def operands(self, inputs: Sequence[torch.Tensor], bundle: Bundle, chosen: slice) -> Operands:
        q, k, v, padding, table_h, table_w = inputs
        wide = self.dtype.itemsize > 2 or bundle.extent[1] >= RASTER_COLS
        as_raster = wide and bundle.raster and not bundle.has_padding
        return operands(q, k, v, padding, (table_h, table_w), bundle, chosen=chosen, as_raster=as_raster)


def _through_operands(
    cast: _Cast, parts: tuple[torch.Tensor, ...], bundle: Bundle, chosen: slice, grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys, values (X, h, n, d), padding and the two tables."""
    leaves = [t.detach().requires_grad_() for t in (*parts, cast.padding, *cast.tables)]
    with torch.enable_grad():
        given = cast.operands(leaves, bundle, chosen)
    grads = _mix_backward(given, grad_out)
    taken = torch.autograd.grad(given.differentiable, leaves, grads, allow_unused=True)
    # Without padding nothing depends on what padding contributes.
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(taken, leaves, strict=True))


def _window_steps(bundle: Bundle) -> Iterator[slice]:
    count, slots = bundle.tokens.shape
    return _steps(count, max(1, STEP_TOKENS // slots))


class _Blocks:
    """The softmax of a block of pairs and queries at a time, in memory that is used again."""

    def __init__(self, given: Operands) -> None:
        self.given = given
        self.num_pairs, self.num_queries = given.queries_xnd.shape[:2]
        self.num_keys = given.keys_xmd.shape[1]
        self.queries = min(self.num_queries, max(1, BLOCK_ELEMENTS // self.num_keys))
        self.pairs = min(self.num_pairs, max(1, BLOCK_ELEMENTS // (self.queries * self.num_keys)))
        if given.codes_xmE is None:
            self.left, keys = given.queries_xnd, given.keys_xmd
        else:
            self.left = torch.cat([given.queries_xnd, given.terms_xnE], -1)
            keys = torch.cat([given.keys_xmd, given.codes_xmE], -1)
        self.keys = keys
        # Contiguous columns: a fifth faster than a transposed view in float32.
        self.columns = keys.transpose(1, 2).contiguous() if keys.element_size() > 2 else keys.transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for pairs in _steps(self.num_pairs, self.pairs):
            for queries in _steps(self.num_queries, self.queries):
                yield pairs, queries

    def scratch(self) -> torch.Tensor:
        """Return memory for one block."""
        return self.keys.new_empty(self.pairs * self.queries * self.num_keys)

    def view(self, scratch: torch.Tensor, pairs: slice, queries: slice) -> torch.Tensor:
        """Return the part of ``scratch`` that a block takes: (b, q, m)."""
        shape = (pairs.stop - pairs.start, queries.stop - queries.start, self.num_keys)
        return scratch[: shape[0] * shape[1] * shape[2]].view(shape)

    def probabilities(self, out: torch.Tensor, pairs: slice, queries: slice) -> torch.Tensor:
        """Write the softmax of a block to ``out``."""
        left, right = self.left[pairs, queries], self.columns[pairs]
        if self.given.codes_xmE is None:
            rows, cols = self.given.grid
            terms = self.given.terms_xnE[pairs, queries]
            torch.add(terms[..., :rows, None], terms[..., None, rows:], out=out.unflatten(-1, (rows, cols)))
            out.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=out)
        return torch.softmax(out, -1, out=out)


def _mix(given: Operands) -> torch.Tensor:
    """Attention of some windows: (x, n, d)."""
    blocks = _Blocks(given)
    mixed, scratch = torch.empty_like(given.queries_xnd), blocks.scratch()
    for pairs, queries in blocks:
        p = blocks.probabilities(blocks.view(scratch, pairs, queries), pairs, queries)
        torch.bmm(p, given.values_xmd[pairs], out=mixed[pairs, queries])
    return mixed


def _mix_backward(given: Operands, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, terms, keys and values of some windows."""
    with torch.no_grad():
        blocks = _Blocks(given)
        grad_left, grad_terms = torch.empty_like(blocks.left), torch.empty_like(given.terms_xnE)
        grad_keys, grad_values = (_Total(t, split=blocks.queries < blocks.num_queries)
                                  for t in (given.keys_xmd, given.values_xmd))  # fmt: skip
        scratch, scratch_grad = blocks.scratch(), blocks.scratch()
        value_columns = given.values_xmd.transpose(1, 2)
        for pairs, queries in blocks:
            p = blocks.probabilities(blocks.view(scratch, pairs, queries), pairs, queries)
            grad = grad_out[pairs, queries]
            grad_values.add(pairs, p, grad)
            ds = blocks.view(scratch_grad, pairs, queries)
            torch.bmm(grad, value_columns[pairs], out=ds)
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            grad_keys.add(pairs, ds, given.queries_xnd[pairs, queries])
            torch.bmm(ds, blocks.keys[pairs], out=grad_left[pairs, queries])
            if given.codes_xmE is None:
                rows = given.grid[0]
                raster = ds.unflatten(-1, given.grid)
                grad_terms[pairs, queries, :rows] = raster.sum(-1)
                grad_terms[pairs, queries, rows:] = raster.sum(-2)
        if given.codes_xmE is not None:
            grad_left, grad_terms = grad_left.split([given.queries_xnd.shape[-1], grad_terms.shape[-1]], -1)
        return grad_left, grad_terms, grad_keys.result(), grad_values.result()


class _Total:
    """Sum over blocks of queries; never kept in half precision."""

    def __init__(self, like: torch.Tensor, *, split: bool) -> None:
        self.dtype = like.dtype
        precise = torch.promote_types(like.dtype, torch.float32)
        self.split = split
        self.total = torch.zeros_like(like, dtype=precise) if split else torch.empty_like(like)

    def add(self, pairs: slice, left_bqm: torch.Tensor, right_bqd: torch.Tensor) -> None:
        total, left_bmq = self.total[pairs], left_bqm.transpose(1, 2)
        if not self.split:
            torch.bmm(left_bmq, right_bqd, out=total)
        elif total.dtype == right_bqd.dtype:
            total.baddbmm_(left_bmq, right_bqd)
        else:
            total += torch.bmm(left_bmq, right_bqd)

    def result(self) -> torch.Tensor:
        return self.total.to(self.dtype)
