"""A case: one scan, its labels and the names that tie it to a patient, before anything is pseudonymous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import grids_agree, to_plane
from samgraft.shared.scans.readers.scan import ScanFiles, read_scan
from samgraft.shared.scans.volume import Array, RawScan, Volume

LABEL_GRID_TOLERANCE_MM = 0.01
"""Largest distance between corners of image and label. Headers in float32 differ by micrometres."""
MAX_LABEL_ID = 65535


class LabelGridError(DataError):
    """A label lies on another grid than its scan; both are kept for a picture."""

    def __init__(self, what: str, *, where: str, scan: RawScan, label: RawScan) -> None:
        super().__init__(what, where=where)
        self.scan = scan
        self.label = label


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """One label file of a case."""

    scan: ScanFiles
    ids: Mapping[int, int] | None = None
    """Label id in the file -> label id in the store. An id that is not listed is an error, except 0; None keeps all.
    Map an id to 0 to drop it."""
    round_values: bool = False
    """Round values that are nearly whole numbers (0.999); otherwise they are refused."""


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """One scan to be put into a store. The keys may identify people: they are hashed and never stored."""

    name: str
    """Name for messages and reports on this machine."""
    patient_key: str
    scan: ScanFiles
    labels: tuple[LabelFiles, ...] = ()
    study_key: str = ""
    site_key: str | None = None


def read_label(case: SourceCase, scan: RawScan) -> tuple[Array, str]:
    """Read and merge the label files of a case on the grid of its scan.

    Returns:
        Label ids (I, J, K) on the file's own axes, and the sha256 of the label files.

    Raises:
        DataError: If geometry differs from the scan's, a value is not a whole number, an id is not in the map, or two
            files claim one voxel.
    """
    merged = np.zeros(scan.array_ijk.shape, dtype=np.uint16)
    digests = []
    for label in case.labels:
        part = read_scan(label.scan, as_label=True, like=scan)
        _check_grid(part, scan, where=f"{case.name}: {label.scan.name}")
        ids_ijk = whole_numbers(part.array_ijk, round_values=label.round_values, where=label.scan.name)
        ids_ijk = map_ids(ids_ijk, label.ids, where=label.scan.name)
        clash = (merged != 0) & (ids_ijk != 0) & (merged != ids_ijk)
        if clash.any():
            pairs = sorted({(int(a), int(b)) for a, b in zip(merged[clash], ids_ijk[clash], strict=True)})
            text = ", ".join(f"{a} and {b}" for a, b in pairs[:5])
            raise DataError(
                f"{int(clash.sum())} voxels are claimed by two labels ({text}). Decide which one wins in the source.",
                where=case.name,
            )
        merged = np.where(ids_ijk != 0, ids_ijk, merged)
        digests.append(part.source_sha256)
    return merged.astype(np.min_scalar_type(int(merged.max()))), "+".join(digests)


def label_on_plane(label_ijk: Array, volume: Volume) -> Array:
    """Cut a label into the slices of its volume."""
    affine = np.asarray(volume.grid.affine, dtype=np.float64)
    label_zyx, _ = to_plane(label_ijk, affine, volume.plane)
    return label_zyx


def whole_numbers(array: Array, *, round_values: bool, where: str) -> Array:
    """Return label values as integers; a conversion that cuts 0.999 to 0 would erase the label.

    Raises:
        DataError: If values are negative, above 65535, or not whole.
    """
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DataError("label values must be finite, got NaN or Inf.", where=where)
        whole = np.rint(array)
        distance = float(np.abs(array - whole).max(initial=0.0))
        if distance > 0 and not (round_values and distance < 0.05):
            raise DataError(
                f"label values must be whole numbers, got values up to {distance:.3g} away from one. Pass "
                "--round-labels for rounding errors below 0.05; redo interpolated labels with nearest neighbour.",
                where=where,
            )
        array = whole
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > MAX_LABEL_ID:
        raise DataError(f"label ids must lie in 0..{MAX_LABEL_ID}, got {low}..{high}. Map them.", where=where)
    return array.astype(np.uint16)


def map_ids(ids: Array, mapping: Mapping[int, int] | None, *, where: str) -> Array:
    """Replace label ids by a map.

    Raises:
        DataError: If an id is not in the map; the message suggests one.
    """
    if mapping is None:
        return ids
    found = [int(value) for value in np.unique(ids) if value != 0]
    if unknown := [value for value in found if value not in mapping]:
        suggestion = ",".join(f"{value}={mapping.get(value, 0)}" for value in found)
        raise DataError(
            f"label ids must be among {sorted(mapping)}, got {unknown} too. Try --label-map {suggestion}", where=where
        )
    table = np.zeros(int(ids.max(initial=0)) + 1, dtype=np.uint16)
    for source, target in mapping.items():
        if 0 <= source < len(table):
            table[source] = target
    table[0] = mapping.get(0, 0)
    return np.asarray(table[ids])


def _check_grid(label: RawScan, scan: RawScan, *, where: str) -> None:
    if not (label.has_orientation and scan.has_orientation):
        if label.array_ijk.shape != scan.array_ijk.shape:
            raise LabelGridError(
                f"image and label must have one shape, got {scan.array_ijk.shape} and {label.array_ijk.shape}.",
                where=where,
                scan=scan,
                label=label,
            )
        return
    agree, difference = grids_agree(
        scan.affine,
        scan.array_ijk.shape,
        label.affine,
        label.array_ijk.shape,
        tolerance_mm=LABEL_GRID_TOLERANCE_MM,
    )
    if not agree:
        raise LabelGridError(
            f"image and label must lie on one grid: {difference}. Resample the label to the image (nearest).",
            where=where,
            scan=scan,
            label=label,
        )
