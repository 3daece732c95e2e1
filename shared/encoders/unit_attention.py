"""Windows of mask units for Hiera's attention, dense or with units left out.

Hiera has no relative positions, so only the set of tokens in a window matters, not their order. Tokens are therefore
kept unit by unit through all blocks, and a window is a list of units. Attention is torch's own, without a bias in the
dense encoder. SAM 2 pads the grid with zeros to whole windows, and real tokens attend to the padding. Here padding is
a unit of zero tokens, of which only queries, keys and values are computed.

Shape letters: B = images; N = units kept per image; T = tokens per unit; C = channels; X = windows (of all images);
m = slots for units per window; d = channels per head; g = units along a side of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class UnitWindows:
    """Sets of units whose tokens attend to each other."""

    num_slots: int
    """Slots per window, m."""
    slots: Tensor | None = None
    """Row of each slot's unit in the flattened (B N) units, shape (X m,), and B N for padding. None if the windows are
    consecutive units."""
    homes: Tensor | None = None
    """Slot of each unit, shape (B N,). A unit of no window has any slot, and its output is undefined."""
    bias_Xm: Tensor | None = None
    """Logarithm of how often each slot counts as a key, 0 for a unit and -inf for an empty slot. None if all are 0."""


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """Windows of one forward pass by their side in units, 1 for single units and 0 for whole images."""

    windows: dict[int, UnitWindows]


def plan_all_units(grid: int, sides: set[int], num_images: int, device: torch.device) -> UnitPlan:
    """Plan attention for all units of square grids, with SAM 2's padding at the right and bottom edges."""
    num_units = num_images * grid * grid
    windows = _trivial_windows(grid * grid)
    for side in sides - windows.keys():
        # Padding slots all point to one more row behind the units, which holds the zero token.
        padded = grid + -grid % side
        place = torch.full((num_images, padded, padded), num_units, device=device)
        place[:, :grid, :grid] = torch.arange(num_units, device=device).view(num_images, grid, grid)
        across = padded // side
        slots = place.view(num_images, across, side, across, side).transpose(2, 3).flatten()
        windows[side] = UnitWindows(num_slots=side * side, slots=slots, homes=_homes(slots, num_units))
    return UnitPlan(windows=windows)


def plan_kept_units(ids_keep_BN: Tensor, grid: int, sides: set[int], dtype: torch.dtype) -> UnitPlan:
    """Plan attention for kept units only. Each image may keep other ones.

    Args:
        ids_keep_BN: Raster numbers of the kept units of each image, int64, without repeats; -1 fills up images that
            keep fewer units than others.
        grid: Grid side in units.
        sides: Sides of windows in units.
        dtype: Type of the bias.
    """
    windows = _trivial_windows(ids_keep_BN.shape[1])
    for side in sides - {1}:
        if side == 0 and bool((ids_keep_BN >= 0).all()):
            continue
        windows[side] = _kept_windows(ids_keep_BN, grid=grid, side=side or grid, dtype=dtype)
    return UnitPlan(windows=windows)


def attend_within(qkv_BNTD: Tensor, padding_D: Tensor, windows: UnitWindows, *, num_heads: int, pools: bool) -> Tensor:
    """Mix tokens by attention within windows of units.

    Args:
        qkv_BNTD: Queries, keys and values of all tokens, D = 3 C.
        padding_D: Query, key and value of a zero token, which is what padding contributes.
        windows: Windows of units.
        num_heads: Number of heads.
        pools: True keeps the largest query of every four consecutive tokens, which are a square of 2 x 2.

    Returns:
        Shape (B, N, T, C), or (B, N, T / 4, C) with pooled queries, before the output projection.
    """
    images, units, tokens, _ = qkv_BNTD.shape
    # One row per unit. Gathering whole units moves long contiguous pieces of memory, unlike single tokens.
    rows = qkv_BNTD.flatten(0, 1)
    if windows.slots is not None:
        rows = torch.cat([rows, padding_D.expand(1, tokens, -1)]).index_select(0, windows.slots)
    query, key, value = rows.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    if pools:
        query = query.unflatten(1, (-1, 4)).amax(2)
    kept_tokens = query.shape[1]
    # (X m, T, heads, d) becomes (X, heads, m T, d).
    query, key, value = (
        part.unflatten(0, (-1, windows.num_slots)).flatten(1, 2).transpose(1, 2) for part in (query, key, value)
    )
    bias = None
    if windows.bias_Xm is not None:
        # Four dimensions, because torch has no fused kernel for fewer.
        bias = windows.bias_Xm.to(query.dtype).repeat_interleave(tokens, 1)[:, None, None, :]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    mixed = mixed.transpose(1, 2).flatten(2).reshape(-1, kept_tokens, mixed.shape[1] * mixed.shape[3])
    if windows.homes is not None:
        mixed = mixed.index_select(0, windows.homes)
    mixed_BNTC: Tensor = mixed.unflatten(0, (images, units))
    return mixed_BNTC


def _trivial_windows(num_keep: int) -> dict[int, UnitWindows]:
    return {1: UnitWindows(num_slots=1), 0: UnitWindows(num_slots=num_keep)}


def _kept_windows(ids_keep_BN: Tensor, *, grid: int, side: int, dtype: torch.dtype) -> UnitWindows:
    """Sort the kept units into windows of at most as many slots as the fullest one needs."""
    device, num_keep = ids_keep_BN.device, ids_keep_BN.shape[1]
    image_M, place_M = (ids_keep_BN >= 0).nonzero(as_tuple=True)
    ids_M = ids_keep_BN[image_M, place_M]
    across = -(-grid // side)
    number_M = (image_M * across + ids_M // grid // side) * across + ids_M % grid // side
    # Only windows with a unit, because a softmax over empty slots alone is undefined.
    numbers_X, window_M, count_X = number_M.unique(return_inverse=True, return_counts=True)
    # Sorted by window, the slot of a unit is its distance from the first unit of its window.
    order = window_M.argsort(stable=True)
    first_X = count_X.cumsum(0) - count_X
    slot_M = torch.empty_like(window_M)
    slot_M[order] = torch.arange(len(order), device=device) - first_X[window_M[order]]
    rows_X, columns_X = (
        (grid - at * side).clamp(max=side) for at in (numbers_X // across % across, numbers_X % across)
    )
    padding_X = side * side - rows_X * columns_X
    slots = int(count_X.max()) + int(bool(padding_X.any()))
    place_X, num_units = torch.arange(len(numbers_X), device=device) * slots, ids_keep_BN.numel()
    filled = torch.full((len(numbers_X) * slots,), num_units, device=device)
    bias_Xm = torch.full((len(numbers_X), slots), -torch.inf, dtype=dtype, device=device)
    home_M = place_X[window_M] + slot_M
    filled[home_M] = image_M * num_keep + place_M
    bias_Xm.view(-1)[home_M] = 0.0
    if bool(padding_X.any()):
        # All padding has the same key, so that one slot stands for all of it: n equal terms are exp(q k + log n).
        bias_Xm[:, -1] = padding_X.to(dtype).log()
    return UnitWindows(
        num_slots=slots, slots=filled, homes=_homes(filled, num_units), bias_Xm=bias_Xm if bias_Xm.any() else None
    )


def _homes(slots: Tensor, num_units: int) -> Tensor:
    """Return the slot of each unit, the inverse of ``slots``."""
    homes = torch.zeros(num_units + 1, dtype=slots.dtype, device=slots.device)
    homes[slots] = torch.arange(len(slots), device=slots.device)
    return homes[:num_units]
