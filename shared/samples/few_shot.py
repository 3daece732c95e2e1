"""Few-shot subsets of a split: N training patients or N labelled training slices, drawn anew for every repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.samples.dataset import SliceRef, select_slices
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore


def few_shot(split: Split, store: SliceStore, *, num: int, unit: str, repeat: int) -> Split:
    """Keep ``num`` training patients, or ``num`` training slices with a label; val and test stay as they are.

    Draws are nested: with one repeat, the subset of 5 holds the subset of 3, so that a curve over N compares like with
    like.

    Raises:
        DataError: If there are fewer.
    """
    rng = np.random.default_rng([split.seed, 3, repeat])
    if unit == "patients":
        order = rng.permutation(len(split.train))
        _enough(num, len(split.train), "training patients", store)
        return dataclasses.replace(split, train=tuple(sorted(split.train[i] for i in order[:num])))
    if unit != "slices":
        raise DataError(f"unit must be patients or slices, got {unit!r}.")
    refs = select_slices(store, split.train, labelled_only=True)
    _enough(num, len(refs), "labelled training slices", store)
    chosen = sorted((refs[i].series_id, refs[i].slice_index) for i in rng.permutation(len(refs))[:num])
    patients = {store.record(series_id).patient_id for series_id, _ in chosen}
    return dataclasses.replace(split, train=tuple(sorted(patients)), train_slices=tuple(chosen))


def keep_train_slices(refs: Iterable[SliceRef], split: Split) -> list[SliceRef]:
    """Leave out training slices that a few-shot split does not name; without such a list all stay."""
    if not split.train_slices:
        return list(refs)
    allowed = set(split.train_slices)
    return [ref for ref in refs if (ref.series_id, ref.slice_index) in allowed]


def _enough(num: int, available: int, what: str, store: SliceStore) -> None:
    if not 1 <= num <= available:
        raise DataError(f"few-shot needs 1 to {available} {what}, asked for {num}.", where=store.path.name)
