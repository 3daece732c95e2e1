"""Queries, keys, values and position terms of a few attention windows, as operands of one plain softmax attention.

The decomposed bias of a query towards a key is a row term plus a column term. Both are products: the query's terms for
all rows and columns of the window, times the key's one-hot row and column. The zero padding of segment_anything's edge
windows takes part in its softmax: every padded key has the bias of ``qkv`` as key and value and a relative position.
All of them together are one more key, whose logit is a log-sum-exp in closed form.

Shape letters: B = images; N = tokens; C = channels; D = 3 C; X = windows; h = heads; x = X h (window, head) pairs;
n = slots; m = keys; d = channels per head; W = window side; L = 2 W - 1; E = position terms of a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.windows import Bundle

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Some windows, heads flattened into them: ``softmax(queries keys^T + terms codes^T) values``."""

    queries_xnd: torch.Tensor
    """Scaled."""
    terms_xnE: torch.Tensor
    """Bias of each query towards each row, then each column; then what empty slots and padding need."""
    keys_xmd: torch.Tensor
    codes_xmE: torch.Tensor | None
    """Which terms apply to a key; None for all positions of a raster, where they are known."""
    values_xmd: torch.Tensor
    grid: tuple[int, int]
    """Rows and columns of the raster."""

    @property
    def differentiable(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What gradients are taken of."""
        return self.queries_xnd, self.terms_xnE, self.keys_xmd, self.values_xmd


def operands(
    q_Xhnd: torch.Tensor,
    k_Xhnd: torch.Tensor,
    v_Xhnd: torch.Tensor,
    padding_D: torch.Tensor,
    tables: Tables,
    bundle: Bundle,
    *,
    chosen: slice,
    as_raster: bool,
) -> Operands:
    """Bring some windows of a bundle to the form that attention kernels take.

    Args:
        q_Xhnd: Queries of the windows ``chosen``.
        k_Xhnd: Keys.
        v_Xhnd: Values.
        padding_D: Query, key and value of a zero token, laid out as segment_anything's ``qkv``.
        tables: Relative positions of rows and columns, each (L, d).
        bundle: Windows of one extent.
        chosen: Which of them.
        as_raster: Leave the codes out; only for bundles in raster order without padding.
    """
    _, heads, _, dim = q_Xhnd.shape
    scale = 1.0 / math.sqrt(dim)
    row_terms = _terms(q_Xhnd, tables[0], bundle.row_index, chosen)
    col_terms = _terms(q_Xhnd, tables[1], bundle.col_index, chosen)
    terms = [row_terms, col_terms]
    codes_xmE = None
    if not as_raster:
        if bundle.has_empty:
            terms.append(row_terms.new_ones(*row_terms.shape[:-1], 1))
        if bundle.has_padding:
            _, padding_key_hd, padding_value_hd = padding_D.view(3, heads, dim).unbind(0)
            logit = padding_logit(row_terms, col_terms, extent=bundle.extent)
            logit = logit + scale * (q_Xhnd * padding_key_hd[:, None]).sum(-1)
            terms.append(logit.to(q_Xhnd.dtype)[..., None])
            v_Xhnd = torch.cat([v_Xhnd, padding_value_hd[:, None].expand(*v_Xhnd.shape[:2], 1, dim)], 2)
            k_Xhnd = F.pad(k_Xhnd, (0, 0, 0, 1))
        codes_XmE = bundle.codes if bundle.codes.shape[0] == 1 else bundle.codes[chosen]
        codes_XhmE = codes_XmE.to(q_Xhnd.dtype)[:, None].expand(q_Xhnd.shape[0], heads, -1, -1)
        codes_xmE = codes_XhmE.flatten(0, 1)
    return Operands(
        queries_xnd=(q_Xhnd * scale).flatten(0, 1),
        terms_xnE=torch.cat(terms, -1).flatten(0, 1),
        keys_xmd=k_Xhnd.flatten(0, 1),
        codes_xmE=codes_xmE,
        values_xmd=v_Xhnd.flatten(0, 1),
        grid=bundle.extent,
    )


def _terms(q_Xhnd: torch.Tensor, table_Ld: torch.Tensor, index_XnW: torch.Tensor, chosen: slice) -> torch.Tensor:
    """Return the bias of each query towards each row (or column) of its window: (X, h, n, W)."""
    if index_XnW.shape[0] > 1:
        index_XnW = index_XnW[chosen]
    index_XhnW = index_XnW[:, None].expand(*q_Xhnd.shape[:2], -1, -1)
    return (q_Xhnd @ table_Ld.t()).gather(-1, index_XhnW)


def padding_logit(row_terms: torch.Tensor, col_terms: torch.Tensor, *, extent: tuple[int, int]) -> torch.Tensor:
    """Log-sum-exp of the bias over the padded positions of a window, in closed form.

    Padding is every position right of or below ``extent``: all rows of the padded columns, and the padded rows of the
    real columns. As the bias is a sum of a row and a column term, each rectangle's sum is a product of sums.

    Args:
        row_terms: (..., W).
        col_terms: (..., W).
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


def take(flat: torch.Tensor, tokens_Xn: torch.Tensor, *, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Gather rows of (tokens, parts h d) into ``parts`` tensors (X, h, n, d); empty slots get any token's."""
    count, slots = tokens_Xn.shape
    rows = flat.index_select(0, tokens_Xn.flatten().clamp(max=flat.shape[0] - 1))
    split = rows.view(count, slots, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
    return tuple(part.contiguous() for part in split)


def put(flat: torch.Tensor, tokens_Xn: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
    """Scatter what ``take`` gathered; empty slots fall on the last row."""
    stacked = torch.stack([part.transpose(1, 2) for part in parts], 2)  # (X, n, parts, h, d)
    flat.index_copy_(0, tokens_Xn.flatten(), stacked.flatten(2).flatten(0, 1).to(flat.dtype))
