"""Picture of a label that does not lie on its scan's grid.

Both panels show the slice with the most label: on the left the label where its own header puts it, on the right the
label voxel by voxel without its header. If the right one fits and the left one does not, the header is wrong and not
the label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from samgraft.shared.scans.orientation import slice_plane, to_plane
from samgraft.shared.scans.volume import RawScan

Array = npt.NDArray[Any]

MIN_SIDE_PX = 320
GAP_PX = 8
LABEL_RGB = np.array([255.0, 40.0, 40.0])
OPACITY = 0.4


def write_grid_picture(path: Path, scan: RawScan, label: RawScan) -> Path:
    """Write the picture as PNG.

    It shows patient pixels and must stay on this machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    by_header = resample_to(label, scan)
    panels = [by_header]
    if label.array_ijk.shape == scan.array_ijk.shape:
        panels.append(label.array_ijk != 0)
    plane = slice_plane(scan.affine, scan.array_ijk.shape)
    image_zyx, _ = to_plane(scan.array_ijk, scan.affine, plane)
    masks_zyx = [to_plane(mask, scan.affine, plane)[0] for mask in panels]
    slice_index = _fullest_slice(masks_zyx)
    gray_HW = _gray(image_zyx[slice_index])
    drawn = [_over(gray_HW, mask[slice_index]) for mask in masks_zyx]
    gap = np.full((gray_HW.shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    picture = np.concatenate([part for panel in drawn for part in (panel, gap)][:-1], axis=1)
    factor = max(1, -(-MIN_SIDE_PX // gray_HW.shape[0]))
    Image.fromarray(picture.repeat(factor, axis=0).repeat(factor, axis=1)).save(path)
    return path


def resample_to(label: RawScan, scan: RawScan) -> npt.NDArray[np.bool_]:
    """Return the label's foreground on the scan's voxels (I, J, K), by both headers and nearest neighbour."""
    # Scan voxel -> world -> label voxel; one slice at a time keeps the memory small.
    to_label = np.linalg.inv(label.affine) @ scan.affine
    shape_I, shape_J, shape_K = scan.array_ijk.shape
    places_4N = np.ones((4, shape_I * shape_J))
    places_4N[:2] = np.indices((shape_I, shape_J)).reshape(2, -1)
    found = np.zeros(scan.array_ijk.shape, dtype=bool)
    limits = np.asarray(label.array_ijk.shape)[:, None]
    for k in range(shape_K):
        places_4N[2] = k
        voxels_3N = np.rint(to_label @ places_4N)[:3].astype(np.int64)
        inside = ((voxels_3N >= 0) & (voxels_3N < limits)).all(axis=0)
        values = np.zeros(shape_I * shape_J, dtype=bool)
        values[inside] = label.array_ijk[tuple(voxels_3N[:, inside])] != 0
        found[:, :, k] = values.reshape(shape_I, shape_J)
    return found


def _fullest_slice(masks_zyx: list[Array]) -> int:
    for mask in masks_zyx:
        counts = mask.sum(axis=(1, 2))
        if counts.any():
            return int(counts.argmax())
    return len(masks_zyx[0]) // 2


def _gray(slice_HW: Array) -> npt.NDArray[np.float64]:
    low, high = np.percentile(slice_HW, (0.5, 99.5))
    scaled_HW = (slice_HW.astype(np.float64) - low) / max(float(high - low), 1e-12)
    return np.asarray(np.clip(scaled_HW, 0, 1) * 255, dtype=np.float64)


def _over(gray_HW: npt.NDArray[np.float64], mask_HW: Array) -> npt.NDArray[np.uint8]:
    weight_HW1 = OPACITY * mask_HW[..., None].astype(np.float64)
    return np.asarray((1 - weight_HW1) * gray_HW[..., None] + weight_HW1 * LABEL_RGB).astype(np.uint8)
