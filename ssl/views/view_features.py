"""Features of views of any size.

``vit_t`` accepts any size, and so does Hiera, which interpolates its positions at every size. The windowed ViTs have
one position per token of their grid, so a small view is placed in a part of the grid that begins at the edge of an
attention window, and the rest of the grid is left out. The positions, absolute and relative, are then SAM's own, none
is interpolated, and the rest of the grid costs nothing.

Shape letters: B = views, C = channels, s = side of the view in pixels, h, w = feature rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from samgraft.shared.encoders.base import FixedGridEncoder, ImageEncoder, cut_patches
from samgraft.shared.encoders.sam import to_pixels

PLACE_STREAM = 0x706C6163
"""Random stream of the places, separate from those of crops and masks."""


def view_features(
    encoder: ImageEncoder,
    views_B1ss: torch.Tensor,
    *,
    with_neck: bool,
    places_B2: torch.Tensor | None = None,
    token_mask_Bhw: torch.Tensor | None = None,
    mask_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode views.

    Args:
        encoder: Student or teacher.
        views_B1ss: Views in [0, 1], of the encoder's own size or smaller.
        with_neck: Return image embeddings; otherwise the features before the neck.
        places_B2: First row and column of each smaller view in the grid (windowed ViTs), from :func:`draw_places`.
        token_mask_Bhw: True = hidden; for views of the encoder's own size.
        mask_token: Replacement of hidden tokens.

    Returns:
        Shape (B, C, h, w).
    """
    pixels_B3ss = to_pixels(views_B1ss, encoder.spec)
    side = views_B1ss.shape[-1]
    if isinstance(encoder, FixedGridEncoder) and side != encoder.image_size:
        assert places_B2 is not None
        assert token_mask_Bhw is None
        features_BChw = _encode_part_of_grid(encoder, pixels_B3ss, places_B2)
    else:
        features_BChw = encoder.forward_features(pixels_B3ss, token_mask_Bhw=token_mask_Bhw, mask_token=mask_token)
    out: torch.Tensor = encoder.neck(features_BChw) if with_neck else features_BChw
    return out


def small_view_features(
    encoder: ImageEncoder, views_BCss: torch.Tensor, *, sample_counters: Sequence[int], seed: int, with_neck: bool
) -> torch.Tensor:
    """Encode the small views of a batch (``Crops.local_BCss``), each at a random place of the grid."""
    num_views = len(views_BCss) // len(sample_counters)
    places_B2 = draw_places(encoder, sample_counters, side_px=views_BCss.shape[-1], num_views=num_views, seed=seed)
    return view_features(encoder, views_BCss, with_neck=with_neck, places_B2=places_B2)


def draw_places(
    encoder: ImageEncoder, sample_counters: Sequence[int], *, side_px: int, num_views: int, seed: int
) -> torch.Tensor | None:
    """Draw the place of each small view in the grid, or return None for encoders without a fixed grid.

    Returns:
        Shape (num_views * B, 2), in the order of ``Crops.local_BCss``.
    """
    if not isinstance(encoder, FixedGridEncoder):
        return None
    window = encoder.attn_window_size
    # Places begin at attention windows, so that a view is cut into the same windows as a part of a whole slice.
    num_starts = max(0, encoder.grid - side_px // encoder.stride) // window + 1
    draws = [
        np.random.default_rng([seed, PLACE_STREAM, int(counter)]).integers(0, num_starts, size=(num_views, 2))
        for counter in sample_counters
    ]
    return torch.from_numpy(np.stack(draws, axis=1).reshape(-1, 2) * window)


def _encode_part_of_grid(encoder: FixedGridEncoder, pixels_B3ss: torch.Tensor, places_B2: torch.Tensor) -> torch.Tensor:
    side = pixels_B3ss.shape[-1] // encoder.stride
    steps = torch.arange(side, device=pixels_B3ss.device)
    rows_Bs, columns_Bs = (places_B2.to(pixels_B3ss.device)[:, axis, None] + steps for axis in (0, 1))
    # Token numbers in the whole grid, from which the encoder takes the positions.
    ids_BN = (rows_Bs[:, :, None] * encoder.grid + columns_Bs[:, None, :]).flatten(1)
    features_BNC = encoder.forward_patches(cut_patches(pixels_B3ss, encoder.stride), ids_BN)
    features_BChw: torch.Tensor = features_BNC.mT.unflatten(2, (side, side))
    return features_BChw
