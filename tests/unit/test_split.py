"""Splits are by patient, seeded, stratified and hashed. Leaks are refused by id and by content."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.samples.split import (
    check_split,
    choose_fold,
    default_split_path,
    group_patients,
    keep_drawn_split,
    load_split,
    make_folds,
    make_split,
    refuse_empty_train,
)
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from store_factory import make_cases, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("split"), num_patients=10, shape_zyx=(2, 16, 16)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (0.8, 0.0, 0.2), (1.0, 0, 0)]))
def test_make_split__parts_are_disjoint_complete_and_of_the_right_size(store, seed, fractions):
    split = make_split(store, fractions=fractions, seed=seed)
    assert sorted((*split.train, *split.val, *split.test)) == list(store.patient_ids)
    assert len(split.val) == round(10 * fractions[1])
    assert len(split.test) == round(10 * fractions[2])
    check_split(split, store)
    assert split == make_split(store, fractions=fractions, seed=seed)


def test_make_split__another_seed_gives_another_split(store):
    assert len({make_split(store, seed=s).test for s in range(20)}) > 5


def test_make_split__parts_are_stratified_by_labels(tmp_path):
    labelled = make_cases(tmp_path / "a", num_patients=10, shape_zyx=(3, 16, 16))
    plain = make_cases(tmp_path / "b", num_patients=10, shape_zyx=(3, 16, 16), labelled=False, seed=7)
    plain = [dataclasses.replace(c, name=f"b{c.name}", patient_key=f"b{c.patient_key}") for c in plain]
    path = tmp_path / "s.zarr"
    build_store(
        [*labelled, *plain],
        out=path,
        settings=BuildSettings(modality=Modality.MRI, salt=""),
        label_names={1: "lesion"},
        intensity=IntensityPreset(),
    )
    mixed = SliceStore.open(path)
    with_label = {r.patient_id for r in mixed.series if r.has_label}
    for seed in range(10):
        split = make_split(mixed, fractions=(0.5, 0.2, 0.3), seed=seed)
        assert 2 <= len(with_label & set(split.test)) <= 4
        assert 1 <= len(with_label & set(split.val)) <= 3


def test_load_split__saved_file_is_equal_and_an_edited_one_is_refused(store, tmp_path):
    split = make_split(store, seed=3)
    path = tmp_path / "x.split.json"
    split.save(path)
    assert load_split(path, store) == split
    values = json.loads(path.read_text())
    values["train"].append(values["test"].pop())
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="was edited"):
        load_split(path, store)
    path.write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        load_split(path, store)
    with pytest.raises(DataError, match="does not exist"):
        load_split(tmp_path / "none.json", store)


def test_save__killed_before_the_flush_keeps_the_old_file(store, tmp_path, monkeypatch):
    """A run reads its own split again whenever it resumes, so half a file would end the run."""
    make_split(store).save(tmp_path / "s.json")
    before = (tmp_path / "s.json").read_bytes()

    def killed(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    for name in ("s.json", "new.json"):
        with pytest.raises(KeyboardInterrupt):
            make_split(store, seed=1).save(tmp_path / name)
    assert (tmp_path / "s.json").read_bytes() == before
    assert not (tmp_path / "new.json").exists()


def test_load_split__leaking_file_is_refused(store, tmp_path):
    """Its own hash is right, so only the check of the content can find the leak."""
    split = make_split(store)
    dataclasses.replace(split, val=(*split.val, split.train[0])).save(tmp_path / "s.json")
    with pytest.raises(DataError, match="1 patient is in both train and val"):
        load_split(tmp_path / "s.json", store)


def test_load_split__without_path_takes_the_file_beside_the_store(store):
    default = load_split(None, store)
    assert default == make_split(store)
    beside = default_split_path(store.path)
    assert beside.name == "store.split.json"
    other = make_split(store, seed=77)
    other.save(beside)
    try:
        assert load_split(None, store) == other != default
    finally:
        beside.unlink()


def test_check_split__patient_in_two_parts_is_refused(store):
    split = make_split(store)
    leaking = dataclasses.replace(split, val=(*split.val, split.train[0], split.train[1]))
    with pytest.raises(DataError, match=r"2 patients are in both train and val \(p_[0-9a-f]{12}, p_"):
        check_split(leaking, store)


def test_check_split__unknown_patients_other_stores_and_empty_train_are_refused(store):
    split = make_split(store)
    with pytest.raises(DataError, match="does not have"):
        check_split(dataclasses.replace(split, test=("p_000000000000",)), store)
    with pytest.raises(DataError, match="fingerprints differ"):
        check_split(dataclasses.replace(split, store_fingerprint="0"), store)
    with pytest.raises(DataError, match="at least one training patient"):
        refuse_empty_train(dataclasses.replace(split, train=()), store)


def test_check_split__equal_voxels_under_two_ids_are_refused(tmp_path):
    cases = make_cases(tmp_path, num_patients=3, shape_zyx=(2, 16, 16), labelled=False)
    twin = dataclasses.replace(cases[0], name="copy", patient_key="somebody else")
    path = tmp_path / "s.zarr"
    build_store(
        [*cases, twin],
        out=path,
        settings=BuildSettings(modality=Modality.MRI, salt=""),
        label_names={},
        intensity=IntensityPreset(),
    )
    store = SliceStore.open(path)
    by_content = {}
    for record in store.series:
        by_content.setdefault(record.content_sha256, []).append(record.patient_id)
    first, second = next(ids for ids in by_content.values() if len(ids) == 2)
    others = [p for p in store.patient_ids if p not in (first, second)]
    split = dataclasses.replace(make_split(store), train=(first, *others), val=(second,), test=())
    with pytest.raises(DataError, match="the same voxels occur in"):
        check_split(split, store)
    check_split(dataclasses.replace(split, train=(first, second, *others), val=()), store)


def test_make_split__small_sets_keep_a_training_patient(tmp_path):
    for num, expected in ((1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1))):
        path = make_store(tmp_path / str(num), num_patients=num, shape_zyx=(2, 8, 8))
        split = make_split(SliceStore.open(path))
        assert (len(split.train), len(split.val), len(split.test)) == expected


def test_make_split__wrong_fractions_are_refused(store):
    with pytest.raises(DataError, match="sum to 1"):
        make_split(store, fractions=(0.5, 0.1, 0.1))


def test_make_split__every_patient_can_be_for_testing(store):
    assert make_split(store, fractions=(0, 0, 1)).test == store.patient_ids


def test_make_split__patients_that_are_left_out_are_in_no_part(store):
    out = store.patient_ids[2:5]
    split = make_split(store, fractions=(0.5, 0.25, 0.25), without=out)
    assert sorted((*split.train, *split.val, *split.test)) == [p for p in store.patient_ids if p not in out]


def test_check_split__all_leaks_are_in_one_message(store):
    split = make_split(store)
    leaking = dataclasses.replace(split, val=(*split.val, split.train[0]), test=(*split.test, split.train[1]))
    with pytest.raises(DataError, match=r"in both train and val .*in both train and test"):
        check_split(leaking, store)


def test_make_folds__every_patient_outside_test_is_validated_once(store, tmp_path):
    split = make_folds(store, num_folds=4, test_fraction=0.2, seed=1)
    assert len(split.test) == 2
    validated = [patient for fold in split.folds for patient in fold.val]
    assert sorted((*validated, *split.test)) == list(store.patient_ids)
    for number in range(4):
        fold = split.fold(number)
        assert sorted((*fold.train, *fold.val, *fold.test)) == list(store.patient_ids)
        assert fold.folds == ()
        assert fold.test == split.test
    assert split.held_out == store.patient_ids
    split.save(tmp_path / "s.json")
    assert load_split(tmp_path / "s.json", store) == split
    assert len({split.fold(number).sha256 for number in range(4)} | {split.sha256}) == 5


def test_make_folds__more_folds_than_patients_are_refused(store):
    with pytest.raises(UsageError, match=r"number of folds does not fit the store \(got 11, expected 2 to 10"):
        make_folds(store, num_folds=11)


def test_check_split__leak_in_one_fold_is_refused(store):
    split = make_folds(store, num_folds=3)
    last = split.folds[2]
    leaking = dataclasses.replace(last, train=(*last.train, last.val[0]))
    with pytest.raises(DataError, match="1 patient is in both train and val"):
        check_split(dataclasses.replace(split, folds=(*split.folds[:2], leaking)), store)


def test_choose_fold__number_must_fit_the_split(store):
    folds, plain = make_folds(store, num_folds=3), make_split(store)
    assert choose_fold(folds, 2) == folds.fold(2)
    assert choose_fold(plain, None) == plain
    with pytest.raises(UsageError, match=r"got none, expected data.fold=0 to 2"):
        choose_fold(folds, None)
    with pytest.raises(UsageError, match=r"no such fold \(got 3, expected 0 to 2\)"):
        choose_fold(folds, 3)
    with pytest.raises(UsageError, match="has no folds"):
        choose_fold(plain, 0)


def test_keep_drawn_split__is_written_once_and_never_replaced(tmp_path):
    store = SliceStore.open(make_store(tmp_path, num_patients=4, shape_zyx=(2, 8, 8)))
    path = default_split_path(store.path)
    keep_drawn_split(store)
    assert load_split(path, store) == make_split(store)
    other = make_split(store, seed=3)
    other.save(path)
    keep_drawn_split(store)
    assert load_split(None, store) == other


def patients_of(*series):
    """Return a store of (patient, voxels, site, labels) without files."""
    records = [
        SimpleNamespace(patient_id=p, content_sha256=voxels, site_id=site, label_voxels=dict.fromkeys(labels, 5))
        for p, voxels, site, labels in series
    ]
    patients = tuple(dict.fromkeys(record.patient_id for record in records))
    return SimpleNamespace(series=records, patient_ids=patients, fingerprint="f", path=Path("s.zarr"))


def test_group_patients__equal_voxels_and_sites_join_through_others():
    """a = b by voxels, b = c by the other scan of b, d alone; e and f share a site only."""
    store = patients_of(
        ("a", "1", "x", [1]), ("b", "1", "y", [1]), ("b", "2", "y", [1]), ("c", "2", None, []), ("d", "3", None, []),
        ("e", "4", "z", [2]), ("f", "5", "z", [2]),
    )  # fmt: skip
    assert group_patients(store) == [("a", "b", "c"), ("d",), ("e",), ("f",)]
    assert group_patients(store, by_site=True) == [("a", "b", "c"), ("d",), ("e", "f")]


@pytest.mark.parametrize("seed", range(12))
def test_make_split__equal_scans_and_sites_are_never_separated(seed):
    series = [(f"p{n}", str(n // 2), f"site{n // 3}", [n % 2]) for n in range(12)]
    store = patients_of(*series)
    for by_site, size in ((False, 2), (True, 6)):
        split = make_split(store, fractions=(0.5, 0.25, 0.25), seed=seed, by_site=by_site)
        part_of = {patient: name for name in ("train", "val", "test") for patient in split.part(name)}
        assert len(part_of) == 12
        for first in range(0, 12, size):
            assert len({part_of[f"p{first + n}"] for n in range(size)}) == 1
        folds = make_folds(store, num_folds=2, seed=seed, by_site=by_site).folds
        for fold in folds:
            for first in range(0, 12, size):
                assert len({f"p{first + n}" in fold.val for n in range(size)}) == 1
