"""Attention with decomposed relative positions for GPUs and ``torch.compile``: few large operations, no bias tensor.

A GPU that must be told of every operation waits for the next one more often than it computes: all windows of a batch
are one call of a fused kernel, the padded ones too. The bias of a query towards a key is a row term plus a column term;
both are written as extra channels of queries and keys (``terms codes^T``), so that no attention map is ever stored.

Shape letters: B = images; N = tokens of an image; C = channels; D = 3 C; X = windows of all images; Y = X, or 1 if
equal for all; n = slots of a window; m = keys; h = heads; d = channels per head; W = window side; L = 2 W - 1;
E = extra channels; g = grid side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NEVER = -30000.0
"""A logit whose exponential is 0 in every float type and whose product with 1 stays finite in float16."""


@dataclass(frozen=True, kw_only=True)
class FusedWindows:
    """All windows of a batch, with the same number of slots each."""

    shape: tuple[int, int]
    """(X, n)."""
    terms_index: Tensor
    """(Y, n, 1, 2 W): which relative position of the rows' and, from L on, of the columns' table applies to a slot."""
    codes: Tensor
    """(Y, n, 1, E): a key's one-hot row and column; then NEVER where a slot is empty, if any is."""
    tokens: Tensor | None = None
    """(X n,): row of each slot's token in the flattened (B N) tokens, any row without one; None if slots are tokens."""
    slots: Tensor | None = None
    """(B N,): the other way round."""
    is_padding: Tensor | None = None
    """(X n, 1): slots outside the image, which segment_anything fills with zero tokens."""
    unused_slots: Tensor | None = None
    """(X n, 1): slots that hold no token."""
    unused_tokens: Tensor | None = None
    """(B N, 1): tokens that stand in no slot."""
    left_out: Tensor | None = None
    """(X, 1, 1, 4, W) where padding has no slots but one key for all of it: what is left out of the sums over all rows,
    the rows outside the image, the columns outside, the columns inside."""

    @property
    def has_empty(self) -> bool:
        """True if some slot is neither token nor padding: then codes have a column for it."""
        return self.codes.shape[-1] > self.terms_index.shape[-1]


def attend_fused(
    qkv_BND: Tensor,
    padding_D: Tensor,
    rel_pos_h_Ld: Tensor,
    rel_pos_w_Ld: Tensor,
    windows: FusedWindows,
    *,
    num_heads: int,
) -> Tensor:
    """Attend within each window.

    Args:
        qkv_BND: Queries, keys and values, laid out as segment_anything's ``qkv``.
        padding_D: The same of a zero token: what padding contributes.
        rel_pos_h_Ld: Relative positions of rows for the windows' side.
        rel_pos_w_Ld: Of columns.
        windows: Who attends to whom.
        num_heads: Heads.

    Returns:
        Shape (B, N, C), before the output projection; undefined for tokens that stand in no window.
    """
    num_images, num_tokens, width = qkv_BND.shape
    rows = rearrange(qkv_BND.reshape(-1, width), windows.tokens, windows.slots, unused=windows.unused_tokens)
    padding_D = padding_D.to(rows.dtype)
    if windows.is_padding is not None:
        rows = torch.where(windows.is_padding, padding_D, rows)
    q_Xnhd, k_Xnhd, v_Xnhd = rows.view(*windows.shape, 3, num_heads, -1).unbind(2)
    head_dim = q_Xnhd.shape[-1]
    q_Xnhd = q_Xnhd * (1.0 / math.sqrt(head_dim))
    tables_Ld = (torch.cat([rel_pos_h_Ld, rel_pos_w_Ld]) * math.sqrt(head_dim)).to(rows.dtype)
    query, key, value = _operands(q_Xnhd, k_Xnhd, v_Xnhd, padding_D, tables_Ld, windows)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=1.0
    ).transpose(1, 2)
    out = rearrange(
        mixed[..., :head_dim].reshape(-1, width // 3), windows.slots, windows.tokens, unused=windows.unused_slots
    )
    return out.view(num_images, num_tokens, -1)


def _operands(
    q_Xnhd: Tensor, k_Xnhd: Tensor, v_Xnhd: Tensor, padding_D: Tensor, tables_Ld: Tensor, windows: FusedWindows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (scaled already), keys and values of one plain softmax attention, a multiple of 8 channels each.

    Padding that has no slots is one more key, whose logit is the log-sum-exp of all of it.
    """
    count, slots, heads, dim = q_Xnhd.shape
    terms = (q_Xnhd @ tables_Ld.t()).gather(-1, windows.terms_index.expand(count, -1, heads, -1))
    codes = windows.codes.to(q_Xnhd.dtype).expand(count, -1, heads, -1)
    query = [q_Xnhd, terms]
    if windows.has_empty:
        query.append(terms.new_ones(1).expand(count, slots, heads, 1))
    if windows.left_out is not None:
        _, padding_k_hd, padding_v_hd = padding_D.view(3, heads, dim).unbind(0)
        logit = padding_logit(terms, windows.left_out) + (q_Xnhd * padding_k_hd).sum(-1, keepdim=True)
        query.append(logit.to(terms.dtype))
        codes = F.pad(codes, (0, 1, 0, 0, 0, 1))
        codes[:, -1, :, -1] = 1.0
        k_Xnhd = F.pad(k_Xnhd, (0, 0, 0, 0, 0, 1))
        v_Xnhd = torch.cat([v_Xnhd, padding_v_hd.expand(count, 1, -1, -1)], 1)
    pad = -(dim + codes.shape[-1]) % 8
    if pad:
        query.append(terms.new_zeros(1).expand(count, slots, heads, pad))
        codes = F.pad(codes, (0, pad))
    # Values as wide as keys: the fastest kernels ask for it.
    return torch.cat(query, -1), torch.cat([k_Xnhd, codes], -1), F.pad(v_Xnhd, (0, codes.shape[-1]))


def padding_logit(terms: Tensor, left_out: Tensor) -> Tensor:
    """Log-sum-exp of the bias over the positions of a window outside the image, in closed form.

    These are all rows of the outside columns, and the outside rows of the inside columns. As the bias is a sum of a row
    and a column term, each rectangle's sum is a product of sums.

    Args:
        terms: (X, n, h, 2 W).
        left_out: ``FusedWindows.left_out``.

    Returns:
        Shape (X, n, h, 1), at least float32; far below any logit for windows that lie inside.
    """
    precise = terms.to(torch.promote_types(terms.dtype, torch.float32))
    # All rows, outside rows, outside columns, inside columns: in one call, as it is many kernels each time.
    sums = precise.unflatten(-1, (2, -1)).repeat_interleave(2, -2).masked_fill(left_out, NEVER).logsumexp(-1)
    beside, below = (sums[..., :2] + sums[..., 2:]).unbind(-1)
    return torch.logaddexp(beside, below)[..., None]


def rearrange(rows: Tensor, index: Tensor | None, inverse: Tensor | None, *, unused: Tensor | None) -> Tensor:
    """Return ``rows[index]`` where no row is read twice for anything that has a gradient.

    Args:
        rows: Shape (R, ...).
        index: Shape (S,); None returns ``rows``.
        inverse: Shape (R,): where each row went.
        unused: Shape (R, 1): rows that went nowhere.
    """
    if index is None or inverse is None:
        return rows
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return rows.index_select(0, index)
    out: Tensor = _Rearrange.apply(rows, index, inverse, unused)
    return out


class _Rearrange(torch.autograd.Function):
    """Its gradient is read, not added up: faster than that of ``index_select``, and the same on every run."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
        """Return the rows that ``index`` names."""
        ctx.save_for_backward(inverse, unused)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of every row, from where it went."""
        inverse, unused = ctx.saved_tensors
        grad_rows = grad.index_select(0, inverse)
        return grad_rows if unused is None else grad_rows.masked_fill(unused, 0.0), None, None, None


def position_tables(rows_Yn: Tensor, cols_Yn: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """Return ``terms_index`` and the one-hot rows and columns of ``codes`` for slots at these places of a window."""
    line = torch.arange(side, device=rows_Yn.device)
    rows, cols = rows_Yn[..., None, None], cols_Yn[..., None, None]
    first_col_entry = 2 * side - 1
    index = torch.cat([rows - line + side - 1, cols - line + side - 1 + first_col_entry], -1)
    codes = torch.cat([(rows == line).float(), (cols == line).float()], -1)
    return index, codes
