"""Search for near-duplicates, scans that may be one scan under the ids of several patients.

Equal voxels are found by their hash. A scan that was rescaled or stored in another type has another hash, but the same
shape and nearly the same share of tissue on every slice. Two people differ in that by more than half a percent on at
least one slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
from samgraft.shared.store.series import SeriesRecord

MAX_DIFFERENCE = 0.005
"""Largest difference in the share of non-air pixels on any slice. Rescaling changes the share by rounding only."""
MIN_SPREAD = 0.1
"""Smallest difference between the emptiest and the fullest slice. Crops that are all tissue are not comparable."""
MIN_SLICES = 8
NUM_HASHED_SLICES = 4
CELL = 1.01 * MAX_DIFFERENCE
"""Width of a hash cell. It is a little over the largest difference, so that rounding cannot separate a pair by two."""


def near_duplicates(records: Iterable[SeriesRecord]) -> list[tuple[SeriesRecord, SeriesRecord]]:
    """Return pairs of near-duplicate series of different patients, without those with equal voxels."""
    groups: dict[tuple[int, ...], dict[str, list[SeriesRecord]]] = {}
    for record in records:
        shares_Z = _tissue_shares(record)
        if len(shares_Z) >= MIN_SLICES and np.ptp(shares_Z) >= MIN_SPREAD:
            # Copies with equal voxels are one point of the search. A thousand of them are not half a million pairs.
            groups.setdefault(record.shape_zyx, {}).setdefault(record.content_sha256, []).append(record)
    return [pair for group in groups.values() for pair in _pairs(list(group.values()))]


def _pairs(copies: Sequence[list[SeriesRecord]]) -> Iterator[tuple[SeriesRecord, SeriesRecord]]:
    points_NZ = np.stack([_tissue_shares(records[0]) for records in copies])
    for first_P, second_P in _candidates(points_NZ):
        # Slice by slice: a table of all candidates and slices would not fit into memory.
        for shares_N in points_NZ.T:
            near_P = np.abs(shares_N[first_P] - shares_N[second_P]) <= MAX_DIFFERENCE
            first_P, second_P = first_P[near_P], second_P[near_P]
        for first, second in zip(first_P, second_P, strict=True):
            for one, other in product(copies[first], copies[second]):
                if one.patient_id != other.patient_id:
                    yield one, other


def _candidates(points_NZ: npt.NDArray[np.float64]) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Yield indices of points in equal or adjacent hash cells, every pair once.

    The time is nearly linear in the number of points, where comparing all pairs is quadratic.
    """
    num_slices = points_NZ.shape[1]
    # Evenly spaced slices without the ends of the stack, which are nearly empty in every scan.
    hashed = np.linspace(0, num_slices - 1, NUM_HASHED_SLICES + 2).round().astype(int)[1:-1]
    cells_NK = np.floor(points_NZ[:, hashed] / CELL).astype(np.int64)
    # One integer per cell. The base leaves room for the neighbours of the outermost cells.
    weights_K = (int(1 / CELL) + 4) ** np.arange(NUM_HASHED_SLICES)
    codes_N = cells_NK @ weights_K
    order_N = np.argsort(codes_N, kind="stable")
    sorted_N = codes_N[order_N]
    places_N = np.arange(len(codes_N))
    for offset in product((-1, 0, 1), repeat=NUM_HASHED_SLICES - 1):
        step = int(np.dot(offset, weights_K[1:]))
        if step < 0:
            continue  # the same pairs as the opposite step
        # Neighbours along the first slice have consecutive codes, so one range covers all three. In the own row only
        # later points count: every pair comes once, and none with itself.
        begin_N = places_N + 1 if step == 0 else np.searchsorted(sorted_N, sorted_N + step - 1, side="left")
        counts_N = np.searchsorted(sorted_N, sorted_N + step + 1, side="right") - begin_N
        first_P = np.repeat(places_N, counts_N)
        within_P = np.arange(len(first_P)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        yield order_N[first_P], order_N[np.repeat(begin_N, counts_N) + within_P]


def _tissue_shares(record: SeriesRecord) -> npt.NDArray[np.float64]:
    return np.asarray(record.planes[record.plane].foreground_fraction, dtype=np.float64)
