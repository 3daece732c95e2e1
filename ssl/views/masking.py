"""Token masks, which mark the tokens of a slice that are hidden from the encoder.

``token_mask_Bhw`` is boolean and **True means hidden** everywhere. Masks are pure functions of the run's seed and the
sample's counter, never of global random state, so that a resumed run hides the same tokens. Every sample hides the
same number of tokens, which keeps batches of visible tokens rectangular.

Shape letters: B = samples, h, w = rows and columns of the token grid (or of a coarser grid of mask units).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.errors import UsageError

MASK_STREAM = 0x6D61736B
"""Random stream of masks, separate from that of augmentation, which uses the same seed and counter."""
VIEW_MASK_STREAM = 0x766D736B
"""Random stream of masks of views."""
MAX_BLOCK_TRIES = 200
"""Largest number of rectangles in a block mask."""

GridMask = npt.NDArray[np.bool_]


class MaskKind(Enum):
    """Spread of the hidden tokens over the grid."""

    RANDOM = "random"
    """Tokens hidden independently of each other."""
    BLOCK = "block"
    """Hidden rectangles as in BEiT, which are harder than small gaps."""
    PER_WINDOW = "per_window"
    """The same number of hidden tokens in every attention window, so that none is empty and none is full."""


def token_masks(
    sample_counters: Sequence[int],
    *,
    seed: int,
    grid_hw: tuple[int, int],
    mask_ratio: float,
    kind: MaskKind = MaskKind.RANDOM,
    attn_window_size: int | None = None,
) -> torch.Tensor:
    """Draw one mask per sample.

    Args:
        sample_counters: Position of each sample in the run. The mask depends on it and on the seed only.
        seed: Seed of the run.
        grid_hw: Rows and columns of the grid.
        mask_ratio: Fraction hidden, in (0, 1).
        kind: Spread of the hidden tokens.
        attn_window_size: Tokens along a side of an attention window (kind per_window).

    Returns:
        Shape (B, h, w), boolean, True = hidden. Kinds random and block hide ``round(mask_ratio * h * w)`` tokens.

    Raises:
        UsageError: If the ratio leaves nothing hidden or nothing visible.
        ValueError: If a needed window size is missing.
    """
    height, width = grid_hw
    num_hidden = hidden_count(height * width, mask_ratio)
    if not 0 < num_hidden < height * width:
        raise UsageError(
            f"mask_ratio must hide at least one token and keep one on a {height} x {width} grid, got {mask_ratio}.",
            where="objective.*.mask_ratio",
        )
    masks = []
    for counter in sample_counters:
        # A new generator per sample, so that the mask depends neither on the batch nor on the number of processes.
        generator = np.random.default_rng([seed, MASK_STREAM, int(counter)])
        if kind is MaskKind.RANDOM:
            mask_hw = _random_mask(grid_hw, num_hidden, generator)
        elif kind is MaskKind.BLOCK:
            mask_hw = _block_mask(grid_hw, num_hidden, generator)
        else:
            if attn_window_size is None:
                raise ValueError("attn_window_size must be given for mask_kind per_window, got None.")
            mask_hw = _per_window_mask(grid_hw, mask_ratio, attn_window_size, generator)
        if not mask_hw.any():
            raise UsageError(
                f"mask_ratio must hide at least one token of an attention window, got {mask_ratio}.",
                where="objective.*.mask_ratio",
            )
        masks.append(mask_hw)
    return torch.from_numpy(np.stack(masks))


def mask_unit(encoder: ImageEncoder, wanted_px: int | None, *, share: float = 0.1, step_px: int | None = None) -> int:
    """Return the side of a hidden square in pixels, chosen or checked.

    Args:
        encoder: The encoder, whose stride and input limit the side.
        wanted_px: The side; None takes the encoder's natural one, for vit_t what is nearest to ``share``.
        share: Wanted side as a share of the input's side.
        step_px: Pixels that the side is a multiple of, by default the encoder's stride.

    Raises:
        UsageError: If the wanted side is no multiple of ``step_px``, does not divide its input, or is all of
            it; or if the input is a single token, of which no part can be hidden.
    """
    if wanted_px is None and encoder.spec.natural_mask_unit_px is not None:
        return encoder.spec.natural_mask_unit_px
    size, step = encoder.image_size, step_px or encoder.stride
    units = [side for side in range(step, size, step) if size % side == 0]
    if not units:
        raise UsageError(f"image_size must be at least two tokens of {step} px, got {size}.", where="model.image_size")
    # The ratio to the wanted side counts, and not the difference, so that a half and a double are equally far.
    if wanted_px is None:
        return min(units, key=lambda unit: max(unit / (share * size), share * size / unit))
    if wanted_px not in units:
        raise UsageError(
            f"mask_unit_px must be a multiple of {step} px for {encoder.arch} and divide image_size {size}, got "
            f"{wanted_px}. Use one of {', '.join(map(str, units))}.",
            where="objective.*.mask_unit_px",
        )
    return wanted_px


def scattered_masks(
    sample_counters: Sequence[int],
    *,
    seed: int,
    side: int,
    num_views: int,
    ratios: tuple[float, float],
    kind: MaskKind,
) -> torch.Tensor:
    """Draw masks for several views per sample, of which exactly one has hidden tokens.

    In iBOT half of the views have some on average. Here it is exactly one view, because a batch without hidden tokens
    has no loss on them.

    Args:
        sample_counters: Position of each sample in the run.
        seed: Seed of the run.
        side: Rows and columns of the grid.
        num_views: Views per sample.
        ratios: Bounds between which the hidden fraction of a view is drawn.
        kind: Spread of the hidden tokens.

    Returns:
        Shape (num_views * B, side, side), True = hidden, all first views before all second ones.
    """
    num_samples = len(sample_counters)
    masks_VBhw = np.zeros((num_views, num_samples, side, side), dtype=np.bool_)
    for position, counter in enumerate(sample_counters):
        generator = np.random.default_rng([seed, VIEW_MASK_STREAM, int(counter)])
        view, ratio = int(generator.integers(num_views)), float(generator.uniform(*ratios))
        # At least one token is hidden and one visible, also on a grid of few tokens.
        num_hidden = min(max(hidden_count(side * side, ratio), 1), side * side - 1)
        draw = _block_mask if kind is MaskKind.BLOCK else _random_mask
        masks_VBhw[view, position] = draw((side, side), num_hidden, generator)
    return torch.from_numpy(masks_VBhw.reshape(-1, side, side))


def hidden_count(num_tokens: int, mask_ratio: float) -> int:
    """Return the number of hidden tokens among ``num_tokens``."""
    return round(num_tokens * mask_ratio)


def upsample_mask(token_mask_Bhw: torch.Tensor, *, image_size: int) -> torch.Tensor:
    """Return the pixel mask (B, 1, S, S) of a token mask.

    Raises:
        ValueError: If the grid does not divide ``image_size``.
    """
    height, width = token_mask_Bhw.shape[-2:]
    if image_size % height or image_size % width:
        raise ValueError(f"the grid of the mask must divide image_size {image_size}, got {height} x {width}.")
    # Repeating is exact, and an interpolation would blur the borders of hidden squares.
    rows_BSw = token_mask_Bhw.repeat_interleave(image_size // height, dim=-2)
    return rows_BSw.repeat_interleave(image_size // width, dim=-1)[:, None]


def _random_mask(grid_hw: tuple[int, int], num_hidden: int, generator: np.random.Generator) -> GridMask:
    mask_hw = np.zeros(grid_hw[0] * grid_hw[1], dtype=np.bool_)
    mask_hw[generator.permutation(mask_hw.size)[:num_hidden]] = True
    return mask_hw.reshape(grid_hw)


def _block_mask(grid_hw: tuple[int, int], num_hidden: int, generator: np.random.Generator) -> GridMask:
    """Add rectangles until at least ``num_hidden`` tokens are hidden, then correct the number at random."""
    height, width = grid_hw
    mask_hw = np.zeros(grid_hw, dtype=np.bool_)
    for _ in range(MAX_BLOCK_TRIES):
        missing = num_hidden - int(mask_hw.sum())
        if missing <= 0:
            break
        # At most the missing area, so that the last rectangles do not hide far too much. Aspects are those of BEiT.
        area = generator.uniform(min(4, missing), max(4, missing))
        aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
        rows = int(np.clip(round(float(np.sqrt(area * aspect))), 1, height))
        columns = int(np.clip(round(float(np.sqrt(area / aspect))), 1, width))
        top = int(generator.integers(0, height - rows + 1))
        left = int(generator.integers(0, width - columns + 1))
        mask_hw[top : top + rows, left : left + columns] = True
    # Overlaps and clipping make the number inexact, and batches need the same number in every sample.
    flat = mask_hw.reshape(-1)
    excess = int(flat.sum()) - num_hidden
    if excess > 0:
        flat[generator.permutation(np.flatnonzero(flat))[:excess]] = False
    elif excess < 0:
        flat[generator.permutation(np.flatnonzero(~flat))[:-excess]] = True
    return mask_hw


def _per_window_mask(
    grid_hw: tuple[int, int], mask_ratio: float, attn_window_size: int, generator: np.random.Generator
) -> GridMask:
    """Hide the same share of every window."""
    height, width = grid_hw
    mask_hw = np.zeros(grid_hw, dtype=np.bool_)
    for top in range(0, height, attn_window_size):
        for left in range(0, width, attn_window_size):
            view = mask_hw[top : top + attn_window_size, left : left + attn_window_size]
            # One token of every window stays visible, because attention over an empty window is undefined.
            num_hidden = min(max(hidden_count(view.size, mask_ratio), 0), view.size - 1)
            view[...] = _random_mask((view.shape[0], view.shape[1]), num_hidden, generator)
    return mask_hw
