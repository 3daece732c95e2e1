"""Distances between the surfaces of a predicted and a true structure in millimetres.

Surfaces are the marching-cubes surfaces of the two masks; every surface element counts with its area in mm^2 (its
length in mm for a single slice), so that anisotropic voxels do not distort the result. Elements and areas come from
MONAI.

If neither mask has the structure, there is nothing to measure and every value is n/a. If only one of them has it, the
surface Dice is 0 and both distances are the diagonal of the scan, the largest error that its grid allows: a miss must
not score better than a bad hit, and dropping the case would reward it.

Where voxels are not annotated, it is not known where the structure ends. Surface elements next to such a voxel are left
out of both surfaces.

Source: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
radiotherapy" (2018), and its reference implementation, package ``surface-distance``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

DEFAULT_TOLERANCE_MM = 2.0
"""Tolerance of the surface Dice, mm, from the FLARE challenges and MedSAM's evaluation.

The typical disagreement of your own readers is a better value."""
HAUSDORFF_PERCENT = 95.0
"""Percentile of the Hausdorff distance."""

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SurfaceScore:
    """Agreement of two surfaces."""

    nsd: float
    """Normalised surface Dice, the share of both surfaces that is within the tolerance of the other."""
    hd95_mm: float
    """Larger of the two directed distances that 95 % of a surface stay below, mm."""
    mean_surface_distance_mm: float
    """Area-weighted mean of the distances in both directions, mm."""


def surface_score(
    predicted: Mask,
    true: Mask,
    *,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    ignored: Mask | None = None,
) -> SurfaceScore | None:
    """Compare the surfaces of two masks.

    Args:
        predicted: Mask (Z, H, W). With one slice, contours are compared instead of surfaces: the flat caps above and
            below a slice would otherwise be most of its surface.
        true: Mask of the same shape.
        spacing_mm: Distance of slices, rows and columns.
        tolerance_mm: Largest distance that counts as agreement in ``nsd``.
        ignored: Voxels that are not annotated, where both masks are empty. None if there are none.

    Returns:
        None when both are empty, or have no surface away from ignored voxels.

    Raises:
        ValueError: If shapes differ or are not three-dimensional, or a length is not positive.
    """
    if predicted.shape != true.shape or predicted.ndim != 3:
        raise ValueError(f"masks must have one shape (Z, H, W), got {predicted.shape} and {true.shape}.")
    if min(spacing_mm) <= 0 or tolerance_mm <= 0:
        raise ValueError(f"spacing and tolerance must be positive, got {spacing_mm} and {tolerance_mm} mm.")
    if not predicted.any() and not true.any():
        return None
    # One-sided: there is no distance, so the largest one that the grid allows is used.
    diagonal = float(np.linalg.norm(np.asarray(predicted.shape) * np.asarray(spacing_mm)))
    one_sided = SurfaceScore(nsd=0.0, hd95_mm=diagonal, mean_surface_distance_mm=diagonal)
    if not predicted.any() or not true.any():
        return one_sided
    ignored = ignored if ignored is not None and ignored.any() else None
    (to_true, area_predicted), (to_predicted, area_true) = _distances(predicted, true, ignored, spacing_mm)
    if not len(area_predicted) or not len(area_true):
        return one_sided if len(area_predicted) or len(area_true) else None
    total = area_predicted.sum() + area_true.sum()
    within = area_predicted[to_true <= tolerance_mm].sum() + area_true[to_predicted <= tolerance_mm].sum()
    return SurfaceScore(
        nsd=float(within / total),
        hd95_mm=max(_percentile(to_true, area_predicted), _percentile(to_predicted, area_true)),
        mean_surface_distance_mm=float(((to_true * area_predicted).sum() + (to_predicted * area_true).sum()) / total),
    )


def _distances(
    predicted: Mask, true: Mask, ignored: Mask | None, spacing_mm: tuple[float, float, float]
) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
    """Return (distance, area) of every surface element of the prediction and of the truth."""
    # Imported here, because MONAI takes seconds and studies, comparisons and releases only read scores.
    from monai.metrics.utils import get_edge_surface_distance

    [box] = ndimage.find_objects((predicted | true).view(np.uint8))
    # MONAI copies the whole masks. Cropping first keeps the copies small on large scans with small structures, and the
    # border of one voxel closes surfaces at the edge of the scan.
    pair = [np.pad(mask[box], 1) for mask in (predicted, true)]
    spacing: tuple[float, ...] = spacing_mm
    known = None if ignored is None else _away_from(ignored, box)
    if predicted.shape[0] == 1:
        pair, spacing = [mask[1] for mask in pair], spacing_mm[1:]  # the slice between the two of the border
        known = None if known is None else known[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns about an argument that it passes itself
        edges, distances, areas = get_edge_surface_distance(
            torch.from_numpy(pair[0]),
            torch.from_numpy(pair[1]),
            spacing=spacing,
            use_subvoxels=True,
            symmetric=True,
            mask=known,
        )
    found = [
        (_values(distance), _values(area[edge])) for distance, area, edge in zip(distances, areas, edges, strict=True)
    ]
    return found[0], found[1]


def _away_from(ignored: Mask, box: tuple[slice, ...]) -> torch.Tensor:
    """Return the surface elements around a box that touch no ignored voxel."""
    # With the border of one voxel of the box: the structures often end exactly where the annotation ends.
    around = np.pad(ignored, 1)[tuple(slice(part.start, part.stop + 2) for part in box)]
    # An element lies between the 2 x 2 x 2 voxels that its index counts from.
    touched = torch.nn.functional.max_pool3d(torch.from_numpy(around)[None].float(), 2, stride=1)[0]
    return touched == 0


def _percentile(distances: Values, areas: Values) -> float:
    """Return the distance that 95 % of the area stay below."""
    # Every surface element has the weight of its area: on anisotropic grids the elements differ in size, and plain
    # percentiles would count small ones too much.
    order = np.argsort(distances)
    share = np.cumsum(areas[order]) / areas.sum()
    place = min(int(np.searchsorted(share, HAUSDORFF_PERCENT / 100)), len(order) - 1)
    return float(distances[order[place]])


def _values(tensor: Any) -> Values:
    return np.asarray(torch.as_tensor(tensor), dtype=np.float64).reshape(-1)
