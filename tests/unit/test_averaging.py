"""The mean of the weights of several models, which must be alike."""

import dataclasses
import json
import logging
import shutil

import pytest
import samgraft.api as sg
import torch
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.commands.average import average
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.release import averaging
from samgraft.finetune.release.averaging import common_split, joined_card
from samgraft.finetune.task import Task
from samgraft.finetune.training import train
from samgraft.shared.cli import main
from samgraft.shared.config import load_config
from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.device import choose_device
from store_factory import make_store

DEVICE = choose_device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=6, shape_zyx=(4, 24, 20))
    sam = make_sam(tiny_vit_t_spec(), image_size=32).state_dict()
    write_tensors(root / "base.safetensors", dict(sam))
    other = {name: 1.01 * t if t.is_floating_point() else t for name, t in sam.items()}
    write_tensors(root / "other.safetensors", other)
    for name, *overrides in (
        ("a",),
        ("b", "seed=1"),
        ("start", f"model.ckpt={root / 'other.safetensors'}"),
        ("unet", "model.arch=dynunet2d", "model.ckpt=null", "baseline.base_channels=4"),
        ("square", "data.keep_aspect=false"),
    ):
        train_run(root, name, *overrides)
    return root


def train_run(root, name, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(root / "store.zarr"), "batch_size": 2},
        "model": {"ckpt": str(root / "base.safetensors"), "image_size": 32},
        "adapter": {"r": 2, "lora_alpha": 2},
        "optim": {"warmup_steps": 1, "lr": 0.01},
        "trainer": {"max_steps": 2, "device": "cpu"},
        "watch": {"validate_every_n_steps": 2, "num_overlays": 1},
    }
    config = load_config(FinetuneConfig, layers=[layer], overrides=overrides)
    with RunFolder.open(root / "runs", name, config=config, stage="finetune") as folder:
        train.finetune(config, folder, DEVICE, train.prepare_seeded(config))


def tensors(path):
    return read_model(path).segmenter.sam.state_dict()


def test_average__weights_are_the_mean_and_the_model_is_an_ordinary_one(lab, tmp_path, caplog):
    a, b = lab / "runs" / "a", lab / "runs" / "b"
    with caplog.at_level(logging.INFO):
        result = average([a, b], out=tmp_path / "mean", device="cpu")
    first, second, mean = tensors(a), tensors(b), tensors(tmp_path / "mean")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, ((first[name].double() + second[name].double()) / 2).float(), atol=0)
    assert result.member_dice.keys() == {str(a), str(b)}
    assert f"{result.dice:.3f}  average" in caplog.text
    model = read_model(tmp_path / "mean")
    assert model.task.validation["best"] == result.dice
    assert model.card.notes[-1].startswith("mean of the weights of 2 models (sha256 ")
    assert main(["evaluate", str(tmp_path / "mean"), "--data", str(lab / "store.zarr"), "--split", "test"]) == 0


def test_average__of_one_model_twice_in_two_folders_is_that_model(lab, tmp_path):
    sg.average([lab / "runs" / "a", lab / "runs" / "a" / "model"], out=tmp_path / "same", device="cpu")
    first, same = tensors(lab / "runs" / "a"), tensors(tmp_path / "same")
    assert all(torch.equal(first[name], same[name]) for name in first)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ("start", "differs from a in base_sha256"),
        ("square", "differs from a in keep_aspect"),
        ("unet", "dynunet2d starts from random weights"),
        ("a", "two or more different"),
    ],
)
def test_average__other_models_are_refused_and_nothing_is_written(lab, tmp_path, other, match):
    with pytest.raises(UsageError, match=match):
        average([lab / "runs" / "a", lab / "runs" / other], out=tmp_path / "mean", device="cpu")
    assert not (tmp_path / "mean").exists()


def test_average__every_member_and_the_mean_have_their_own_score(lab, tmp_path, monkeypatch):
    """The score is replaced by the sum of the weights, which differs between the models."""

    def sum_of(model):
        return sum(float(p.detach().double().sum()) for p in model.segmenter.sam.parameters())

    monkeypatch.setattr(averaging, "_dice", lambda model, *_: sum_of(model))
    runs = [lab / "runs" / name for name in ("a", "b")]
    result = average(runs, out=tmp_path / "mean", device="cpu")
    members = [sum_of(read_model(path)) for path in runs]
    assert members[0] != members[1]
    assert result.member_dice == dict(zip(map(str, runs), members, strict=True))
    assert result.dice == pytest.approx(sum(members) / 2, rel=1e-5)


def test_average__encoders_of_other_pretrainings_are_refused(lab, tmp_path):
    other = shutil.copytree(lab / "runs" / "b", tmp_path / "other")
    card = json.loads((other / "model" / "card.json").read_text())
    card["data_manifest"]["pretraining"] = {"fingerprint": "x"}
    (other / "model" / "card.json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="differs from a in pretraining of the encoder"):
        average([lab / "runs" / "a", other], out=tmp_path / "mean", device="cpu")


def test_average__existing_folder_is_kept(lab, tmp_path):
    (tmp_path / "mean").mkdir()
    with pytest.raises(StorageError, match="the folder exists"):
        average([lab / "runs" / "a", lab / "runs" / "b"], out=tmp_path / "mean")


def test_common_split__what_a_member_trained_on_is_trained_on(lab):
    task = Task.read(lab / "runs" / "a" / "model")
    folds = [
        dataclasses.replace(task, split={"train": ["1", "2"], "val": ["3", "4"], "test": ["5", "6"]}),
        dataclasses.replace(task, split={"train": ["3", "2"], "val": ["1", "4", "6"], "test": ["5"]}),
    ]
    assert common_split(folds) == {"train": ["1", "2", "3"], "val": ["4", "6"], "test": ["5"]}


def test_joined_card__has_the_training_data_of_all(lab):
    card = read_model(lab / "runs" / "a").card
    card = dataclasses.replace(card, steps=2, slices_seen=30)
    other = dataclasses.replace(
        card, data_manifest={**card.data_manifest, "patient_ids": ["x"]}, notes=["bad ending"], steps=5, slices_seen=700
    )
    joined = joined_card([card, other])
    assert (joined.steps, joined.slices_seen) == (7, 730)
    assert set(joined.data_manifest["patient_ids"]) == {*card.data_manifest["patient_ids"], "x"}
    assert "bad ending" not in joined.notes
