"""Rows 136, 137 and 139: patients in two parts, one scan under two names, parts that are empty or lack a class."""

import logging

import numpy as np
import pytest
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.training.preparation import prepare
from samgraft.shared.cli import main
from samgraft.shared.config import load_config
from samgraft.shared.errors import DataError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.split import Split, check_split, make_split
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.build_report import summarise
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.near_duplicates import near_duplicates
from samgraft.shared.store.store import SliceStore
from store_factory import make_store, write_nifti

SETTINGS = BuildSettings(modality=Modality.MRI, salt="test")


def heads(folder, number, *, shape_zyx=(12, 40, 32)):
    """Heads of people: sizes and places differ."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    for patient in range(number):
        rng = np.random.default_rng(patient)
        (a, b, c), (dy, dx) = rng.uniform(0.6, 0.95, size=3), rng.uniform(-0.1, 0.1, size=2)
        head = (z / a / 1.2) ** 2 + ((y - dy) / b) ** 2 + ((x - dx) / c) ** 2 < 1
        image = (head * (300 + 100 * np.sin(5 * x)) + rng.integers(0, 12, size=shape_zyx)).astype(np.int16)
        yield write_nifti(folder / f"p{patient}" / "t1.nii", image), image


def store_of(folder, out):
    found = discover(folder)
    report = build_store(found.cases, out=out, settings=SETTINGS, label_names={}, intensity=IntensityPreset())
    return SliceStore.open(out), summarise(found, report)


def test_row_137_rescaled_copy_under_another_name_is_reported(tmp_path, caplog):
    scans = list(heads(tmp_path / "in", 4))
    write_nifti(tmp_path / "in" / "someone else" / "export.nii", (scans[2][1] * 2.5 + 10).astype(np.float32))
    store, values = store_of(tmp_path / "in", tmp_path / "s.zarr")
    assert values["duplicates"] == []
    assert values["near_duplicates"] == [["p2/t1.nii", "someone else/export.nii"]]
    ((one, other),) = near_duplicates(store.series)
    rest = tuple(p for p in store.patient_ids if p not in (one.patient_id, other.patient_id))
    with caplog.at_level(logging.WARNING):
        for val, test, said in (((one.patient_id,), (), 1), ((), (), 0)):
            caplog.clear()
            train = tuple(p for p in store.patient_ids if p not in (*val, *test))
            check_split(Split(train=train, val=val, test=test, seed=0, store_fingerprint=store.fingerprint), store)
            assert caplog.text.count("are near-duplicates") == said
    assert len(rest) == 3


def test_row_137_different_people_and_series_of_one_person_are_not(tmp_path):
    scans = list(heads(tmp_path / "in", 8))
    write_nifti(tmp_path / "in" / "p3" / "t1_again.nii", (scans[3][1] * 2.0).astype(np.float32))
    full = np.random.default_rng(0).integers(100, 200, size=(12, 40, 32)).astype(np.int16)
    for name in ("x", "y"):  # crops without air say nothing
        write_nifti(tmp_path / "in" / name / "crop.nii", full + (name == "y"))
    _, values = store_of(tmp_path / "in", tmp_path / "s.zarr")
    assert values["near_duplicates"] == []


def test_row_136_split_file_with_a_patient_in_two_parts(tmp_path):
    store = SliceStore.open(make_store(tmp_path, num_patients=4))
    a, b, c, d = store.patient_ids
    Split(train=(a, b), val=(b,), test=(c, d), seed=0, store_fingerprint=store.fingerprint).save(
        tmp_path / "store.split.json"
    )
    with pytest.raises(DataError, match=f"1 patients are in both train and val \\({b}\\)"):
        prepare(config(tmp_path))


def config(root):
    weights = root / "sam.safetensors"
    if not weights.exists():
        write_tensors(weights, dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    layer = {
        "modality": "mri",
        "data": {"store": str(root / "store.zarr"), "batch_size": 1},
        "model": {"ckpt": str(weights), "image_size": 32},
        "trainer": {"max_steps": 1},
    }
    return load_config(FinetuneConfig, layers=[layer])


def test_row_139_no_validation_patient(tmp_path):
    store = SliceStore.open(make_store(tmp_path, num_patients=2))
    Split(train=store.patient_ids, val=(), test=(), seed=0, store_fingerprint=store.fingerprint).save(
        tmp_path / "store.split.json"
    )
    with pytest.raises(DataError, match="validation must have at least one labelled scan, got 0 patients and 0 scans"):
        prepare(config(tmp_path))


def test_row_139_one_patient(tmp_path):
    """One patient can train; with nobody to validate on it is refused by name, not scored on itself."""
    store = SliceStore.open(make_store(tmp_path, num_patients=1))
    split = make_split(store)
    assert (len(split.train), len(split.val), len(split.test)) == (1, 0, 0)
    with pytest.raises(DataError, match="validation must have at least one labelled scan"):
        prepare(config(tmp_path))


def test_row_103_no_patient_at_all(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["store", "build", str(tmp_path / "empty"), "--out", str(tmp_path / "s.zarr")]) == 3
    assert "no scan was found" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()
