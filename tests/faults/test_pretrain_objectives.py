"""Every objective through all of stage 1, resumed to the same results and exported."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samgraft.shared.config import load_config
from samgraft.shared.errors import StoppedAndSaved
from samgraft.shared.training.device import choose_device
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.module import PretrainModule
from samgraft.ssl.pretrain import pretrain
from store_factory import make_store
from tiny_encoders import lively_encoder, plain_encoder

CROPS = {"num_local_crops": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "dino": {"output_dim": 12, "head_hidden_dim": 8, "head_bottleneck_dim": 4, "crops": CROPS},
    "lejepa": {"head_hidden_dim": 8, "output_dim": 4, "num_directions": 8, "crops": CROPS},
    "feature": {"decoder_dim": 16, "num_decoder_heads": 2, "num_decoder_blocks": 1},
    "mae": {"decoder_dim": 16, "num_decoder_heads": 2, "num_decoder_blocks": 1, "decoder": "windowed"},
}
CASES = [
    *(("dino", arch) for arch in ("vit_t", "vit_b")),
    *(("lejepa", arch) for arch in ("vit_t", "vit_b")),
    *(("feature", arch) for arch in ("vit_t", "vit_b")),
    ("mae", "vit_b"),
]
BESIDE = {
    "dino": "encoder.",  # The student's, because the teacher's encoder is exported.
    "lejepa": "head.",
    "feature": "frozen_copy.",
    "mae": "decoder.",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=4, shape_zyx=(4, 24, 20), labelled=False)
    card = Card(arch="vit_t", stem="conv1x1", image_size=32, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    save_encoder(lively_encoder(), root / "vit_t", card)
    save_encoder(
        plain_encoder(), root / "vit_b", Card(arch="vit_b", image_size=96, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    )
    return root


def run(lab: Path, name: str, objective: str, arch: str, **trainer: Any) -> Path:
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "num_held_out_slices": 3},
        "model": {"arch": arch, "base": str(lab / arch), "image_size": 32 if arch == "vit_t" else 96},
        "objective": {"name": objective, objective: SETTINGS[objective]},
        "optim": {"warmup_steps": 1, "lr": 1e-3},
        "trainer": {"max_steps": 2, "save_every_steps": 1} | trainer,
        "watch": {"every_n_steps": 2, "num_panel_rows": 2, "log_images": arch == "vit_b"},
    }
    config = load_config(PretrainConfig, layers=[layer])
    weights = pretrain(config, name=name, runs=lab / "runs", device=choose_device("cpu"))
    assert weights is not None
    return weights


def outcome(weights: Path) -> tuple[list[str], list[dict[str, float]]]:
    lines = (weights.parents[1] / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    state = weights.parents[1] / "ssl_state" / "state.safetensors"
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (weights, state)], metrics


def check(lab: Path, monkeypatch: pytest.MonkeyPatch, objective: str, arch: str) -> None:
    whole = run(lab, f"whole-{objective}-{arch}", objective, arch, accumulate=2)
    update = PretrainModule.optimizer_step

    def update_then_stop(self: PretrainModule, *arguments: Any, **keywords: Any) -> None:
        update(self, *arguments, **keywords)
        if self.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "optimizer_step", update_then_stop)
        with pytest.raises(StoppedAndSaved):
            run(lab, f"stopped-{objective}-{arch}", objective, arch, accumulate=2)
    resumed = run(lab, f"stopped-{objective}-{arch}", objective, arch, accumulate=2)
    assert outcome(resumed) == outcome(whole)

    base, learned = read_weights(lab / arch).tensors, read_weights(whole).tensors
    assert learned.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], learned[name])}
    assert changed
    assert not any(".neck." in name for name in changed)
    beside = load_file(whole.parents[1] / "ssl_state" / "state.safetensors")
    assert any(name.startswith(BESIDE[objective]) for name in beside)
    if objective == "dino":
        student = {name.replace("encoder.", "image_encoder.", 1): t for name, t in beside.items()}
        lead = {name for name in changed if not torch.equal(student[name], learned[name])}
        assert lead == changed  # The teacher was exported, and it differs from the student.
        assert not any(name.startswith("teacher.encoder.") for name in beside)
    assert (whole.parents[1] / "panels" / "step-000002.png").is_file() == (arch == "vit_b")
    assert "data:image/png" in (whole.parents[1] / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "arch"), CASES)
def test_objective__resumed_run_equals_an_uninterrupted_one(
    lab: Path, monkeypatch: pytest.MonkeyPatch, objective: str, arch: str
) -> None:
    check(lab, monkeypatch, objective, arch)
