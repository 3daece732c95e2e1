"""A new fine-tuning method is one record. This file adds one and runs it through the command line."""

import dataclasses

import peft
import pytest
import torch
from samgraft.finetune.adapters import METHODS, AdapterConfig, MethodSpec
from samgraft.finetune.model_folder import read_model
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.load import load_sam
from store_factory import make_store
from tiny_sams import images_for, logits_of, tiny_sam


def build_fourier(request):
    """Return peft's FourierFT, which samgraft does not offer itself."""
    return peft.FourierFTConfig(**request.places, n_frequency=8 * request.config.r, scaling=30.0)


TOY = MethodSpec(build=build_fourier, options=frozenset({"r"}))


def test_method__added_as_one_record_trains_merges_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "fourier", TOY)
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path, num_patients=5, shape_zyx=(3, 24, 24))
    write_tensors(tmp_path / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    settings = [
        "trainer.max_steps=2", "data.batch_size=2", "model.image_size=32", "watch.validate_every_n_steps=2",
        "watch.num_overlays=1", "optim.warmup_steps=1", "adapter.r=2", "adapter.lora_dropout=0.5",
    ]  # fmt: skip
    start = ["--ckpt", "base.safetensors", "--data", "store.zarr", "--preset", "cpu", "--name", "toy"]

    assert main(["finetune", "--method", "fourier", *start, *settings]) == 0

    shown = " ".join(capsys.readouterr().err.split())
    assert "adapter.lora_dropout is not read by adapter.method=fourier" in shown
    assert "adapters merged" in shown
    model = read_model(tmp_path / "runs" / "toy")
    merged = load_sam(model.folder / "sam.safetensors", image_size=32)
    assert (logits_of(merged, "vit_t") - logits_of(tiny_sam("vit_t"), "vit_t")).abs().max() > 1e-6
    with torch.inference_mode():
        torch.testing.assert_close(model.segmenter(images_for("vit_t")), logits_of(merged, "vit_t"))
    assert "fourier" in (tmp_path / "runs" / "toy" / "report.html").read_text(encoding="utf-8")
    assert main(["evaluate", "runs/toy", "--split", "test"]) == 0


def test_method__that_is_not_in_the_table_is_refused_with_the_known_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path, num_patients=5, shape_zyx=(3, 24, 24))
    assert main(["finetune", "--ckpt", "a.pth", "--data", "store.zarr", "--method", "fourier"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "adapter.method must be one of lora, adapter" in shown


@pytest.mark.parametrize("name", METHODS)
def test_method__reads_only_options_that_exist(name):
    assert METHODS[name].options <= {field.name for field in dataclasses.fields(AdapterConfig)}
