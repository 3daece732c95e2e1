"""Scans without labels of their own, and the guard that leaves validation and test patients out of them."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from samgraft.finetune.pseudo_labels import held_out_patients
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.samples.leaks import count_rules, join_manifests, pretrain_manifest
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


class FurtherScans(Protocol):
    """Scans of a self-training, labelled before it or while it trains."""

    @property
    def images(self) -> SliceStore:
        """Store of the scans."""

    @property
    def patients(self) -> tuple[str, ...]:
        """Patients of the scans."""

    @property
    def transductive(self) -> bool:
        """True if validation or test patients are among them."""

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes that a resumed run must have again."""

    def describe(self) -> str:
        """Return one sentence for the pre-flight, the card and the report."""


def joined_manifest(store: SliceStore, train_patients: tuple[str, ...], further: FurtherScans) -> dict[str, Any]:
    """Return the data manifest of a model that was trained on labelled and on further scans."""
    labelled, others = pretrain_manifest(store, train_patients), pretrain_manifest(further.images, further.patients)
    origin = {"source_fingerprint": further.images.fingerprint, "num_patients": len(further.patients)}
    return {**join_manifests([labelled, others]), "self_training": {**further.inputs, **origin}}


@dataclass(frozen=True, kw_only=True)
class UnlabelledScans:
    """Scans that a self-training labels."""

    images: SliceStore
    """Store of the scans."""
    series: tuple[str, ...]
    """Series in the order of the store."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of scans that get none, by reason."""
    transductive: bool = False
    """True if scans of validation or test patients are among them, because the user allowed it."""

    @property
    def patients(self) -> tuple[str, ...]:
        """Patients of these scans."""
        return tuple(sorted({self.images.record(series_id).patient_id for series_id in self.series}))

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes that a resumed run must have again."""
        return {"unlabelled_fingerprint": self.images.fingerprint}

    @property
    def num_slices(self) -> int:
        """Number of slices of these scans."""
        return sum(self.images.record(series_id).shape_zyx[0] for series_id in self.series)

    def describe(self) -> str:
        """Return one line for the pre-flight and the report."""
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items() if number)
        suffix = f" (left out: {reasons})" if reasons else ""
        return (
            f"{self.images.path.name}, {counted(len(self.series), 'scan')} of "
            f"{counted(len(self.patients), 'patient')}, {counted(self.num_slices, 'slice')} without labels{suffix}"
        )


def choose_unlabelled(
    scans: SliceStore, store: SliceStore, split: Split, *, allow_transductive: bool = False
) -> UnlabelledScans:
    """Return the scans to label, without those of validation and test patients and those with labels in the training.

    Args:
        scans: Store of the scans, the labelled one or another.
        store: Labelled store.
        split: Split of the labelled store, with the few-shot draw.
        allow_transductive: Label scans of validation and test patients too.

    Raises:
        DataError: If no scan is left.
    """
    # Looked up even if they are allowed, because the card has to report it.
    found = held_out_patients(scans, store, split)
    held_out = set() if allow_transductive else set(found)
    train = set(split.train)
    # Of a few-shot draw of slices, the other slices of a scan are unlabelled.
    labelled = (
        set()
        if split.train_slices
        else {r.content_sha256 for r in store.series if r.has_label and r.patient_id in train}
    )
    left_out: Counter[str] = Counter()
    series = []
    for record in scans.series:
        if record.patient_id in held_out:
            left_out["of validation or test patients"] += 1
        elif record.content_sha256 in labelled:
            left_out["with labels in the training"] += 1
        else:
            series.append(record.series_id)
    chosen = UnlabelledScans(
        images=scans,
        series=tuple(series),
        left_out=dict(left_out),
        transductive=allow_transductive and any(scans.record(s).patient_id in found for s in series),
    )
    if held_out:
        log.info("not labelled: validation and test patients, %s", count_rules(found))
    if chosen.transductive:
        log.warning("transductive: scans of validation or test patients get pseudo-labels; the card reports it.")
    if not series:
        raise DataError(
            f"0 scans are left to label ({chosen.describe()}). Give a store with further scans as UNLABELLED, or train "
            "on fewer labels with data.few_shot.num.",
            where=scans.path.name,
        )
    return chosen
