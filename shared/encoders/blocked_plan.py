"""Windows of a token grid as lists of token numbers, dense or with hidden tokens, for ``blocked_attention``.

segment_anything pads its grid with zeros to whole windows and lets real tokens attend to the padding. Nothing is padded
here. Windows at the edge are smaller sets of tokens, and their padding is one term in closed form.

Shape letters: B = images; N = tokens kept per image; X = windows (of all images); n = slots per window; m = keys;
M = tokens of all images in one group of windows; E = terms; W = window side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = -30000.0
"""Logit whose exponential is 0 in every float type and whose product with 1 stays finite in float16."""


@dataclass(kw_only=True)
class WindowSet:
    """Windows of equal extent, each a set of tokens that attend to each other."""

    tokens: Tensor
    """Row of each slot's token in the flattened (B N) tokens, shape (X, n). B N where the slot is empty."""
    rows: Tensor
    """Row of each slot inside its window (or grid), shape (X, n) or, if equal for all windows, (1, n)."""
    cols: Tensor
    """Column of each slot, likewise."""
    side: int
    """Window side W in tokens (the grid side for global attention). Positions are relative within it."""
    extent: tuple[int, int]
    """Rows and columns inside the image. The rest of the window is padding."""
    raster: bool
    """True if the slots are all positions of ``extent`` in raster order, so that the cheap form of the bias applies."""
    num_tokens: int
    """Tokens of all images, B N."""
    has_empty: bool = False
    """True if some window has fewer tokens than slots."""
    row_index: Tensor = field(init=False)
    """Entry of the table of relative rows for each slot and each key row k, row - k + W - 1, shape (X, n, W)."""
    col_index: Tensor = field(init=False)
    """Entry of the table of relative columns, likewise."""
    empty: Tensor = field(init=False)
    """True where a slot holds no token, shape (X, n)."""
    codes: Tensor = field(init=False)
    """Weights with which a query's terms apply to each key, shape (X, m, E), or (1, m, E) if equal for all windows.
    These are the key's one-hot row and column and a penalty if its slot is empty. Padding is one more key with a term
    of its own."""

    @property
    def has_padding(self) -> bool:
        """True at the right or bottom edge of a grid that the window does not divide."""
        return self.extent != (self.side, self.side)

    def __post_init__(self) -> None:
        # These tables depend on the plan only, so all layers share them.
        index = torch.arange(self.side, device=self.tokens.device)
        self.row_index = self.rows[..., None] - index + self.side - 1
        self.col_index = self.cols[..., None] - index + self.side - 1
        self.empty = self.tokens == self.num_tokens
        parts = [(self.rows[..., None] == index).float(), (self.cols[..., None] == index).float()]
        if self.has_empty:
            parts.append(self.empty[..., None].float() * NEVER)
        self.codes = torch.cat(parts, dim=-1)
        if self.has_padding:
            self.codes = F.pad(self.codes, (0, 1, 0, 1))
            self.codes[:, -1, -1] = 1.0


WindowSets = tuple[WindowSet, ...]


@dataclass(frozen=True, kw_only=True)
class WindowGroup:
    """Windows of one extent in a grid, such as the full ones or those at the right edge."""

    starts: tuple[tuple[int, int], ...]
    """Row and column of each window's first token."""
    rows: int
    cols: int


def window_groups(grid: int, side: int) -> tuple[WindowGroup, ...]:
    """Cut a grid into windows, grouped by extent, without empty groups."""
    full, rest = divmod(grid, side)
    lines = [(tuple(i * side for i in range(full)), side)] if full else []
    if rest:
        lines.append(((full * side,), rest))
    return tuple(
        WindowGroup(starts=tuple((r, c) for r in row_starts for c in col_starts), rows=rows, cols=cols)
        for row_starts, rows in lines
        for col_starts, cols in lines
    )


def dense_window_sets(
    grid: int, side: int, num_images: int, device: torch.device
) -> tuple[WindowSets, WindowSets, Tensor]:
    """Return windows and grids of all tokens, and the order in which tokens are kept.

    Tokens are kept window by window, so that gathering a window reads one contiguous piece of memory.

    Returns:
        Windows for windowed blocks, one set for global blocks, and the raster number of each token, shape (N,).
    """
    num_tokens = grid * grid
    offsets = torch.arange(num_images, device=device)[:, None, None] * num_tokens
    windowed, pieces, start = [], [], 0
    for group in window_groups(grid, side):
        local_rows, local_cols = _raster(group.rows, group.cols, device)
        pieces += [(row + local_rows) * grid + col + local_cols for row, col in group.starts]
        size, count = group.rows * group.cols, len(group.starts)
        local = start + torch.arange(count * size, device=device).view(1, count, size)
        start += count * size
        windowed.append(
            WindowSet(
                tokens=(offsets + local).reshape(-1, size),
                rows=local_rows[None],
                cols=local_cols[None],
                side=side,
                extent=(group.rows, group.cols),
                raster=True,
                num_tokens=num_images * num_tokens,
            )
        )
    order = torch.cat(pieces)
    rows, cols = _raster(grid, grid, device)
    everyone = WindowSet(
        tokens=(offsets + order.argsort()).reshape(num_images, num_tokens),
        rows=rows[None],
        cols=cols[None],
        side=grid,
        extent=(grid, grid),
        raster=True,
        num_tokens=num_images * num_tokens,
    )
    return tuple(windowed), (everyone,), order


def visible_window_sets(ids_keep_BN: Tensor, *, grid: int, side: int) -> tuple[WindowSets, WindowSets]:
    """Return windows and grids of the kept tokens only, for windowed and for global blocks."""
    num_images, num_keep = ids_keep_BN.shape
    valid_BN = ids_keep_BN >= 0
    ids = ids_keep_BN.clamp(min=0)
    rows_BN, cols_BN = ids // grid, ids % grid
    windowed = [
        windows
        for group in window_groups(grid, side)
        if (windows := _visible_windows(rows_BN, cols_BN, valid_BN, group=group, side=side)) is not None
    ]
    tokens = torch.arange(num_images * num_keep, device=ids.device).view(num_images, num_keep)
    everyone = WindowSet(
        tokens=torch.where(valid_BN, tokens, num_images * num_keep),
        rows=rows_BN,
        cols=cols_BN,
        side=grid,
        extent=(grid, grid),
        raster=False,
        has_empty=not bool(valid_BN.all()),
        num_tokens=num_images * num_keep,
    )
    return tuple(windowed), (everyone,)


def _visible_windows(
    rows_BN: Tensor, cols_BN: Tensor, valid_BN: Tensor, *, group: WindowGroup, side: int
) -> WindowSet | None:
    """Sort the kept tokens of one group of windows into slots, or return None if it keeps none."""
    num_images, num_keep = rows_BN.shape
    device = rows_BN.device
    row_numbers, col_numbers = (
        torch.tensor(sorted({start[axis] // side for start in group.starts}), device=device) for axis in (0, 1)
    )
    inside_BN = valid_BN & (_position_in(rows_BN // side, row_numbers) >= 0)
    inside_BN &= _position_in(cols_BN // side, col_numbers) >= 0
    image_M, token_M = inside_BN.nonzero(as_tuple=True)
    if not len(token_M):
        return None
    rows_M, cols_M = rows_BN[image_M, token_M], cols_BN[image_M, token_M]
    in_image = _position_in(rows_M // side, row_numbers) * len(col_numbers)
    in_image = in_image + _position_in(cols_M // side, col_numbers)
    window_M = image_M * len(group.starts) + in_image
    num_windows = num_images * len(group.starts)
    # Sorted by window, a token's slot is its distance from the first token of its window. The fullest window decides
    # the number of slots; the others have empty slots behind their tokens.
    order = window_M.argsort(stable=True)
    count_X = torch.bincount(window_M, minlength=num_windows)
    first_X = count_X.cumsum(0) - count_X
    slots = int(count_X.max())
    sorted_window = window_M[order]
    slot_M = torch.arange(len(order), device=device) - first_X[sorted_window]
    tokens = torch.full((num_windows, slots), num_images * num_keep, device=device)
    tokens[sorted_window, slot_M] = (image_M * num_keep + token_M)[order]
    local_rows, local_cols = torch.zeros_like(tokens), torch.zeros_like(tokens)
    local_rows[sorted_window, slot_M] = (rows_M % side)[order]
    local_cols[sorted_window, slot_M] = (cols_M % side)[order]
    return WindowSet(
        tokens=tokens,
        rows=local_rows,
        cols=local_cols,
        side=side,
        extent=(group.rows, group.cols),
        raster=False,
        has_empty=len(order) < num_windows * slots,
        num_tokens=num_images * num_keep,
    )


def _position_in(numbers: Tensor, sorted_values: Tensor) -> Tensor:
    """Return the index of each number in a run of consecutive values, or -1."""
    position = numbers - sorted_values[0]
    return torch.where((position >= 0) & (position < len(sorted_values)), position, -1)


def _raster(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    number = torch.arange(rows * cols, device=device)
    return number // cols, number % cols
