"""Attention engine of GPUs and ``torch.compile``, in few large operations and without a bias tensor.

On a GPU, launching many small operations takes longer than computing them. All windows of a batch, the padded ones too,
are therefore one call of a fused kernel. The bias of a query towards a key is a row term plus a column term. Both are
written as extra channels of queries and keys (``terms codes^T``), so that no attention map is ever stored.

Shape letters: B = images; N = tokens of an image; C = channels; D = 3 C; X = windows of all images; Y = X, or 1 if
equal for all; n = slots of a window; m = keys; M = tokens of all images; h = heads; d = channels per head;
W = window side; L = 2 W - 1; E = extra channels; g = grid side; R, S = rows before and after a rearrangement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.blocked_plan import NEVER
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class FusedWindows:
    """All windows of a batch, with the same number of slots each."""

    shape: tuple[int, int]
    """Number of windows and of slots, (X, n)."""
    terms_index: Tensor
    """Entry of the table of relative rows and, from L on, of relative columns for each slot, shape (Y, n, 1, 2 W)."""
    codes: Tensor
    """One-hot row and column of each key, then ``NEVER`` where a slot is empty, if any is. Shape (Y, n, 1, E)."""
    tokens: Tensor | None = None
    """Row of each slot's token in the flattened (B N) tokens, shape (X n,). An arbitrary row where there is no token.
    None if slots are tokens."""
    slots: Tensor | None = None
    """Slot of each token, shape (B N,)."""
    is_padding: Tensor | None = None
    """True for slots outside the image, which segment_anything fills with zero tokens, shape (X n, 1)."""
    unused_slots: Tensor | None = None
    """True for slots that hold no token, shape (X n, 1)."""
    unused_tokens: Tensor | None = None
    """True for tokens that are in no slot, shape (B N, 1)."""
    left_out: Tensor | None = None
    """Positions excluded from four sums, shape (X, 1, 1, 4, W). The sums are over all rows, the rows outside the image,
    the columns outside, and the columns inside. Given where all padding of a window is one key without slots."""

    @property
    def has_empty(self) -> bool:
        """True if some slot is neither token nor padding, so that codes have a column for it."""
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
    """Mix tokens by attention within each window.

    Args:
        qkv_BND: Queries, keys and values, laid out as segment_anything's ``qkv``.
        padding_D: Query, key and value of a zero token, which is what padding contributes.
        rel_pos_h_Ld: Relative positions of rows for the windows' side.
        rel_pos_w_Ld: Relative positions of columns.
        windows: Windows in which tokens attend to each other.
        num_heads: Number of heads.

    Returns:
        Shape (B, N, C), before the output projection; undefined for tokens that are in no window.
    """
    num_images, num_tokens, width = qkv_BND.shape
    rows = rearrange(qkv_BND.reshape(-1, width), windows.tokens, windows.slots, unused=windows.unused_tokens)
    padding_D = padding_D.to(rows.dtype)
    if windows.is_padding is not None:
        rows = torch.where(windows.is_padding, padding_D, rows)
    q_Xnhd, k_Xnhd, v_Xnhd = rows.view(*windows.shape, 3, num_heads, -1).unbind(2)
    head_dim = q_Xnhd.shape[-1]
    q_Xnhd = q_Xnhd * (1.0 / math.sqrt(head_dim))
    # segment_anything adds unscaled position terms. The queries are scaled already, so the tables undo the scale.
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
    """Return queries, keys and values of one plain softmax attention, with a multiple of 8 channels each.

    Queries are scaled already. Padding without slots is one more key, whose logit is the log-sum-exp of all padding.
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
    # Fused kernels need channels in multiples of 8, and the fastest ones values as wide as keys.
    pad = -(dim + codes.shape[-1]) % 8
    if pad:
        query.append(terms.new_zeros(1).expand(count, slots, heads, pad))
        codes = F.pad(codes, (0, pad))
    return torch.cat(query, -1), torch.cat([k_Xnhd, codes], -1), F.pad(v_Xnhd, (0, codes.shape[-1]))


def padding_logit(terms: Tensor, left_out: Tensor) -> Tensor:
    """Return the log-sum-exp of the bias over the positions of a window outside the image, in closed form.

    Outside are all rows of the outside columns, and the outside rows of the inside columns. As the bias is a sum of a
    row and a column term, each rectangle's sum is a product of sums.

    Args:
        terms: Bias of each query towards each row, then each column, shape (X, n, h, 2 W).
        left_out: Excluded positions, as in ``FusedWindows.left_out``.

    Returns:
        Shape (X, n, h, 1), at least float32; far below any logit for windows that lie inside.
    """
    precise = terms.to(torch.promote_types(terms.dtype, torch.float32))
    # The four sums (all rows, outside rows, outside columns, inside columns) are one call, because each call launches
    # several kernels.
    sums = precise.unflatten(-1, (2, -1)).repeat_interleave(2, -2).masked_fill(left_out, NEVER).logsumexp(-1)
    beside, below = (sums[..., :2] + sums[..., 2:]).unbind(-1)
    return torch.logaddexp(beside, below)[..., None]


def rearrange(rows: Tensor, index: Tensor | None, inverse: Tensor | None, *, unused: Tensor | None) -> Tensor:
    """Return ``rows[index]`` with a fast gradient, for an index that reads no row with a gradient twice.

    Args:
        rows: Rows to read, shape (R, ...).
        index: Row of each result, shape (S,); None returns ``rows``.
        inverse: Result that each row became, shape (R,).
        unused: True for rows that became no result, shape (R, 1).
    """
    if index is None or inverse is None:
        return rows
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return rows.index_select(0, index)
    out: Tensor = _Rearrange.apply(rows, index, inverse, unused)
    return out


class _Rearrange(torch.autograd.Function):
    """Rearrangement whose gradient is gathered instead of summed.

    The backward pass of ``index_select`` adds with atomics, which is slower and differs from run to run.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, unused: Tensor | None) -> Tensor:
        """Return the rows at ``index``."""
        ctx.save_for_backward(inverse, unused)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of every row, gathered from the result that it became."""
        inverse, unused = ctx.saved_tensors
        grad_rows = grad.index_select(0, inverse)
        return grad_rows if unused is None else grad_rows.masked_fill(unused, 0.0), None, None, None


def position_tables(rows_Yn: Tensor, cols_Yn: Tensor, *, side: int) -> tuple[Tensor, Tensor]:
    """Return ``terms_index`` and the one-hot part of ``codes`` for slots at these places of a window."""
    line = torch.arange(side, device=rows_Yn.device)
    rows, cols = rows_Yn[..., None, None], cols_Yn[..., None, None]
    first_col_entry = 2 * side - 1
    index = torch.cat([rows - line + side - 1, cols - line + side - 1 + first_col_entry], -1)
    codes = torch.cat([(rows == line).float(), (cols == line).float()], -1)
    return index, codes


def dense_fused_windows(
    grid: int, side: int, num_images: int, device: torch.device
) -> tuple[FusedWindows, FusedWindows]:
    """Return windows and grids of all tokens in raster order, for windowed and for global blocks.

    Windows at the edge are padded, as in segment_anything.
    """
    number = torch.arange(grid * grid, device=device)
    index, codes = position_tables((number // grid)[None], (number % grid)[None], side=grid)
    everyone = FusedWindows(shape=(num_images, grid * grid), terms_index=index, codes=codes)
    return _dense_windows(grid, side, num_images, device), everyone


def _dense_windows(grid: int, side: int, num_images: int, device: torch.device) -> FusedWindows:
    across = -(-grid // side)
    window, slot = torch.arange(across, device=device), torch.arange(side, device=device)
    line = window[:, None] * side + slot  # (across, side): row or column in the grid
    rows, cols = line[:, None, :, None], line[None, :, None, :]
    inside = ((rows < grid) & (cols < grid)).flatten()
    number = (rows * grid + cols).expand(across, across, side, side).flatten()
    # Padding slots point to arbitrary, distinct tokens, because many reads of one row would be slow. Their content is
    # replaced afterwards.
    tokens = torch.where(inside, number, torch.arange(len(number), device=device) % (grid * grid))
    at = torch.arange(grid, device=device)
    slots = ((at[:, None] // side * across + at // side) * side + at[:, None] % side) * side + at % side
    images = torch.arange(num_images, device=device)[:, None]
    index, codes = position_tables(slot.repeat_interleave(side)[None], slot.repeat(side)[None], side=side)
    padding = None if across * side == grid else (~inside).repeat(num_images)[:, None]
    return FusedWindows(
        shape=(num_images * across * across, side * side),
        terms_index=index,
        codes=codes,
        tokens=(images * grid * grid + tokens).flatten(),
        slots=(images * len(number) + slots.flatten()).flatten(),
        is_padding=padding,
        unused_slots=padding,
    )


def visible_fused_windows(ids_keep_BN: Tensor, *, grid: int, side: int) -> tuple[FusedWindows, FusedWindows]:
    """Return windows and grids of the kept tokens only, for windowed and for global blocks."""
    missing_BN = ids_keep_BN < 0
    ids = ids_keep_BN.clamp(min=0)
    rows_BN, cols_BN = ids // grid, ids % grid
    has_missing = bool(missing_BN.any())
    index, codes = position_tables(rows_BN, cols_BN, side=grid)
    everyone = FusedWindows(
        shape=(ids.shape[0], ids.shape[1]),
        terms_index=index,
        codes=_with_empty(codes, missing_BN) if has_missing else codes,
    )
    windowed = _visible_windows(rows_BN, cols_BN, missing_BN if has_missing else None, grid=grid, side=side)
    return windowed, everyone


def _visible_windows(
    rows_BN: Tensor, cols_BN: Tensor, missing_BN: Tensor | None, *, grid: int, side: int
) -> FusedWindows:
    """Sort the kept tokens into slots of their windows, as many as the fullest window needs."""
    device, (num_images, num_keep) = rows_BN.device, rows_BN.shape
    across = -(-grid // side)
    num_windows = num_images * across * across
    image = torch.arange(num_images, device=device)[:, None]
    # As in ``blocked_plan``: sorted by window, a token's slot is its distance from the first token of its window.
    window_M = ((image * across + rows_BN // side) * across + cols_BN // side).flatten()
    if missing_BN is not None:
        window_M = torch.where(missing_BN.flatten(), num_windows, window_M)  # sorted behind all others
    order_M = window_M.argsort(stable=True)
    count_X = torch.bincount(window_M, minlength=num_windows + 1)
    first_X = count_X.cumsum(0) - count_X
    num_slots = max(1, int(count_X[:num_windows].max()))
    sorted_M = window_M[order_M]
    place_M = sorted_M * num_slots + torch.arange(len(order_M), device=device) - first_X[sorted_M]
    place_M = place_M.clamp(max=num_windows * num_slots)  # missing tokens share one place behind the last slot
    tokens = torch.full((num_windows * num_slots + 1,), -1, device=device)
    tokens[place_M] = order_M
    slots = torch.empty_like(order_M)
    slots[order_M] = place_M.clamp(max=num_windows * num_slots - 1)
    tokens = tokens[:-1]
    empty = tokens < 0
    # Empty slots point to arbitrary, distinct tokens; their output is discarded.
    tokens = torch.where(empty, torch.arange(len(tokens), device=device) % (num_images * num_keep), tokens)
    local_rows, local_cols = (
        (lines.flatten()[tokens] % side).view(num_windows, num_slots) for lines in (rows_BN, cols_BN)
    )
    index, codes = position_tables(local_rows, local_cols, side=side)
    return FusedWindows(
        shape=(num_windows, num_slots),
        terms_index=index,
        codes=_with_empty(codes, empty.view(num_windows, num_slots)),
        tokens=tokens,
        slots=slots,
        unused_slots=empty[:, None],
        unused_tokens=None if missing_BN is None else missing_BN.flatten()[:, None],
        left_out=_left_out(grid, side, num_images, device) if across * side > grid else None,
    )


def _with_empty(codes_Yn1E: Tensor, empty_Yn: Tensor) -> Tensor:
    """Append the column that removes empty slots from every softmax."""
    return torch.cat([codes_Yn1E, empty_Yn[..., None, None] * NEVER], -1)


def _left_out(grid: int, side: int, num_images: int, device: torch.device) -> Tensor:
    """Return ``FusedWindows.left_out`` of the windows of square grids."""
    across = -(-grid // side)
    line = (torch.arange(across * side, device=device) >= grid).view(across, side)
    rows = line[:, None].expand(-1, across, -1).reshape(-1, side)
    cols = line[None].expand(across, -1, -1).reshape(-1, side)
    left_out = torch.stack([torch.zeros_like(rows), ~rows, ~cols, cols], 1)
    return left_out.repeat(num_images, 1, 1)[:, None, None]
