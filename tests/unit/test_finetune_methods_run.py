"""Fine-tuning methods through the command, with the model folder that they leave."""

import pytest
import torch
from samgraft.finetune.model_folder import read_model
from samgraft.shared.cli import main
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.load import load_sam
from store_factory import make_store
from tiny_sams import images_for, tiny_sam


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=5, shape_zyx=(3, 24, 24))
    write_tensors(root / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    return root


def run(name, *settings, method="lora"):
    return main([
        "finetune", "--method", method, "--ckpt", "base.safetensors", "--data", "store.zarr", "--name", name,
        "--preset", "cpu", "trainer.max_steps=3", "data.batch_size=2", "model.image_size=32",
        "watch.validate_every_n_steps=3", "watch.num_overlays=1", "optim.warmup_steps=1", "adapter.r=2", *settings,
    ])  # fmt: skip


def printed(capsys):
    """Return the terminal's text as one line, because log lines are wrapped."""
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_finetune__adapter_method_writes_base_weights_and_adapter(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run("bottleneck", method="adapter") == 0
    assert "adapter cannot be merged: the model is kept as base weights with an adapter" in printed(capsys)
    folder = place / "runs" / "bottleneck" / "model"
    assert not (folder / "sam.safetensors").exists()
    base, start = load_sam(folder / "base.safetensors", image_size=32), tiny_sam("vit_t")
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in start.state_dict().items())

    model = read_model(place / "runs" / "bottleneck")
    assert not model.is_merged
    with torch.inference_mode():
        segmented = model.segmenter(images_for("vit_t"))
        difference = (segmented - type(model.segmenter)(base, num_classes=1)(images_for("vit_t"))).abs().max()
    assert difference > 1e-4
    assert main(["evaluate", "runs/bottleneck", "--split", "test"]) == 0

    with pytest.raises(WeightsError, match="adapter that cannot be merged"):
        load_sam(folder)
    tensors = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(WeightsError, match="sha256 differs"):
        read_model(place / "runs" / "bottleneck")
    tensors.unlink()
    with pytest.raises(WeightsError, match="adapter_model"):
        read_model(place / "runs" / "bottleneck")


@pytest.mark.parametrize("method", ["eva", *(pytest.param(m, marks=pytest.mark.slow) for m in ("adalora", "pissa"))])
def test_finetune__method_writes_a_merged_model(place, monkeypatch, capsys, method):
    monkeypatch.chdir(place)
    assert run(method, "trainer.max_steps=10", method=method) == 0
    shown = printed(capsys)
    assert "adapters merged" in shown
    assert ("updates start along the main directions" in shown) is (method == "eva")
    model = read_model(place / "runs" / method)
    assert model.is_merged
    assert (model.folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "settings", "text"),
    [
        ("lorra", [], "Did you mean 'lora'?"),
        ("lora", ["adapter.last_blocks=5"], "at most the 4 transformer blocks"),
        ("lora", ["adapter.r=9"], "adapter.r must be at most 8"),
        ("lora", ["adapter.scope=decoder", "adapter.last_blocks=1"], "adapter.scope=encoder_decoder"),
        ("vera", ["adapter.targets=qv"], "adapter.targets=qv needs one of"),
        ("lora", ["cache.variants=2"], "cache.variants needs adapter.scope=decoder"),
        ("adalora", [], "trainer.max_steps must be at least 10"),
    ],
)
def test_finetune__bad_input_is_refused_without_traceback(place, monkeypatch, capsys, method, settings, text):
    monkeypatch.chdir(place)
    assert run("refused", *settings, method=method) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert not (place / "runs" / "refused").exists()
