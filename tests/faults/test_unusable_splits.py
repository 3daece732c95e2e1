"""Splits with a patient in two parts, one scan under two names, or an empty part."""

import logging
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

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
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.build_report import summarise
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.near_duplicates import MAX_DIFFERENCE, near_duplicates
from samgraft.shared.store.store import SliceStore
from store_factory import make_store, write_nifti

SETTINGS = BuildSettings(modality=Modality.MRI, salt="test")


def heads(folder, number, *, shape_zyx=(12, 40, 32)):
    """Write heads of several people, which differ in size and place."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    for patient in range(number):
        rng = np.random.default_rng(patient)
        (a, b, c), (dy, dx) = rng.uniform(0.6, 0.95, size=3), rng.uniform(-0.1, 0.1, size=2)
        head = (z / a / 1.2) ** 2 + ((y - dy) / b) ** 2 + ((x - dx) / c) ** 2 < 1
        image = (head * (300 + 100 * np.sin(5 * x)) + rng.integers(0, 12, size=shape_zyx)).astype(np.int16)
        yield write_nifti(folder / f"p{patient}" / "t1.nii", image), image


def build_from_folder(folder, out):
    found = discover(folder)
    report = build_store(found.cases, out=out, settings=SETTINGS, label_names={}, intensity=IntensityPreset())
    return SliceStore.open(out), summarise(found, report)


def test_near_duplicates__rescaled_copy_under_another_name_is_reported(tmp_path, caplog):
    scans = list(heads(tmp_path / "in", 4))
    write_nifti(tmp_path / "in" / "someone else" / "export.nii", (scans[2][1] * 2.5 + 10).astype(np.float32))
    store, values = build_from_folder(tmp_path / "in", tmp_path / "s.zarr")
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


def test_near_duplicates__other_people_and_series_of_one_person_are_not_reported(tmp_path):
    scans = list(heads(tmp_path / "in", 8))
    write_nifti(tmp_path / "in" / "p3" / "t1_again.nii", (scans[3][1] * 2.0).astype(np.float32))
    full = np.random.default_rng(0).integers(100, 200, size=(12, 40, 32)).astype(np.int16)
    for name in ("x", "y"):  # crops without air say nothing
        write_nifti(tmp_path / "in" / name / "crop.nii", full + (name == "y"))
    _, values = build_from_folder(tmp_path / "in", tmp_path / "s.zarr")
    assert values["near_duplicates"] == []


def record_of(number, shares_Z, patient):
    return SimpleNamespace(
        patient_id=f"p{patient}",
        content_sha256=f"c{number}",
        shape_zyx=(len(shares_Z), 64, 64),
        plane=Plane.AXIAL,
        planes={Plane.AXIAL: SimpleNamespace(foreground_fraction=tuple(shares_Z))},
    )


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates__equal_those_of_comparing_all_pairs(seed):
    """The search hashes a few slices, so pairs at cell borders and at the exact tolerance must not be lost."""
    rng = np.random.default_rng(seed)
    shares_NZ = rng.uniform(0.2, 0.25, size=(150, 9)) + np.linspace(0, 0.3, 9)
    shares_NZ[50:] = shares_NZ[:100] + rng.choice([-0.0049, 0, 0.004], size=(100, 9))
    shares_NZ[::7, rng.integers(9)] += 0.0101  # too far on one slice
    shares_NZ = shares_NZ.clip(0, 1).round(4)
    records = [record_of(n, shares_Z, patient=n % 140) for n, shares_Z in enumerate(shares_NZ)]
    expected = {
        frozenset((one.content_sha256, other.content_sha256))
        for (i, one), (j, other) in combinations(enumerate(records), 2)
        if one.patient_id != other.patient_id and np.abs(shares_NZ[i] - shares_NZ[j]).max() <= MAX_DIFFERENCE
    }
    found = [frozenset(r.content_sha256 for r in pair) for pair in near_duplicates(records)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) > 3


def test_near_duplicates__equal_copies_are_compared_once_with_the_others():
    base = np.linspace(0, 0.5, 9)
    copies = [record_of(0, base, patient=n) for n in range(3)]
    rescaled = record_of(1, base + 0.001, patient=9)
    pairs = near_duplicates([*copies, rescaled])
    assert sorted(tuple(sorted(r.patient_id for r in pair)) for pair in pairs) == [
        ("p0", "p9"),
        ("p1", "p9"),
        ("p2", "p9"),
    ]


def test_split__empty_part_is_refused_with_a_way_out(tmp_path, capsys):
    store = make_store(tmp_path, num_patients=2)
    assert main(["store", "split", str(store)]) == 3
    shown = capsys.readouterr().err
    assert "val would be empty (got 2 patients" in shown
    assert "--patient-pattern" in shown
    assert not (tmp_path / "store.split.json").exists()
    assert main(["store", "split", str(store), "--fractions", "1,0,0"]) == 0


LIGHT = """
import sys
from samgraft.shared.cli import main
for words in (["info"], ["check"], ["split"], ["split", "--few-shot", "2", "--unit", "slices"]):
    assert main(["store", words[0], sys.argv[1], *words[1:]]) == 0, words
heavy = {"torch", "monai", "lightning", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_store_commands__do_not_load_torch(tmp_path):
    """torch needs several hundred MB and seconds, which matters in scripts over many stores."""
    store = make_store(tmp_path, num_patients=5)
    done = subprocess.run([sys.executable, "-c", LIGHT, str(store)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prepare__split_file_with_a_patient_in_two_parts_is_refused(tmp_path):
    store = SliceStore.open(make_store(tmp_path, num_patients=4))
    a, b, c, d = store.patient_ids
    Split(train=(a, b), val=(b,), test=(c, d), seed=0, store_fingerprint=store.fingerprint).save(
        tmp_path / "store.split.json"
    )
    with pytest.raises(DataError, match=f"1 patient is in both train and val \\({b}\\)"):
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


def test_prepare__split_without_validation_patient_is_refused(tmp_path):
    store = SliceStore.open(make_store(tmp_path, num_patients=2))
    Split(train=store.patient_ids, val=(), test=(), seed=0, store_fingerprint=store.fingerprint).save(
        tmp_path / "store.split.json"
    )
    with pytest.raises(DataError, match="validation must have at least one labelled scan, got 0 patients and 0 scans"):
        prepare(config(tmp_path))


def test_prepare__store_of_one_patient_is_refused(tmp_path):
    """One patient can be trained on, but must not be validated on itself."""
    store = SliceStore.open(make_store(tmp_path, num_patients=1))
    split = make_split(store)
    assert (len(split.train), len(split.val), len(split.test)) == (1, 0, 0)
    with pytest.raises(DataError, match="validation must have at least one labelled scan"):
        prepare(config(tmp_path))


def test_build__folder_without_scans_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["store", "build", str(tmp_path / "empty"), "--out", str(tmp_path / "s.zarr")]) == 3
    assert "no scan was found" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()
