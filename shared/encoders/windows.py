"""Which token attends to which: windows of a grid, dense or with hidden tokens, as lists of token numbers.

segment_anything pads its grid with zeros to whole windows and lets real tokens attend to the padding. Nothing is padded
here: windows at the edge are smaller groups of tokens, and their padding is a closed-form term. This is the form of
``blocked_attention``; that of GPUs is in ``fused_plan``.

Shape letters: B = images; N = tokens kept per image; X = windows (of all images); n = slots per window; m = keys;
E = terms; g = grid side; W = window side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.fused_attention import FusedWindows


@dataclass(kw_only=True)
class Bundle:
    """Windows of equal extent, each a set of tokens that attend among themselves."""

    tokens: torch.Tensor
    """(X, n): row of each slot's token in the flattened (B N) tokens; B N where the slot is empty."""
    rows: torch.Tensor
    """(X, n): row of each slot inside its window (or grid); (1, n) if equal for all windows."""
    cols: torch.Tensor
    """(X, n): column of each slot, likewise."""
    side: int
    """Window side W (the grid side for global attention): positions are relative within it."""
    extent: tuple[int, int]
    """Rows and columns inside the image; what remains of the window is padding."""
    raster: bool
    """True if the slots are all positions of ``extent`` in raster order: the cheap form of the bias applies."""
    num_tokens: int
    """B N."""
    has_empty: bool = False
    """True if some window has fewer tokens than slots."""
    row_index: torch.Tensor = field(init=False)
    """(X, n, W): for each slot and each key row k, which relative position applies: row - k + W - 1."""
    col_index: torch.Tensor = field(init=False)
    """(X, n, W): the same for columns."""
    empty: torch.Tensor = field(init=False)
    """(X, n): True where a slot holds no token."""
    codes: torch.Tensor = field(init=False)
    """(X, m, E): which of a query's terms apply to each key: its one-hot row and column, a penalty if its slot is
    empty; padding is one more key with a term of its own. (1, m, E) if equal for all windows."""

    @property
    def has_padding(self) -> bool:
        """True at the right or bottom edge of a grid that the window does not divide."""
        return self.extent != (self.side, self.side)

    def __post_init__(self) -> None:
        # Computed once per plan and shared by all layers.
        index = torch.arange(self.side, device=self.tokens.device)
        self.row_index = self.rows[..., None] - index + self.side - 1
        self.col_index = self.cols[..., None] - index + self.side - 1
        self.empty = self.tokens == self.num_tokens
        parts = [(self.rows[..., None] == index).float(), (self.cols[..., None] == index).float()]
        if self.has_empty:
            # exp(-30000) is 0 in every float type, and the product with 1 stays finite in float16.
            parts.append(self.empty[..., None].float() * -30000.0)
        self.codes = torch.cat(parts, dim=-1)
        if self.has_padding:
            self.codes = F.pad(self.codes, (0, 1, 0, 1))
            self.codes[:, -1, -1] = 1.0


@dataclass(frozen=True, kw_only=True)
class WindowGroup:
    """Windows of one extent in a grid: full ones, those at the right or bottom edge, the corner."""

    starts: tuple[tuple[int, int], ...]
    """Row and column of each window's first token."""
    rows: int
    cols: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who attends to whom in one forward pass."""

    windowed: tuple[Bundle, ...] | FusedWindows
    everyone: tuple[Bundle, ...] | FusedWindows
    """Of the global blocks."""
    order: torch.Tensor | None = None
    """(N,): raster position of each token in the order in which they are kept (window by window); None if as given."""


def window_groups(grid: int, side: int) -> tuple[WindowGroup, ...]:
    """Cut a grid into windows; groups without windows are left out."""
    full, rest = divmod(grid, side)
    lines = [(tuple(i * side for i in range(full)), side)] if full else []
    if rest:
        lines.append(((full * side,), rest))
    return tuple(
        WindowGroup(starts=tuple((r, c) for r in row_starts for c in col_starts), rows=rows, cols=cols)
        for row_starts, rows in lines
        for col_starts, cols in lines
    )


def dense_plan(grid: int, side: int, num_images: int, device: torch.device) -> Plan:
    """Plan for all tokens of square grids, kept window by window so that window blocks move nothing."""
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
            Bundle(
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
    everyone = Bundle(
        tokens=(offsets + order.argsort()).reshape(num_images, num_tokens),
        rows=rows[None],
        cols=cols[None],
        side=grid,
        extent=(grid, grid),
        raster=True,
        num_tokens=num_images * num_tokens,
    )
    return Plan(windowed=tuple(windowed), everyone=(everyone,), order=order)


def visible_plan(ids_keep_BN: torch.Tensor, *, grid: int, side: int) -> Plan:
    """Plan for kept tokens only; each image may keep other ones.

    Args:
        ids_keep_BN: Raster numbers of the kept tokens of each image, int64, without repeats; -1 fills up images that
            keep fewer.
        grid: Grid side.
        side: Window side.
    """
    num_images, num_keep = ids_keep_BN.shape
    valid_BN = ids_keep_BN >= 0
    ids = ids_keep_BN.clamp(min=0)
    rows_BN, cols_BN = ids // grid, ids % grid
    windowed = [
        bundle
        for group in window_groups(grid, side)
        if (bundle := _group_bundle(rows_BN, cols_BN, valid_BN, group=group, side=side)) is not None
    ]
    tokens = torch.arange(num_images * num_keep, device=ids.device).view(num_images, num_keep)
    everyone = Bundle(
        tokens=torch.where(valid_BN, tokens, num_images * num_keep),
        rows=rows_BN,
        cols=cols_BN,
        side=grid,
        extent=(grid, grid),
        raster=False,
        has_empty=not bool(valid_BN.all()),
        num_tokens=num_images * num_keep,
    )
    return Plan(windowed=tuple(windowed), everyone=(everyone,))


def _group_bundle(
    rows_BN: torch.Tensor, cols_BN: torch.Tensor, valid_BN: torch.Tensor, *, group: WindowGroup, side: int
) -> Bundle | None:
    """Sort the kept tokens of one group of windows into slots; windows with fewer than the fullest have empty slots."""
    num_images, num_keep = rows_BN.shape
    windows = _window_numbers(group.starts, side, device=rows_BN.device)
    inside_BN = valid_BN & (_position_in(rows_BN // side, windows[0]) >= 0)
    inside_BN &= _position_in(cols_BN // side, windows[1]) >= 0
    image_M, token_M = inside_BN.nonzero(as_tuple=True)
    if not len(token_M):
        return None
    rows_M, cols_M = rows_BN[image_M, token_M], cols_BN[image_M, token_M]
    num_cols = len(windows[1])
    in_image = _position_in(rows_M // side, windows[0]) * num_cols + _position_in(cols_M // side, windows[1])
    window_M = image_M * len(group.starts) + in_image
    num_windows = num_images * len(group.starts)
    order = window_M.argsort(stable=True)
    count_X = torch.bincount(window_M, minlength=num_windows)
    first_X = count_X.cumsum(0) - count_X
    slots = int(count_X.max())
    sorted_window = window_M[order]
    slot_M = torch.arange(len(order), device=order.device) - first_X[sorted_window]
    tokens = torch.full((num_windows, slots), num_images * num_keep, device=order.device)
    tokens[sorted_window, slot_M] = (image_M * num_keep + token_M)[order]
    local_rows, local_cols = torch.zeros_like(tokens), torch.zeros_like(tokens)
    local_rows[sorted_window, slot_M] = (rows_M % side)[order]
    local_cols[sorted_window, slot_M] = (cols_M % side)[order]
    return Bundle(
        tokens=tokens,
        rows=local_rows,
        cols=local_cols,
        side=side,
        extent=(group.rows, group.cols),
        raster=False,
        has_empty=len(order) < num_windows * slots,
        num_tokens=num_images * num_keep,
    )


def _window_numbers(
    starts: Sequence[tuple[int, int]], side: int, *, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = sorted({row // side for row, _ in starts})
    cols = sorted({col // side for _, col in starts})
    return torch.tensor(rows, device=device), torch.tensor(cols, device=device)


def _position_in(numbers: torch.Tensor, sorted_values: torch.Tensor) -> torch.Tensor:
    """Return where each number stands in a run of consecutive values, or -1."""
    position = numbers - sorted_values[0]
    return torch.where((position >= 0) & (position < len(sorted_values)), position, -1)


def _raster(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    number = torch.arange(rows * cols, device=device)
    return number // cols, number % cols
