"""Patients of one store in another, as leaks between the stages and as patients that a pretraining leaves out.

A patient is found in two stores by three rules, from the surest to the weakest. Equal ids need stores with one salt,
which are stores in one folder. Equal voxels are found under any salt and in any file format. Near-duplicates are scans
that were rescaled or stored in another type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.samples.split import Split, first_ids, group_patients
from samgraft.shared.scans.privacy import SALT_FILE
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.store import SliceStore

BY_ID, BY_VOXELS, BY_SIMILARITY = "by id", "by equal voxels", "as near-duplicates"
"""Rules by which a patient is found in another store."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Patients of one part of a split that a pretraining has seen."""

    part: str
    rule: str
    """Rule that found at least one of them, ``BY_ID`` or ``BY_VOXELS``."""
    patients: tuple[str, ...]

    def render(self) -> str:
        """Return one clause without a full stop."""
        return (
            f"{counted(len(self.patients), f'{self.part} patient was', f'{self.part} patients were')} in the "
            f"pretraining set ({self.rule}: {first_ids(self.patients)})"
        )


def pretrain_manifest(store: SliceStore, patient_ids: Iterable[str]) -> dict[str, Any]:
    """Return fingerprint, hashed ids and content hashes of the pretraining set, for a card."""
    patients = set(patient_ids)
    return {
        "fingerprint": store.fingerprint,
        "patient_ids": sorted(patients),
        "content_sha256": sorted({r.content_sha256 for r in store.series if r.patient_id in patients}),
    }


def join_manifests(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first manifest with the patients and contents of all."""
    joined = {
        key: sorted({value for manifest in manifests for value in manifest.get(key, ())})
        for key in ("patient_ids", "content_sha256")
    }
    return {**manifests[0], **joined}


def find_leaks(manifest: Mapping[str, Any], split: Split, store: SliceStore) -> list[Leak]:
    """Return the validation and test patients of a split that a pretraining has seen.

    Args:
        manifest: ``data_manifest`` of an encoder's card, with the lists ``patient_ids`` and ``content_sha256``.
        split: The split of stage 2.
        store: The store of stage 2.
    """
    # Ids are comparable only between stores with one salt. The hash of the voxels finds the same scan in any store.
    seen_patients = set(manifest.get("patient_ids", ()))
    seen_content = set(manifest.get("content_sha256", ()))
    leaks = []
    for part in ("val", "test"):
        patients = set(split.scored(part))
        by_id = patients & seen_patients
        by_content = {
            r.patient_id for r in store.series if r.patient_id in patients and r.content_sha256 in seen_content
        }
        if leaked := tuple(sorted(by_id | by_content)):
            leaks.append(Leak(part=part, rule=BY_ID if by_id else BY_VOXELS, patients=leaked))
    return leaks


def refuse_leaks(leaks: Mapping[str, Collection[Leak]], *, way_out: str) -> None:
    """Refuse leaks of one or several stores in one message.

    Args:
        leaks: Leaks by the name of their store.
        way_out: Command that makes an encoder without these patients.

    Raises:
        DataError: If there is a leak.
    """
    leaking = {name: found for name, found in leaks.items() if found}
    if not leaking:
        return
    # The name of a single store is in the line `where` already.
    clauses = [
        f"{name}: {leak.render()}" if len(leaking) > 1 else leak.render()
        for name, found in leaking.items()
        for leak in found
    ]
    raise DataError(
        f"{'; '.join(clauses)}. Pretrain without them, which LABELLED=STORE does by itself, or move them to train.",
        where=", ".join(leaking),
        kept="nothing was written",
        next_command=f"{way_out}; or the same command with data.allow_transductive=true, if that is meant; the card "
        "records it",
    )


def find_patients_again(store: SliceStore, other: SliceStore, patients: Iterable[str]) -> dict[str, str]:
    """Return the patients of a store that are among ``patients`` of another store, each with the rule that found it.

    Patients of the store that share voxels with one of them are included.
    """
    wanted = set(patients)
    targets = [record for record in other.series if record.patient_id in wanted]
    contents = {record.content_sha256 for record in targets}
    # The rules go from the surest to the weakest, and the first that finds a patient is the one that is reported.
    found = {patient: BY_ID for patient in store.patient_ids if patient in wanted}
    found |= {
        r.patient_id: BY_VOXELS for r in store.series if r.content_sha256 in contents and r.patient_id not in found
    }
    _add_groups(found, store)
    # Every scan of a patient that was found counts, because a rescaled copy may be of another scan than the labelled.
    known = {id(record) for record in targets} | {id(r) for r in store.series if r.patient_id in found}
    same_store = {id(record) for record in store.series}
    for pair in near_duplicates([*store.series, *(r for r in targets if id(r) not in same_store)]):
        for one, twin in (pair, pair[::-1]):
            if id(one) in known and id(twin) in same_store:
                found.setdefault(twin.patient_id, BY_SIMILARITY)
    _add_groups(found, store)
    return found


def have_one_salt(store: SliceStore, other: SliceStore) -> bool:
    """Return whether the ids of two stores were made with one salt, so that equal patients have equal ids."""
    salts: list[bytes | None] = []
    for one in (store, other):
        try:
            salts.append(one.files.read_beside(SALT_FILE))
        except FileNotFoundError:
            salts.append(None)
    # Stores that were copied without their salt may share it. Two such stores count as comparable if an id is equal.
    return salts[0] == salts[1] and (salts[0] is not None or bool(set(store.patient_ids) & set(other.patient_ids)))


def count_rules(found: Mapping[str, str]) -> str:
    """Return how many patients each rule found, e.g. ``10 by id, 1 by equal voxels``."""
    counts = Counter(found.values())
    return ", ".join(f"{counts[rule]} {rule}" for rule in (BY_ID, BY_VOXELS, BY_SIMILARITY) if counts[rule])


def _add_groups(found: dict[str, str], store: SliceStore) -> None:
    """Add the patients that share voxels with a patient in ``found``."""
    for group in group_patients(store):
        if not found.keys().isdisjoint(group):
            for patient in group:
                found.setdefault(patient, BY_VOXELS)
