"""Selection of slices to train on, and few-shot subsets of a split."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.series import PlaneTable
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceRef:
    """Reference to one slice of a store."""

    series_id: str
    slice_index: int
    plane: Plane | None = None
    """Plane of the slice. None is the main plane of the series."""


def select_slices(
    store: SliceStore,
    patient_ids: Iterable[str],
    *,
    planes: Sequence[Plane | str] = (),
    min_foreground_fraction: float = 0.0,
    labelled_only: bool = False,
    annotated_only: bool = False,
) -> list[SliceRef]:
    """List the usable slices of some patients, and log how many were left out and why.

    Args:
        store: The store.
        patient_ids: Patients whose slices are listed.
        planes: Planes to list, where a series has them. Empty takes every series in its main plane.
        min_foreground_fraction: Smallest share of non-air pixels of a usable slice, 0 to 1.
        labelled_only: Leave out slices without a label pixel, and series without label.
        annotated_only: Leave out slices on which every pixel is ignored.

    Raises:
        DataError: If no slice is left.
    """
    wanted = set(patient_ids)
    chosen = [Plane(plane) if isinstance(plane, str) else plane for plane in planes]
    counts = {"other plane": 0, "air": 0, "no label": 0, "not annotated": 0}
    refs: list[SliceRef] = []
    for record in store.series:
        if record.patient_id not in wanted:
            continue
        present = [plane for plane in chosen if plane in record.planes] if chosen else [None]
        if not present:
            counts["other plane"] += record.shape_zyx[0]
        for plane in present:
            table = record.planes[plane or record.plane]
            labelled = _labelled_slices(table)
            ignored = table.ignored_pixels >= table.shape_zyx[1] * table.shape_zyx[2]
            for index, fraction in enumerate(table.foreground_fraction):
                if fraction < min_foreground_fraction:
                    counts["air"] += 1
                elif labelled_only and not labelled[index]:
                    counts["no label"] += 1
                elif annotated_only and ignored[index]:
                    counts["not annotated"] += 1
                else:
                    refs.append(SliceRef(record.series_id, index, plane))
    left_out = ", ".join(f"{number} {reason}" for reason, number in counts.items() if number)
    suffix = f" (left out: {left_out})" if left_out else ""
    log.info("%s: %s of %s%s", store.path.name, counted(len(refs), "slice"), counted(len(wanted), "patient"), suffix)
    if not refs:
        raise DataError(
            f"0 usable slices: {left_out or 'no patient of the list is in the store'}.", where=store.path.name
        )
    return refs


def select_few_shot(split: Split, store: SliceStore, *, num: int, unit: str, repeat: int) -> Split:
    """Keep ``num`` training patients, or ``num`` labelled training slices. Val and test do not change.

    Draws are nested: in one repeat the subset of 5 contains the subset of 3, so that the points of a learning curve
    are comparable.

    Raises:
        DataError: If there are fewer.
    """
    rng = np.random.default_rng([split.seed, 3, repeat])
    if unit == "patients":
        order = rng.permutation(len(split.train))
        _check_number(num, len(split.train), "training patients", store)
        return dataclasses.replace(split, train=tuple(sorted(split.train[i] for i in order[:num])))
    if unit != "slices":
        raise DataError(f"unit must be patients or slices, got {unit!r}.")
    refs = select_slices(store, split.train, labelled_only=True)
    _check_number(num, len(refs), "labelled training slices", store)
    chosen = sorted((refs[i].series_id, refs[i].slice_index) for i in rng.permutation(len(refs))[:num])
    patients = {store.record(series_id).patient_id for series_id, _ in chosen}
    return dataclasses.replace(split, train=tuple(sorted(patients)), train_slices=tuple(chosen))


def keep_train_slices(refs: Iterable[SliceRef], split: Split) -> list[SliceRef]:
    """Keep the training slices that a few-shot split lists. A split without such a list keeps all."""
    if not split.train_slices:
        return list(refs)
    allowed = set(split.train_slices)
    return [ref for ref in refs if (ref.series_id, ref.slice_index) in allowed]


def _labelled_slices(table: PlaneTable) -> np.ndarray[Any, np.dtype[np.bool_]]:
    labelled_Z = np.zeros(table.shape_zyx[0], dtype=bool)
    for label, pixels in table.label_pixels.items():
        if label != IGNORE_LABEL:
            labelled_Z |= np.asarray(pixels) > 0
    return labelled_Z


def _check_number(num: int, available: int, what: str, store: SliceStore) -> None:
    if not 1 <= num <= available:
        raise DataError(f"few-shot needs 1 to {available} {what}, got {num}.", where=store.path.name)
