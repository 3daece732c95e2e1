"""A whole scan through the segmenter, slice by slice, back on the scan's own grid.

Shape letters: Z = slices, H, W = rows and columns of a slice, N = slices of a batch, C = foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.data.frame import InputFrame, fit_frame, image_to_frame, logits_to_native
from samgraft.shared.data.intensity import IntensityPreset, IntensityStats, normalise
from samgraft.shared.data.store import SliceStore
from torch import Tensor, nn

Volume = npt.NDArray[Any]
Flips = tuple[tuple[int, ...], ...]
"""Axes to mirror, one entry per pass."""
NO_FLIPS: Flips = ((),)
ALL_FLIPS: Flips = ((), (-1,), (-2,), (-2, -1))


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How slices reach the encoder; fixed at training time and recorded with the model."""

    intensity: IntensityPreset
    """Native units to [0, 1]."""
    keep_aspect: bool
    """Pad to a square instead of squashing."""
    batch_size: int = 8
    """Slices per forward pass; changes speed and memory only."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients and give every submodule its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def segment_volume(
    segmenter: Segmenter,
    volume_ZHW: Volume,
    stats: IntensityStats,
    classes: ClassTable,
    config: InferenceConfig,
    *,
    flips: Flips = NO_FLIPS,
    on_slices: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int32]:
    """Segment a scan; draws no random numbers and leaves the model as it was.

    Args:
        segmenter: The model, on the device to use.
        volume_ZHW: Native units.
        stats: Intensity statistics of this volume.
        classes: Channel order of the model.
        config: How slices reach the encoder.
        flips: Axes to mirror, one pass each; the logits are averaged.
        on_slices: Called with slices done and slices to do after every batch; may raise to stop.

    Returns:
        Label ids, the shape of ``volume_ZHW``. Logits, not labels, are resized; the class is chosen on native pixels.
    """
    frame = fit_frame(
        (volume_ZHW.shape[1], volume_ZHW.shape[2]), image_size=segmenter.image_size, keep_aspect=config.keep_aspect
    )
    device = next(segmenter.parameters()).device
    labels = np.zeros(volume_ZHW.shape, dtype=np.int32)
    with evaluating(segmenter):
        for start in range(0, len(volume_ZHW), config.batch_size):
            slices = volume_ZHW[start : start + config.batch_size]
            images = np.stack([normalise(slice_HW, stats, config.intensity) for slice_HW in slices])
            logits_NCHW = _mean_logits(segmenter, torch.from_numpy(images)[:, None].to(device), frame, flips)
            labels[start : start + len(slices)] = classes.from_logits(logits_NCHW).cpu().numpy()
            if on_slices is not None:
                on_slices(start + len(slices), len(volume_ZHW))
    return labels


def _mean_logits(segmenter: Segmenter, images_N1HW: Tensor, frame: InputFrame, flips: Flips) -> Tensor:
    """Return logits (N, C, H, W) on native pixels; slices are mirrored before they are padded."""
    passes = []
    for axes in flips:
        mirrored = images_N1HW.flip(axes) if axes else images_N1HW
        logits_NCHW = logits_to_native(segmenter(image_to_frame(mirrored, frame)).float(), frame)
        passes.append(logits_NCHW.flip(axes) if axes else logits_NCHW)
    return passes[0] if len(passes) == 1 else torch.stack(passes).mean(dim=0)


def segment_series(
    segmenter: Segmenter, store: SliceStore, series_id: str, classes: ClassTable, config: InferenceConfig
) -> npt.NDArray[np.int32]:
    """Segment one series of a store on its own grid."""
    return segment_volume(segmenter, store.read_volume(series_id), store.record(series_id).stats, classes, config)
