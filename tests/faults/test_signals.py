"""Tests of stop signals and of failures of the loader workers."""

from __future__ import annotations

import ast
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver, resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_child import start_child
from samgraft.shared.cli import main
from samgraft.shared.errors import SamgraftError, StoppedAndSaved
from samgraft.shared.training import boundary as step_boundary
from samgraft.shared.training import periodic
from samgraft.shared.training.failures import explain_failure
from samgraft.shared.training.loader import StepLoader, build_step_loader
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.shared.training.signals import StopRequest, exit_on_stop_signals, handle_stop_signals
from tiny_dataset import FatalDataset, NoStart, PatientDataset, SlowStart, TinyDataset
from tiny_training import At, TinyModule, curve, final_bytes, noisy_validation, tiny_config, tiny_fit
from torch.utils.data import default_collate


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def has_same_results(root: Path) -> bool:
    return final_bytes(root, "whole", 15) == final_bytes(root, "killed", 15) and curve(root, "whole") == curve(
        root, "killed"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_fit__on_a_stop_signal_saves_the_step_and_exits_with_75(tmp_path: Path, number: signal.Signals) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        StoppedAndSaved, match=rf"{number.name} requested a stop; everything is saved at step 6\."
    ) as stop:
        tiny_fit(tmp_path, "killed", tiny_config(), callbacks=[At(6, lambda: send(number))])
    assert stop.value.exit_code == 75
    assert stop.value.next_command == "make pretrain NAME=killed"
    assert stop.value.where == "killed/checkpoints/step-000006"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert has_same_results(tmp_path)


def test_fit__stopped_in_a_validation_repeats_it_after_the_resume(tmp_path: Path) -> None:
    def interrupted(context: TaskContext) -> dict[str, float]:
        if context.step == 9:
            send(signal.SIGTERM)
        return noisy_validation(context) if context.step != 9 else (context.check_stop() or {})

    tasks = [PeriodicTask(name="validation", every_steps=3, run=interrupted, at_start=True)]
    with pytest.raises(StoppedAndSaved, match="at step 9"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert "val/score" not in dict(curve(tmp_path, "killed"))[9]
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert has_same_results(tmp_path)


def test_check_stop__on_a_stop_in_another_process_ends_the_task_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the other process receives the signal, but all processes take part in the validation."""
    is_stopped_elsewhere, finished = False, []

    def any_across_processes(*flags: bool) -> tuple[bool, ...]:
        return tuple(flag or is_stopped_elsewhere for flag in flags)

    def validation(context: TaskContext) -> dict[str, float]:
        nonlocal is_stopped_elsewhere
        is_stopped_elsewhere = context.step == 9
        context.check_stop()
        finished.append(context.step)
        return noisy_validation(context)

    tasks = [PeriodicTask(name="validation", every_steps=3, run=validation, at_start=True)]
    with monkeypatch.context() as patch:
        for module in (periodic, step_boundary):
            patch.setattr(module, "any_across_processes", any_across_processes)
        with pytest.raises(StoppedAndSaved, match="another process requested a stop; everything is saved at step 9"):
            tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert finished == [0, 3, 6]
    assert "val/score" not in dict(curve(tmp_path, "killed"))[9]
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert has_same_results(tmp_path)


def test_fit__stopped_in_the_last_validation_repeats_it_without_training(tmp_path: Path) -> None:
    def interrupted(context: TaskContext) -> dict[str, float]:
        if context.step == 15:
            send(signal.SIGTERM)
            context.check_stop()
        return noisy_validation(context)

    tasks = [PeriodicTask(name="validation", every_steps=3, run=interrupted, at_start=True)]
    with pytest.raises(StoppedAndSaved, match="at step 15"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert has_same_results(tmp_path)


def test_fit__repeats_a_task_without_training_under_the_rank_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without training there is no process group, but only the first process may write the results of a task."""
    ranks = []

    def run_task(context: TaskContext) -> dict[str, float]:
        if context.step == 15 and not ranks:
            ranks.append(context.rank)
            send(signal.SIGTERM)
            context.check_stop()
        ranks.append(context.rank)
        return {}

    tasks = [PeriodicTask(name="task", every_steps=15, run=run_task)]
    with pytest.raises(StoppedAndSaved, match="at step 15"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    monkeypatch.setattr("samgraft.shared.training.trainer.process_rank", lambda: 1)
    tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert ranks == [0, 1]


def test_fit__with_fifty_signals_at_random_times_saves_a_valid_state(tmp_path: Path) -> None:
    finished = threading.Event()

    def send_signals() -> None:
        generator = random.Random(1)
        for _ in range(50):
            time.sleep(generator.random() * 0.004)
            if finished.is_set():
                return
            send(signal.SIGUSR1)

    def start() -> None:
        threading.Thread(target=send_signals, daemon=True).start()

    def train() -> None:
        with handle_stop_signals(StopRequest()):  # The last signals may arrive after the training has ended.
            try:
                tiny_fit(tmp_path, "killed", tiny_config(max_steps=100), callbacks=[At(2, start)])
            finally:
                finished.set()
                time.sleep(0.02)

    with pytest.raises(StoppedAndSaved):
        train()
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.tmp"))
    assert tiny_fit(tmp_path, "killed", tiny_config(max_steps=100)).step == 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_exit_on_stop_signals__outside_of_training_exits_with_75(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["samgraft", "pretrain"])
    handlers = [signal.getsignal(n) for n in (number, signal.SIGINT)]

    def stopped() -> None:
        with exit_on_stop_signals(), handle_stop_signals(StopRequest()):
            pass  # Training installs handlers of its own and removes them.
        with exit_on_stop_signals():
            send(number)

    with pytest.raises(StoppedAndSaved, match=f"{number.name} requested a stop outside of training") as stop:
        stopped()
    assert (stop.value.exit_code, stop.value.next_command) == (75, "samgraft pretrain")
    assert [signal.getsignal(n) for n in (number, signal.SIGINT)] == handlers


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_main__stopped_in_the_pre_flight_exits_with_75(stage: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stopped(*_: object, **__: object) -> None:
        send(signal.SIGUSR1)

    monkeypatch.setattr("samgraft.ssl.prepare.prepare", stopped)
    monkeypatch.setattr("samgraft.finetune.commands.finetune.build_config", stopped)
    assert main([stage, *(["--ckpt", "runs/x"] if stage == "finetune" else [])]) == 75
    assert "stopped: SIGUSR1 requested a stop" in capsys.readouterr().err


SCRIPT = """
import sys, time, threading, os, signal
from samgraft.shared.training.signals import StopRequest, handle_stop_signals
stop = StopRequest()
stop.kept = "the verified state step-000004"
with handle_stop_signals(stop):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    print("still here")
"""


def test_stop_request__second_ctrl_c_exits_at_once_with_130() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 130
    assert "SIGINT: stopping after this step, saving everything (Ctrl-C again ends at once)" in done.stderr
    assert "kept   the verified state step-000004" in done.stderr
    assert "still here" not in done.stdout


def test_workers__ignore_signals_to_the_process_group(tmp_path: Path) -> None:
    """A scheduler signals every process of the job, but the parent still needs batches from its workers."""

    signalled: list[int] = []

    def signal_workers() -> None:
        forkservers = _children(os.getpid())
        signalled.extend(worker for server in forkservers for worker in _children(server))
        for pid in signalled:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR1)

    config = tiny_config(num_workers=2)
    with pytest.raises(StoppedAndSaved, match="at step 12"):
        tiny_fit(tmp_path, "killed", config, callbacks=[At(6, signal_workers), At(12, lambda: send(signal.SIGTERM))])
    assert len(signalled) == 2


def test_fit__with_a_killed_worker_explains_it_and_keeps_the_last_step(tmp_path: Path) -> None:
    message = r"a data worker died \((signal Killed|unexpectedly), probably because memory ran out\)"
    with pytest.raises(SamgraftError, match=message) as refusal:
        tiny_fit(tmp_path, "killed", tiny_config(num_workers=2), dataset=FatalDataset(at_sample=40))
    assert refusal.value.next_command == "the same with trainer.num_workers=1"
    # Sample 40 belongs to step 11, and the workers are up to four batches ahead. The last finished step was saved.
    assert re.fullmatch(r"the verified state step-0000(0[6-9]|10)", str(refusal.value.kept))
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert has_same_results(tmp_path)


def test_fit__with_a_hung_worker_explains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_TIMEOUT_S", 1)
    with pytest.raises(SamgraftError, match="no data worker delivered a batch in time"):
        tiny_fit(tmp_path, "a", tiny_config(num_workers=1), dataset=PatientDataset(at_sample=8))


def worker_batches(dataset: TinyDataset) -> list[Any]:
    loader = build_step_loader(
        dataset, batch_sampler=[[(0, 0)], [(1, 1)], [(2, 2)]], collate_fn=default_collate, num_workers=2
    )
    return list(loader)


def test_step_loader__with_slow_start_does_not_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_batches(TinyDataset())  # This starts the fork server.
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_TIMEOUT_S", 1)
    monkeypatch.setattr("samgraft.shared.training.loader.POLL_S", 0.05)
    assert len(worker_batches(SlowStart(seconds=1.5))) == 3
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_START_TIMEOUT_S", 0.1)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out: no worker within 0\.1 seconds"):
        worker_batches(SlowStart(seconds=0.5))


def load_and_report(pipe: int) -> None:
    """Load with two workers in a child process, report their process ids and wait to be killed."""
    loader = build_step_loader(
        TinyDataset(), batch_sampler=[[(0, 0)], [(1, 1)]], collate_fn=default_collate, num_workers=2
    )
    batches = iter(loader)
    next(batches)
    pids = [worker.pid for worker in multiprocessing.active_children()]
    os.write(pipe, repr([*pids, forkserver._forkserver._forkserver_pid]).encode())
    signal.pause()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_exit_with_parent__after_sigkill_ends_workers_and_fork_server() -> None:
    """They wait for each other and would otherwise keep running after the trainer was killed."""
    child, reported = start_child(load_and_report)
    pids = ast.literal_eval(reported.decode())
    assert len(pids) == 3
    assert all(map(is_running, pids))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_step_loader__with_a_worker_that_dies_at_its_start_fails_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) exited unexpectedly"):
        worker_batches(NoStart())
    assert time.monotonic() - started < 60  # The time-out of a batch is 120 s.


def test_find_first_failure__is_not_hidden_by_the_teardown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_worker(_: StepLoader) -> None:
        raise RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")

    monkeypatch.setattr(StepLoader, "__iter__", no_worker)
    with pytest.raises(SamgraftError, match="a data worker died") as refusal:
        tiny_fit(tmp_path, "a", tiny_config())
    assert refusal.value.kept == "nothing was saved yet"


def test_fit__out_of_memory_suggests_the_same_global_batch(tmp_path: Path) -> None:
    class OutOfMemory(TinyModule):
        def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
            if self.trainer.global_step == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().training_step(batch)

    with pytest.raises(SamgraftError, match=r"out of memory with batch_size 4 and trainer\.accumulate 1") as refusal:
        tiny_fit(tmp_path, "a", tiny_config(), module=OutOfMemory)
    assert refusal.value.exit_code == 2
    assert refusal.value.kept == "the verified state step-000004"
    assert (
        "a batch of 2 with trainer.accumulate=2 for the same global batch; or trainer.activation_checkpointing=true"
        in str(refusal.value.next_command)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "shared memory is full"),
        ("DataLoader worker (pid(s) 3, 4) exited unexpectedly", "a data worker died (unexpectedly"),
        ("unable to write to file </torch_1>: No space left on device (28), /dev/shm", "shared memory is full"),
    ],
)
def test_explain_failure__of_a_loader_names_the_cause(text: str, message: str) -> None:
    error = explain_failure(RuntimeError(text), batch_size=4, accumulate=1, num_workers=4, kept="all")
    assert isinstance(error, SamgraftError)
    assert message in str(error)


def test_explain_failure__of_another_error_returns_it() -> None:
    error = KeyError("x")
    assert explain_failure(error, batch_size=4, accumulate=1, num_workers=0, kept="all") is error


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_explain_failure__of_a_worker_that_died_with_a_batch_names_the_cause(tmp_path: Path) -> None:
    """The announced batch is in the memory of a dead process, which appears only as a broken socket."""
    with pytest.raises(OSError, match=r"No such file|refused") as lost:
        resource_sharer._resource_sharer.get_connection((str(tmp_path / "socket"), 1))
    explained = explain_failure(lost.value, batch_size=4, accumulate=1, num_workers=2, kept="all")
    assert re.search(r"a data worker died \(unexpectedly, probably because memory ran out\)", str(explained))
    other = ConnectionResetError("of an object store")
    assert explain_failure(other, batch_size=4, accumulate=1, num_workers=2, kept="all") is other
