"""Patient-level splits, their files with a hash, and the checks against leaks between parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.files import write_json
from samgraft.shared.store.files import LocalFiles
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

SCHEMA = 1
DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)
"""Fractions of the patients in train, val and test."""
PARTS = ("train", "val", "test")
OPTIONAL_KEYS = ("train_slices", "folds")
"""Keys of a split file that not every split has."""
ALL_PARTS = "all"
"""Name of all patients of a split, whatever their part."""
MAX_WARNINGS = 8


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Training and validation patients of one fold of a cross-validation."""

    train: tuple[str, ...]
    val: tuple[str, ...]


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
    folds: tuple[Fold, ...] = ()
    """Folds of a cross-validation, which share ``test``. ``train`` and ``val`` are then those of the first fold."""

    def part(self, name: str) -> tuple[str, ...]:
        """Return the patients of ``train``, ``val``, ``test`` or ``all``."""
        if name == ALL_PARTS:
            return _merge_groups([self.train, self.val, self.test])
        if name not in PARTS:
            raise DataError(f"a part of a split must be one of {', '.join(PARTS)}, got {name!r}.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def fold(self, number: int) -> Split:
        """Return one fold as a split without folds.

        Raises:
            UsageError: If there is no such fold.
        """
        if not 0 <= number < len(self.folds):
            known = f"0 to {len(self.folds) - 1}" if self.folds else "none, because this split has no folds"
            raise UsageError(
                f"there is no such fold (got {number}, expected {known}). Folds are made with samgraft store split "
                "STORE --folds 5, or read with --from.",
                where="data.fold",
            )
        return dataclasses.replace(self, train=self.folds[number].train, val=self.folds[number].val, folds=())

    def scored(self, name: str) -> tuple[str, ...]:
        """Return the patients of ``val``, in any fold, or of ``test``."""
        return _merge_groups([self.part(name), *(fold.val for fold in self.folds if name == "val")])

    @property
    def held_out(self) -> tuple[str, ...]:
        """Patients on which scores are measured, those of val in any fold and of test."""
        return _merge_groups([self.scored("val"), self.test])

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
        if self.folds:
            values["folds"] = [{"train": list(fold.train), "val": list(fold.val)} for fold in self.folds]
        return values

    def save(self, path: Path) -> None:
        """Write the split and its hash to a file, atomically."""
        write_json(path, {**self._plain(), "sha256": self.sha256}, sort_keys=False)


def make_split(
    store: SliceStore,
    *,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    by_site: bool = False,
    without: Collection[str] = (),
) -> Split:
    """Draw a split by patient, stratified by the labels that a patient has.

    Patients that share voxels (one scan under two ids) stay together, and with ``by_site`` those of one site. Every
    part with a positive fraction gets at least one such group if there are enough. Test is filled before val.
    Patients in ``without`` are in no part.
    """
    _check_fractions(fractions)
    ordered = _draw_groups(store, seed=seed, by_site=by_site, without=without)
    num_test, num_val = _count_groups([len(group) for group in ordered], fractions)
    return Split(
        test=_merge_groups(ordered[:num_test]),
        val=_merge_groups(ordered[num_test : num_test + num_val]),
        train=_merge_groups(ordered[num_test + num_val :]),
        seed=seed,
        store_fingerprint=store.fingerprint,
    )


def make_folds(
    store: SliceStore, *, num_folds: int, test_fraction: float = 0.0, seed: int = 0, by_site: bool = False
) -> Split:
    """Draw the folds of a cross-validation, with the rules of ``make_split``.

    Args:
        store: The store.
        num_folds: Number of folds. Every patient outside test is validated in exactly one of them.
        test_fraction: Fraction of the patients in test, which no fold trains on or validates.
        seed: Seed of the draw.
        by_site: Keep the patients of a site together.

    Raises:
        UsageError: If there are fewer groups of patients than folds.
    """
    _check_fractions((1 - test_fraction, 0, test_fraction))
    ordered = _draw_groups(store, seed=seed, by_site=by_site)
    num_test, _ = _count_groups([len(group) for group in ordered], (1 - test_fraction, 0, test_fraction))
    rest = ordered[num_test:]
    if not 2 <= num_folds <= len(rest):
        raise UsageError(
            f"the number of folds does not fit the store (got {num_folds}, expected 2 to {len(rest)}, the number of "
            "patients that may be separated).",
            where=store.path.name,
        )
    # Every num_folds-th group of the common order, so that the folds have the proportions of the whole.
    parts = [_merge_groups(rest[number::num_folds]) for number in range(num_folds)]
    folds = tuple(Fold(train=_merge_groups(p for p in parts if p is not val), val=val) for val in parts)
    return Split(
        train=folds[0].train,
        val=folds[0].val,
        test=_merge_groups(ordered[:num_test]),
        seed=seed,
        store_fingerprint=store.fingerprint,
        folds=folds,
    )


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or not 0.999 < sum(fractions) < 1.001:
        raise DataError(f"fractions of train, val and test must be >= 0 and sum to 1, got {list(fractions)}.")


def _draw_groups(
    store: SliceStore, *, seed: int, by_site: bool, without: Collection[str] = ()
) -> list[tuple[str, ...]]:
    """Return the groups of patients that stay together in a random order, in which the labels are evenly spread."""
    # The second number separates the random streams of the program: 0 sample order, 1 samples, 2 splits, 3 few-shot.
    rng = np.random.default_rng([seed, 2])
    labels_of: dict[str, set[int]] = {patient: set() for patient in store.patient_ids}
    for record in store.series:
        labels_of[record.patient_id] |= set(record.label_voxels)
    strata: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    for group in group_patients(store, by_site=by_site):
        if kept := tuple(patient for patient in group if patient not in without):
            strata.setdefault(tuple(sorted(set().union(*(labels_of[p] for p in kept)))), []).append(kept)
    # Every stratum is shuffled and spread evenly over one common order, the relative rank from 0 to 1. Any contiguous
    # piece of that order has the proportions of the whole, so the parts can be cut from it one after the other.
    ranked: list[tuple[float, tuple[str, ...]]] = []
    for labels in sorted(strata):
        shuffled = [strata[labels][i] for i in rng.permutation(len(strata[labels]))]
        ranked += [((rank + float(rng.random())) / len(shuffled), group) for rank, group in enumerate(shuffled)]
    return [group for _, group in sorted(ranked)]


def refuse_empty_parts(split: Split, fractions: Sequence[float], *, where: str) -> None:
    """Refuse a split in which a part with a positive fraction has no patient.

    Raises:
        DataError: With the options that help.
    """
    empty = [name for name, fraction in zip(PARTS, fractions, strict=True) if fraction > 0 and not split.part(name)]
    if empty:
        num_patients = sum(len(split.part(name)) for name in PARTS)
        raise DataError(
            f"{' and '.join(empty)} would be empty (got {counted(num_patients, 'patient')}, and those with equal "
            "voxels stay together). If several patients count as one, build the store again with --patient-pattern.",
            where=where,
            next_command="the same command with --fractions 1,0,0, if every patient is meant for training",
        )


def describe_split(split: Split) -> str:
    """Return the numbers of patients in one line."""
    counts = {name: len(split.part(name)) for name in PARTS}
    if not split.folds:
        return ", ".join(f"{name} {number}" for name, number in counts.items()) + " patients"
    validated = ", ".join(str(len(fold.val)) for fold in split.folds)
    return f"{counted(len(split.folds), 'fold')} that validate {validated} patients, test {counts['test']} patients"


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
            what = "is a folder" if path.is_dir() else "does not exist"
            raise DataError(f"the split file {what}. Give the path of a split file.", where=str(path))
        return _parse_split(path.read_bytes(), store, where=path.name)
    split = load_split_beside(store)
    if split is None:
        split = make_split(store)
        log.info(
            "no split file: drawn by patient with seed 0 (train %d, val %d, test %d patients)",
            *(len(split.part(name)) for name in PARTS),
        )
    return split


def choose_fold(split: Split, number: int | None) -> Split:
    """Return the split to train with, which is one fold if there are folds.

    Raises:
        UsageError: If the number is missing, or there is no such fold.
    """
    if number is not None:
        return split.fold(number)
    if split.folds:
        raise UsageError(
            f"the split has {counted(len(split.folds), 'fold')}, and one of them must be chosen (got none, expected "
            f"data.fold=0 to {len(split.folds) - 1}). Add data.fold=0, or run all of them as a study with folds.",
            where="data.fold",
        )
    return split


def keep_drawn_split(store: SliceStore) -> None:
    """Write the default split beside a store without a split file, so that every later step uses the same."""
    path = default_split_path(store.path)
    if not isinstance(store.files, LocalFiles) or path.exists():
        return
    try:
        make_split(store).save(path)
    except OSError as err:  # the same split is drawn again from the same store
        log.info("the split was not written beside the store (%s)", err.strerror)
    else:
        log.info("the split was written to %s, which later steps use", path.name)


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
            folds=tuple(Fold(train=tuple(f["train"]), val=tuple(f["val"])) for f in values.get("folds", ())),
        )
        recorded = str(values["sha256"])
        unknown = sorted(set(values) - {*split._plain(), *OPTIONAL_KEYS, "sha256"})
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DataError(
            f"the split file is damaged, or is not one that samgraft wrote ({type(err).__name__}). Make it again with "
            "`samgraft store split`, which also reads other forms with --from.",
            where=where,
        ) from err
    if unknown:
        raise DataError(
            f"the split file has keys that are not read (got {', '.join(unknown)}, expected {', '.join(PARTS)}). "
            "Remove them, and make the split again.",
            where=where,
        )
    if recorded != split.sha256:
        raise DataError("the split file was edited: its hash differs. Make it again.", where=where)
    check_split(split, store)
    return split


def check_split(split: Split, store: SliceStore) -> None:
    """Refuse a split that leaks or does not fit the store, with all leaks in one message.

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
    variants = [split.fold(number) for number in range(len(split.folds))] or [split]
    known = set(store.patient_ids)
    if unknown := sorted({p for one in variants for p in one.part(ALL_PARTS)} - known):
        raise DataError(
            f"the split has {counted(len(unknown), 'patient')} that the store does not have ({first_ids(unknown)}).",
            where=where,
        )
    if leaks := [leak for one in variants for leak in (*_shared_patients(one), *_shared_voxels(one, store))]:
        more = f"; and {len(leaks) - MAX_WARNINGS} more" if len(leaks) > MAX_WARNINGS else ""
        raise DataError(
            f"split leaks: {'; '.join(list(dict.fromkeys(leaks))[:MAX_WARNINGS])}{more}. Give series with equal voxels "
            "one patient when the store is built, and make the split again.",
            where=where,
        )
    part_of = split.part_of() | {p: f"fold {number}" for number, fold in enumerate(split.folds) for p in fold.val}
    _warn_near_duplicates(part_of, store)


def _shared_patients(split: Split) -> Iterable[str]:
    """Yield a clause for each two parts that have patients in common."""
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(set(split.part(first)) & set(split.part(second))):
            yield f"{counted(len(both), 'patient is', 'patients are')} in both {first} and {second} ({first_ids(both)})"


def _shared_voxels(split: Split, store: SliceStore) -> Iterable[str]:
    """Yield a clause for each two patients of different parts that have equal voxels."""
    part_of = split.part_of()
    first_with: dict[str, str] = {}
    for record in store.series:
        patient = record.patient_id
        if patient not in part_of:
            continue
        first = first_with.setdefault(record.content_sha256, patient)
        if part_of[first] != part_of[patient]:
            yield f"the same voxels occur in {part_of[first]} ({first}) and {part_of[patient]} ({patient})"


def _warn_near_duplicates(part_of: Mapping[str, str], store: SliceStore) -> None:
    near = [
        [f"{record.patient_id} ({part_of[record.patient_id]})" for record in pair]
        for pair in near_duplicates(record for record in store.series if record.patient_id in part_of)
        if part_of[pair[0].patient_id] != part_of[pair[1].patient_id]
    ]
    for one, other in near[:MAX_WARNINGS]:
        log.warning("%s and %s are near-duplicates. Check whether they are one patient under two ids.", one, other)
    if len(near) > MAX_WARNINGS:
        more = counted(len(near) - MAX_WARNINGS, "more pair of near-duplicates is", "more pairs of near-duplicates are")
        log.warning("%s in different parts.", more)


def refuse_empty_train(split: Split, store: SliceStore) -> None:
    """Refuse to train on a split without training patients.

    Raises:
        DataError: If every patient is for validation or test, as in a store of another site.
    """
    if not split.train:
        raise DataError(
            "the split must have at least one training patient, got none. A store in which every patient is for "
            "testing is scored with samgraft evaluate --split all.",
            where=store.path.name,
        )


def _count_groups(sizes: Sequence[int], fractions: Sequence[float]) -> tuple[int, int]:
    """Return the number of groups in test and in val. The last group is train, unless train is to be empty."""
    # Groups differ in size, so the numbers of patients can only come close to the fractions. Test and val take groups
    # from the front until another one would lead further away.
    counts, start = [], 0
    for part in (2, 1):
        wanted, count, patients = fractions[part] * sum(sizes), 0, 0
        while fractions[part] > 0 and start + count < len(sizes) - (fractions[0] > 0):
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
    return tuple(sorted({patient for group in groups for patient in group}))


def first_ids(ids: Sequence[str]) -> str:
    """Return the first ids of a list as text."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
