"""Which token attends to which, as ``fused_attention`` takes it: windows of a grid, dense or with hidden tokens.

Shape letters: B = images; N = tokens kept per image; X = windows (of all images); n = slots per window; g = grid side;
W = window side.
"""

from __future__ import annotations

import torch
from samgraft.shared.encoders.fused_attention import NEVER, FusedWindows, position_tables
from samgraft.shared.encoders.windows import Plan
from torch import Tensor


def fused_dense_plan(grid: int, side: int, num_images: int, device: torch.device) -> Plan:
    """Plan for all tokens of square grids in raster order; windows at the edge are padded, as in segment_anything."""
    number = torch.arange(grid * grid, device=device)
    index, codes = position_tables((number // grid)[None], (number % grid)[None], side=grid)
    everyone = FusedWindows(shape=(num_images, grid * grid), terms_index=index, codes=codes)
    return Plan(windowed=_dense_windows(grid, side, num_images, device), everyone=everyone)


def _dense_windows(grid: int, side: int, num_images: int, device: torch.device) -> FusedWindows:
    across = -(-grid // side)
    window, slot = torch.arange(across, device=device), torch.arange(side, device=device)
    line = window[:, None] * side + slot  # (across, side): row or column in the grid
    rows, cols = line[:, None, :, None], line[None, :, None, :]
    inside = ((rows < grid) & (cols < grid)).flatten()
    number = (rows * grid + cols).expand(across, across, side, side).flatten()
    # Slots of padding read any token, each another one: nothing is read again and again.
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


def fused_visible_plan(ids_keep_BN: Tensor, *, grid: int, side: int) -> Plan:
    """Plan for kept tokens only; each image may keep other ones.

    Args:
        ids_keep_BN: Raster numbers of the kept tokens of each image, int64, without repeats; -1 fills up images that
            keep fewer.
        grid: Grid side.
        side: Window side.
    """
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
    return Plan(windowed=windowed, everyone=everyone)


def _visible_windows(
    rows_BN: Tensor, cols_BN: Tensor, missing_BN: Tensor | None, *, grid: int, side: int
) -> FusedWindows:
    """Sort the kept tokens into their windows; windows with fewer than the fullest have empty slots."""
    device, (num_images, num_keep) = rows_BN.device, rows_BN.shape
    across = -(-grid // side)
    num_windows = num_images * across * across
    image = torch.arange(num_images, device=device)[:, None]
    window_M = ((image * across + rows_BN // side) * across + cols_BN // side).flatten()
    if missing_BN is not None:
        window_M = torch.where(missing_BN.flatten(), num_windows, window_M)  # sorted behind all others
    order_M = window_M.argsort(stable=True)
    count_X = torch.bincount(window_M, minlength=num_windows + 1)
    first_X = count_X.cumsum(0) - count_X
    num_slots = max(1, int(count_X[:num_windows].max()))
    sorted_M = window_M[order_M]
    place_M = sorted_M * num_slots + torch.arange(len(order_M), device=device) - first_X[sorted_M]
    place_M = place_M.clamp(max=num_windows * num_slots)  # missing tokens: one place behind the last slot
    tokens = torch.full((num_windows * num_slots + 1,), -1, device=device)
    tokens[place_M] = order_M
    slots = torch.empty_like(order_M)
    slots[order_M] = place_M.clamp(max=num_windows * num_slots - 1)
    tokens = tokens[:-1]
    empty = tokens < 0
    # Empty slots read any token, each another one.
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
    """Add the column that takes empty slots out of every softmax."""
    return torch.cat([codes_Yn1E, empty_Yn[..., None, None] * NEVER], -1)


def _left_out(grid: int, side: int, num_images: int, device: torch.device) -> Tensor:
    """Return ``FusedWindows.left_out`` of the windows of square grids."""
    across = -(-grid // side)
    line = (torch.arange(across * side, device=device) >= grid).view(across, side)
    rows = line[:, None].expand(-1, across, -1).reshape(-1, side)
    cols = line[None].expand(across, -1, -1).reshape(-1, side)
    left_out = torch.stack([torch.zeros_like(rows), ~rows, ~cols, cols], 1)
    return left_out.repeat(num_images, 1, 1)[:, None, None]
