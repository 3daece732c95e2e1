"""Tests that a killed and resumed run ends with the same bytes as an uninterrupted one."""

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


def has_same_results(root: Path, step: int) -> bool:
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
def test_fit__killed_and_resumed_gives_the_same_bytes(
    tmp_path: Path, settings: dict[str, object], kills: list[int]
) -> None:
    config = tiny_config(**settings)
    tiny_fit(tmp_path, "whole", config)
    for step in kills:
        with pytest.raises(Killed):
            tiny_fit(tmp_path, "killed", config, callbacks=[At(step, die)])
    result = tiny_fit(tmp_path, "killed", config)
    assert result.step == 15
    assert has_same_results(tmp_path, 15)


def test_fit__resumed_with_other_num_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "whole", tiny_config())
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, die)])
    tiny_fit(tmp_path, "killed", tiny_config(num_workers=1))
    assert has_same_results(tmp_path, 15)


def test_fit__killed_between_micro_steps_gives_the_same_bytes(tmp_path: Path) -> None:
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
    assert has_same_results(tmp_path, 15)


def test_fit__resumed_without_the_generators_gives_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This shows that the comparison of the other tests can fail."""
    tiny_fit(tmp_path, "whole", tiny_config())
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, die)])
    monkeypatch.setattr("samgraft.shared.training.boundary.restore_rng", lambda _: None)
    tiny_fit(tmp_path, "killed", tiny_config())
    assert not has_same_results(tmp_path, 15)


def test_fit__with_accumulation_logs_the_loss_at_the_same_scale(tmp_path: Path) -> None:
    tiny_fit(tmp_path, "one", tiny_config(max_steps=3))
    tiny_fit(tmp_path, "two", tiny_config(max_steps=3, accumulate=2))
    one, two = (float.fromhex(curve(tmp_path, n)[1][1]["train/loss"]) for n in ("one", "two"))
    assert two == pytest.approx(one, rel=0.3)  # The batches differ, but a missing division would give a factor of 2.


def test_tensorboard__after_a_resume_has_every_step_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", tiny_config(log_every_steps=1), callbacks=[At(11, die)])
    tiny_fit(tmp_path, "killed", tiny_config(log_every_steps=1))
    tb = tmp_path / "killed" / "tb"
    events = EventAccumulator(str(tb), purge_orphaned_data=False).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 16))
    assert [e.step for e in events.Scalars("val/score")] == [0, 3, 6, 9, 12, 15]
    names = [p.name for p in tb.iterdir()]
    assert names == ["events.out.tfevents.0000000002.samgraft"], "one file without a host name"


def test_fit__of_a_finished_run_only_loads_the_weights(tmp_path: Path) -> None:
    config = tiny_config()
    tiny_fit(tmp_path, "whole", config)
    before = final_bytes(tmp_path, "whole", 15), curve(tmp_path, "whole")
    made = []

    def make_module(**settings: int) -> TinyModule:
        made.append(TinyModule(**settings))
        return made[0]

    result = tiny_fit(tmp_path, "whole", config, module=make_module)
    assert result.resumed_from_step == 15
    assert (final_bytes(tmp_path, "whole", 15), curve(tmp_path, "whole")) == before
    stored = load_file(tmp_path / "whole" / "checkpoints" / "step-000015" / "state.safetensors")
    assert torch.equal(made[0].teacher.weight, stored["model.teacher.weight"])


def test_fit__with_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "a", tiny_config(), callbacks=[At(6, die)], data_fingerprint="one")
    with pytest.raises(DataError, match="are not those that the run was started with"):
        tiny_fit(tmp_path, "a", tiny_config(), data_fingerprint="two")


def test_check_resumable__with_another_number_of_processes_is_refused(
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
            record, config=tiny_config().trainer, device=device, counters=counters, continue_command="resume"
        )
    assert refusal.value.next_command == "torchrun --no-python --nproc-per-node 2 samgraft pretrain --name 'my run'"
    resized = tiny_config(allow_resize=True).trainer
    with caplog.at_level("WARNING"):
        assert not check_resumable(record, config=resized, device=device, counters=counters, continue_command="resume")
    assert "processes 2 -> 1: not bit-exact" in caplog.text
    assert f"threads {thread_count() + 1} -> {thread_count()}: not bit-exact" in caplog.text
    assert "torch 2.0.0 -> " in caplog.text


class Slow(pl.Callback):
    """Callback that writes the step to a file and lengthens it, so that a kill can hit any moment of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.path.write_text(str(trainer.global_step))
        time.sleep(0.01)


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.read_text() or "0").isdigit() and int(path.read_text() or "0") >= step):
        assert time.monotonic() < deadline, "the training does not progress"
        time.sleep(0.002)


def test_fit__after_sigkill_at_random_moments_gives_the_same_bytes(tmp_path: Path) -> None:
    """The run saves at every step, so that a kill hits it between steps or during a save."""
    config = tiny_config(max_steps=40, save_every_steps=1)
    tiny_fit(tmp_path, "whole", config)
    generator = random.Random()
    for step in (5, 15, 25):
        child = os.fork()  # A fork is faster than a new interpreter, which imports everything again.
        if child == 0:
            try:
                tiny_fit(tmp_path, "killed", config, callbacks=[Slow(tmp_path / "step")])
            finally:
                os._exit(1)  # The child must not continue in pytest.
        wait_for_step(tmp_path / "step", step)
        time.sleep(generator.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    result = tiny_fit(tmp_path, "killed", config)
    assert result.resumed_from_step is not None
    assert result.resumed_from_step >= 24
    assert final_bytes(tmp_path, "whole", 40) == final_bytes(tmp_path, "killed", 40)
    assert curve(tmp_path, "whole") == curve(tmp_path, "killed")


def test_metrics__after_sigkill_early_in_a_resumed_session_lose_no_line(tmp_path: Path) -> None:
    """The run is resumed at step 3, whose line contains a validation, and killed before it logs anything."""
    config = tiny_config(save_every_steps=3)
    tiny_fit(tmp_path, "whole", config)
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "killed", config, callbacks=[At(5, die)])
    child = os.fork()
    if child == 0:
        try:
            tiny_fit(tmp_path, "killed", config, callbacks=[At(4, lambda: os.kill(os.getpid(), signal.SIGKILL))])
        finally:
            os._exit(1)  # The child must not continue in pytest.
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [step for step, _ in curve(tmp_path, "killed")] == [0, 1, 2, 3]
    tiny_fit(tmp_path, "killed", config)
    assert has_same_results(tmp_path, 15)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_training import *
class PrintSteps(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        print("step", trainer.global_step, flush=True)
tiny_fit(Path({root!r}), "killed", tiny_config(max_steps=60, save_every_steps=1), callbacks=[PrintSteps()])
"""


@pytest.mark.slow
def test_fit__after_sigkill_of_another_interpreter_gives_the_same_bytes(tmp_path: Path) -> None:
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
