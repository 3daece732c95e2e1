"""Patients of one store are found in another by id, by equal voxels and as near-duplicates."""

import dataclasses

import numpy as np
import pytest
from samgraft.shared.errors import DataError
from samgraft.shared.samples.leaks import (
    BY_ID,
    BY_SIMILARITY,
    BY_VOXELS,
    count_rules,
    find_leaks,
    find_patients_again,
    have_one_salt,
    pretrain_manifest,
    refuse_leaks,
)
from samgraft.shared.samples.split import make_folds, make_split
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.privacy import SALT_FILE, pseudonym
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from store_factory import make_store, nifti_files, write_nifti

SHAPE = (10, 24, 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("leaks"), num_patients=10, shape_zyx=(2, 16, 16)))


def head(number):
    """Return the scan of one person. Persons differ in size and in voxels."""
    rng = np.random.default_rng(number)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    a, b, c = rng.uniform(0.6, 0.95, size=3)
    inside = (z / a / 1.2) ** 2 + (y / b) ** 2 + (x / c) ** 2 < 1
    return (inside * (300 + 100 * np.sin(5 * x)) + rng.integers(0, 12, size=SHAPE)).astype(np.int16)


def build(folder, scans, *, salt="lab"):
    """Build a store from (patient, voxels) pairs."""
    cases = []
    for number, (patient, image) in enumerate(scans):
        file = nifti_files(write_nifti(folder / "scans" / f"scan{number}.nii", image))
        cases.append(SourceCase(name=f"scan{number}", patient_key=patient, scan=file))
    settings = BuildSettings(modality=Modality.MRI, salt=salt)
    build_store(cases, out=folder / "s.zarr", settings=settings, label_names={}, intensity=IntensityPreset())
    return SliceStore.open(folder / "s.zarr")


def test_find_leaks__pretraining_patients_are_found_by_id_and_by_content(store):
    split = make_split(store)
    assert find_leaks(pretrain_manifest(store, split.train), split, store) == []
    (leak,) = find_leaks(pretrain_manifest(store, store.patient_ids), dataclasses.replace(split, val=()), store)
    assert (leak.part, leak.rule, leak.patients) == ("test", BY_ID, split.test)
    # Another salt gives other ids. The voxels still give the leak away.
    manifest = {**pretrain_manifest(store, split.val), "patient_ids": ["p_ffffffffffff"]}
    (leak,) = find_leaks(manifest, split, store)
    assert (leak.part, leak.rule, leak.patients) == ("val", BY_VOXELS, split.val)


def test_find_leaks__validation_patients_of_every_fold_count(store):
    folds = make_folds(store, num_folds=5)
    (leak,) = find_leaks(pretrain_manifest(store, folds.folds[4].val), folds, store)
    assert leak.patients == folds.folds[4].val


def test_refuse_leaks__parts_and_stores_are_in_one_message(store):
    split = make_split(store)
    leaks = find_leaks(pretrain_manifest(store, store.patient_ids), split, store)
    with pytest.raises(DataError, match=r"2 val patients were .*\(by id: p_.*; 2 test patients were .*LABELLED"):
        refuse_leaks({"store.zarr": leaks}, way_out="make it")
    with pytest.raises(DataError, match=r"a\.zarr: 2 val.*b\.zarr: 2 test") as refusal:
        refuse_leaks({"a.zarr": leaks[:1], "b.zarr": leaks[1:], "c.zarr": []}, way_out="make it")
    assert "make it; or the same command with data.allow_transductive=true" in refusal.value.render()
    refuse_leaks({"a.zarr": []}, way_out="")


def test_find_patients_again__every_rule_finds_its_patients(tmp_path):
    labelled = build(tmp_path / "l", [("anna", head(0)), ("ben", head(1)), ("cleo", head(2)), ("dan", head(3))])
    unlabelled = build(
        tmp_path / "u",
        [
            ("anna", head(10)),  # another scan of the same patient
            ("export 1", head(1)),  # ben's voxels under another id
            ("export 2", (head(2) * 2.5).astype(np.float32)),  # cleo's scan, rescaled
            ("eva", head(4)),
            ("dan", head(3)),
        ],
    )
    anna, ben, cleo, dan = (labelled.record(r.series_id).patient_id for r in sorted_by_scan(labelled))
    ids = [r.patient_id for r in sorted_by_scan(unlabelled)]
    found = find_patients_again(unlabelled, labelled, [anna, ben, cleo])
    assert found == {ids[0]: BY_ID, ids[1]: BY_VOXELS, ids[2]: BY_SIMILARITY}
    assert count_rules(found) == "1 by id, 1 by equal voxels, 1 as near-duplicates"
    assert find_patients_again(unlabelled, labelled, [dan]) == {ids[4]: BY_ID}
    assert find_patients_again(unlabelled, labelled, []) == {}


def sorted_by_scan(store):
    """Return the records in the order of the scans, which have the seed of their person in their voxels."""
    keys = ["anna", "ben", "cleo", "dan"] if len(store.series) == 4 else ["anna", "export 1", "export 2", "eva", "dan"]
    by_patient = {record.patient_id: record for record in store.series}
    return [by_patient[pseudonym("p", key, salt="lab")] for key in keys]


def test_find_patients_again__copies_of_a_found_patients_other_scans_are_found(tmp_path):
    labelled = build(tmp_path / "l", [("anna", head(0))])
    unlabelled = build(
        tmp_path / "u",
        [("anna", head(5)), ("copy", head(5)), ("rescaled", (head(5) * 3.0).astype(np.float32)), ("ben", head(6))],
    )
    found = find_patients_again(unlabelled, labelled, labelled.patient_ids)
    assert sorted(found.values()) == sorted([BY_ID, BY_VOXELS, BY_SIMILARITY])


def patients_of(*keys):
    return [pseudonym("p", key, salt="lab") for key in keys]


def test_find_patients_again__patients_with_a_scan_of_a_near_duplicate_are_found(tmp_path):
    """The rescaled scan and another one are of one patient, and that other scan has a second id."""
    labelled = build(tmp_path / "l", [("anna", head(0))])
    unlabelled = build(
        tmp_path / "u",
        [
            ("export 1", (head(0) * 3.0).astype(np.float32)),
            ("export 1", head(8)),
            ("export 2", head(8)),
            ("ben", head(6)),
        ],
    )
    first, second = patients_of("export 1", "export 2")
    found = find_patients_again(unlabelled, labelled, labelled.patient_ids)
    assert found == {first: BY_SIMILARITY, second: BY_VOXELS}


def test_find_patients_again__near_duplicates_of_a_copys_other_scans_are_found(tmp_path):
    """Anna has a second id, under which there is another scan, and a rescaled one of that has a third id."""
    labelled = build(tmp_path / "l", [("anna", head(0))])
    rescaled = (head(9) * 3.0).astype(np.float32)
    unlabelled = build(
        tmp_path / "u", [("anna", head(5)), ("copy", head(5)), ("copy", head(9)), ("third", rescaled), ("ben", head(6))]
    )
    anna, copy, third = patients_of("anna", "copy", "third")
    found = find_patients_again(unlabelled, labelled, labelled.patient_ids)
    assert found == {anna: BY_ID, copy: BY_VOXELS, third: BY_SIMILARITY}


def test_find_patients_again__another_salt_leaves_only_the_voxels(tmp_path):
    labelled = build(tmp_path / "l", [("anna", head(0)), ("ben", head(1))])
    unlabelled = build(tmp_path / "u", [("anna", head(7)), ("ben", head(1))], salt="elsewhere")
    assert list(find_patients_again(unlabelled, labelled, labelled.patient_ids).values()) == [BY_VOXELS]


def test_have_one_salt__stores_of_two_folders_differ(tmp_path):
    stores = [build(tmp_path / name, [("anna", head(0))], salt=name) for name in ("a", "b")]
    assert not have_one_salt(*stores)
    for name, salt in (("a", "one"), ("b", "two")):
        (tmp_path / name / SALT_FILE).write_text(salt)
    assert not have_one_salt(*stores)
    (tmp_path / "b" / SALT_FILE).write_text("one")
    assert have_one_salt(*stores)
