"""Exact attention with decomposed relative positions, without any full-size attention map, in the form a device likes.

On a CPU ``blocked_attention``: blocks that fit the cache, nothing padded. On a GPU and under ``torch.compile``
``fused_attention``: few large operations.
"""

from __future__ import annotations

import torch
from samgraft.shared.encoders.blocked_attention import BlockedAttention
from samgraft.shared.encoders.fused_attention import FusedWindows, attend_fused
from samgraft.shared.encoders.fused_plan import fused_dense_plan, fused_visible_plan
from samgraft.shared.encoders.windows import Bundle, Plan, dense_plan, visible_plan


def computes_in_blocks(device: torch.device) -> bool:
    """Return whether attention on this device runs block by block."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def plan_all(grid: int, side: int, num_images: int, device: torch.device) -> Plan:
    """Plan for all tokens of square grids."""
    plan = dense_plan if computes_in_blocks(device) else fused_dense_plan
    return plan(grid, side, num_images, device)


def plan_visible(ids_keep_BN: torch.Tensor, *, grid: int, side: int) -> Plan:
    """Plan for kept tokens only, see ``visible_plan``."""
    plan = visible_plan if computes_in_blocks(ids_keep_BN.device) else fused_visible_plan
    return plan(ids_keep_BN, grid=grid, side=side)


def mix_tokens(
    qkv_BND: torch.Tensor,
    padding_D: torch.Tensor,
    rel_pos_h_Ld: torch.Tensor,
    rel_pos_w_Ld: torch.Tensor,
    windows: tuple[Bundle, ...] | FusedWindows,
    *,
    num_heads: int,
) -> torch.Tensor:
    """Mix tokens by attention within the windows of a plan.

    Args:
        qkv_BND: Queries, keys and values of B images with N tokens, D = 3 C, laid out as segment_anything's ``qkv``.
        padding_D: The same of a zero token: what padding contributes.
        rel_pos_h_Ld: Relative positions of rows for the windows' side.
        rel_pos_w_Ld: Of columns.
        windows: ``windowed`` or ``everyone`` of a plan for these tokens.
        num_heads: Heads.

    Returns:
        Shape (B, N, C), before the output projection; undefined for tokens that stand in no window.
    """
    if isinstance(windows, FusedWindows):
        return attend_fused(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, windows, num_heads=num_heads)
    out: torch.Tensor = BlockedAttention.apply(qkv_BND, padding_D, rel_pos_h_Ld, rel_pos_w_Ld, windows, num_heads)
    return out
