"""Resizing of position tables to another grid, the only place where it is done.

Shape letters: G, S = grid sides (tokens); C = channels; L = 2 G - 1 relative distances; D = channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def resize_positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """Resize absolute or relative positions to a grid of ``size`` x ``size`` tokens.

    Absolute positions are smoothed when they shrink (antialias), because each new position is then an average of
    several trained ones. Relative positions use segment_anything's own linear interpolation, so that resizing at load
    equals the result of its ``get_rel_pos`` during a forward pass.

    Args:
        table: ``pos_embed`` of shape (1, G, G, C), or ``rel_pos_h``/``rel_pos_w`` of shape (L, D).
        size: Tokens per side of the new grid.

    Returns:
        Shape (1, size, size, C) or (2 size - 1, D), in the dtype of ``table``. ``table`` itself at its own size.

    Source:
        Absolute: DINOv2's ``interpolate_pos_encoding`` (bicubic, antialias). Relative: segment_anything
        ``image_encoder.get_rel_pos``.
    """
    if table.ndim == 4:
        if table.shape[1] == table.shape[2] == size:
            return table
        # Bicubic interpolation is not defined for half precision on every device, so it runs in float32.
        grid = table.permute(0, 3, 1, 2).float()
        out = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        return out.permute(0, 2, 3, 1).to(table.dtype).contiguous()
    if table.ndim != 2:
        raise ValueError(f"table must have shape (1, G, G, C) or (L, D), got {tuple(table.shape)}.")
    # Distances run from -(size - 1) to size - 1.
    length = 2 * size - 1
    if table.shape[0] == length:
        return table
    out = F.interpolate(table.float().t()[None], size=length, mode="linear", align_corners=False)
    return out[0].t().to(table.dtype).contiguous()
