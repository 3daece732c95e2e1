"""Runs of every objective that were stopped and resumed end with the bytes of an uninterrupted run.

The objectives come from ``OBJECTIVES``. A new one is covered when it has an entry in ``tiny_pretrain.SETTINGS``.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from killed_child import start_child
from process_pair import run_pair
from samgraft.shared.cli import main
from samgraft.shared.errors import ExitCode, NumericalError, StoppedAndSaved, WeightsError
from samgraft.shared.runs.training_state import find_damage
from samgraft.shared.weights.load import load_image_encoder, read_weights
from samgraft.ssl import initial_weights, module
from samgraft.ssl.objectives import OBJECTIVES
from tiny_encoders import TINY_VIT
from tiny_pretrain import NUM_STEPS, PLAIN_ONLY, SETTINGS, act_after, left_behind, make_lab, run
from tiny_training import Killed, die

OBJECTIVE_NAMES = list(OBJECTIVES)
MATRIX = [
    pytest.param((f"trainer.num_workers={workers}", f"trainer.precision={precision}", f"trainer.accumulate={n}"),
                 id=f"{workers} workers, {precision}, accumulate {n}")
    for workers in (0, 2) for precision in ("fp32", "bf16") for n in (1, 2)
]  # fmt: skip


ROUNDING_ONLY = ("lejepa", "image_encoder.layers.3.blocks.0.mlp.fc2.bias")
"""Objective and bias before a batch norm, whose gradient is rounding only. AdamW follows even that."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_settings__cover_every_objective() -> None:
    assert set(SETTINGS) >= set(OBJECTIVE_NAMES)


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_sigterm__resumed_run_has_the_same_bytes(lab: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """The run stops between two saves, so that both micro-steps of an accumulated batch are repeated."""
    settings = ("trainer.accumulate=2", "trainer.channels_last=true")
    whole = left_behind(run(lab, f"whole-{objective}", objective, *settings))
    with monkeypatch.context() as patch:
        act_after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run(lab, f"stopped-{objective}", objective, *settings)
    resumed = run(lab, f"stopped-{objective}", objective, *settings)
    assert left_behind(resumed) == whole
    base = read_weights(lab / ("plain" if objective in PLAIN_ONLY else "base")).tensors
    assert any(not torch.equal(base[name], tensor) for name, tensor in read_weights(resumed).tensors.items())


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_read_weights__unfinished_run_gives_the_encoder_that_it_would_export(lab: Path, objective: str) -> None:
    """An ``ssl_state`` alone never contains that encoder. The card gives the pixel statistics."""
    done = run(lab, f"start-{objective}", objective, "trainer.max_steps=2", "optim.lr=0.01")
    exported = read_weights(done)
    beside = read_weights(done / "ssl_state" / "state.safetensors")
    assert (beside.sha256, beside.spec) == (exported.sha256, exported.spec)
    shutil.rmtree(done / "encoder")
    with pytest.raises(WeightsError, match="ssl_state, which contains everything but the trained encoder"):
        read_weights(done / "ssl_state" / "state.safetensors")
    shutil.rmtree(done / "ssl_state")
    stopped = read_weights(done)
    assert stopped.tensors.keys() == exported.tensors.keys()
    assert all(torch.equal(tensor, exported.tensors[name]) for name, tensor in stopped.tensors.items())
    assert (stopped.spec, stopped.image_size) == (exported.spec, exported.image_size)
    names = ("objective", "steps", "intensity", "num_neighbours", "data_manifest", "base_sha256")
    assert all(getattr(stopped.card, name) == getattr(exported.card, name) for name in names)
    (done / "checkpoints" / "card.json").unlink()
    with pytest.raises(WeightsError, match="pixel statistics are unknown"):
        read_weights(done)


def test_random_weights__statistics_are_learnt_resumed_and_exported(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch norms of a random vit_t learn their statistics. Stage 2 and later runs keep them."""
    monkeypatch.setattr(initial_weights, "arch_spec", lambda _: TINY_VIT)
    averaged: list[object] = []
    monkeypatch.setattr(module, "average_statistics", averaged.append)
    settings = (
        "model.base=random",
        "trainer.accumulate=2",
        "trainer.activation_checkpointing=true",
        "watch.every_n_steps=4",
    )
    whole = run(lab, "random-whole", "masked_image", *settings)
    with monkeypatch.context() as patch:
        act_after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run(lab, "random-stopped", "masked_image", *settings)
    assert left_behind(run(lab, "random-stopped", "masked_image", *settings)) == left_behind(whole)
    encoder, card = load_image_encoder(whole)
    norms = {name: m for name, m in encoder.train().named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert all(norm.running_mean.any() and not norm.training for norm in norms.values())
    # Every micro-batch is counted once, although the backward pass runs each stage again.
    assert {int(norm.num_batches_tracked) for norm in norms.values()} == {2 * NUM_STEPS}
    assert "batch norms learnt their statistics in this run" in card.notes
    assert len(averaged) == 2 * NUM_STEPS  # once per step of both runs


def kill_child_at(step: int, lab: Path, name: str, objective: str, *settings: str) -> None:
    """Train in a child process and send it SIGKILL after ``step`` steps."""

    def train(tell: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            act_after(step, lambda: os.write(tell, b"x") and None, patch)
            run(lab, name, objective, *settings)

    child, said = start_child(train)
    assert said == b"x", "the child ended before it got to the step"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("settings", MATRIX)
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_sigkill__resumed_run_has_the_same_bytes(
    lab: Path, request: pytest.FixtureRequest, objective: str, settings: tuple[str, ...]
) -> None:
    """The run is killed before the first save, and again during the last steps."""
    name = request.node.callspec.id.replace(", ", "-").replace(" ", "")
    settings = (*settings, "trainer.save_every_steps=2")
    whole = left_behind(run(lab, f"{name}-whole", objective, *settings))
    for step in (1, 3):
        kill_child_at(step, lab, f"{name}-killed", objective, *settings)
    assert left_behind(run(lab, f"{name}-killed", objective, *settings)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_signal__exits_with_75_and_the_same_command_resumes(
    lab: Path, monkeypatch: pytest.MonkeyPatch, objective: str, number: signal.Signals
) -> None:
    """The public command, as a scheduler runs it."""
    base, size = ("plain", 96) if objective in PLAIN_ONLY else ("base", 32)
    name = f"command-{objective}-{number.name}"
    command = ["pretrain", "--data", str(lab / "store.zarr"), "--base", str(lab / base), "--method", objective]
    command += ["--preset", "cpu", "--runs", str(lab / "runs"), "--name", name, f"model.image_size={size}"]
    command += ["model.num_frozen_depths=0", "data.batch_size=2", "trainer.max_steps=3", "optim.warmup_steps=1"]
    command += [f"objective.{objective}.{setting}" for setting in SETTINGS[objective]]
    with monkeypatch.context() as patch:
        act_after(2, lambda: os.kill(os.getpid(), number), patch)
        assert main(command) == ExitCode.STOPPED_SAVED
    state = lab / "runs" / name / "checkpoints" / "step-000002"
    assert find_damage(state) is None
    assert main(command) == ExitCode.OK
    assert (lab / "runs" / name / "encoder" / "encoder.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two interpreters start, and train three times each
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_two_processes__killed_and_resumed_run_has_the_same_bytes(lab: Path, objective: str, strategy: str) -> None:
    ways = {strategy}
    if not (lab / "runs" / f"pair-{objective}-whole-ddp").exists():
        ways.add("ddp")
    for way in sorted(ways):
        for done in run_pair(lab, f"{objective}/{way}", worker="two_pretrainings.py", timeout_s=800):
            assert done.returncode == 0, done.stderr[-2000:]
            assert "same bytes: True" in done.stdout
    if strategy == "fsdp":  # The same training as ddp, up to the order of sums.
        ddp, fsdp = (read_weights(lab / "runs" / f"pair-{objective}-whole-{way}").tensors for way in ("ddp", "fsdp"))
        assert ddp.keys() == fsdp.keys()
        for name, tensor in ddp.items():
            atol = 1e-3 if (objective, name) == ROUNDING_ONLY else 1e-4
            torch.testing.assert_close(fsdp[name], tensor, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes__random_weights_have_the_same_statistics_and_bytes(lab: Path) -> None:
    for way in ("ddp", "fsdp"):
        for done in run_pair(lab, f"masked_image/{way}/random", worker="two_pretrainings.py", timeout_s=800):
            assert done.returncode == 0, done.stderr[-2000:]
            assert "same bytes: True" in done.stdout
    ddp, fsdp = (read_weights(lab / "runs" / f"pair-masked_imagerandom-whole-{way}").tensors for way in ("ddp", "fsdp"))
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_nan__run_stops_before_the_update_and_the_step_can_be_replayed(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a NaN loss at step 3 the weights are those of step 2. The run resumes when the step gives a number."""
    whole = left_behind(run(lab, "nan-whole", "masked_image"))
    step = 3
    with monkeypatch.context() as patch:
        spoil_loss_at(step, patch)
        with pytest.raises(NumericalError, match="loss is nan and gradient norm nan at step 3") as refusal:
            run(lab, "nan", "masked_image")
    assert str(refusal.value.next_command).endswith("trainer.resume_from=nan-step-3")
    state = lab / "runs" / "nan" / "nan-step-3"
    assert find_damage(state) is None
    assert (state / "batch.safetensors").is_file()
    with monkeypatch.context() as patch:
        spoil_loss_at(step, patch)
        with pytest.raises(NumericalError, match="at step 3"):
            run(lab, "nan", "masked_image", "trainer.resume_from=nan-step-3")
    replayed = left_behind(run(lab, "nan", "masked_image", "trainer.resume_from=nan-step-3"))
    encoder = "encoder/encoder.safetensors"
    assert replayed[encoder] == whole[encoder]
    assert replayed["metrics"] == whole["metrics"]


def spoil_loss_at(step: int, patch: pytest.MonkeyPatch) -> None:
    from samgraft.ssl.module import PretrainModule

    original = PretrainModule.training_step

    def spoiled(self: PretrainModule, batch, batch_idx):
        result = original(self, batch, batch_idx)
        if self.global_step + 1 == step:
            result["loss"] = result["loss"] * float("nan")
        return result

    patch.setattr(PretrainModule, "training_step", spoiled)


def test_comparison__can_fail(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without optimizer moments a resumed run ends with other bytes, which the comparison detects."""
    whole = left_behind(run(lab, "guard-whole", "masked_image"))
    with monkeypatch.context() as patch:
        act_after(3, die, patch)
        with pytest.raises(Killed):
            run(lab, "guard", "masked_image")
    monkeypatch.setattr("samgraft.shared.training.boundary.load_optimizer_state", lambda *_: None)
    assert left_behind(run(lab, "guard", "masked_image")) != whole
