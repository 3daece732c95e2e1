"""Picture at the top of the README, drawn from the public demo scans.

python docs/tools/lead_picture.py data docs/pictures/lead.png     after `make demo-data MODALITY=mri`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import samgraft.api as sg
from PIL import Image
from samgraft.finetune.evaluation.overlays import overlay
from samgraft.shared.demo import demo_paths
from samgraft.shared.scans.intensity import normalise
from segment_anything import SamPredictor

Array = npt.NDArray[Any]
SIDE = 256
HIDDEN_SHARE = 0.6
NUM_SQUARES = 16
AIR = 0.2
NUM_COLORS = 160
TITLES = ("your scans", "stage 1: fill what is hidden", "stage 2: learn from few labels", "masks for new scans")


def main(data: Path, out: Path) -> None:
    """Draw four steps side by side, each on another demo scan."""
    paths = demo_paths(data / "demo")
    unlabelled, labelled = sg.open_store(paths.unlabelled), sg.open_store(paths.labelled)
    heads = [record.series_id for record in unlabelled.series]
    tumours = [record.series_id for record in labelled.series]
    plain = _image(unlabelled, heads[0], 0.5)
    hidden = _hide(_image(unlabelled, heads[-1], 0.45))
    index, label = _largest(labelled, tumours[0])
    truth = _square(_outlined(labelled, tumours[0], index, label))
    index, label = _largest(labelled, tumours[-1])
    mask = _box_mask(labelled, tumours[-1], index, label, paths.weights)
    picture = _square(overlay(_slice(labelled, tumours[-1], index), predicted_HW=mask))
    _draw((plain, hidden, truth, picture), out)


def _slice(store: Any, series_id: str, index: int) -> Array:
    image: Array = normalise(store.read_slice(series_id, index), store.record(series_id).stats, store.intensity)
    return image


def _image(store: Any, series_id: str, share: float) -> Array:
    num_slices = store.record(series_id).shape_zyx[0]
    return _square(overlay(_slice(store, series_id, int(share * num_slices))))


def _hide(picture: Array) -> Array:
    """Paint a random share of squares, as stage 1 hides them."""
    hidden = np.random.default_rng(3).random((NUM_SQUARES, NUM_SQUARES)) < HIDDEN_SHARE
    side = SIDE // NUM_SQUARES
    large = np.kron(hidden, np.ones((side, side), dtype=bool))
    return np.where(large[..., None], np.float32(0.35), picture)


def _largest(store: Any, series_id: str) -> tuple[int, Array]:
    """Return the slice with most labelled pixels and its label."""
    sizes = [(store.read_label_slice(series_id, i) > 0).sum() for i in range(store.record(series_id).shape_zyx[0])]
    index = int(np.argmax(sizes))
    return index, store.read_label_slice(series_id, index)


def _outlined(store: Any, series_id: str, index: int, label: Array) -> Array:
    return overlay(_slice(store, series_id, index), true_HW=label)


def _box_mask(store: Any, series_id: str, index: int, label: Array, weights: Path) -> Array:
    """Return the mask that the base weights find in a box around the label."""
    image = _slice(store, series_id, index)
    rows, columns = np.nonzero(label)
    predictor = SamPredictor(sg.load_sam(weights))
    predictor.set_image((np.repeat(image[..., None], 3, axis=-1) * 255).astype(np.uint8))
    box = np.array([columns.min() - 2, rows.min() - 2, columns.max() + 2, rows.max() + 2])
    masks, _, _ = predictor.predict(box=box, multimask_output=False)
    return masks[0].astype(np.uint8)


def _square(picture: Array) -> Array:
    """Crop a picture to what is not air, pad it to a square and resize it to ``SIDE`` pixels."""
    rows, columns = (np.flatnonzero((picture.max(axis=-1) > AIR).any(axis=axis)) for axis in (1, 0))
    picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = picture.shape[:2]
    side = max(height, width)
    padded = np.zeros((side, side, 3), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = picture
    nearest = (np.arange(SIDE) * side / SIDE).astype(int)
    return padded[nearest][:, nearest]


def _draw(pictures: tuple[Array, ...], out: Path) -> None:
    mpl.use("agg")
    figure, axes = plt.subplots(1, len(pictures), figsize=(9.6, 2.7), dpi=100, facecolor="white")
    for axis, picture, title in zip(axes, pictures, TITLES, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.9, wspace=0.02)
    figure.canvas.draw()
    # A palette keeps the file small.
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(NUM_COLORS).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
