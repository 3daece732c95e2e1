"""Tests of training states with damage, kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from samgraft.shared import files as tensor_file
from samgraft.shared.errors import StorageError, WeightsError
from samgraft.shared.runs import training_state
from samgraft.shared.runs.training_state import (
    find_damage,
    find_newest_state,
    finished_states,
    flatten_state,
    prune_states,
    read_state,
    rewrite_record,
    unflatten_state,
    write_state,
)
from samgraft.shared.training import preflight
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.shared.training.preflight import LOGS_BYTES, check_disk
from tiny_training import At, Killed, TinyModule, die, final_bytes, tiny_config, tiny_fit
from torch import nn


def write_tiny_state(parent: Path, step: int, *, size: int = 100) -> Path:
    tensors = {"model.w": torch.arange(size, dtype=torch.float32) + step, "model.empty": torch.zeros(0, 3)}
    rng = [{"torch": torch.get_rng_state()}]
    return write_state(
        parent, f"step-{step:06d}", step=step, record={"world_size": 1}, tensors=tensors, rng_per_rank=rng
    )


def test_write_tensors__is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([1.5, float("nan"), float("inf")]),
        "b.bf16": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.tensor([True, False]),
        "e": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "f": torch.arange(6).reshape(2, 3).T,
    }
    digest = tensor_file.write_tensors(tmp_path / "t.safetensors", tensors)
    assert tensor_file.file_sha256(tmp_path / "t.safetensors") == digest.sha256
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(), tensor.nan_to_num()), name


def test_flatten_state__round_trip_keeps_types_and_bits() -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0)}},
        "groups": [{"betas": (0.1, 1 / 3), "lr": float("inf"), "x": None}],
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(flatten_state(state, prefix="optimizer", tensors=tensors))
    assert list(tensors) == ["optimizer.state.0.step"]
    assert unflatten_state(json.loads(text), tensors) == state
    with pytest.raises(TypeError, match=r"extra.path must be a tensor, number, .* got PosixPath"):
        flatten_state({"path": Path()}, prefix="extra", tensors={})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "state.safetensors"), "state.safetensors: sha256 mismatch"),
        (lambda p: flip(p / "state.json"), "state.json: sha256 mismatch"),
        (lambda p: flip(p / "rng-0000.safetensors"), "rng-0000.safetensors: sha256 mismatch"),
        (lambda p: flip(p / "manifest.json", at=0), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"files": 3}'), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: os.truncate(p / "state.safetensors", 50), "state.safetensors has 50 of "),
    ],
)
def test_find_newest_state__with_a_damaged_state_renames_it_and_returns_an_older_one(
    tmp_path, damage, message, caplog
) -> None:
    write_tiny_state(tmp_path, 297)
    damage(write_tiny_state(tmp_path, 300))
    with caplog.at_level("WARNING"):
        chosen = find_newest_state(tmp_path)
    assert chosen == tmp_path / "step-000297"
    assert f"step-000300: {message}" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000297", "step-000300.corrupt"]


def test_find_newest_state__with_damaged_states_only_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(write_tiny_state(tmp_path, step) / "state.safetensors")
    for _ in range(2):  # The second time they are already renamed.
        with pytest.raises(WeightsError, match="all 2 training states of the run are damaged"):
            find_newest_state(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001.corrupt", "step-000002.corrupt"]


def test_find_newest_state__deletes_drafts_once_a_state_verifies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (300, 303):
        write_tiny_state(tmp_path, step).rename(tmp_path / f"step-{step:06d}.tmp")
    (tmp_path / "card.tmp").mkdir()
    with caplog.at_level("INFO"):
        assert find_newest_state(tmp_path) is None
    assert "step-000300.tmp is incomplete" in caplog.text
    write_tiny_state(tmp_path, 297)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert find_newest_state(tmp_path, set_aside=False) == tmp_path / "step-000297"
        assert caplog.text == ""
        assert find_newest_state(tmp_path) == tmp_path / "step-000297"
        assert find_newest_state(tmp_path) == tmp_path / "step-000297"
    (line,) = caplog.messages
    assert line == "deleted 2 leftovers of interrupted saves: step-000300.tmp, step-000303.tmp"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.tmp", "step-000297"]


def test_fit__deletes_the_draft_of_an_interrupted_nan_step(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "a", tiny_config(max_steps=3))
    (tmp_path / "a/nan-step-7.tmp").mkdir()
    tiny_fit(tmp_path, "a", tiny_config(max_steps=3))
    assert not (tmp_path / "a/nan-step-7.tmp").exists()


@pytest.mark.parametrize("die_at", range(3))
def test_rewrite_record__killed_at_any_moment_keeps_a_valid_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    """This happens after an interrupted validation, when the state is the only one of the run."""
    write_tiny_state(tmp_path, 300)
    act, calls = Path.rename, iter(range(100))

    def dying_rename(self: Path, target: Path) -> Path:
        if next(calls) == die_at:
            raise Killed
        return act(self, target)

    def dying_rmtree(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_rename)
        patch.setattr(training_state.shutil, "rmtree", dying_rmtree if die_at == 2 else shutil.rmtree)
        with pytest.raises(Killed):
            rewrite_record(read_state(tmp_path / "step-000300"), {"best": "new"})
    newest = find_newest_state(tmp_path)
    assert newest == tmp_path / "step-000300"
    assert read_state(newest).record.get("best") == ("new" if die_at == 2 else None)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000300"]


def test_write_state__of_the_same_step_on_a_failing_disk_restores_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_state(tmp_path, 300)
    act = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return act(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(StorageError) as refusal:
        write_tiny_state(tmp_path, 300)
    assert refusal.value.kept == "the verified state step-000300"
    assert find_damage(tmp_path / "step-000300") is None


def test_find_newest_state__compares_steps_and_not_times(tmp_path: Path) -> None:
    for step in (9, 1000000, 100):
        os.utime(write_tiny_state(tmp_path, step), (1, 1) if step == 1000000 else None)
    assert [p.name for p in finished_states(tmp_path)] == ["step-000009", "step-000100", "step-1000000"]
    assert find_newest_state(tmp_path) == tmp_path / "step-1000000"


def test_write_state__flushes_all_files_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    write_tiny_state(tmp_path, 3)
    files = ("state.safetensors", "state.json", "rng-0000.safetensors", "manifest.json")
    flushed = [event for name in files for event in (f"sync {name}.tmp", "sync step-000003.tmp")]
    assert events == [*flushed, "rename step-000003.tmp", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("die_at", range(9))
def test_write_state__killed_at_any_moment_keeps_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    older = write_tiny_state(tmp_path, 297)
    calls = iter(range(100))

    def dying_fsync(_: int) -> None:
        if next(calls) == die_at:
            raise Killed

    monkeypatch.setattr(os, "fsync", dying_fsync)
    with pytest.raises(Killed):
        write_tiny_state(tmp_path, 300)
    expected = "step-000300" if die_at == 8 else older.name  # At 8 only the new name is not flushed.
    assert find_newest_state(tmp_path) == tmp_path / expected
    assert find_damage(older) is None
    assert find_damage(write_tiny_state(tmp_path, 300)) is None


def test_prune_states__keeps_the_newest_two_and_milestones(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write_tiny_state(tmp_path, step)
    prune_states(tmp_path, keep_last=2, keep_every=30)
    assert [p.name for p in finished_states(tmp_path)] == [f"step-0000{n}" for n in (30, 60, 70)]
    prune_states(tmp_path, keep_last=0, keep_every=None)
    assert [p.name for p in finished_states(tmp_path)] == ["step-000060", "step-000070"]


def test_write_state__on_a_full_disk_keeps_the_older_state(tmp_path: Path) -> None:
    write_tiny_state(tmp_path, 297)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StorageError, match="step-000300 could not be written: File too large") as refusal:
            write_tiny_state(tmp_path, 300, size=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert refusal.value.exit_code == 5
    assert refusal.value.kept == "the verified state step-000297"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000297"]
    assert find_newest_state(tmp_path) == tmp_path / "step-000297"


@pytest.mark.parametrize(("code", "tries"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 4), (errno.ESTALE, 4)])
def test_write_state__repeats_writes_after_network_errors(tmp_path, monkeypatch, code, tries) -> None:
    calls = []

    def failing(_: int, __: memoryview) -> int:
        calls.append(1)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tensor_file.os, "write", failing)
    monkeypatch.setattr(tensor_file.time, "sleep", lambda _: None)
    with pytest.raises(StorageError, match=os.strerror(code)):
        write_tiny_state(tmp_path, 1)
    assert len(calls) == tries


def test_fit__on_a_full_disk_resumes_from_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    armed: list[bool] = []

    def full(descriptor: int, data: memoryview) -> int:
        if armed and "step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(tensor_file.os, "write", full)
    with pytest.raises(StorageError, match="No space left on device") as refusal:
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, lambda: armed.append(True))])
    assert refusal.value.kept == "the verified state step-000004"
    armed.clear()
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert final_bytes(tmp_path, "whole", 15) == final_bytes(tmp_path, "killed", 15)


@pytest.mark.parametrize(("step", "kept"), [(3, "nothing was saved yet"), (6, "the verified state step-000004")])
def test_fit__on_a_full_disk_in_a_periodic_task_names_the_kept_state(tmp_path: Path, step: int, kept: str) -> None:
    """Validation writes weights too, and a resume and the end of a run write further files."""

    def keep_best(context: TaskContext) -> dict[str, float]:
        if context.step == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/killed/best/step.safetensors")
        return {"val/score": 0.0}

    periodic = [PeriodicTask(name="validation", every_steps=3, run=keep_best)]
    with pytest.raises(StorageError, match=r"the disk is full: No space left on device\.") as refusal:
        tiny_fit(tmp_path, "killed", tiny_config(save_every_steps=4), periodic=periodic)
    assert refusal.value.where == "killed/step.safetensors"
    assert refusal.value.kept == kept
    assert refusal.value.next_command == "free space, then: make pretrain NAME=killed"


def test_write_state__of_a_nan_step_on_a_full_disk_names_the_kept_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_tiny_state(tmp_path / "a" / "checkpoints", 4)
    monkeypatch.setattr(training_state, "write_tensors", full)
    with pytest.raises(StorageError, match="nan-step-7 could not be written: No space") as refusal:
        write_state(tmp_path / "a", "nan-step-7", step=6, record={}, tensors={}, rng_per_rank=[])
    assert refusal.value.kept == "the verified state step-000004"
    assert refusal.value.where == "a"


def test_fit__without_enough_disk_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr("samgraft.shared.training.preflight.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs 0\.07 GB for its training states"):
        tiny_fit(tmp_path, "a", tiny_config())
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_check_disk__of_a_resumed_run_counts_existing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that just fits on its disk fits at every resume, and a finished run needs no space."""
    trainer = tiny_config(keep_every_steps=5).trainer
    module, run_path, size = nn.Linear(1000, 100), tmp_path / "a", 300_300
    whole = 4 * size * (trainer.keep_last + 3 + 2) + LOGS_BYTES

    def set_free(num_bytes: int) -> None:
        usage = SimpleNamespace(free=num_bytes)
        monkeypatch.setattr(preflight, "shutil", SimpleNamespace(disk_usage=lambda _: usage))

    set_free(whole)
    assert check_disk(module, trainer, run_path).startswith("up to 0.08 GB for training states")
    set_free(whole - 1)
    with pytest.raises(StorageError, match=r"needs 0\.08 GB for its training states \(0\.00 GB each"):
        check_disk(module, trainer, run_path)
    write_tiny_state(run_path / "checkpoints", 12, size=size).rename(run_path / "checkpoints" / "step-000012.tmp")
    with pytest.raises(StorageError):  # A draft is not deleted while there is no state.
        check_disk(module, trainer, run_path)
    for step in (5, 9, 10):
        write_tiny_state(run_path / "checkpoints", step, size=size)
    (run_path / "metrics.jsonl").write_bytes(bytes(1000))
    set_free(whole - 4 * 4 * size - 1000)
    assert check_disk(module, trainer, run_path).startswith("up to 0.07 GB more for training states")
    set_free(whole - 4 * 4 * size - 100_000)  # This is more than generators and manifest of each state.
    with pytest.raises(StorageError, match="GB more for its training states") as refusal:
        check_disk(module, trainer, run_path)
    assert refusal.value.kept == "the training states up to step-000010"
    write_tiny_state(run_path / "checkpoints", 15)
    set_free(0)
    assert check_disk(module, trainer, run_path) == "nothing more to train after step-000015"
    with pytest.raises(StorageError):
        check_disk(module, tiny_config(resume_from="nan-step-7").trainer, run_path)


def test_fit__with_unwritable_logs_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lose_logs() -> None:
        (tmp_path / "a" / "metrics.jsonl").unlink(missing_ok=True)
        (tmp_path / "a" / "metrics.jsonl").mkdir()  # A folder cannot be written, like a file on a full disk.

    with caplog.at_level("WARNING"):
        result = tiny_fit(tmp_path, "a", tiny_config(), callbacks=[At(6, lose_logs)])
    assert result.step == 15
    assert caplog.text.count("metrics.jsonl cannot be written") == 1


def test_fit__with_a_hook_after_the_save_is_refused(tmp_path: Path) -> None:
    class LateHook(TinyModule):
        def on_train_batch_end(self, *_):
            """Run after the state was saved."""

    with pytest.raises(TypeError, match="LateHook must not define on_train_batch_end"):
        tiny_fit(tmp_path, "a", tiny_config(), module=LateHook)


def test_write_state__uses_the_umask_for_its_files(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with pytest.raises(Killed):
            tiny_fit(tmp_path, "a", tiny_config(), callbacks=[At(6, die)])
    finally:
        os.umask(before)
    assert (tmp_path / "a/checkpoints/step-000004/state.safetensors").stat().st_mode & 0o777 == 0o660


def flip(path: Path, *, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
