"""Tests of the stop before an update with a non-finite loss or gradient."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samgraft.shared.errors import NumericalError, StoppedAndSaved, UsageError
from samgraft.shared.runs.training_state import read_state
from samgraft.shared.training import numerics
from samgraft.shared.training.numerics import find_suspect_batch
from tiny_training import At, TinyModule, curve, final_bytes, tiny_config, tiny_fit


def test_fit__with_a_nan_loss_stops_before_the_update_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["samgraft", "pretrain"])
    with pytest.raises(NumericalError, match=r"loss is nan and gradient norm nan at step 7 ") as refusal:
        tiny_fit(tmp_path, "a", tiny_config(), nan_at=7)
    assert refusal.value.kept == "last good state: step-000004"
    assert refusal.value.next_command == "samgraft pretrain trainer.resume_from=nan-step-7"
    assert [step for step, _ in curve(tmp_path, "a")] == list(range(7))
    kept = tmp_path / "a" / "nan-step-7"
    state = read_state(kept)
    assert state.step == 6
    assert all(t.isfinite().all() for name, t in state.tensors.items() if t.is_floating_point())
    assert load_file(kept / "batch.safetensors")["batch.image"].shape == (4, 3, 6, 6)
    with pytest.raises(NumericalError, match="at step 7"):
        tiny_fit(tmp_path, "a", tiny_config(resume_from="nan-step-7"), nan_at=7)
    # The kept state is exact. Without the NaN it gives the same result as a run that never had one.
    tiny_fit(tmp_path, "a", tiny_config(resume_from="nan-step-7"))
    tiny_fit(tmp_path, "whole", tiny_config())
    assert final_bytes(tmp_path, "whole", 15) == final_bytes(tmp_path, "a", 15)


def test_fit__with_nan_in_one_micro_step_saves_its_batch(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class NanFirst(TinyModule):
        def training_step(self, batch):
            result = super().training_step(batch)
            if self.trainer.global_step == 1:
                seen.append(batch["image"].clone())
                result["loss"] = result["loss"] * (float("nan") if len(seen) == 1 else 1)
            return result

    with pytest.raises(NumericalError) as refusal:
        tiny_fit(tmp_path, "a", tiny_config(accumulate=2), module=NanFirst)
    assert refusal.value.where.endswith("and the batch whose loss is not finite (micro-step 1 of 2)")
    assert len(seen) == 2
    assert torch.equal(load_file(tmp_path / "a/nan-step-2/batch.safetensors")["batch.image"], seen[0])


def test_fit__with_a_nan_gradient_only_saves_all_micro_batches(tmp_path: Path) -> None:
    class Steep(TinyModule):
        def training_step(self, batch):
            result = super().training_step(batch)
            result["loss"] = result["loss"] + (result["loss"] * 0).sqrt()  # The value is 0, its derivative is infinite.
            return result

    with pytest.raises(NumericalError, match=r"loss is [0-9.]+ and gradient norm nan at step 1 ") as refusal:
        tiny_fit(tmp_path, "a", tiny_config(accumulate=2), module=Steep)
    assert refusal.value.where.endswith("and all 2 micro-batches")
    kept = load_file(tmp_path / "a/nan-step-1/batch.safetensors")
    assert {"batch.0.image", "batch.1.image"} <= set(kept)


def test_find_suspect_batch__with_nan_in_another_process_returns_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([1, {"batch": torch.ones(1)}])
    monkeypatch.setattr(numerics, "gather_from_processes", lambda own: [own, next(others)])
    tensors, description = find_suspect_batch([torch.zeros(1)] * 2, torch.tensor([0.1, 0.2]), rank=0)
    assert tensors == {"batch": torch.ones(1)}
    assert description == "the batch whose loss is not finite (micro-step 2 of 2, process 2 of 2)"
    monkeypatch.setattr(numerics, "gather_from_processes", lambda own: [own, None])
    assert find_suspect_batch([torch.zeros(1)], torch.tensor([0.1]), rank=0)[1] == "the batch of the first process"


def test_fit__with_clip_grad_norm_limits_the_norm(tmp_path: Path) -> None:
    norms = []

    class RecordNorms(TinyModule):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            )

    tiny_fit(tmp_path, "a", tiny_config(max_steps=3, clip_grad_norm=0.25), module=RecordNorms)
    assert norms == pytest.approx([0.25] * 3, rel=1e-4)


def test_resume_from__given_again_keeps_the_steps_after_the_replay(tmp_path: Path, caplog) -> None:
    with pytest.raises(NumericalError):
        tiny_fit(tmp_path, "a", tiny_config(), nan_at=7)
    replay = tiny_config(resume_from="nan-step-7", save_every_steps=1)
    with pytest.raises(StoppedAndSaved):
        tiny_fit(tmp_path, "a", replay, callbacks=[At(9, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    with caplog.at_level("INFO"):
        result = tiny_fit(tmp_path, "a", replay)
    assert result.resumed_from_step == 9
    assert "nan-step-7 is ignored, the run has reached step-000009" in caplog.text


@pytest.mark.parametrize("name", ["step-000004", "nan-step-9"])
def test_resume_from__unknown_state_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(NumericalError):
        tiny_fit(tmp_path, "a", tiny_config(), nan_at=7)
    with pytest.raises(UsageError, match=r"kept state of the run \(nan-step-7\)") as refusal:
        tiny_fit(tmp_path, "a", tiny_config(resume_from=name))
    assert "to resume from the newest state in checkpoints/" in str(refusal.value)
    # The same command would be refused again.
    assert refusal.value.next_command is None
