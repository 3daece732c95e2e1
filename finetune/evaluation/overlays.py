"""Pictures of slices with outlines of truth and prediction, for TensorBoard and reports.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import IGNORE_LABEL
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.store.store import SliceStore
from scipy import ndimage

Array = npt.NDArray[Any]
Rgb = npt.NDArray[np.float32]

TRUTH_COLOR = (0.20, 0.85, 0.35)
PREDICTION_COLOR = (1.0, 0.35, 0.25)
IGNORED_BRIGHTNESS = 0.4
"""Factor of the brightness of pixels that are not annotated."""
MIN_SIDE = 256
"""Smallest length of the longer side of a picture, pixels."""


def choose_slices(true_ZHW: Array, *, number: int) -> list[int]:
    """Choose slices to show, evenly spread over those with foreground, or over the scan without any."""
    foreground = np.flatnonzero((true_ZHW > 0).any(axis=(1, 2)))
    pool = foreground if foreground.size else np.arange(len(true_ZHW))
    places = np.linspace(0, pool.size - 1, min(number, pool.size)).round().astype(int)
    return [int(pool[place]) for place in dict.fromkeys(places.tolist())]


def overlay(image_HW: Array, *, true_HW: Array | None = None, predicted_HW: Array | None = None) -> Rgb:
    """Draw the truth as green outline and the prediction as red, half filled area on a slice.

    Pixels that are not annotated are dark.

    Args:
        image_HW: Slice, values in [0, 1].
        true_HW: True label ids; None draws none.
        predicted_HW: Predicted label ids; None draws none.

    Returns:
        Picture (H', W', 3) in [0, 1]. Small slices are enlarged by a whole number so that outlines stay thin.
    """
    # A whole factor keeps pixels square and outlines one pixel of the slice wide or less.
    factor = max(1, MIN_SIDE // max(image_HW.shape))
    image = _enlarge(np.asarray(image_HW, dtype=np.float32), factor)
    picture = np.repeat(image[..., None], 3, axis=-1)
    for label, color, alpha in ((predicted_HW, PREDICTION_COLOR, 0.35), (true_HW, TRUTH_COLOR, 0.0)):
        if label is None:
            continue
        big = _enlarge(np.asarray(label), factor)
        for label_id in np.unique(big[big > 0]):
            inside = big == label_id
            picture[inside] = (1 - alpha) * picture[inside] + alpha * np.asarray(color, dtype=np.float32)
            outline = inside & ~ndimage.binary_erosion(inside, iterations=1 if factor == 1 else 2)
            picture[outline] = color
        picture[big == IGNORE_LABEL] *= IGNORED_BRIGHTNESS
    return picture


def slice_pictures(
    store: SliceStore, series_id: str, slice_indexes: list[int], *, intensity: IntensityPreset
) -> list[tuple[Array, Array]]:
    """Return image in [0, 1] and true label ids of some slices."""
    stats = store.record(series_id).stats
    return [
        (
            normalise(store.read_slice(series_id, index), stats, intensity),
            store.read_label_slice(series_id, index),
        )
        for index in slice_indexes
    ]


def _enlarge(array: Array, factor: int) -> Array:
    return np.kron(array, np.ones((factor, factor), dtype=array.dtype)) if factor > 1 else array
