"""Scans of different patients that look alike: one scan under two names, rescaled, converted or exported again.

Equal voxels are found by their hash. What was rescaled or stored in another type has another hash, but the same shape
and, slice by slice, the same share of tissue: two people do not agree in that to half a percent on every slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from samgraft.shared.store.series import SeriesRecord

MAX_DIFFERENCE = 0.005
"""Of the share of non-air pixels, on every slice. Rescaling moves it by rounding only."""
MIN_SPREAD = 0.1
"""Between the emptiest and the fullest slice: crops that are tissue all over say nothing."""
MIN_SLICES = 8


def look_alike(records: Iterable[SeriesRecord]) -> list[tuple[SeriesRecord, SeriesRecord]]:
    """Return pairs of series of different patients that look alike; those with equal voxels are left out."""
    groups: dict[tuple[int, ...], list[tuple[float, npt.NDArray[np.float64], SeriesRecord]]] = {}
    for record in records:
        shares_Z = np.asarray(record.planes[record.plane].foreground_fraction, dtype=np.float64)
        if len(shares_Z) >= MIN_SLICES and np.ptp(shares_Z) >= MIN_SPREAD:
            groups.setdefault(record.shape_zyx, []).append((float(shares_Z.mean()), shares_Z, record))
    return [pair for group in groups.values() for pair in _pairs(group)]


def _pairs(
    group: list[tuple[float, npt.NDArray[np.float64], SeriesRecord]],
) -> Iterator[tuple[SeriesRecord, SeriesRecord]]:
    """Compare neighbours in the order of their mean only: alike ones cannot be far apart in it."""
    group.sort(key=lambda entry: entry[0])
    for place, (mean, shares_Z, record) in enumerate(group):
        for other_mean, other_Z, other in group[place + 1 :]:
            if other_mean - mean > MAX_DIFFERENCE:
                break
            same_person = record.patient_id == other.patient_id
            if same_person or record.content_sha256 == other.content_sha256:
                continue
            if np.abs(shares_Z - other_Z).max() <= MAX_DIFFERENCE:
                yield record, other
