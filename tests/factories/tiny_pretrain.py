"""Small data, weights and settings for stage 1 with every objective."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from samgraft.shared.config import load_config
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training import preflight
from samgraft.shared.training.boundary import StepBoundary
from samgraft.shared.training.device import choose_device
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.pretrain import pretrain
from store_factory import make_store
from tiny_encoders import plain_encoder, tiny_encoder

NUM_STEPS = 4
VIEWS = ("crops.num_local_crops=2", "head_hidden_dim=8")
SETTINGS: dict[str, tuple[str, ...]] = {
    "masked_image": ("mask_unit_px=8", "decoder_dim=8"),
    "mae": ("decoder_dim=16", "num_decoder_heads=2"),
    "dino": (*VIEWS, "output_dim=12", "head_bottleneck_dim=4"),
    "lejepa": (*VIEWS, "output_dim=4", "num_directions=8"),
    "feature": ("decoder_dim=16", "num_decoder_heads=2", "num_decoder_blocks=1"),
}
"""Small settings of every objective. A new objective needs an entry, and is then covered by all tests."""
PLAIN_ONLY = {"mae"}
"""Objectives that need an encoder that can leave tokens out."""


def make_lab(root: Path) -> Path:
    """Write four unlabelled patients and two base encoders."""
    make_store(root, num_patients=4, shape_zyx=(4, 24, 20), labelled=False)
    card = Card(arch="vit_t", stem="conv1x1", image_size=32, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    save_encoder(tiny_encoder(), root / "base", card)
    plain_card = Card(arch="vit_b", image_size=96, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    save_encoder(plain_encoder(), root / "plain", plain_card)
    return root


def make_labelled_store(lab: Path, *, seed: int) -> None:
    """Build ``labelled.zarr`` of patients outside the unlabelled store, and its split, anew."""
    path = lab / "labelled.zarr"
    shutil.rmtree(path, ignore_errors=True)
    store = SliceStore.open(make_store(lab, num_patients=7, shape_zyx=(4, 24, 20), seed=seed, name="labelled.zarr"))
    new = tuple(p for p in store.patient_ids if p not in set(SliceStore.open(lab / "store.zarr").patient_ids))
    parts = {"train": new[:1], "val": new[1:], "test": ()}
    Split(**parts, seed=0, store_fingerprint=store.fingerprint).save(lab / "labelled.split.json")


def config_of(lab: Path, objective: str, *overrides: str) -> PretrainConfig:
    """Return the configuration of a run of a few steps."""
    plain = objective in PLAIN_ONLY
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "num_held_out_slices": 2},
        "model": {
            "base": str(lab / ("plain" if plain else "base")),
            "arch": "vit_b" if plain else "vit_t",
            "image_size": 96 if plain else 32,
        },
        "objective": {"name": objective},
        "optim": {"warmup_steps": 1},
        "trainer": {"max_steps": NUM_STEPS, "save_every_steps": 2, "device": "cpu", "precision": "fp32"},
        "watch": {"every_n_steps": 2, "num_panel_rows": 2},
    }
    small = [f"objective.{objective}.{setting}" for setting in SETTINGS[objective]]
    return load_config(PretrainConfig, layers=[layer], overrides=[*small, *overrides])


def run(lab: Path, name: str, objective: str, *overrides: str) -> Path:
    """Train or resume, and return the run's folder."""
    config = config_of(lab, objective, *overrides)
    device = choose_device("cpu", precision=config.trainer.precision, devices=config.trainer.devices)
    with patch.object(preflight, "MAX_MEASURED_STEPS", 1):  # the estimate is not what is tested
        weights = pretrain(config, name=name, runs=lab / "runs", device=device)
    assert weights is not None
    return weights.parents[1]


def left_behind(run_path: Path) -> dict[str, Any]:
    """Return the hash of every byte that must be equal after a resume, and the metrics bit by bit."""
    states = sorted((run_path / "checkpoints").iterdir())
    files = [p for f in (run_path / "encoder", run_path / "ssl_state", states[-1]) for p in f.rglob("*") if p.is_file()]
    hashes = {str(p.relative_to(run_path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}
    lines = [json.loads(text) for text in (run_path / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: float(v).hex() for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return {**hashes, "metrics": metrics}


def act_after(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call ``act`` after ``step`` optimizer steps, before the trainer's own work at that step."""
    original = StepBoundary.on_train_batch_end

    def acting(self: StepBoundary, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == step:
            act()
        original(self, trainer, *arguments)

    monkeypatch.setattr(StepBoundary, "on_train_batch_end", acting)
