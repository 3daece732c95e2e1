"""Pictures of slices with outlines of truth and prediction, for TensorBoard and reports.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import IGNORE_LABEL, ClassTable
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.store.store import SliceStore
from scipy import ndimage

Array = npt.NDArray[Any]
Rgb = npt.NDArray[np.float32]

CLASS_COLORS = ("#ff5a40", "#3da5ff", "#ffd23f", "#33d959", "#c77dff", "#2fe0d8", "#ff8fc7", "#c98b4b")
"""Colors of label ids 1, 2, ... on grey slices, repeated after the last."""
FILL_ALPHA = 0.4
"""Opacity of a predicted area."""
TRUTH_AND_PREDICTION = "The line is the truth, the filled area the prediction."
"""Sentence of captions under pictures with both."""
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
    """Draw the truth as an outline and the prediction as a filled area on a slice, one color per class.

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
    for label, is_truth in ((predicted_HW, False), (true_HW, True)):
        if label is None:
            continue
        big = _enlarge(np.asarray(label), factor)
        for label_id in np.unique(big[(big > 0) & (big != IGNORE_LABEL)]):
            inside, color = big == label_id, _rgb(class_color(int(label_id)))
            if is_truth:
                picture[inside & ~ndimage.binary_erosion(inside, iterations=1 if factor == 1 else 2)] = color
            else:
                picture[inside] = (1 - FILL_ALPHA) * picture[inside] + FILL_ALPHA * color
        picture[big == IGNORE_LABEL] *= IGNORED_BRIGHTNESS
    return picture


def class_color(label_id: int) -> str:
    """Return the CSS color of a label id, which is the same in every picture."""
    return CLASS_COLORS[(label_id - 1) % len(CLASS_COLORS)]


def class_key(classes: ClassTable) -> dict[str, str]:
    """Return the color of each class by its name."""
    return {name: class_color(label_id) for label_id, name in zip(classes.ids, classes.names, strict=True)}


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


def _rgb(color: str) -> npt.NDArray[np.float32]:
    return np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)], dtype=np.float32)


def _enlarge(array: Array, factor: int) -> Array:
    return np.kron(array, np.ones((factor, factor), dtype=array.dtype)) if factor > 1 else array
