"""Release of a model that cannot be merged, as base weights and adapter."""

import numpy as np
import pytest
import torch
from model_factory import tiny_vit_t_spec
from release_factory import InThisProcess, finished_model
from samgraft.finetune.adapters import AdapterConfig, adapt, save_adapter
from samgraft.finetune.model_folder import read_model, write_model
from samgraft.finetune.prediction import Predictor
from samgraft.finetune.release import release_clients
from samgraft.finetune.release.release import release_model
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.release import load_back
from samgraft.shared.release.request import ReleaseRequest
from samgraft.shared.weights.load import load_sam


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A finished run whose adapter is no longer a no-op."""
    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys, release_clients.CLIENTS).run)
    path = finished_model(tmp_path, tiny_vit_t_spec(), image_size=64)
    model = read_model(path)
    sam = model.segmenter.sam
    peft_model = adapt(sam, AdapterConfig(method="adapter"), num_classes=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if ".bottleneck_." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = path / "model"
    (folder / "sam.safetensors").unlink()
    save_adapter(peft_model, folder / "adapter", method="adapter")
    write_model(sam, folder, card=model.card, task=model.task, is_merged=False)
    return path


def request(run, **values):
    return ReleaseRequest(**({"run": run, "out": run.parents[1] / "out", "licence": "cc-by-4.0"} | values))


def test_release__of_a_pair_segments_as_the_run_did(run):
    released = release_model(request(run))
    assert [c.path for c in released.checked] == ["base.safetensors"]
    assert set(released.checked[0].outputs) == {"automatic", "boxes", "embeddings"}
    assert len(released.left_out) == 5
    assert all("cannot be merged" in line for line in released.left_out)
    out = run.parents[1] / "out"
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "README.md", "SHA256SUMS", "card.json", "task.json", "base.safetensors",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    images = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = (read_model(path).segmenter.eval()(images) for path in (run, out))
        base = load_sam(out / "base.safetensors", image_size=64)
        untuned = type(read_model(run).segmenter)(base, num_classes=1)(images)
    assert torch.equal(ours, theirs)
    assert (ours - untuned).abs().max() > 1e-3
    assert "read_model" in (out / "README.md").read_text()
    with pytest.raises(WeightsError, match="adapter that cannot be merged"):
        load_sam(out)


def test_predict__with_a_pair_and_its_release_gives_the_same_labels(run):
    out = run.parents[1] / "out"
    release_model(request(run))
    volume_ZHW = np.random.default_rng(1).normal(100, 30, size=(3, 40, 36)).astype(np.float32)
    labels = [Predictor(path, device="cpu", precision="fp32")(volume_ZHW) for path in (run, out)]
    assert 0 < (labels[0] > 0).mean() < 1
    assert np.array_equal(*labels)


def test_release__of_a_pair_as_plain_sam_is_refused(run):
    with pytest.raises(UsageError, match="format transformers cannot be written: its adapters cannot be merged"):
        release_model(request(run, formats=("transformers",)))
    assert not (run.parents[1] / "out").exists()
