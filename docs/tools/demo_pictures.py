"""Pictures of the documentation, drawn from the public demo scans and the two runs of the demo.

python docs/tools/demo_pictures.py data runs/mri-vit_t-masked_image docs/pictures     after the quick start

Shape letters: H, W = rows and columns of a slice.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import samgraft.api as sg
from PIL import Image
from samgraft.finetune.evaluation.overlays import choose_slices, overlay
from samgraft.shared.demo.heads import demo_paths
from samgraft.shared.report.page import image_grid
from samgraft.shared.scans.intensity import normalise

Array = npt.NDArray[Any]
SIDE = 256
HIDDEN_SHARE = 0.6
NUM_SQUARES = 16
AIR = 0.2
NUM_COLORS = 160
LEAD_TITLES = ("stage 1: fill what is hidden", "a scan that was not trained on", "its true mask", "the model's mask")
OVERLAY_TITLES = ("slice", "true mask", "the model's mask")
TEST_SLICES = (1, 2)
"""Places of the shown slices among four that are evenly spread over the scan."""
LEAD_SLICE = 0
NUM_PANEL_ROWS = 6
"""Slices in a picture of stage 1, of a run with the settings of the demo."""


def main(data: Path, stage1: Path, out: Path) -> None:
    """Draw the lead picture, the output of stage 1, and slices of the test scan with true and predicted mask."""
    run = stage1.with_name(f"{stage1.name}-finetune")
    paths = demo_paths(data / "demo")
    unlabelled, labelled = sg.open_store(paths.unlabelled), sg.open_store(paths.labelled)
    test_patients = json.loads(paths.split.read_text(encoding="utf-8"))["test"]
    series_id = next(record.series_id for record in labelled.series if record.patient_id in test_patients)
    predicted_ZHW = sg.load(run).predictor(labelled.read_volume(series_id), stats=labelled.record(series_id).stats)
    rows = []
    for index in choose_slices(labelled.read_label_volume(series_id), number=4):
        image_HW, label_HW = _slice(labelled, series_id, index), labelled.read_label_slice(series_id, index)
        # The outline alone is hard to see in a small picture, so that both masks are filled.
        tiles = (overlay(image_HW), overlay(image_HW, predicted_HW=label_HW),
                 overlay(image_HW, predicted_HW=predicted_ZHW[index]))  # fmt: skip
        rows.append([_square(tile, like=tiles[0]) for tile in tiles])
    head = unlabelled.series[-1].series_id
    hidden = _hide(_square(overlay(_slice(unlabelled, head, int(0.45 * unlabelled.record(head).shape_zyx[0])))))
    _save(image_grid([[hidden, *rows[LEAD_SLICE]]], column_titles=LEAD_TITLES, cell_in=2.4), out / "lead.png")
    panels = Image.open(max((stage1 / "panels").glob("step-*.png")))
    row = panels.height / NUM_PANEL_ROWS
    shown = panels.crop((0, round(row), panels.width, round(4 * row) - 2))
    # Pixels of 64 x 64 are too few for a page. Enlarged without smoothing, so that every pixel of the output is seen.
    shown = shown.resize((2 * shown.width, 2 * shown.height), Image.Resampling.NEAREST)
    shown.save(out / "reconstruction.png", optimize=True)
    _save(
        image_grid([rows[place] for place in TEST_SLICES], column_titles=OVERLAY_TITLES, cell_in=2.2),
        out / "overlay.png",
    )


def _slice(store: Any, series_id: str, index: int) -> Array:
    image: Array = normalise(store.read_slice(series_id, index), store.record(series_id).stats, store.intensity)
    return image


def _hide(picture: Array) -> Array:
    """Paint a random share of squares, as stage 1 hides them."""
    hidden = np.random.default_rng(3).random((NUM_SQUARES, NUM_SQUARES)) < HIDDEN_SHARE
    side = SIDE // NUM_SQUARES
    large = np.kron(hidden, np.ones((side, side), dtype=bool))
    return np.where(large[..., None], np.float32(0.35), picture)


def _square(picture: Array, *, like: Array | None = None) -> Array:
    """Crop a picture to what is not air, pad it to a square and resize it to ``SIDE`` pixels.

    Args:
        picture: Picture (H, W, 3) in [0, 1].
        like: Picture of equal shape that decides where air is, so that several are cropped alike.
    """
    shape = picture if like is None else like
    rows, columns = (np.flatnonzero((shape.max(axis=-1) > AIR).any(axis=axis)) for axis in (1, 0))
    picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = picture.shape[:2]
    side = max(height, width)
    padded = np.zeros((side, side, 3), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = picture
    nearest = (np.arange(SIDE) * side / SIDE).astype(int)
    return padded[nearest][:, nearest]


def _save(png: bytes, path: Path) -> None:
    """Write a picture with a palette, which keeps the file small."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(NUM_COLORS).save(path, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
