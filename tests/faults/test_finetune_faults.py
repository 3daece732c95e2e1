"""Bad inputs of fine-tuning, evaluation and release, and their messages."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig, ModelConfig
from samgraft.finetune.evaluation.evaluate import evaluate
from samgraft.finetune.evaluation.metrics import class_scores
from samgraft.finetune.evaluation.validation import CaseResult
from samgraft.finetune.initial_weights import read_initial_weights
from samgraft.finetune.model_folder import read_model, write_model
from samgraft.finetune.release.release import release_model
from samgraft.finetune.task import Task
from samgraft.finetune.training.preparation import check_leak
from samgraft.finetune.training.rounds import ValidationRounds
from samgraft.shared.cli import main
from samgraft.shared.config import config_to_dict, load_config
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.release.request import ReleaseRequest
from samgraft.shared.runs.run_folder import check_run_folder
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.samples.split import Split, make_split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from store_factory import make_store

SPEC = tiny_vit_t_spec()


def card(spec=SPEC, **facts):
    return Card(
        arch=spec.arch, stem=spec.variant, image_size=32,
        pixel_mean=list(spec.pixel_mean), pixel_std=list(spec.pixel_std), **facts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a store of five patients, weights of two architectures, a stage-1 encoder and a finished run."""
    root = tmp_path_factory.mktemp("lab")
    store = SliceStore.open(make_store(root, num_patients=5, shape_zyx=(4, 32, 32)))
    sam = make_sam(SPEC, image_size=32)
    write_tensors(root / "base.safetensors", dict(sam.state_dict()))
    save_encoder(sam.image_encoder, root / "ssl" / "encoder", card(stage="encoder", objective="masked_image"))
    other = make_sam(tiny_plain_spec(), image_size=160)
    write_tensors(root / "other.safetensors", dict(other.state_dict()))
    (root / "notes.pth").write_bytes(b"not weights at all")
    split = make_split(store)
    task = Task(
        class_ids=[1], class_names=["lesion"], modality="mri", image_size=32, keep_aspect=True,
        intensity=store.intensity.to_dict(), store_fingerprint=store.fingerprint, split_sha256=split.sha256,
        split={"train": list(split.train), "val": list(split.val), "test": list(split.test)},
    )  # fmt: skip
    manifest = pretrain_manifest(store, split.train)
    write_model(sam, root / "runs" / "seg" / "model", card=card(stage="model", data_manifest=manifest), task=task)
    return root, store, split


def start(root, ckpt, **given):
    given = {"base": None, "image_size": 32, **given}
    return read_initial_weights(root / ckpt, **given)


def test_initial_weights__missing_file_or_no_weights_is_refused(place, tmp_path, monkeypatch):
    root, _, _ = place
    # The advice names runs and weights of the current folder, which a checkout has after the quick start.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="does not exist") as refusal:
        start(root, "nothing.pth")
    assert "make pretrain MODALITY=mri" in refusal.value.what
    with pytest.raises(WeightsError):
        start(root, "notes.pth")


def test_initial_weights__another_architecture_is_refused(place):
    root, _, _ = place
    with pytest.raises(WeightsError, match="one architecture"):
        start(root, "ssl", base=root / "other.safetensors")
    with pytest.raises(WeightsError, match="MODEL=vit_b"):
        start(root, "base.safetensors", model="vit_b")


def test_initial_weights__encoder_alone_gets_its_decoder_from_base(place, caplog):
    root, _, _ = place
    caplog.set_level("INFO")
    point = start(root, "ssl", base=root / "base.safetensors")
    _, reports = point.build()
    assert [r.part for r in reports] == ["sam", "image_encoder"]
    assert all(r.num_loaded == r.num_requested for r in reports)
    assert "prompt encoder and mask decoder: base.safetensors" in caplog.text
    assert point.is_continued


def test_initial_weights__base_without_decoder_is_refused(place):
    root, _, _ = place
    with pytest.raises(WeightsError, match="full SAM"):
        start(root, "ssl", base=root / "ssl")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--ckpt", "gone.pth", "--data", "store.zarr"], 4, "--ckpt does not exist"),
        (["--ckpt", "notes.pth", "--data", "store.zarr"], 4, "error"),
        ([], 2, "--ckpt and --base are both missing"),
        (["--ckpt", "base.safetensors", "--data", "no.zarr"], 3, "does not exist"),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "data.classes=[7]"], 3, "got 7; it has 1"),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "data.batchsize=2"], 2, "data.batch_size"),
        (
            ["--ckpt", "base.safetensors", "--data", "store.zarr", "data.batch_size=9999"],
            2,
            "batch_size must be at most",
        ),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "--method", "lorra"], 2, "lora"),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "--model", "vit_x"], 2, "model must be one of vit_t"),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "seed=-1"], 2, "seed must be in 0..4294967295"),
        (["--ckpt", "base.safetensors", "--data", "store.zarr", "--preset", "gpu"], 2, "cpu, cpu_long, default"),
    ],
)
def test_finetune__bad_input_gives_its_exit_code(place, monkeypatch, capsys, arguments, code, text):
    root, _, _ = place
    monkeypatch.chdir(root)
    before = sorted(p.name for p in (root / "runs").iterdir())
    assert main(["finetune", *arguments, "model.image_size=32"]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert sorted(p.name for p in (root / "runs").iterdir()) == before


def test_model_config__image_size_0_is_refused():
    with pytest.raises(ValueError, match=r"image_size\n  Input should be"):
        ModelConfig(image_size=0)


def test_finetune__incomplete_store_is_refused(tmp_path, place, monkeypatch, capsys):
    root, _, _ = place
    store = make_store(tmp_path, num_patients=3)
    (store / "complete.json").unlink()
    monkeypatch.chdir(root)
    assert main(["finetune", "--ckpt", "base.safetensors", "--data", str(store)]) == 3
    assert "completion mark" in capsys.readouterr().err


def test_check_leak__pretraining_on_test_patients_is_refused_by_id_and_content(place):
    _, store, split = place
    by_id = pretrain_manifest(store, split.test)
    by_content = {**by_id, "patient_ids": ["p_elsewhere"]}
    for manifest in (by_id, by_content):
        leaky = card(data_manifest=manifest)
        with pytest.raises(DataError, match="in the pretraining set") as refusal:
            check_leak(leaky, split, store, allow=False)
        assert "data.allow_transductive=true" in refusal.value.render()
        assert check_leak(leaky, split, store, allow=True)
    assert not check_leak(card(data_manifest=pretrain_manifest(store, split.train)), split, store, allow=False)
    assert not check_leak(None, split, store, allow=False)


def test_evaluate__has_no_side_effects_and_scores_the_test_part(place):
    root, store, split = place
    model = read_model(root / "runs" / "seg")
    model.segmenter.train()
    weights = {k: v.clone() for k, v in model.segmenter.state_dict().items()}
    modes = [m.training for m in model.segmenter.modules()]
    torch.manual_seed(5)
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluation = evaluate(model, store, split, part="test")
    assert {row["patient_id"] for row in evaluation.rows} == set(split.test)
    series_id, packed = next(iter(evaluation.predictions.items()))
    assert packed.unpack().shape == store.record(series_id).shape_zyx
    assert all(torch.equal(weights[k], v) for k, v in model.segmenter.state_dict().items())
    assert [m.training for m in model.segmenter.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state())
    assert np.array_equal(numpy_rng, np.random.get_state()[1])


def test_evaluate__refuses_patients_the_model_was_trained_on(place):
    root, store, split = place
    model = read_model(root / "runs" / "seg")
    swapped = Split(train=split.test, val=split.val, test=split.train, seed=0, store_fingerprint=store.fingerprint)
    with pytest.raises(DataError, match="trained on"):
        evaluate(model, store, swapped, part="test")
    # A release contains no patient ids, but hashes of their scans.
    nameless = dataclasses.replace(model, task=dataclasses.replace(model.task, split={}))
    with pytest.raises(DataError, match="trained on"):
        evaluate(nameless, store, swapped, part="test")


def test_read_model__changed_weights_are_refused(place, tmp_path):
    root, _, _ = place
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("card.json", "task.json"):
        (copy / name).write_bytes((root / "runs/seg/model" / name).read_bytes())
    data = bytearray((root / "runs/seg/model/sam.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "sam.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="sha256 differs"):
        read_model(copy)
    with pytest.raises(WeightsError, match="an encoder alone and no classes"):
        read_model(root / "ssl" / "encoder")


def test_release__contains_no_patient_ids(place, tmp_path):
    root, _, split = place
    request = ReleaseRequest(run=root / "runs" / "seg", out=tmp_path / "out", licence="cc-by-4.0", formats=("sam",))
    checked = release_model(request).checked
    assert {c.path for c in checked} == {"sam.safetensors", "sam.pth"}
    assert all(c.max_difference <= 1e-4 for c in checked)
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not any(p.encode() in everything for p in (*split.train, *split.val, *split.test))
    facts = json.loads((tmp_path / "out" / "card.json").read_text())
    assert facts["license"] == "cc-by-4.0"
    assert "not evaluated" in (tmp_path / "out" / "README.md").read_text()


def test_validation_rounds__best_is_kept_and_survives_a_resume(tmp_path):
    classes = ClassTable(ids=(1,), names=("a",))

    def result(predicted):
        scores = tuple(class_scores(np.array(predicted), np.array([1, 1, 0]), classes))
        return [CaseResult(series_id="s", patient_id="p", scores=scores, predicted=np.array(predicted))]

    rounds = ValidationRounds(tmp_path)
    for step, predicted in ((10, [1, 0, 0]), (20, [1, 1, 0]), (30, [0, 0, 0])):
        rounds.add(step, result(predicted), lambda step=step: {"w": torch.tensor([float(step)])})
    again = ValidationRounds(tmp_path)
    assert again.record.rounds == {10: pytest.approx(2 / 3), 20: 1.0, 30: 0.0}
    assert again.best_file().name == "step-000020.safetensors"
    again.remove_after(15)
    assert again.best_file().name == "step-000010.safetensors"
    other = ValidationRounds(tmp_path / "other", is_writer=False)  # the second of two processes
    other.add(10, result([1, 1, 0]), dict)
    assert other.record.best_step == 10
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="no validation scan shows a class"):
        rounds.add(40, [dataclasses.replace(result([0, 0, 0])[0], scores=())], dict)


def test_run_folder__renamed_setting_of_an_earlier_version_is_accepted(tmp_path):
    settings = {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "a.pth"}, "trainer": {"max_steps": 5}}
    config = load_config(FinetuneConfig, layers=[settings])
    stored = config_to_dict(config)
    stored["data"] = {**stored["data"], "num_workers": 0}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(f"# stage: finetune\n{yaml.safe_dump(stored, sort_keys=False)}")
    check_run_folder(tmp_path, "old", config=config, stage="finetune")
    with pytest.raises(UsageError, match=r"data\.num_workers is now called trainer\.num_workers"):
        load_config(FinetuneConfig, layers=[settings], overrides=["data.num_workers=2"])


@pytest.mark.parametrize(
    ("name", "message"), [("a/b", "plain folder name"), ("file", "file is a file"), ("foreign", "contains no run")]
)
def test_dry_run__bad_run_folder_is_refused(place, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(place[0])
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "scan.txt").write_text("x")
    start_from = ["--ckpt", "base.safetensors", "--data", "store.zarr", "--preset", "cpu"]
    assert main(["finetune", *start_from, "--runs", str(tmp_path), "--name", name, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "foreign", "scan.txt"]


def test_messages__contain_no_absolute_path(place):
    """Messages contain names of files and not their folders."""
    root, _, _ = place
    with pytest.raises(WeightsError) as refusal:
        start(root, "nothing.pth")
    assert str(Path(root)) not in refusal.value.render()
