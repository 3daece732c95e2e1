"""Attention engine of CPUs, in blocks of queries that fit the cache.

No attention map is kept, as in flash attention. The backward pass recomputes each block from queries, keys and values.

Relative positions add a row term and a column term to each logit. Both are products: the query's terms for all rows
and columns of the window, times the key's one-hot row and column. segment_anything also lets real tokens attend to the
zero padding of edge windows, where every padded key has the bias of ``qkv`` as key and value and a relative position.
All padded keys together are one more key here, whose logit is a log-sum-exp in closed form.

Shape letters: B = images; N = tokens; C = channels; D = 3 C; X = windows; h = heads; x = X h (window, head) pairs;
n = slots; m = keys; d = channels per head; W = window side; L = 2 W - 1; E = position terms of a query;
b = pairs in a block; q = queries in a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.blocked_plan import WindowSet
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**21
"""Logits per block, 4 MiB in bfloat16. Smaller blocks pack the keys more often, larger ones leave the cache."""
STEP_TOKENS = 2**13
"""Tokens whose queries, keys and values are gathered at once, so that many windows or one large image are one call."""
RASTER_COLS = 48
"""Columns from which adding the row and column terms of a raster in bfloat16 is faster than multiplying with codes. In
narrower grids the additions are too short to vectorise (1.1 against 0.15 ns per logit at 16 columns)."""


class BlockedAttention(torch.autograd.Function):
    """Attention block by block, which keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BND: Tensor,
        padding_D: Tensor,
        rel_pos_h_Ld: Tensor,
        rel_pos_w_Ld: Tensor,
        window_sets: tuple[WindowSet, ...],
        num_heads: int,
    ) -> Tensor:
        """Return mixed tokens, shape (B, N, C)."""
        num_images, num_tokens, width = qkv_BND.shape
        # One more row than tokens: empty slots are scattered there and cut off.
        flat, out = qkv_BND.reshape(-1, width), qkv_BND.new_zeros(num_images * num_tokens + 1, width // 3)
        cast = _Cast(qkv_BND.dtype, padding_D, (rel_pos_h_Ld, rel_pos_w_Ld))
        with torch.autocast("cpu", enabled=False):
            for windows in window_sets:
                for chosen in _window_steps(windows):
                    parts = cast.gather(flat, windows.tokens[chosen], parts=3, num_heads=num_heads)
                    given = cast.operands((*parts, cast.padding, *cast.tables), windows, chosen)
                    mixed = _softmax_attention(given).unflatten(0, (-1, num_heads))
                    _scatter_rows(out, windows.tokens[chosen], (mixed,))
        ctx.save_for_backward(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld)
        ctx.window_sets, ctx.num_heads = window_sets, num_heads
        return out[:-1].view(num_images, num_tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute each block and return the gradients of the tensors."""
        qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld = ctx.saved_tensors
        num_heads, width = ctx.num_heads, qkv_BND.shape[-1]
        flat, grad = qkv_BND.reshape(-1, width), grad_BNC.reshape(-1, width // 3)
        grad_qkv = flat.new_zeros(flat.shape[0] + 1, width)
        cast = _Cast(qkv_BND.dtype, padding_D, (rel_pos_h_Ld, rel_pos_w_Ld))
        # Padding and position tables belong to all windows, so their gradients are summed, at least in float32.
        shared = (cast.padding, *cast.tables)
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in shared]
        with torch.autocast("cpu", enabled=False):
            for windows in ctx.window_sets:
                for chosen in _window_steps(windows):
                    tokens = windows.tokens[chosen]
                    (grad_out,) = cast.gather(grad, tokens, parts=1, num_heads=num_heads)
                    if windows.has_empty:
                        # An empty slot was gathered from an arbitrary token, whose gradient must not count twice.
                        grad_out.masked_fill_(windows.empty[chosen][:, None, :, None], 0.0)
                    parts = cast.gather(flat, tokens, parts=3, num_heads=num_heads)
                    grads = _operands_backward(cast, parts, windows, chosen, grad_out.flatten(0, 1))
                    _scatter_rows(grad_qkv, tokens, grads[:3])
                    for total, part in zip(sums, grads[3:], strict=True):
                        total += part
        sums = [total.to(t.dtype) for total, t in zip(sums, (padding_D, rel_pos_h_Ld, rel_pos_w_Ld), strict=True)]
        return (grad_qkv[:-1].view_as(qkv_BND), *sums, None, None)


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """Operands of ``softmax(queries keys^T + terms codes^T) values`` for some windows, with heads flattened in."""

    queries_xnd: Tensor
    """Queries, already scaled by 1 / sqrt(d)."""
    terms_xnE: Tensor
    """Bias of each query towards each row, then each column, then the terms of empty slots and of padding."""
    keys_xmd: Tensor
    codes_xmE: Tensor | None
    """Weights with which the terms apply to a key. None for a full raster, where they follow from the position."""
    values_xmd: Tensor
    grid: tuple[int, int]
    """Rows and columns of the raster."""

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.queries_xnd, self.terms_xnE, self.keys_xmd, self.values_xmd


class _Cast:
    """Inputs in the type in which blocks are computed, and the form of the bias that suits it."""

    def __init__(self, dtype: torch.dtype, padding: Tensor, tables: tuple[Tensor, Tensor]) -> None:
        # float32 where the processor only emulates the type, which is faster and more exact.
        emulated = dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported()
        self.dtype = torch.float32 if dtype == torch.float16 or emulated else dtype
        self.padding = padding.to(self.dtype)
        self.tables = (tables[0].to(self.dtype), tables[1].to(self.dtype))

    def gather(self, flat: Tensor, tokens_Xn: Tensor, *, parts: int, num_heads: int) -> tuple[Tensor, ...]:
        """Gather rows of (tokens, parts h d) into ``parts`` tensors (X, h, n, d)."""
        count, slots = tokens_Xn.shape
        # Empty slots point behind the last token. They read that token, and their result is discarded.
        rows = flat.index_select(0, tokens_Xn.flatten().clamp(max=flat.shape[0] - 1))
        split = rows.view(count, slots, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
        return tuple(part.contiguous().to(self.dtype) for part in split)

    def operands(self, inputs: Sequence[Tensor], windows: WindowSet, chosen: slice) -> _Operands:
        """Return the operands of the chosen windows from queries, keys, values, padding and two tables."""
        q_Xhnd, k_Xhnd, v_Xhnd, padding_D, rows_Ld, cols_Ld = inputs
        _, heads, _, dim = q_Xhnd.shape
        scale = 1.0 / math.sqrt(dim)
        row_terms = _position_terms(q_Xhnd, rows_Ld, windows.row_index, chosen)
        col_terms = _position_terms(q_Xhnd, cols_Ld, windows.col_index, chosen)
        terms, codes_xmE = [row_terms, col_terms], None
        wide = self.dtype.itemsize > 2 or windows.extent[1] >= RASTER_COLS
        if not (wide and windows.raster and not windows.has_padding):
            if windows.has_empty:
                terms.append(row_terms.new_ones(*row_terms.shape[:-1], 1))
            if windows.has_padding:
                _, padding_key_hd, padding_value_hd = padding_D.view(3, heads, dim).unbind(0)
                logit = padding_logit(row_terms, col_terms, extent=windows.extent)
                logit = logit + scale * (q_Xhnd * padding_key_hd[:, None]).sum(-1)
                # The whole logit is a term, so the key of the padding itself is zero.
                terms.append(logit.to(q_Xhnd.dtype)[..., None])
                v_Xhnd = torch.cat([v_Xhnd, padding_value_hd[:, None].expand(*v_Xhnd.shape[:2], 1, dim)], 2)
                k_Xhnd = F.pad(k_Xhnd, (0, 0, 0, 1))
            codes_XmE = windows.codes if windows.codes.shape[0] == 1 else windows.codes[chosen]
            codes_XhmE = codes_XmE.to(q_Xhnd.dtype)[:, None].expand(q_Xhnd.shape[0], heads, -1, -1)
            codes_xmE = codes_XhmE.flatten(0, 1)
        return _Operands(
            queries_xnd=(q_Xhnd * scale).flatten(0, 1),
            terms_xnE=torch.cat(terms, -1).flatten(0, 1),
            keys_xmd=k_Xhnd.flatten(0, 1),
            codes_xmE=codes_xmE,
            values_xmd=v_Xhnd.flatten(0, 1),
            grid=windows.extent,
        )


def padding_logit(row_terms: Tensor, col_terms: Tensor, *, extent: tuple[int, int]) -> Tensor:
    """Return the log-sum-exp of the bias over the padded positions of a window, in closed form.

    Padding is every position right of or below ``extent``: all rows of the padded columns, and the padded rows of the
    real columns. As the bias is a sum of a row and a column term, each rectangle's sum is a product of sums.

    Args:
        row_terms: Bias towards each row, shape (..., W).
        col_terms: Bias towards each column, shape (..., W).
        extent: Real rows and columns, at least one smaller than W.

    Returns:
        Shape (...), at least float32.
    """
    rows, cols = extent
    precise = torch.promote_types(row_terms.dtype, torch.float32)
    row_terms, col_terms = row_terms.to(precise), col_terms.to(precise)
    parts = []
    if cols < col_terms.shape[-1]:
        parts.append(row_terms.logsumexp(-1) + col_terms[..., cols:].logsumexp(-1))
    if rows < row_terms.shape[-1]:
        parts.append(row_terms[..., rows:].logsumexp(-1) + col_terms[..., :cols].logsumexp(-1))
    return parts[0] if len(parts) == 1 else torch.logaddexp(parts[0], parts[1])


def _position_terms(q_Xhnd: Tensor, table_Ld: Tensor, index_XnW: Tensor, chosen: slice) -> Tensor:
    """Return the bias of each query towards each row (or column) of its window, shape (X, h, n, W)."""
    if index_XnW.shape[0] > 1:
        index_XnW = index_XnW[chosen]
    # One product with the whole table and a gather: the table entries of all slots would be n times as large.
    index_XhnW = index_XnW[:, None].expand(*q_Xhnd.shape[:2], -1, -1)
    return (q_Xhnd @ table_Ld.t()).gather(-1, index_XhnW)


def _scatter_rows(flat: Tensor, tokens_Xn: Tensor, parts: tuple[Tensor, ...]) -> None:
    """Write tensors (X, h, n, d) to the rows that they were gathered from, and empty slots to the last row."""
    stacked = torch.stack([part.transpose(1, 2) for part in parts], 2)  # (X, n, parts, h, d)
    flat.index_copy_(0, tokens_Xn.flatten(), stacked.flatten(2).flatten(0, 1).to(flat.dtype))


def _operands_backward(
    cast: _Cast, parts: tuple[Tensor, ...], windows: WindowSet, chosen: slice, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys, values (X, h, n, d), padding and the two tables."""
    # The cheap preparation is differentiated by autograd, the softmax by hand. Detached leaves cut the graph between.
    leaves = [t.detach().requires_grad_() for t in (*parts, cast.padding, *cast.tables)]
    with torch.enable_grad():
        given = cast.operands(leaves, windows, chosen)
    grads = _softmax_attention_backward(given, grad_out)
    taken = torch.autograd.grad(given.differentiable, leaves, grads, allow_unused=True)
    # Without padding in these windows nothing depends on ``padding``, and autograd returns None for it.
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(taken, leaves, strict=True))


def _steps(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _window_steps(windows: WindowSet) -> Iterator[slice]:
    count, slots = windows.tokens.shape
    return _steps(count, max(1, STEP_TOKENS // slots))


class _Blocks:
    """Softmax over blocks of pairs and queries, in scratch memory that is used again."""

    def __init__(self, given: _Operands) -> None:
        self.given = given
        self.num_pairs, self.num_queries = given.queries_xnd.shape[:2]
        self.num_keys = given.keys_xmd.shape[1]
        self.queries = min(self.num_queries, max(1, BLOCK_ELEMENTS // self.num_keys))
        self.pairs = min(self.num_pairs, max(1, BLOCK_ELEMENTS // (self.queries * self.num_keys)))
        if given.codes_xmE is None:
            self.left, keys = given.queries_xnd, given.keys_xmd
        else:
            # With codes the bias is part of one product: [queries, terms] [keys, codes]^T.
            self.left = torch.cat([given.queries_xnd, given.terms_xnE], -1)
            keys = torch.cat([given.keys_xmd, given.codes_xmE], -1)
        self.keys = keys
        # Contiguous columns: a fifth faster than a transposed view in float32.
        self.columns = keys.transpose(1, 2).contiguous() if keys.element_size() > 2 else keys.transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for pairs in _steps(self.num_pairs, self.pairs):
            for queries in _steps(self.num_queries, self.queries):
                yield pairs, queries

    def scratch(self) -> Tensor:
        """Return memory for one block."""
        return self.keys.new_empty(self.pairs * self.queries * self.num_keys)

    def view(self, scratch: Tensor, pairs: slice, queries: slice) -> Tensor:
        """Return the part of ``scratch`` that a block uses, shape (b, q, m)."""
        shape = (pairs.stop - pairs.start, queries.stop - queries.start, self.num_keys)
        return scratch[: shape[0] * shape[1] * shape[2]].view(shape)

    def probabilities(self, out: Tensor, pairs: slice, queries: slice) -> Tensor:
        """Write the softmax of a block to ``out``."""
        left, right = self.left[pairs, queries], self.columns[pairs]
        if self.given.codes_xmE is None:
            # A full raster: the bias is an outer sum, written first, and the product is added to it in place.
            rows, cols = self.given.grid
            terms = self.given.terms_xnE[pairs, queries]
            torch.add(terms[..., :rows, None], terms[..., None, rows:], out=out.unflatten(-1, (rows, cols)))
            out.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=out)
        return torch.softmax(out, -1, out=out)


def _softmax_attention(given: _Operands) -> Tensor:
    """Return the attention of some windows, shape (x, n, d)."""
    blocks = _Blocks(given)
    mixed, scratch = torch.empty_like(given.queries_xnd), blocks.scratch()
    for pairs, queries in blocks:
        p = blocks.probabilities(blocks.view(scratch, pairs, queries), pairs, queries)
        torch.bmm(p, given.values_xmd[pairs], out=mixed[pairs, queries])
    return mixed


def _softmax_attention_backward(given: _Operands, grad_out: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of queries, terms, keys and values of some windows."""
    with torch.no_grad():
        blocks = _Blocks(given)
        grad_left, grad_terms = torch.empty_like(blocks.left), torch.empty_like(given.terms_xnE)
        # Keys and values get a contribution from every block of queries, so theirs are sums.
        split = blocks.queries < blocks.num_queries
        grad_keys, grad_values = _GradientSum(given.keys_xmd, split=split), _GradientSum(given.values_xmd, split=split)
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
                # The backward pass of the outer sum: a row term has the sum over columns, and the other way round.
                rows = given.grid[0]
                raster = ds.unflatten(-1, given.grid)
                grad_terms[pairs, queries, :rows] = raster.sum(-1)
                grad_terms[pairs, queries, rows:] = raster.sum(-2)
        if given.codes_xmE is not None:
            grad_left, grad_terms = grad_left.split([given.queries_xnd.shape[-1], grad_terms.shape[-1]], -1)
        return grad_left, grad_terms, grad_keys.result(), grad_values.result()


class _GradientSum:
    """Sum over blocks of queries, kept at least in float32."""

    def __init__(self, like: Tensor, *, split: bool) -> None:
        self.dtype = like.dtype
        precise = torch.promote_types(like.dtype, torch.float32)
        self.split = split
        self.total = torch.zeros_like(like, dtype=precise) if split else torch.empty_like(like)

    def add(self, pairs: slice, left_bqm: Tensor, right_bqd: Tensor) -> None:
        total, left_bmq = self.total[pairs], left_bqm.transpose(1, 2)
        if not self.split:
            torch.bmm(left_bmq, right_bqd, out=total)  # the only contribution of these pairs
        elif total.dtype == right_bqd.dtype:
            total.baddbmm_(left_bmq, right_bqd)
        else:
            total += torch.bmm(left_bmq, right_bqd)

    def result(self) -> Tensor:
        return self.total.to(self.dtype)
