"""Queries, keys, values and position terms of a few attention windows.

The zero padding of segment_anything's edge windows takes part in its softmax: every padded key has the bias of ``qkv``
as key and value and a relative position. All of them together are one more logit, a log-sum-exp, and one value.

Shape letters: B = images; N = tokens; C = channels; X = windows; h = heads; x = (window, head) pairs in a block;
n = slots; q = queries in a block; d = channels per head; W = window side; L = 2 W - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from samgraft.shared.models.window_attention import Bundle


@dataclass(kw_only=True)
class Windows:
    """Queries, keys and values of some windows, heads flattened into them: (x, n, d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    padding_key: torch.Tensor  # (x, d)
    padding_value: torch.Tensor  # (x, d)
    tables: tuple[torch.Tensor, torch.Tensor]
    bundle: Bundle
    chosen: slice
    num_heads: int

    @classmethod
    def gather(
        cls,
        flat: torch.Tensor,
        padding: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        bundle: Bundle,
        chosen: slice,
        num_heads: int,
    ) -> Windows:
        """Collect the windows ``chosen`` of a bundle from flattened tokens."""
        q, k, v = take(flat, bundle.tokens[chosen], parts=3, num_heads=num_heads)
        _, padding_key, padding_value = padding.view(3, num_heads, -1).unbind(0)
        count = q.shape[0] // num_heads
        return cls(
            q=q,
            k=k,
            v=v,
            padding_key=padding_key.repeat(count, 1),
            padding_value=padding_value.repeat(count, 1),
            tables=tables,
            bundle=bundle,
            chosen=chosen,
            num_heads=num_heads,
        )

    @property
    def scale(self) -> float:
        """Factor on query-key products."""
        return 1.0 / math.sqrt(self.q.shape[-1])

    def index(self, axis: int, pairs: slice, queries: slice) -> torch.Tensor:
        """Which relative position applies per query and key row (axis 0) or column (1): (x or 1, q, W)."""
        index = self.bundle.row_index if axis == 0 else self.bundle.col_index
        if index.shape[0] > 1:
            index = index[self.chosen].repeat_interleave(self.num_heads, 0)[pairs]
        return index[:, queries]

    def bias_terms(self, pairs: slice, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias of each query towards each key row and each key column of the window: two of (x, q, W)."""
        query = self.q[pairs, queries]
        terms = []
        for axis, table in enumerate(self.tables):
            index = self.index(axis, pairs, queries)
            terms.append((query @ table.t()).gather(-1, index.expand(query.shape[0], -1, -1)))
        return terms[0], terms[1]

    def keys(self) -> torch.Tensor:
        """What queries meet: the keys, augmented unless the cheap form of the bias applies."""
        return self.k if self.bundle.raster else self.augmented_keys()

    def augmented_keys(self) -> torch.Tensor:
        """Keys with their one-hot row and column behind: (x, n, d + 2 W (+ 1))."""
        code = self.bundle.key_code
        if code.shape[0] > 1:
            code = code[self.chosen].repeat_interleave(self.num_heads, 0)
        return torch.cat([self.k, code.to(self.k.dtype).expand(self.k.shape[0], -1, -1)], -1)

    def sink(
        self, row_bias: torch.Tensor, col_bias: torch.Tensor, query: torch.Tensor, pairs: slice = slice(None)
    ) -> torch.Tensor:
        """Logit of all padding together: (x, q)."""
        shared = (query * self.padding_key[pairs, None]).sum(-1) * self.scale
        return padding_logit(row_bias, col_bias, extent=self.bundle.extent) + shared

    def probabilities(
        self, pairs: slice, queries: slice, key_columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Softmax of a block, (x, q, n (+ 1 for the padding)), and its two bias terms.

        ``key_columns`` are ``keys()`` transposed and contiguous: a fifth faster than a transposed view.
        """
        row_bias, col_bias = self.bias_terms(pairs, queries)
        query, num_keys = self.q[pairs, queries], self.k.shape[1]
        rows, cols = self.bundle.extent
        logits = query.new_empty(*query.shape[:2], num_keys + self.bundle.has_padding)
        real = logits[..., :num_keys]
        if self.bundle.raster:
            grid = real.unflatten(-1, (rows, cols))
            torch.add(row_bias[..., :rows, None], col_bias[..., None, :cols], out=grid)
            real.baddbmm_(query, key_columns[pairs], alpha=self.scale)
        else:
            augmented = torch.cat([query * self.scale, row_bias, col_bias], -1)
            if self.bundle.has_empty:
                augmented = F.pad(augmented, (0, 1), value=1.0)
            torch.bmm(augmented, key_columns[pairs], out=real)
        if self.bundle.has_padding:
            logits[..., num_keys] = self.sink(row_bias, col_bias, query, pairs).to(logits.dtype)
        return torch.softmax(logits, -1, out=logits), row_bias, col_bias


def padding_logit(row_bias: torch.Tensor, col_bias: torch.Tensor, *, extent: tuple[int, int]) -> torch.Tensor:
    """Log-sum-exp of the bias over the padded positions of a window, in closed form.

    Padding is every position right of or below ``extent``: all rows of the padded columns, and the padded rows of the
    real columns. As the bias is a sum of a row and a column term, each rectangle's sum is a product of sums.

    Args:
        row_bias: (..., W).
        col_bias: (..., W).
        extent: Real rows and columns, at least one smaller than W.

    Returns:
        Shape (...), at least float32.
    """
    rows, cols = extent
    precise = torch.promote_types(row_bias.dtype, torch.float32)
    row_bias, col_bias = row_bias.to(precise), col_bias.to(precise)
    terms = []
    if cols < col_bias.shape[-1]:
        terms.append(row_bias.logsumexp(-1) + col_bias[..., cols:].logsumexp(-1))
    if rows < row_bias.shape[-1]:
        terms.append(row_bias[..., rows:].logsumexp(-1) + col_bias[..., :cols].logsumexp(-1))
    return terms[0] if len(terms) == 1 else torch.logaddexp(terms[0], terms[1])


def take(flat: torch.Tensor, tokens: torch.Tensor, *, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Gather rows of (tokens, parts h d) into ``parts`` tensors (X h, n, d)."""
    count, slots = tokens.shape
    rows = flat.index_select(0, tokens.flatten().clamp(max=flat.shape[0] - 1))
    split = rows.view(count, slots, parts, num_heads, -1).permute(2, 0, 3, 1, 4)
    return tuple(part.reshape(count * num_heads, slots, -1) for part in split)


def put(flat: torch.Tensor, tokens: torch.Tensor, parts: Sequence[torch.Tensor], *, num_heads: int) -> None:
    """Scatter what ``take`` gathered; empty slots fall on the last row."""
    stacked = torch.stack([part.unflatten(0, (-1, num_heads)) for part in parts])
    rows = stacked.permute(1, 3, 0, 2, 4).reshape(tokens.numel(), -1)
    flat.index_copy_(0, tokens.flatten(), rows.to(flat.dtype))
