"""DATA may be a folder of scans: `pretrain` and `finetune` build its store first, then it is a run like any other."""

import json
import re
from pathlib import Path

import pytest
import torch
from dicom_factory import write_segmentation, write_series
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from store_factory import make_scan, write_nifti
from tiny_encoders import tiny_encoder

FOLDER = "Kopf MR ü 患者"
SHAPE = (4, 24, 20)


def write_nifti_folder(folder: Path, *, labelled: bool) -> None:
    for patient in range(5):
        image, label = make_scan(shape_zyx=SHAPE, seed=patient)
        write_nifti(folder / f"pat {patient}" / "t1.nii.gz", image)
        if labelled:
            write_nifti(folder / f"pat {patient}" / "t1_label.nii.gz", label)


def write_dicom_folder(folder: Path, *, labelled: bool) -> None:
    for patient in range(5):
        image, label = make_scan(shape_zyx=SHAPE, seed=patient)
        series = f"1.2.3.{patient}"
        write_series(folder / "export" / f"{patient}", image, PatientID=f"P{patient}", SeriesInstanceUID=series)
        if labelled:
            path = folder / "export" / f"{patient}" / "seg.dcm"
            write_segmentation(path, {"lesion": label > 0}, series_uid=series)


SOURCES = [pytest.param(write_nifti_folder, id="nifti"), pytest.param(write_dicom_folder, id="dicom")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    about = {"arch": "vit_t", "stem": "conv1x1", "image_size": 32, "pixel_mean": [0.0] * 3, "pixel_std": [255.0] * 3}
    save_encoder(tiny_encoder(), tmp_path / "base", Card(**about))
    write_tensors(tmp_path / "sam.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    return tmp_path


def pretrain(folder, *arguments):
    tiny = [
        "model.image_size=32",
        "model.num_frozen_depths=0",
        "data.batch_size=2",
        "objective.masked_image.decoder_dim=8",
    ]
    short = ["trainer.max_steps=1", "optim.warmup_steps=0", "data.num_held_out_slices=1"]
    return main(["pretrain", "--data", folder, "--base", "base", "--preset", "cpu", *arguments, *tiny, *short])


@pytest.mark.parametrize("write", SOURCES)
def test_pretrain__on_a_folder_of_scans(workplace, capsys, write):
    write(workplace / FOLDER, labelled=False)
    before = {p: p.read_bytes() for p in (workplace / FOLDER).rglob("*") if p.is_file()}
    assert pretrain(FOLDER) == 0
    store = SliceStore.open(Path("data") / f"{FOLDER}.zarr")
    assert (len(store.series), len(store.patient_ids)) == (5, 5)
    run = Path("runs") / f"{FOLDER}-vit_t-masked_image"
    assert (run / "encoder" / "encoder.safetensors").is_file()
    assert len(json.loads((run / "encoder" / "card.json").read_text())["data_manifest"]["patient_ids"]) == 4
    assert {p: p.read_bytes() for p in (workplace / FOLDER).rglob("*") if p.is_file()} == before
    shown = capsys.readouterr().err
    assert "holds scans. They are written to the store data" in shown
    assert re.search(r"series +5 of 5, 5 patients", shown)

    table = (store.path / "manifest.json").stat().st_mtime_ns
    assert pretrain(FOLDER, "--name", "again") == 0  # nothing is built twice
    assert (store.path / "manifest.json").stat().st_mtime_ns == table

    write_nifti(workplace / FOLDER / "late" / "x.nii.gz", make_scan(shape_zyx=SHAPE, seed=9)[0])
    assert pretrain(FOLDER, "--name", "changed") == 2
    shown = capsys.readouterr().err
    assert "scans were added or changed, or another folder has this name" in shown
    assert "--overwrite" in shown
    assert not Path("runs/changed").exists()


def test_pretrain__a_dry_run_on_scans_says_what_it_leaves(workplace, capsys):
    write_nifti_folder(workplace / FOLDER, labelled=False)
    assert pretrain(FOLDER, "--dry-run") == 0
    store = f"{Path('data') / FOLDER}.zarr"
    left = f"dry run: no run was written; the store {store}, made from the scans, and the salt and names"
    assert left in capsys.readouterr().err
    assert sorted(p.name for p in Path("data").iterdir()) == [
        ".samgraft-salt",
        f"{FOLDER}.names.json",
        f"{FOLDER}.zarr",
    ]
    assert not Path("runs").exists()
    assert pretrain("data/" + FOLDER + ".zarr", "--dry-run") == 0
    assert "dry run: no run was written." in capsys.readouterr().err


@pytest.mark.parametrize("write", SOURCES)
def test_finetune__on_a_folder_of_scans_with_labels(workplace, write, capsys):
    write(workplace / FOLDER, labelled=True)
    command = ["finetune", "--ckpt", "sam.safetensors", "--data", FOLDER, "--preset", "cpu", "--dry-run"]
    assert main([*command, "model.image_size=32", "data.batch_size=2"]) == 0
    printed = capsys.readouterr().err
    assert f"no run was written; the store {Path('data') / FOLDER}.zarr, made from" in printed
    assert printed.count(" GB for training states, ") == 1
    assert not Path("runs").exists()
    store = SliceStore.open(Path("data") / f"{FOLDER}.zarr")
    assert store.label_names == ({1: "label 1"} if write is write_nifti_folder else {1: "lesion"})
    assert all(record.has_label for record in store.series)


def test_refused_scans__end_the_command_before_a_run_begins(workplace, capsys):
    write_nifti_folder(workplace / FOLDER, labelled=False)
    broken = workplace / FOLDER / "pat 3" / "t1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    assert pretrain(FOLDER) == 3
    shown = capsys.readouterr().err
    assert "pat 3/t1.nii.gz: the gzip data is damaged or cut short" in shown
    assert not Path("runs").exists()


def test_modality__of_the_scans_is_compared_with_the_headers(workplace, capsys):
    write_dicom_folder(workplace / FOLDER, labelled=False)
    assert pretrain(FOLDER, "--modality", "ct") == 3
    assert "the modality must be ct, got MR in the DICOM header" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_modality__another_than_the_stores_is_refused(workplace, capsys, stage):
    write_nifti_folder(workplace / FOLDER, labelled=True)
    assert main(["store", "build", FOLDER, "--out", "data/x.zarr", "--workers", "1"]) == 0
    weights = ["--base", "base"] if stage == "pretrain" else ["--ckpt", "sam.safetensors", "--preset", "cpu"]
    assert main([stage, "--data", "data/x.zarr", "--modality", "xray", *weights]) == 3
    assert "must be of modality xray, got mri. Use --modality mri" in capsys.readouterr().err
