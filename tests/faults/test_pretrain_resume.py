"""Results, pictures, probe and card of stage 1, also after a stop.

That every objective is resumed exactly is shown in ``test_objective_resume.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_factory import make_sam
from PIL import Image
from samgraft.shared.config import load_config
from samgraft.shared.errors import StoppedAndSaved
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training import preflight
from samgraft.shared.training.device import choose_device
from samgraft.shared.training.trainer import FitResult, fit
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import card_of, read_weights
from samgraft.shared.weights.save import save_encoder, save_sam
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.pretrain import pretrain
from store_factory import make_store
from tiny_encoders import TINY_VIT, tiny_encoder
from tiny_pretrain import act_after

NUM_STEPS = 4
MASKED_IMAGE = ("objective.masked_image.mask_unit_px=8", "objective.masked_image.decoder_dim=8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=4, shape_zyx=(4, 24, 20), labelled=False)
    card = Card(arch="vit_t", stem="conv1x1", image_size=32, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    save_encoder(tiny_encoder(), root / "base", card)
    return root


def config_of(lab: Path, *overrides: str) -> PretrainConfig:
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "num_held_out_slices": 2},
        "model": {"base": str(lab / "base"), "image_size": 32},
        "objective": {"name": "masked_image"},
        "optim": {"warmup_steps": 1},
        "trainer": {"max_steps": NUM_STEPS, "save_every_steps": 2},
        "watch": {"every_n_steps": 2, "num_panel_rows": 2},
    }
    return load_config(PretrainConfig, layers=[layer], overrides=overrides or MASKED_IMAGE)


def run(lab: Path, name: str, *overrides: str) -> Path:
    weights = pretrain(config_of(lab, *overrides), name=name, runs=lab / "runs", device=choose_device("cpu"))
    assert weights is not None
    return weights


def results(weights: Path) -> tuple[str, list[dict[str, float]]]:
    lines = (weights.parents[1] / "metrics.jsonl").read_text().splitlines()
    timings = ("perf/",)
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith(timings)} for line in lines]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), metrics


def test_results__card_describes_the_run(lab: Path) -> None:
    weights = run(lab, "card")
    card = Card.read(weights.with_name("card.json"))
    base = read_weights(lab / "base")
    assert (card.stage, card.objective, card.steps, card.slices_seen) == ("encoder", "masked_image", 4, 8)
    assert card.base_sha256 == base.sha256
    assert card.image_size == 32
    assert card.intensity["name"] == "mr-percentile"
    assert len(card.data_manifest["patient_ids"]) == 3
    assert card_of(read_weights(weights.parents[1]), image_size=32).arch == TINY_VIT.arch
    state = read_weights_names(weights.parents[1] / "ssl_state" / "state.safetensors")
    assert "mask_token" in state
    assert not any(name.startswith("encoder.") for name in state)


def test_results__count_the_slices_of_every_process(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable announces processes that Lightning starts, so that the trainer's count is written."""

    def by_two_processes(*arguments: Any, **keywords: Any) -> FitResult:
        result = fit(*arguments, **keywords)
        return dataclasses.replace(result, slices_seen=2 * result.slices_seen, world_size=2)

    monkeypatch.setattr("samgraft.ssl.pretrain.fit", by_two_processes)
    monkeypatch.setattr(preflight, "MAX_MEASURED_STEPS", 1)
    weights = run(lab, "two", *MASKED_IMAGE, "trainer.max_steps=2")
    folder = weights.parents[1]
    assert Card.read(weights.with_name("card.json")).slices_seen == 2 * 2 * 2
    assert "<dt>slices seen</dt><dd>8</dd>" in (folder / "report.html").read_text()
    assert json.loads((folder / "run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_results__of_two_processes_that_lightning_starts(lab: Path) -> None:
    command = [Path(sys.executable).with_name("samgraft"), "pretrain", "--data", lab / "store.zarr"]
    command += ["--base", lab / "base", "--runs", lab / "runs", "--name", "started", "--modality", "mri"]
    command += ["--method", "masked_image", "--preset", "cpu", "model.image_size=32", "model.num_frozen_depths=0"]
    command += ["data.batch_size=2", "trainer.devices=2", "trainer.max_steps=2", "trainer.accumulate=2"]
    command += ["optim.warmup_steps=1"]
    for _ in range(2):  # The second time only the results are written again.
        done = subprocess.run([*command, *MASKED_IMAGE], capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = lab / "runs" / "started"
        assert Card.read(folder / "encoder" / "card.json").slices_seen == 2 * 2 * 2 * 2
        assert json.loads((folder / "run.json").read_text())["world_size"] == 2


def read_weights_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_pictures__are_written_only_with_log_images(lab: Path) -> None:
    quiet = run(lab, "quiet").parents[1]
    shown = run(lab, "shown", *MASKED_IMAGE, "watch.log_images=true").parents[1]
    assert not (quiet / "panels").exists()
    assert "Pictures are off" in (quiet / "report.html").read_text()
    picture = Image.open(shown / "panels" / f"step-{NUM_STEPS:06d}.png")
    assert picture.size == (4 * (32 + 2), 2 * (32 + 2))
    assert (
        "output before" in (shown / "report.html").read_text()
        or "data:image/png" in (shown / "report.html").read_text()
    )


def test_dry_run__writes_nothing(lab: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {p for p in lab.rglob("*") if p.is_file()}
    with caplog.at_level("INFO"):
        done = pretrain(config_of(lab), name="dry", runs=lab / "runs", device=choose_device("cpu"), dry_run=True)
    assert done is None
    assert {p for p in lab.rglob("*") if p.is_file()} == before
    assert "new run" in caplog.text
    assert "12 training slices, volumes: 3, patients: 3 for training, 1 held out" in caplog.text
    assert re.search(r"disk +up to 0\.0\d GB for training states, ", caplog.text)
    milestones = (*MASKED_IMAGE, "trainer.keep_every_steps=1", "trainer.max_steps=1000")
    with caplog.at_level("INFO"):
        pretrain(config_of(lab, *milestones), name="dry", runs=lab / "runs", device=choose_device("cpu"), dry_run=True)
    assert re.search(r"disk +up to 0\.[1-9]\d GB for training states, ", caplog.text)


def test_probe__is_resumed_exactly_and_does_not_change_the_training(
    lab: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labelled = SliceStore.open(make_store(lab, num_patients=6, shape_zyx=(4, 24, 20), seed=50, name="labelled.zarr"))
    known = set(SliceStore.open(lab / "store.zarr").patient_ids)
    new = tuple(p for p in labelled.patient_ids if p not in known)
    Split(train=new[:1], val=new[1:], test=(), seed=0, store_fingerprint=labelled.fingerprint).save(
        lab / "labelled.split.json"
    )
    probe = (f"probe.store={labelled.path}", "probe.every_n_steps=2", "probe.num_train_slices=2")
    overrides = (*MASKED_IMAGE, *probe, f"model.base={lab / 'sam.safetensors'}")
    spec = dataclasses.replace(TINY_VIT, neck_dim=32)
    save_sam(make_sam(spec, image_size=32), lab / "sam.safetensors")
    with caplog.at_level("INFO"):
        whole = run(lab, "probed", *overrides)
    with monkeypatch.context() as patch:
        act_after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run(lab, "probed-stopped", *overrides)
    assert results(run(lab, "probed-stopped", *overrides)) == results(whole)
    rounds = [line for line in results(whole)[1] if "probe/dice" in line]
    assert [line["step"] for line in rounds] == [0, 2, 4]
    assert all(0 <= line["drift/box_dice"] <= 1 for line in rounds)
    unprobed = run(lab, "unprobed", *MASKED_IMAGE, f"model.base={lab / 'sam.safetensors'}")
    assert results(unprobed)[0] == results(whole)[0]
    assert "fitted on 2 slices of 1 patient" in caplog.text
    assert "no val or test patient of labelled.zarr (probe) among the training slices" in caplog.text
    assert "GiB for weights, gradients, AdamW" in caplog.text
    report = (whole.parents[1] / "report.html").read_text()
    assert "A linear head on the frozen features, fitted anew in every round (lesion of labelled.zarr" in report
    assert f'<td class="n">{rounds[0]["probe/dice"]:.3f}</td>' in report


def test_second_command__finds_the_finished_run_also_on_a_full_disk(
    lab: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO"):
        first = run(lab, "again")
    assert caplog.text.count("GB for training states") == 1, "one account of the disk, said once"
    before = first.read_bytes()
    usage = shutil.disk_usage(lab)._replace(free=0)
    monkeypatch.setattr(preflight, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    with caplog.at_level("INFO"):
        second = run(lab, "again")
    assert second.read_bytes() == before
