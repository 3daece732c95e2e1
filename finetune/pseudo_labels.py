"""Pseudo-labels of unlabelled scans, in a slice store of their own inside a run.

The store has the series of the scans' store. Its labels are the pseudo-labels, with ``IGNORE_LABEL`` where the teachers
disagree, and its images are the agreement of the teachers in percent. The scans themselves stay in their own store.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.samples.leaks import count_rules, find_patients_again
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore, read_table

FACTS_KEY = "pseudo_labels"
"""Key of the facts in the table of a store of pseudo-labels."""


@dataclass(frozen=True, kw_only=True)
class PseudoFacts:
    """Origin of pseudo-labels, in the table of their store."""

    source_fingerprint: str
    """Fingerprint of the store of the scans."""
    round: int
    """Round of the self-training, from 1."""
    teachers: list[str]
    """Names of the teachers whose probabilities were averaged."""
    teacher_sha256: list[str]
    """Hashes of the teachers' weights."""
    class_ids: list[int]
    """Label ids of the classes."""
    min_agreement: float
    min_slice_agreement: float
    flips: bool
    transductive: bool
    """True if scans of validation or test patients are among them."""
    planes: list[str] = field(default_factory=list)
    """Planes into which the scans and their pseudo-labels are cut. Empty is the acquired plane."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """Scans and their pseudo-labels."""

    images: SliceStore
    """Store of the scans."""
    labels: SliceStore
    """Store of the pseudo-labels."""
    facts: PseudoFacts

    @property
    def series(self) -> tuple[str, ...]:
        """Series with pseudo-labels."""
        return tuple(record.series_id for record in self.labels.series)

    @property
    def patients(self) -> tuple[str, ...]:
        """Patients with pseudo-labels."""
        return self.labels.patient_ids

    def describe(self) -> str:
        """Return one sentence for the pre-flight, the card and the report."""
        records = self.labels.series
        ignored = 100 * ignored_share(self.labels)
        dropped = sum(int(ignored_slices(record).sum()) for record in records)
        return (
            f"{counted(len(records), 'scan')} of {counted(len(self.patients), 'patient has', 'patients have')} "
            f"pseudo-labels of {', '.join(self.facts.teachers)} (round {self.facts.round}); {dropped} of "
            f"{counted(sum(record.shape_zyx[0] for record in records), 'slice')} and {ignored:.1f} % of the voxels "
            "are ignored"
        )

    @property
    def transductive(self) -> bool:
        """True if scans of validation or test patients are among them."""
        return self.facts.transductive

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes that a resumed run must have again."""
        return {"pseudo_labels_fingerprint": self.labels.fingerprint}


def ignored_share(labels: SliceStore) -> float:
    """Return the share of ignored voxels of all scans, 0 to 1."""
    records = labels.series
    return sum(r.ignored_voxels for r in records) / sum(math.prod(r.shape_zyx) for r in records)


def ignored_slices(record: SeriesRecord) -> npt.NDArray[np.bool_]:
    """Return True for the slices (Z,) on which every voxel is ignored."""
    _, height, width = record.shape_zyx
    whole: npt.NDArray[np.bool_] = record.planes[record.plane].ignored_pixels == height * width
    return whole


def pseudo_record(
    record: SeriesRecord, labels: Mapping[Plane, npt.NDArray[np.integer[Any]]], *, label_sha256: str
) -> SeriesRecord:
    """Return the record of a scan's pseudo-labels (Z, H, W) per plane, with their pixels per slice."""
    tables = {}
    for plane, label_ZHW in labels.items():
        # Background is not counted in the tables of stores.
        ids = [int(label) for label in np.unique(label_ZHW) if label]
        pixels = {label: tuple(int(n) for n in (label_ZHW == label).sum(axis=(1, 2))) for label in ids}
        tables[plane] = dataclasses.replace(record.planes[plane], label_pixels=pixels)
    return dataclasses.replace(record, planes=tables, has_label=True, label_sha256=label_sha256, notes=(), files={})


def open_pseudo_labels(
    path: Path, *, images: SliceStore, store: SliceStore, split: Split, classes: ClassTable, allow_transductive: bool
) -> PseudoLabels:
    """Open pseudo-labels and check that they belong to the scans, the classes and the split of a run.

    Args:
        path: Store of the pseudo-labels.
        images: Store of the scans.
        store: Labelled store.
        split: Split of the labelled store.
        classes: Classes of the run.
        allow_transductive: Accept scans of validation or test patients.

    Raises:
        DataError: If they are damaged, belong to other scans or classes, or label validation or test patients.
    """
    # Checksums and file sizes are checked here as for every store.
    labels = SliceStore.open(path)
    values = read_table(path).get(FACTS_KEY)
    if values is None:
        raise DataError(
            "data.pseudo_labels must be a store of pseudo-labels, got another store. Leave it out: samgraft selftrain "
            "sets it.",
            where=path.name,
        )
    facts = PseudoFacts(**values)
    # Series and slices are matched by their ids, which another store may use for other scans.
    if facts.source_fingerprint != images.fingerprint or facts.class_ids != list(classes.ids):
        what = "scans" if facts.source_fingerprint != images.fingerprint else "classes"
        raise DataError(
            f"the pseudo-labels were made for other {what} than those of this run. Choose another NAME= and run the "
            "self-training again.",
            where=path.name,
            kept="the pseudo-labels, unchanged",
        )
    # Checked again although the labelling leaves these patients out: the split may have changed since then.
    if not allow_transductive:
        refuse_held_out(labels, store, split, where=path.name)
    return PseudoLabels(images=images, labels=labels, facts=facts)


def held_out_patients(scans: SliceStore, store: SliceStore, split: Split) -> dict[str, str]:
    """Return the patients of some scans that are validation or test patients of a split, with the rule that found them.

    Patients are found by id, by equal voxels and as near-duplicates, so that a second store may have other ids.
    """
    # Ids alone would not do: two stores may have been built with different salts.
    return find_patients_again(scans, store, [*split.val, *split.test])


def refuse_held_out(scans: SliceStore, store: SliceStore, split: Split, *, where: str) -> None:
    """Refuse pseudo-labels of validation or test patients.

    Raises:
        DataError: With the number of these patients.
    """
    if found := held_out_patients(scans, store, split):
        raise DataError(
            f"{len(found)} validation or test patients have pseudo-labels ({count_rules(found)}). Run the "
            "self-training again with another NAME=, which leaves them out.",
            where=where,
            next_command="the same command with data.allow_transductive=true, if that is meant; the card records it",
        )
