"""Cases of a source, each with one scan, its labels, and the names that connect it to a patient.

Shape letters: I, J, K = voxel axes of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.orientation import grids_agree, to_plane
from samgraft.shared.scans.readers.registry import read_scan
from samgraft.shared.scans.readers.scan import ScanFiles
from samgraft.shared.scans.volume import IGNORE_LABEL, Array, RawScan, Volume

LABEL_GRID_TOLERANCE_MM = 0.01
"""Largest distance between corners of image and label. Headers in float32 differ by micrometres."""
MAX_LABEL_ID = 65535
IGNORE_NAME = "ignore"
"""Name that makes a label id mean "not annotated", as in nnU-Net's ``dataset.json``."""
MAX_LABEL_MAP_VALUES = 1024
"""Largest number of different values of a label map. Atlases have a few hundred regions."""
MAX_ODD_LABEL_VALUES = 16
"""Largest number of values of a label map with negative or broken values, such as a mask scaled to 0.5."""
MAX_SURE_LABEL_VALUES = 64
"""Number of values in a file called a label above which its voxels are checked too."""
MIN_EQUAL_NEIGHBOURS = 0.7
"""Share of equal values among neighbouring foreground voxels above which an array is a label map. Label maps measure
above 0.8, noise-free 8-bit ultrasound below 0.5."""


class LabelGridError(DataError):
    """Refusal of a label on another grid than its scan. Both are kept for a picture."""

    def __init__(self, what: str, *, where: str, scan: RawScan, label: RawScan) -> None:
        super().__init__(what, where=where)
        self.scan = scan
        self.label = label


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """One label file of a case."""

    scan: ScanFiles
    ids: Mapping[int, int] | None = None
    """Map from label id in the file to label id in the store. An id that is not listed is an error, except 0. 0 as
    target drops an id; None keeps all."""
    class_id: int | None = None
    """Id in the store of everything in this file, for one file per class."""
    round_values: bool = False
    """Permission to round values that are nearly whole numbers (0.999). Otherwise they are refused."""
    ignore_id: int | None = None
    """Id of voxels that are not annotated, after the map. They become ``IGNORE_LABEL``. With one file per class it is a
    value of the file. None if there is no such id."""


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """One scan for a store. The keys may identify people. They are hashed and never stored."""

    name: str
    """Name for messages and reports on this machine."""
    patient_key: str
    scan: ScanFiles
    labels: tuple[LabelFiles, ...] = ()
    study_key: str = ""
    site_key: str | None = None
    is_named_image: bool = True
    """False if only the absence of label words makes this file a scan. Its voxels are then checked."""
    refusal: str | None = None
    """Reason to refuse scan and labels together before they are read, e.g. two labels of which one must be chosen."""
    scan_refusal: str | None = None
    """Reason to refuse the scan, with or without its labels."""


def read_case(case: SourceCase) -> RawScan:
    """Read the scan of a case.

    Raises:
        DataError: If the case was refused when it was found, cannot be read, or is a label map and not a scan.
    """
    if refusal := case.scan_refusal or case.refusal:
        raise DataError(refusal, where=case.name)
    scan = note_unused_frame(read_scan(case.scan), case.scan.frame)
    if not case.is_named_image and is_label_map(scan.array_ijk):
        values = np.unique(scan.array_ijk)
        text = ", ".join(f"{v:g}" for v in values[:5]) + (", ..." if len(values) > 5 else "")
        raise DataError(
            f"the scan looks like a label map ({len(values)} values: {text}). Add a word like _seg to its name "
            "(_dseg in BIDS), or list it as image in a CSV list if it is a scan.",
            where=case.name,
        )
    return scan


def note_unused_frame(scan: RawScan, frame: int | None) -> RawScan:
    """Return a scan with a note if a volume was chosen although its file has one only."""
    if frame is None or scan.num_volumes > 1:
        return scan
    return dataclasses.replace(scan, notes=(*scan.notes, f"--frame {frame} is not used, the file has one volume"))


def is_label_map(array_ijk: Array) -> bool:
    """Return whether an array looks like label ids and not like a scan.

    Label maps hold few different values in areas of one value. Two values alone are a mask.
    """
    # A scan shows its many values in a few slices already. Only what looks like a label map there is searched whole,
    # because small lesions lie between the sampled slices.
    middle = array_ijk[:, :, array_ijk.shape[-1] // 2 :][:, :, :1]
    if array_ijk.dtype.kind not in "biuf" or len(np.unique(middle)) > MAX_LABEL_MAP_VALUES:
        return False
    values = np.unique(array_ijk)
    if not 2 <= len(values) <= MAX_LABEL_MAP_VALUES or not np.isfinite(values).all():
        return False
    are_ids = values[0] >= 0 and np.array_equal(values, np.rint(values))
    if not are_ids and len(values) > MAX_ODD_LABEL_VALUES:
        return False
    return len(values) == 2 or _share_of_equal_neighbours(array_ijk, background=0) > MIN_EQUAL_NEIGHBOURS


def read_label(case: SourceCase, scan: RawScan) -> tuple[Array, str]:
    """Read and merge the label files of a case on the grid of its scan.

    Returns:
        Label ids (I, J, K) on the file's own axes, and the sha256 of the label files.

    Raises:
        DataError: If geometry differs from the scan's, a value is not a whole number, an id is not in the map, or two
            files claim one voxel.
    """
    merged = np.zeros(scan.array_ijk.shape, dtype=np.int32)
    digests = []
    for label in case.labels:
        part = read_scan(label.scan, as_label=True, like=scan)
        _check_grid(part, scan, where=f"{case.name}: {label.scan.name}")
        ids_ijk = _ids_of_file(part.array_ijk, label)
        clash = (merged != 0) & (ids_ijk != 0) & (merged != ids_ijk)
        if clash.any():
            pairs = sorted({(int(a), int(b)) for a, b in zip(merged[clash], ids_ijk[clash], strict=True)})
            text = ", ".join(f"{a} and {b}" for a, b in pairs[:5]).replace(str(IGNORE_LABEL), IGNORE_NAME)
            raise DataError(
                f"{int(clash.sum())} voxels are claimed by two labels ({text}). Remove them from one of the files.",
                where=case.name,
            )
        # After the check for clashes, so the order of the files cannot matter.
        merged = np.where(ids_ijk != 0, ids_ijk, merged)
        digests.append(part.source_sha256)
    return to_small_dtype(merged), "+".join(digests)


def to_small_dtype(label: Array) -> Array:
    """Return label ids in the smallest type that holds them, signed if voxels are ignored."""
    low, high = int(label.min(initial=0)), int(label.max(initial=0))
    return label.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))


def label_on_plane(label_ijk: Array, volume: Volume) -> Array:
    """Cut a label into the slices of its volume."""
    affine = np.asarray(volume.grid.affine, dtype=np.float64)
    label_zyx, _ = to_plane(label_ijk, affine, volume.plane)
    return label_zyx


def to_whole_numbers(array: Array, *, round_values: bool, where: str) -> Array:
    """Return label values as integers.

    A plain conversion would cut 0.999 to 0 and erase the label.

    Raises:
        DataError: If values are not finite or not whole.
    """
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        return array
    if not np.isfinite(array).all():
        raise DataError("label values must be finite, got NaN or Inf.", where=where)
    # Rounding is exact for values that are whole already; others are refused below without --round-labels.
    whole = np.rint(array)
    distance = float(np.abs(array - whole).max(initial=0.0))
    if distance > 0 and not (round_values and distance < 0.05):
        raise DataError(
            f"label values must be whole numbers, got values up to {distance:.3g} away from one. Pass "
            "--round-labels for rounding errors below 0.05; redo interpolated labels with nearest neighbour.",
            where=where,
        )
    return whole.astype(np.int64)


def map_ids(ids: Array, mapping: Mapping[int, int] | None, *, where: str) -> Array:
    """Replace label ids by a map and return them as uint16.

    The map comes before the check of the range, so that it can also drop -1 or ids that are too large.

    Raises:
        DataError: If an id is not in the map or outside 0..65535; the message suggests a map.
    """
    found = [int(value) for value in np.unique(ids) if value != 0]
    if mapping is not None:
        if unknown := [value for value in found if value not in mapping]:
            suggestion = ",".join(f"{value}={mapping.get(value, 0)}" for value in found[:20])
            option = f"--label-map={suggestion}" if suggestion.startswith("-") else f"--label-map {suggestion}"
            raise DataError(
                f"label ids must be among {sorted(mapping)}, got {unknown[:20]} too. Try {option}", where=where
            )
        values, places = np.unique(ids, return_inverse=True)
        targets = np.array([mapping.get(int(value), 0) for value in values], dtype=np.int64)
        ids = targets[places].reshape(ids.shape)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high > MAX_LABEL_ID:
        raise DataError(
            f"label ids must lie in 0..{MAX_LABEL_ID}, got {low}..{high}. Try {_label_map_option(found)}", where=where
        )
    return ids.astype(np.uint16)


def _ids_of_file(values_ijk: Array, label: LabelFiles) -> Array:
    where = label.scan.name
    ids = to_whole_numbers(values_ijk, round_values=label.round_values, where=where)
    found = np.unique(ids)
    if len(found) > MAX_SURE_LABEL_VALUES and not is_label_map(ids):
        raise DataError(
            f"the label looks like a scan ({len(found)} different values). Rename it, or give image and label in a CSV "
            "list.",
            where=where,
        )
    if label.class_id is None:
        # After the map, so that the name "ignore" and --ignore-label use one numbering, that of the store.
        mapped = map_ids(ids, label.ids, where=where)
        return _mark_ignored(mapped, mapped, label)
    classes = found[(found != 0) & (found != label.ignore_id)]
    if len(classes) > 1:
        text = ", ".join(str(int(v)) for v in classes[:5])
        raise DataError(
            f"the name makes this file one class, but it holds ids {text}. Rename it to CASE_seg, or give image and "
            "label in a CSV list.",
            where=where,
        )
    return _mark_ignored(np.where(ids != 0, label.class_id, 0), ids, label)


def _mark_ignored(result: Array, ids: Array, label: LabelFiles) -> Array:
    """Set the voxels of a label to ``IGNORE_LABEL`` where ``ids`` has its ignored id."""
    return (
        result if label.ignore_id is None else np.where(ids == label.ignore_id, IGNORE_LABEL, result.astype(np.int32))
    )


def _share_of_equal_neighbours(array_ijk: Array, *, background: float) -> float:
    equal = total = 0
    for a, b in ((array_ijk[:-1], array_ijk[1:]), (array_ijk[:, :-1], array_ijk[:, 1:])):
        foreground = (a != background) | (b != background)
        equal += int(np.count_nonzero((a == b) & foreground))
        total += int(np.count_nonzero(foreground))
    return equal / max(1, total)


def _label_map_option(found: list[int]) -> str:
    """Return a ``--label-map`` that keeps valid ids, drops negative ones and renumbers those that are too large."""
    free = iter(n for n in range(1, MAX_LABEL_ID) if n not in found)
    targets = {v: v if 0 < v <= MAX_LABEL_ID else 0 if v < 0 else next(free) for v in found[:20]}
    text = ",".join(f"{value}={target}" for value, target in targets.items())
    return f"--label-map={text}" if text.startswith("-") else f"--label-map {text}"  # a leading dash needs the "="


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
