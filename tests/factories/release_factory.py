"""Finished runs of both stages on disk, with random instead of trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model_factory import make_sam, randomise, set_statistics
from samgraft.finetune.adapters import AdapterConfig, adapt
from samgraft.finetune.evaluation.evaluate import Evaluation, write_evaluation
from samgraft.finetune.evaluation.scores import CASE_COLUMNS
from samgraft.finetune.model_folder import write_model
from samgraft.finetune.task import Task
from samgraft.shared.config import config_to_yaml, load_config, packaged_config
from samgraft.shared.files import file_sha256, write_tensors
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.export.encoder_weights import write_encoder_weights
from samgraft.ssl.objectives import build_objective
from samgraft.ssl.preflight import pretraining_split

PATIENTS = {"train": ["p_aaaaaaaaaaaa"], "val": ["p_bbbbbbbbbbbb"], "test": ["p_cccccccccccc"]}


def _card(spec, image_size: int, **facts) -> Card:
    mean, std = list(spec.pixel_mean), list(spec.pixel_std)
    return Card(arch=spec.arch, stem=spec.variant, image_size=image_size, pixel_mean=mean, pixel_std=std, **facts)


def finished_model(root: Path, spec, *, image_size: int, num_classes: int = 1) -> Path:
    """Write a stage-2 run with a LoRA adapter and return its folder.

    The base weights are in ``root``.
    """
    base = root / "base.safetensors"
    sam = make_sam(spec, image_size=image_size)
    write_tensors(base, sam.state_dict())
    peft_model = adapt(sam, AdapterConfig(r=2), num_classes=num_classes)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    run = root / "runs" / "seg"
    (run / "model").mkdir(parents=True)
    peft_model.save_pretrained(str(run / "model" / "adapter"))
    preset = IntensityPreset()
    manifest = {"fingerprint": "0" * 64, "patient_ids": ["p_1"]}
    card = _card(spec, image_size, stage="model", intensity=preset.to_dict(), base_name="base.safetensors",
                 base_sha256=file_sha256(base), data_manifest=manifest)  # fmt: skip
    task = Task(
        class_ids=[3, 5, 7, 8, 9][:num_classes],
        class_names=["lesion", "organ", "edema", "core", "rim"][:num_classes], modality="mri",
        image_size=image_size, keep_aspect=True, intensity=preset.to_dict(), store_fingerprint="0" * 64,
        split_sha256="1" * 64, split=PATIENTS, validation={"zero_shot": 0.0125, "start": 0.031, "best": 0.4567},
    )  # fmt: skip
    write_model(peft_model.merge_and_unload(), run / "model", card=card, task=task)
    config = f"model:\n  ckpt: {json.dumps(str(base))}\n  base: null\n  image_size: {image_size}\n"
    (run / "config.yaml").write_text(config)
    hashes = {"encoder_sha256": file_sha256(base), "base_sha256": file_sha256(base)}
    (run / "run.json").write_text(json.dumps(hashes))
    return run


def write_scores(run: Path) -> Path:
    """Write scores of seven patients as ``evaluate`` does and return their folder."""
    folder = run / "evaluation" / "test"
    rows = [
        {column: 1.0 for column in CASE_COLUMNS}
        | {"patient_id": f"p{i}", "series_id": f"s{i}", "label_id": 3, "class": "lesion", "true_voxels": 9}
        | {"dice": 0.5 + 0.06 * i, "nsd": 0.4 + 0.07 * i, "hd95_mm": 9.5 - i, "predicted_voxels": 9}
        for i in range(7)
    ]
    write_evaluation(Evaluation(part="test", rows=rows, tolerance_mm=2.0), folder, provenance={})
    return folder


def finished_encoder(root: Path, store_path: Path, spec, *, image_size: int, method: str = "masked_image") -> Path:
    """Write a stage-1 run with its SSL state and return its folder."""
    layers = [
        packaged_config(f"pretrain/{method}-cpu.yaml"),
        {"modality": "mri", "data": {"store": str(store_path)}},
        {"model": {"base": "random", "arch": spec.arch, "image_size": image_size}},
    ]
    config = load_config(PretrainConfig, layers=layers)
    run = root / "runs" / "ssl"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("# stage: pretrain\n" + config_to_yaml(config))
    encoder = make_sam(spec, image_size=image_size).image_encoder
    objective = build_objective(encoder, config.objective, seed=config.seed, max_steps=config.trainer.max_steps)
    randomise(objective, scale=0.05)
    for network in (encoder, *(m for m in objective.modules() if isinstance(m, type(encoder)))):
        set_statistics(network)
    store = SliceStore.open(store_path)
    split = pretraining_split(config.data, store, seed=config.seed)
    card = _card(spec, image_size, stage="encoder", objective=method, steps=7, slices_seen=56, base_name="base.pth",
                 base_sha256="2" * 64, intensity=IntensityPreset().to_dict(),
                 data_manifest=pretrain_manifest(store, split.train))  # fmt: skip
    write_encoder_weights(objective, run, card)
    lines = [{"step": 0, "held_out/loss": 0.8123}, {"step": 7, "held_out/loss": 0.4321}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


class InThisProcess:
    """Double of ``subprocess`` that runs ``load_back`` in this process.

    A fresh process costs seconds. The slow end-to-end test starts real ones.
    """

    def __init__(self, capsys, clients=None) -> None:
        self.capsys, self.clients = capsys, clients

    def run(self, command, **_):
        from samgraft.shared.release import load_back

        code = load_back.main([command[-1]], self.clients)
        out = self.capsys.readouterr()
        return type("Done", (), {"returncode": code, "stdout": out.out, "stderr": out.err})()
