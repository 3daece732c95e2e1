"""Exact attention with decomposed relative positions, without a full-size attention map.

Two engines compute the same function, because no single form is fast everywhere. ``blocked_attention`` works through
blocks that fit a CPU's cache and pads nothing. ``fused_attention`` runs few large operations, which a GPU and
``torch.compile`` need. Measurements are in ``benchmarks/results/encoder_speed-engines-*.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from samgraft.shared.encoders.blocked_attention import BlockedAttention
from samgraft.shared.encoders.blocked_plan import WindowSet, dense_window_sets, visible_window_sets
from samgraft.shared.encoders.fused_attention import (
    FusedWindows,
    attend_fused,
    dense_fused_windows,
    visible_fused_windows,
)
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Windows in which tokens attend to each other, for one forward pass."""

    windowed: tuple[WindowSet, ...] | FusedWindows
    """Windows of the windowed blocks."""
    everyone: tuple[WindowSet, ...] | FusedWindows
    """Windows of the global blocks, one per image."""
    order: Tensor | None = None
    """Raster number of each token in the order of the plan, shape (N,). None if tokens stay as given."""


def computes_in_blocks(device: torch.device) -> bool:
    """Return True if attention on this device runs block by block."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def plan_all(grid: int, side: int, num_images: int, device: torch.device) -> Plan:
    """Plan attention for all tokens of square grids."""
    if computes_in_blocks(device):
        windowed, everyone, order = dense_window_sets(grid, side, num_images, device)
        return Plan(windowed=windowed, everyone=everyone, order=order)
    fused_windowed, fused_everyone = dense_fused_windows(grid, side, num_images, device)
    return Plan(windowed=fused_windowed, everyone=fused_everyone)


def plan_visible(ids_keep_BN: Tensor, *, grid: int, side: int) -> Plan:
    """Plan attention for kept tokens only. Each image may keep other ones.

    Args:
        ids_keep_BN: Raster numbers of the kept tokens of each image, int64, without repeats; -1 fills up images that
            keep fewer tokens than others.
        grid: Grid side in tokens.
        side: Window side in tokens.
    """
    if computes_in_blocks(ids_keep_BN.device):
        windowed, everyone = visible_window_sets(ids_keep_BN, grid=grid, side=side)
        return Plan(windowed=windowed, everyone=everyone)
    fused_windowed, fused_everyone = visible_fused_windows(ids_keep_BN, grid=grid, side=side)
    return Plan(windowed=fused_windowed, everyone=fused_everyone)


def mix_tokens(
    qkv_BND: Tensor,
    padding_D: Tensor,
    rel_pos_h_Ld: Tensor,
    rel_pos_w_Ld: Tensor,
    windows: tuple[WindowSet, ...] | FusedWindows,
    *,
    num_heads: int,
) -> Tensor:
    """Mix tokens by attention within the windows of a plan.

    Args:
        qkv_BND: Queries, keys and values of B images with N tokens, D = 3 C, laid out as segment_anything's ``qkv``.
        padding_D: Query, key and value of a zero token, which is what padding contributes.
        rel_pos_h_Ld: Relative positions of rows for the windows' side.
        rel_pos_w_Ld: Relative positions of columns.
        windows: ``windowed`` or ``everyone`` of a plan for these tokens.
        num_heads: Number of heads.

    Returns:
        Shape (B, N, C), before the output projection; undefined for tokens that are in no window.
    """
    if isinstance(windows, FusedWindows):
        return attend_fused(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, windows, num_heads=num_heads)
    out: Tensor = BlockedAttention.apply(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, windows, num_heads)
    return out
