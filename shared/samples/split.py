"""Patient-level splits, their files with a hash, and the checks against leaks between parts and stages."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.files import write_json
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

SCHEMA = 1
DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)
"""Fractions of the patients in train, val and test."""
PARTS = ("train", "val", "test")
MAX_WARNINGS = 8


@dataclass(frozen=True, kw_only=True)
class Split:
    """Patients of train, val and test. All slices of a patient are in the patient's part."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    seed: int
    store_fingerprint: str
    train_slices: tuple[tuple[str, int], ...] = ()
    """(series_id, slice_index) of the slices to train on. Empty means all slices of the training patients."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the patients of ``train``, ``val`` or ``test``."""
        if name not in PARTS:
            raise DataError(f"a part of a split must be one of {', '.join(PARTS)}, got {name!r}.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def part_of(self) -> dict[str, str]:
        """Return the name of the part of every patient."""
        return {patient: name for name in PARTS for patient in self.part(name)}

    @property
    def sha256(self) -> str:
        """Identity of the split, for run.json and cards."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "seed": self.seed,
            "store_fingerprint": self.store_fingerprint,
            **{name: list(self.part(name)) for name in PARTS},
        }
        if self.train_slices:
            values["train_slices"] = [list(item) for item in self.train_slices]
        return values

    def save(self, path: Path) -> None:
        """Write the split and its hash to a file, atomically."""
        write_json(path, {**self._plain(), "sha256": self.sha256}, sort_keys=False)


def make_split(
    store: SliceStore, *, fractions: Sequence[float] = DEFAULT_FRACTIONS, seed: int = 0, by_site: bool = False
) -> Split:
    """Draw a split by patient, stratified by the labels that a patient has.

    Patients that share voxels (one scan under two ids) stay together, and with ``by_site`` those of one site. Every
    part with a positive fraction gets at least one such group if there are enough. Test is filled before val.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not 0.999 < sum(fractions) < 1.001 or fractions[0] == 0:
        raise DataError(
            f"fractions of train, val and test must be >= 0, sum to 1 and leave some for train, got {list(fractions)}."
        )
    # The second number separates the random streams of the program: 0 sample order, 1 samples, 2 splits, 3 few-shot.
    rng = np.random.default_rng([seed, 2])
    labels_of: dict[str, set[int]] = {patient: set() for patient in store.patient_ids}
    for record in store.series:
        labels_of[record.patient_id] |= set(record.label_voxels)
    strata: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    for group in group_patients(store, by_site=by_site):
        strata.setdefault(tuple(sorted(set().union(*(labels_of[p] for p in group)))), []).append(group)
    # Every stratum is shuffled and spread evenly over one common order, the relative rank from 0 to 1. Any contiguous
    # piece of that order has the proportions of the whole, so the parts can be cut from it one after the other.
    ranked: list[tuple[float, tuple[str, ...]]] = []
    for labels in sorted(strata):
        shuffled = [strata[labels][i] for i in rng.permutation(len(strata[labels]))]
        ranked += [((rank + float(rng.random())) / len(shuffled), group) for rank, group in enumerate(shuffled)]
    ordered = [group for _, group in sorted(ranked)]
    num_test, num_val = _count_groups([len(group) for group in ordered], fractions)
    return Split(
        test=_merge_groups(ordered[:num_test]),
        val=_merge_groups(ordered[num_test : num_test + num_val]),
        train=_merge_groups(ordered[num_test + num_val :]),
        seed=seed,
        store_fingerprint=store.fingerprint,
    )


def refuse_empty_parts(split: Split, fractions: Sequence[float], *, where: str) -> None:
    """Refuse a split in which a part with a positive fraction has no patient.

    Raises:
        DataError: With the options that help.
    """
    empty = [name for name, fraction in zip(PARTS, fractions, strict=True) if fraction > 0 and not split.part(name)]
    if empty:
        num_patients = sum(len(split.part(name)) for name in PARTS)
        raise DataError(
            f"{' and '.join(empty)} would be empty (got {num_patients} patients, and those with equal voxels stay "
            "together). If several patients count as one, build the store again with --patient-pattern.",
            where=where,
            next_command="the same command with --fractions 1,0,0, if every patient is meant for training",
        )


def group_patients(store: SliceStore, *, by_site: bool = False) -> list[tuple[str, ...]]:
    """Group patients that share voxels, and on request those of one site, which must stay in one part."""
    # Disjoint sets: every patient points towards the representative of its group.
    parent = {patient: patient for patient in store.patient_ids}

    def find_root(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    first_with: dict[str, str] = {}
    for record in store.series:
        for shared in (record.content_sha256, record.site_id if by_site else None):
            if shared is not None:
                first = first_with.setdefault(shared, record.patient_id)
                parent[find_root(record.patient_id)] = find_root(first)
    groups: dict[str, list[str]] = {}
    for patient in store.patient_ids:
        groups.setdefault(find_root(patient), []).append(patient)
    return sorted(tuple(group) for group in groups.values())


def load_split(path: Path | None, store: SliceStore) -> Split:
    """Load and check a split.

    Args:
        path: A split file. None takes ``<store>.split.json`` beside the store, or draws the default split.
        store: The store that the split belongs to.

    Raises:
        DataError: If the file is damaged, belongs to another store, or leaks.
    """
    if path is not None:
        if not path.is_file():
            raise DataError("the split file does not exist.", where=path.name)
        return _parse_split(path.read_bytes(), store, where=path.name)
    split = load_split_beside(store)
    if split is None:
        split = make_split(store)
        log.info(
            "no split file: drawn by patient with seed 0 (train %d, val %d, test %d patients)",
            *(len(split.part(name)) for name in PARTS),
        )
    return split


def load_split_beside(store: SliceStore) -> Split | None:
    """Load the split that is beside a store, local or remote. Return None if there is none.

    Raises:
        DataError: If the file is damaged, belongs to another store, or leaks.
    """
    name = default_split_path(store.path).name
    try:
        content = store.files.read_beside(name)
    except FileNotFoundError:
        return None
    return _parse_split(content, store, where=name)


def default_split_path(store_path: Path) -> Path:
    """Return the path of the split file beside a store."""
    return store_path.with_name(f"{store_path.name.removesuffix('.zarr')}.split.json")


def _parse_split(content: bytes, store: SliceStore, *, where: str) -> Split:
    try:
        values = json.loads(content)
        split = Split(
            train=tuple(values["train"]),
            val=tuple(values["val"]),
            test=tuple(values["test"]),
            seed=int(values["seed"]),
            store_fingerprint=str(values["store_fingerprint"]),
            train_slices=tuple((str(series), int(index)) for series, index in values.get("train_slices", ())),
        )
        recorded = str(values["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DataError(f"the split file is damaged ({type(err).__name__}).", where=where) from err
    if recorded != split.sha256:
        raise DataError("the split file was edited: its hash differs. Make it again.", where=where)
    check_split(split, store)
    return split


def check_split(split: Split, store: SliceStore) -> None:
    """Refuse a split that leaks or does not fit the store.

    Near-duplicates in different parts are reported as a warning, because similarity does not prove that two scans are
    of one patient.

    Raises:
        DataError: If a patient is in two parts, is not in the store, the split was made for another store, or the same
            voxels occur under patients of different parts.
    """
    where = store.path.name
    if split.store_fingerprint != store.fingerprint:
        raise DataError(
            "the split belongs to another state of the store: fingerprints differ. Make the split again.", where=where
        )
    parts = {name: set(split.part(name)) for name in PARTS}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(parts[first] & parts[second]):
            raise DataError(
                f"split leaks: {len(both)} patients are in both {first} and {second} ({_first_ids(both)}). Rebuild it.",
                where=where,
            )
    if unknown := sorted(set().union(*parts.values()) - set(store.patient_ids)):
        raise DataError(
            f"the split has {len(unknown)} patients that the store does not have ({_first_ids(unknown)}).", where=where
        )
    if not split.train:
        raise DataError("the split must have at least one training patient, got none.", where=where)
    # Equal voxels are proof and refused. Similar ones are not, so they are a warning.
    part_of = split.part_of()
    _refuse_equal_content(store, part_of)
    near = [
        [f"{record.patient_id} ({part_of[record.patient_id]})" for record in pair]
        for pair in near_duplicates(record for record in store.series if record.patient_id in part_of)
        if part_of[pair[0].patient_id] != part_of[pair[1].patient_id]
    ]
    for one, other in near[:MAX_WARNINGS]:
        log.warning("%s and %s are near-duplicates. Check whether they are one patient under two ids.", one, other)
    if len(near) > MAX_WARNINGS:
        log.warning("%d more pairs of near-duplicates are in different parts.", len(near) - MAX_WARNINGS)


def refuse_leak(pretrain_manifest: Mapping[str, Any], split: Split, store: SliceStore) -> None:
    """Refuse fine-tuning on a split whose val or test patients were used for pretraining.

    Args:
        pretrain_manifest: ``data_manifest`` of an encoder's card, with the lists ``patient_ids`` and
            ``content_sha256``.
        split: The split of stage 2.
        store: The store of stage 2.

    Raises:
        DataError: If patient ids are equal (stores with one salt), or voxels are (any salt, any file format).
    """
    # Ids are comparable only between stores with one salt. The hash of the voxels finds the same scan in any store.
    seen_patients = set(pretrain_manifest.get("patient_ids", ()))
    seen_content = set(pretrain_manifest.get("content_sha256", ()))
    for name in ("val", "test"):
        patients = set(split.part(name))
        by_id = patients & seen_patients
        by_content = {
            r.patient_id for r in store.series if r.patient_id in patients and r.content_sha256 in seen_content
        }
        if leaked := sorted(by_id | by_content):
            how = "by id" if by_id else "by equal voxels"
            raise DataError(
                f"{len(leaked)} {name} patients were in the pretraining set ({how}: {_first_ids(leaked)}). Pretrain "
                "without them, or move them to train.",
                where=store.path.name,
                kept="nothing was written",
                next_command="the same command with data.allow_transductive=true, if that is meant; the card records "
                "it",
            )


def pretrain_manifest(store: SliceStore, patient_ids: Iterable[str]) -> dict[str, Any]:
    """Return fingerprint, hashed ids and content hashes of the pretraining set, for a card."""
    patients = set(patient_ids)
    return {
        "fingerprint": store.fingerprint,
        "patient_ids": sorted(patients),
        "content_sha256": sorted({r.content_sha256 for r in store.series if r.patient_id in patients}),
    }


def _count_groups(sizes: Sequence[int], fractions: Sequence[float]) -> tuple[int, int]:
    """Return the number of groups in test and in val. The last group is always train."""
    # Groups differ in size, so the numbers of patients can only come close to the fractions. Test and val take groups
    # from the front until another one would lead further away.
    counts, start = [], 0
    for part in (2, 1):
        wanted, count, patients = fractions[part] * sum(sizes), 0, 0
        while fractions[part] > 0 and start + count < len(sizes) - 1:
            size = sizes[start + count]
            # The first group is always taken, another one only if it brings the part closer to its size.
            if count and abs(patients + size - wanted) > abs(patients - wanted) + 1e-9:
                break
            patients += size
            count += 1
        counts.append(count)
        start += count
    return counts[0], counts[1]


def _merge_groups(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(patient for group in groups for patient in group))


def _refuse_equal_content(store: SliceStore, part_of: Mapping[str, str]) -> None:
    first_with: dict[str, str] = {}
    for record in store.series:
        patient = record.patient_id
        if patient not in part_of:
            continue
        first = first_with.setdefault(record.content_sha256, patient)
        if part_of[first] != part_of[patient]:
            raise DataError(
                f"split leaks: the same voxels occur in {part_of[first]} ({first}) and {part_of[patient]} ({patient}). "
                "Give both series one patient and rebuild the store.",
                where=store.path.name,
            )


def _first_ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
