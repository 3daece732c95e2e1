"""Splits by patient, saved as files with a hash, and the guard against leaks across splits and stages."""

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
from samgraft.shared.store.near_duplicates import look_alike
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

SCHEMA = 1
DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)
"""Train, val, test."""
PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Patients of each part; slices follow their patient."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    seed: int
    store_fingerprint: str
    train_slices: tuple[tuple[str, int], ...] = ()
    """(series_id, slice_index) that may be trained on; empty: all slices of the training patients."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the patients of ``train``, ``val`` or ``test``."""
        if name not in PARTS:
            raise DataError(f"a part of a split must be one of {', '.join(PARTS)}, got {name!r}.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    @property
    def sha256(self) -> str:
        """Identity of the split, for run.json and cards."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "seed": self.seed,
            "store_fingerprint": self.store_fingerprint,
            "train": list(self.train),
            "val": list(self.val),
            "test": list(self.test),
        }
        if self.train_slices:
            values["train_slices"] = [list(item) for item in self.train_slices]
        return values

    def save(self, path: Path) -> None:
        """Write the split with its own hash, atomically."""
        values = {**self._plain(), "sha256": self.sha256}
        write_json(path, values, sort_keys=False)


def make_split(
    store: SliceStore, *, fractions: Sequence[float] = DEFAULT_FRACTIONS, seed: int = 0, by_site: bool = False
) -> Split:
    """Draw a split by patient, stratified by which labels a patient has.

    Patients that share voxels (one scan under two ids) stay together, and with ``by_site`` those of one site. Every
    part with a positive fraction gets at least one group where there are enough: test before val.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not 0.999 < sum(fractions) < 1.001 or fractions[0] == 0:
        raise DataError(f"fractions of train, val and test must be >= 0 and sum to 1, got {list(fractions)}.")
    rng = np.random.default_rng([seed, 2])
    labels_of: dict[str, set[int]] = {patient: set() for patient in store.patient_ids}
    for record in store.series:
        labels_of[record.patient_id] |= set(record.label_voxels)
    strata: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    for group in patient_groups(store, by_site=by_site):
        strata.setdefault(tuple(sorted(set().union(*(labels_of[p] for p in group)))), []).append(group)
    # Interleaving shuffled strata by relative rank keeps their proportions in every contiguous piece.
    ranked: list[tuple[float, tuple[str, ...]]] = []
    for labels in sorted(strata):
        shuffled = [strata[labels][i] for i in rng.permutation(len(strata[labels]))]
        ranked += [((rank + float(rng.random())) / len(shuffled), group) for rank, group in enumerate(shuffled)]
    ordered = [group for _, group in sorted(ranked)]
    counts = _part_counts([len(group) for group in ordered], fractions)
    test, val = ordered[: counts[0]], ordered[counts[0] : counts[0] + counts[1]]
    train = ordered[counts[0] + counts[1] :]
    return Split(
        train=tuple(sorted(patient for group in train for patient in group)),
        val=tuple(sorted(patient for group in val for patient in group)),
        test=tuple(sorted(patient for group in test for patient in group)),
        seed=seed,
        store_fingerprint=store.fingerprint,
    )


def patient_groups(store: SliceStore, *, by_site: bool = False) -> list[tuple[str, ...]]:
    """Return groups of patients that must not be parted: those who share voxels, and on request those of one site."""
    parent = {patient: patient for patient in store.patient_ids}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            parent[patient] = parent[parent[patient]]
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}
    for record in store.series:
        for mark in (record.content_sha256, record.site_id if by_site else None):
            if mark is not None:
                parent[root(record.patient_id)] = root(first.setdefault(mark, record.patient_id))
    groups: dict[str, list[str]] = {}
    for patient in store.patient_ids:
        groups.setdefault(root(patient), []).append(patient)
    return sorted(tuple(group) for group in groups.values())


def load_split(path: Path | None, store: SliceStore) -> Split:
    """Load a split file and check it; None takes ``<store>.split.json`` beside the store, else draws the default.

    Raises:
        DataError: If the file is damaged, belongs to another store, or leaks.
    """
    if path is not None:
        if not path.is_file():
            raise DataError("the split file does not exist.", where=path.name)
        return _read_split(path.read_bytes(), store, where=path.name)
    split = split_beside(store)
    if split is None:
        split = make_split(store)
        log.info(
            "no split file: drawn by patient with seed 0 (train %d, val %d, test %d patients)",
            len(split.train),
            len(split.val),
            len(split.test),
        )
    return split


def split_beside(store: SliceStore) -> Split | None:
    """Return the split that lies beside a store, here or behind its address; None if there is none.

    Raises:
        DataError: If the file is damaged, belongs to another store, or leaks.
    """
    name = default_split_path(store.path).name
    try:
        content = store.files.read_beside(name)
    except FileNotFoundError:
        return None
    return _read_split(content, store, where=name)


def _read_split(content: bytes, store: SliceStore, *, where: str) -> Split:
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
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"the split file is damaged ({type(err).__name__}).", where=where) from err
    if recorded != split.sha256:
        raise DataError("the split file was changed by hand: its hash differs. Make it again.", where=where)
    check_split(split, store)
    return split


def default_split_path(store_path: Path) -> Path:
    """Return where the split of a store lies: beside it."""
    return store_path.with_name(f"{store_path.name.removesuffix('.zarr')}.split.json")


def check_split(split: Split, store: SliceStore) -> None:
    """Refuse a split that leaks or does not fit the store.

    Raises:
        DataError: If a patient is in two parts, is not in the store, the split was made for another store, or the same
            voxels occur under patients of different parts.
    """
    if split.store_fingerprint != store.fingerprint:
        raise DataError(
            "the split belongs to another state of the store: fingerprints differ. Make the split again.",
            where=store.path.name,
        )
    parts = {name: set(split.part(name)) for name in PARTS}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(parts[first] & parts[second]):
            raise DataError(
                f"split leaks: {len(both)} patients are in both {first} and {second} ({_some(both)}). Rebuild it.",
                where=store.path.name,
            )
    everyone = set().union(*parts.values())
    if strangers := sorted(everyone - set(store.patient_ids)):
        raise DataError(
            f"the split names {len(strangers)} patients that the store does not have ({_some(strangers)}).",
            where=store.path.name,
        )
    if not split.train:
        raise DataError("the split must have at least one training patient, got none.", where=store.path.name)
    _refuse_equal_content(store, parts)
    _warn_of_look_alikes(store, parts)


def refuse_leak(pretrain_manifest: Mapping[str, Any], split: Split, store: SliceStore) -> None:
    """Refuse fine-tuning on a split whose validation or test patients were used for pretraining.

    Args:
        pretrain_manifest: ``data_manifest`` of an encoder's card: ``patient_ids`` and ``content_sha256``, lists.
        split: The split of stage 2.
        store: The store of stage 2.

    Raises:
        DataError: By patient id (stores with one salt), or by voxel content (any salt, any file format).
    """
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
                f"{len(leaked)} {name} patients were in the pretraining set ({how}: {_some(leaked)}). Pretrain without "
                "them, or move them to train.",
                where=store.path.name,
                kept="nothing was written",
                next_command="the same command with data.allow_transductive=true, if that is meant; the card says so",
            )


def pretrain_manifest(store: SliceStore, patient_ids: Iterable[str]) -> dict[str, Any]:
    """Return what a card keeps of the pretraining set: fingerprint, hashed ids, content hashes."""
    patients = set(patient_ids)
    return {
        "fingerprint": store.fingerprint,
        "patient_ids": sorted(patients),
        "content_sha256": sorted({r.content_sha256 for r in store.series if r.patient_id in patients}),
    }


def _part_counts(sizes: Sequence[int], fractions: Sequence[float]) -> tuple[int, int]:
    """Return how many groups from the front are test, and how many after them val; the last group is always train."""
    counts, start = [], 0
    for part in (2, 1):
        wanted, count, patients = fractions[part] * sum(sizes), 0, 0
        while fractions[part] > 0 and start + count < len(sizes) - 1:
            size = sizes[start + count]
            # Take the group if that brings the part nearer to its size; the first one always.
            if count and abs(patients + size - wanted) > abs(patients - wanted) + 1e-9:
                break
            patients += size
            count += 1
        counts.append(count)
        start += count
    return counts[0], counts[1]


def _refuse_equal_content(store: SliceStore, parts: Mapping[str, set[str]]) -> None:
    part_of = {patient: name for name, patients in parts.items() for patient in patients}
    seen: dict[str, tuple[str, str]] = {}
    for record in store.series:
        part = part_of.get(record.patient_id)
        if part is None:
            continue
        other = seen.setdefault(record.content_sha256, (part, record.patient_id))
        if other[0] != part:
            raise DataError(
                f"split leaks: the same voxels occur in {other[0]} ({other[1]}) and {part} ({record.patient_id}). "
                "Give both series one patient and rebuild the store.",
                where=store.path.name,
            )


def _warn_of_look_alikes(store: SliceStore, parts: Mapping[str, set[str]]) -> None:
    """Alike is not equal: said, not refused."""
    part_of = {patient: name for name, patients in parts.items() for patient in patients}
    for one, other in look_alike(record for record in store.series if record.patient_id in part_of):
        first, second = part_of[one.patient_id], part_of[other.patient_id]
        if first != second:
            log.warning(
                "%s (%s) and %s (%s) look alike: one patient under two ids?",
                one.patient_id, first, other.patient_id, second,
            )  # fmt: skip


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
