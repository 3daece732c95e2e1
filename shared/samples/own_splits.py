"""Splits that a user brings, as nnU-Net's ``splits_final.json`` or a CSV table of patients.

Both have the names that patients or files have at their owner. The table of names beside the store translates them
into ids.
"""

from __future__ import annotations

import csv
import json
import logging
import shlex
from collections.abc import Iterable
from pathlib import Path

from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.samples.split import PARTS, Fold, Split, check_split, first_ids
from samgraft.shared.store.names import require_names
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

CSV_COLUMNS = ("patient", "part")
MAX_LISTED = 5


def read_own_split(path: Path, store: SliceStore) -> Split:
    """Read a split that a user brings and check it as any other split.

    Args:
        path: A CSV file with the columns patient and part (train, val or test), or nnU-Net's ``splits_final.json``
            with one entry per fold.
        store: The store, which must have its table of names beside it.

    Raises:
        UsageError: If the file is in neither form.
        DataError: If a name is unknown or means several patients, a patient is in two parts, or the split leaks.
    """
    if not path.is_file():
        raise UsageError("the file of the split does not exist.", where=path.name)
    translate = _Translation(store)
    split = _read_table(path, translate) if path.suffix.lower() in (".csv", ".tsv") else _read_nnunet(path, translate)
    translate.refuse_unknown(path)
    check_split(split, store)
    if unused := sorted(set(store.patient_ids) - set(split.held_out) - set(split.train)):
        log.warning(
            "%d of %d patients of %s are in no part, because %s does not list them.",
            len(unused),
            len(store.patient_ids),
            store.path.name,
            path.name,
        )
    return split


class _Translation:
    """Translation of the owner's names into patient ids, which collects the names that it cannot translate."""

    def __init__(self, store: SliceStore) -> None:
        self.store = store
        self._by_name = require_names(store).patients_by_name()
        self._unknown: list[str] = []
        self._ambiguous: list[str] = []

    def patients(self, names: Iterable[object]) -> tuple[str, ...]:
        """Return the ids of some names, sorted."""
        found: set[str] = set()
        for name in map(str, names):
            ids = self._by_name.get(name.strip(), set())
            if len(ids) == 1:
                found |= ids
            else:
                (self._ambiguous if ids else self._unknown).append(name)
        return tuple(sorted(found))

    def refuse_unknown(self, path: Path) -> None:
        """Refuse a file with names that mean no patient or several."""
        problems = []
        for names, what in ((self._unknown, "are not in the store"), (self._ambiguous, "mean several patients")):
            if unique := sorted(set(names)):
                more = ", ..." if len(unique) > MAX_LISTED else ""
                problems.append(f"{len(unique)} names {what} ({', '.join(unique[:MAX_LISTED])}{more})")
        if problems:
            raise DataError(
                f"{' and '.join(problems)}. samgraft store info STORE --names lists the names that can be used.",
                where=path.name,
                next_command=f"samgraft store info {shlex.quote(str(self.store.path))} --names",
            )


def _read_table(path: Path, translate: _Translation) -> Split:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as err:
        raise UsageError("the table of patients is not a CSV file in UTF-8.", where=path.name) from err
    columns = set(rows[0]) if rows else set()
    if not set(CSV_COLUMNS) <= columns:
        found = ", ".join(sorted(str(column) for column in columns)) or "none"
        raise UsageError(f"the table must have the columns patient and part (got {found}).", where=path.name)
    if unused := sorted(str(column or "without a name") for column in columns - set(CSV_COLUMNS)):
        log.info("columns of %s that are not used: %s", path.name, ", ".join(unused))
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, row in enumerate(rows, start=2):
        part = (row["part"] or "").strip().lower()
        if part not in names:
            raise UsageError(
                f"a part must be one of {', '.join(PARTS)} (got {part!r}).", where=f"{path.name}, line {number}"
            )
        names[part].append(row["patient"] or "")
    parts = {part: translate.patients(listed) for part, listed in names.items()}
    fingerprint = translate.store.fingerprint
    return Split(train=parts["train"], val=parts["val"], test=parts["test"], seed=0, store_fingerprint=fingerprint)


def _read_nnunet(path: Path, translate: _Translation) -> Split:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        listed = [(list(entry["train"]), list(entry["val"])) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise UsageError(
            "the file is not nnU-Net's splits_final.json, a list with train and val of every fold. A table of patients "
            "must end in .csv.",
            where=path.name,
        ) from err
    if not listed:
        raise UsageError("the file lists no fold.", where=path.name)
    if unknown := sorted({key for entry in entries for key in entry} - {"train", "val"}):
        raise UsageError(
            f"a fold of nnU-Net has train and val (got {', '.join(unknown)} too). Give a table of patients with the "
            "columns patient and part, in which test is a part.",
            where=path.name,
        )
    # A case of nnU-Net with several channels is several series of one patient here, which one name finds.
    folds = tuple(Fold(train=translate.patients(train), val=translate.patients(val)) for train, val in listed)
    _refuse_overlap(folds, path)
    # One entry is an ordinary split. nnU-Net has no test part in this file.
    return Split(
        train=folds[0].train,
        val=folds[0].val,
        test=(),
        seed=0,
        store_fingerprint=translate.store.fingerprint,
        folds=folds if len(folds) > 1 else (),
    )


def _refuse_overlap(folds: tuple[Fold, ...], path: Path) -> None:
    """Refuse patients that are validated in two folds, because pooled scores would count them twice."""
    counts: dict[str, int] = {}
    for fold in folds:
        for patient in fold.val:
            counts[patient] = counts.get(patient, 0) + 1
    if twice := sorted(patient for patient, count in counts.items() if count > 1):
        raise DataError(
            f"{counted(len(twice), 'patient is', 'patients are')} validated in several folds ({first_ids(twice)}). "
            "Scores over all folds need each patient once. If scans of one patient have several names there, put "
            "them into one fold.",
            where=path.name,
        )
