"""A run that was killed and started again ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.environment import software_versions, thread_count
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.resume import RunCounters, check_resumable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import At, Killed, TinyModule, curve, die, final_bytes, tiny_config, tiny_fit

TESTS = Path(__file__).parents[1] / "factories"


def same(root: Path, step: int) -> bool:
    return final_bytes(root, "whole", step) == final_bytes(root, "killed", step) and curve(root, "whole") == curve(
        root, "killed"
    )


@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        pytest.param({}, [5, 11], id="plain"),
        pytest.param({"num_workers": 2}, [9], id="workers"),
        pytest.param({"precision": "bf16"}, [7], id="bf16"),
        pytest.param({"accumulate": 2}, [6], id="accumulate"),
        pytest.param({"channels_last": True}, [6], id="channels_last"),
        pytest.param({"save_every_steps": 1}, [5], id="before-epoch-end"),
        pytest.param({"save_every_steps": 6}, [7], id="epoch-end"),
        pytest.param({"save_every_steps": 7}, [8], id="after-epoch-end"),
        pytest.param({}, [2], id="before-first-save"),
    ],
)
def test_killed_and_resumed__same_bytes(tmp_path: Path, settings: dict[str, object], kills: list[int]) -> None:
    config = tiny_config(**settings)
    tiny_fit(tmp_path, "whole", config)
    for step in kills:
        with pytest.raises(Killed):
            tiny_fit(tmp_path, "killed", config, callbacks=[At(step, die)])
    result = tiny_fit(tmp_path, "killed", config)
    assert result.step == 15
    assert same(tmp_path, 15)


def test_workers__change_on_resume_keeps_the_bytes(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "whole", tiny_config())
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, die)])
    tiny_fit(tmp_path, "killed", tiny_config(num_workers=1))
    assert same(tmp_path, 15)


def test_killed_inside_accumulation__same_bytes(tmp_path: Path) -> None:
    class DieInSecondHalf(TinyModule):
        halves_of_step_10 = 0

        def training_step(self, batch):
            self.halves_of_step_10 += self.trainer.global_step == 9
            if self.halves_of_step_10 == 2:
                raise Killed
            return super().training_step(batch)

    config = tiny_config(accumulate=2)
    tiny_fit(tmp_path, "whole", config)
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", config, module=DieInSecondHalf)
    tiny_fit(tmp_path, "killed", config)
    assert same(tmp_path, 15)


def test_other_seed_or_skipped_rng__would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: without the generators' states the bytes differ."""
    tiny_fit(tmp_path, "whole", tiny_config())
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, die)])
    monkeypatch.setattr("samgraft.shared.training.boundary.restore_rng", lambda _: None)
    tiny_fit(tmp_path, "killed", tiny_config())
    assert not same(tmp_path, 15)


def test_accumulation__same_loss_scale(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "one", tiny_config(max_steps=3))
    tiny_fit(tmp_path, "two", tiny_config(max_steps=3, accumulate=2))
    one, two = (float.fromhex(curve(tmp_path, n)[1][1]["train/loss"]) for n in ("one", "two"))
    assert two == pytest.approx(one, rel=0.3)  # other batches, same size; a factor of 2 would be a scaling mistake


def test_tensorboard__no_step_twice_after_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(log_every_steps=1), callbacks=[At(11, die)])
    tiny_fit(tmp_path, "killed", tiny_config(log_every_steps=1))
    tb = tmp_path / "killed" / "tb"
    events = EventAccumulator(str(tb), purge_orphaned_data=False).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 16))
    assert [e.step for e in events.Scalars("val/score")] == [0, 3, 6, 9, 12, 15]
    names = [p.name for p in tb.iterdir()]
    assert names == ["events.out.tfevents.0000000002.samgraft"], "one file, no host name in it"


def test_finished_run__is_only_loaded(tmp_path: Path) -> None:
    config = tiny_config()
    tiny_fit(tmp_path, "whole", config)
    before = final_bytes(tmp_path, "whole", 15), curve(tmp_path, "whole")
    made = []

    def remember(**settings: int) -> TinyModule:
        made.append(TinyModule(**settings))
        return made[0]

    result = tiny_fit(tmp_path, "whole", config, module=remember)
    assert result.resumed_from_step == 15
    assert (final_bytes(tmp_path, "whole", 15), curve(tmp_path, "whole")) == before
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-000015" / "state.safetensors")
    assert torch.equal(made[0].teacher.weight, stored["model.teacher.weight"])


def test_other_data__refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "a", tiny_config(), callbacks=[At(6, die)], data_fingerprint="one")
    with pytest.raises(DataError, match="are not those that the run was started with"):
        tiny_fit(tmp_path, "a", tiny_config(), data_fingerprint="two")


def test_other_world_size__refused_with_the_command(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["samgraft", "pretrain", "--name", "my run"])
    counters = RunCounters(seed=1, batch_size=4, accumulate=1)
    record = {
        **vars(counters),
        "world_size": 2,
        "num_threads": thread_count() + 1,
        "precision": "32-true",
        "versions": {**software_versions(), "torch": "2.0.0"},
    }
    device = DeviceChoice(accelerator="cpu", devices=1, num_nodes=1, precision="32-true", reason="")
    with pytest.raises(UsageError, match=r"another number of processes \(got 1, expected 2\)") as refusal:
        check_resumable(
            record, config=tiny_config().trainer, device=device, counters=counters, continue_command="go on"
        )
    assert refusal.value.next_command == "torchrun --no-python --nproc-per-node 2 samgraft pretrain --name 'my run'"
    resized = tiny_config(allow_resize=True).trainer
    with caplog.at_level("WARNING"):
        assert not check_resumable(record, config=resized, device=device, counters=counters, continue_command="go on")
    assert "processes 2 -> 1: not bit-exact" in caplog.text
    assert f"threads {thread_count() + 1} -> {thread_count()}: not bit-exact" in caplog.text
    assert "torch 2.0.0 -> " in caplog.text


class Slow(pl.Callback):
    """Announces and lengthens every step, so that a kill can hit its middle as well as a save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.path.write_text(str(trainer.global_step))
        time.sleep(0.01)


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.read_text() or "0").isdigit() and int(path.read_text() or "0") >= step):
        assert time.monotonic() < deadline, "the training does not get on"
        time.sleep(0.002)


def test_sigkill__same_bytes(tmp_path: Path) -> None:
    """Killed three times at random moments, saving at every step: between steps or in the middle of a save."""
    config = tiny_config(max_steps=40, save_every_steps=1)
    tiny_fit(tmp_path, "whole", config)
    chance = random.Random()
    for step in (5, 15, 25):
        child = os.fork()  # not a new interpreter: importing takes longer than all the rest
        if child == 0:
            try:
                tiny_fit(tmp_path, "killed", config, callbacks=[Slow(tmp_path / "step")])
            finally:
                os._exit(1)  # never back into pytest
        wait_for_step(tmp_path / "step", step)
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    result = tiny_fit(tmp_path, "killed", config)
    assert result.resumed_from_step is not None
    assert result.resumed_from_step >= 24
    assert final_bytes(tmp_path, "whole", 40) == final_bytes(tmp_path, "killed", 40)
    assert curve(tmp_path, "whole") == curve(tmp_path, "killed")


def test_sigkill_early_in_a_resumed_session__no_line_lost(tmp_path: Path) -> None:
    """Resumed at step 3 and killed before anything was logged again: the line of step 3 has a validation in it."""
    config = tiny_config(save_every_steps=3)
    tiny_fit(tmp_path, "whole", config)
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", config, callbacks=[At(5, die)])
    child = os.fork()
    if child == 0:
        try:
            tiny_fit(tmp_path, "killed", config, callbacks=[At(4, lambda: os.kill(os.getpid(), signal.SIGKILL))])
        finally:
            os._exit(1)  # never back into pytest
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [step for step, _ in curve(tmp_path, "killed")] == [0, 1, 2, 3]
    tiny_fit(tmp_path, "killed", config)
    assert same(tmp_path, 15)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_training import *
class Say(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        print("step", trainer.global_step, flush=True)
tiny_fit(Path({root!r}), "killed", tiny_config(max_steps=60, save_every_steps=1), callbacks=[Say()])
"""


@pytest.mark.slow
def test_sigkill_of_another_interpreter__same_bytes(tmp_path: Path) -> None:
    config = tiny_config(max_steps=60, save_every_steps=1)
    tiny_fit(tmp_path, "whole", config)
    script = SCRIPT.format(tests=str(TESTS), root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 7"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert tiny_fit(tmp_path, "killed", config).resumed_from_step in range(6, 60)
    assert final_bytes(tmp_path, "whole", 60) == final_bytes(tmp_path, "killed", 60)
    assert curve(tmp_path, "whole") == curve(tmp_path, "killed")
