"""Signals: finish the step, save, exit 75; a second Ctrl-C ends at once; nobody else is disturbed."""

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


def same(root: Path) -> bool:
    return final_bytes(root, "whole", 15) == final_bytes(root, "killed", 15) and curve(root, "whole") == curve(
        root, "killed"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_signal__saves_this_step_and_exits_75(tmp_path: Path, number: signal.Signals) -> None:
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
    assert same(tmp_path)


def test_signal_in_validation__dropped_and_made_up_for(tmp_path: Path) -> None:
    def interrupted(boundary: TaskContext) -> dict[str, float]:
        if boundary.step == 9:
            send(signal.SIGTERM)
        return noisy_validation(boundary) if boundary.step != 9 else (boundary.check_stop() or {})

    tasks = [PeriodicTask(name="validation", every_steps=3, run=interrupted, at_start=True)]
    with pytest.raises(StoppedAndSaved, match="at step 9"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert "val/score" not in dict(curve(tmp_path, "killed"))[9]
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert same(tmp_path)


def test_stop_of_another_process_in_validation__dropped_here_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the other process hears the signal; a validation in which all take part must not go on in this one."""
    heard_elsewhere, went_on = False, []

    def any_across_processes(*flags: bool) -> tuple[bool, ...]:
        return tuple(flag or heard_elsewhere for flag in flags)

    def validation(boundary: TaskContext) -> dict[str, float]:
        nonlocal heard_elsewhere
        heard_elsewhere = boundary.step == 9
        boundary.check_stop()
        went_on.append(boundary.step)
        return noisy_validation(boundary)

    tasks = [PeriodicTask(name="validation", every_steps=3, run=validation, at_start=True)]
    with monkeypatch.context() as patch:
        for module in (periodic, step_boundary):
            patch.setattr(module, "any_across_processes", any_across_processes)
        with pytest.raises(StoppedAndSaved, match="another process requested a stop; everything is saved at step 9"):
            tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert went_on == [0, 3, 6]
    assert "val/score" not in dict(curve(tmp_path, "killed"))[9]
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert same(tmp_path)


def test_signal_in_the_last_validation__made_up_for_without_training(tmp_path: Path) -> None:
    def interrupted(boundary: TaskContext) -> dict[str, float]:
        if boundary.step == 15:
            send(signal.SIGTERM)
            boundary.check_stop()
        return noisy_validation(boundary)

    tasks = [PeriodicTask(name="validation", every_steps=3, run=interrupted, at_start=True)]
    with pytest.raises(StoppedAndSaved, match="at step 15"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert same(tmp_path)


def test_made_up_for_by_every_process__under_its_own_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training there is no group of processes; still only the first one may write what a look leaves."""
    ranks = []

    def look(boundary: TaskContext) -> dict[str, float]:
        if boundary.step == 15 and not ranks:
            ranks.append(boundary.rank)
            send(signal.SIGTERM)
            boundary.check_stop()
        ranks.append(boundary.rank)
        return {}

    tasks = [PeriodicTask(name="look", every_steps=15, run=look)]
    with pytest.raises(StoppedAndSaved, match="at step 15"):
        tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    monkeypatch.setattr("samgraft.shared.training.trainer.process_rank", lambda: 1)
    tiny_fit(tmp_path, "killed", tiny_config(), periodic=tasks)
    assert ranks == [0, 1]


def test_fifty_signals_at_random_times__state_is_whole(tmp_path: Path) -> None:
    finished = threading.Event()

    def pester() -> None:
        chance = random.Random(1)
        for _ in range(50):
            time.sleep(chance.random() * 0.004)
            if finished.is_set():
                return
            send(signal.SIGUSR1)

    def start() -> None:
        threading.Thread(target=pester, daemon=True).start()

    def train() -> None:
        with handle_stop_signals(StopRequest()):  # the last ones may come after the training has ended
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
def test_signal_outside_of_training__is_exit_75_too(number: signal.Signals) -> None:
    handlers = [signal.getsignal(n) for n in (number, signal.SIGINT)]

    def stopped() -> None:
        with exit_on_stop_signals("samgraft pretrain"), handle_stop_signals(StopRequest()):
            pass  # training: its handlers go away again
        with exit_on_stop_signals("samgraft pretrain"):
            send(number)

    with pytest.raises(StoppedAndSaved, match=f"{number.name} requested a stop outside of training") as stop:
        stopped()
    assert (stop.value.exit_code, stop.value.next_command) == (75, "samgraft pretrain")
    assert [signal.getsignal(n) for n in (number, signal.SIGINT)] == handlers


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_command__stopped_in_its_pre_flight_can_be_requeued(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
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


def test_second_ctrl_c__ends_at_once_with_130() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 130
    assert "SIGINT: stopping after this step, saving everything (Ctrl-C again ends at once)" in done.stderr
    assert "kept   the verified state step-000004" in done.stderr
    assert "still here" not in done.stdout


def test_workers__ignore_signals_of_the_group(tmp_path: Path) -> None:
    """A scheduler signals every process of the job; the workers must live until the parent has its last batch."""

    signalled: list[int] = []

    def whole_group() -> None:
        forkservers = _children(os.getpid())
        signalled.extend(worker for server in forkservers for worker in _children(server))
        for pid in signalled:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR1)

    config = tiny_config(num_workers=2)
    with pytest.raises(StoppedAndSaved, match="at step 12"):
        tiny_fit(tmp_path, "killed", config, callbacks=[At(6, whole_group), At(12, lambda: send(signal.SIGTERM))])
    assert len(signalled) == 2


def test_worker_killed__said_in_words(tmp_path: Path) -> None:
    message = r"a data worker died \((signal Killed|unexpectedly), probably because memory ran out\)"
    with pytest.raises(SamgraftError, match=message) as refusal:
        tiny_fit(tmp_path, "killed", tiny_config(num_workers=2), dataset=FatalDataset(at_sample=40))
    assert refusal.value.next_command == "the same with trainer.num_workers=1"
    # Sample 40 belongs to step 11; the workers are up to four batches ahead. The last whole step was saved.
    assert re.fullmatch(r"the verified state step-0000(0[6-9]|10)", str(refusal.value.kept))
    tiny_fit(tmp_path, "killed", tiny_config())
    tiny_fit(tmp_path, "whole", tiny_config())
    assert same(tmp_path)


def test_worker_hangs__said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_TIMEOUT_S", 1)
    with pytest.raises(SamgraftError, match="no data worker delivered a batch in time"):
        tiny_fit(tmp_path, "a", tiny_config(num_workers=1), dataset=PatientDataset(at_sample=8))


def worker_batches(dataset: TinyDataset) -> list[Any]:
    loader = build_step_loader(
        dataset, batch_sampler=[[(0, 0)], [(1, 1)], [(2, 2)]], collate_fn=default_collate, num_workers=2
    )
    return list(loader)


def test_worker_starts_slowly__does_not_count_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    worker_batches(TinyDataset())  # the fork server is up
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_TIMEOUT_S", 1)
    monkeypatch.setattr("samgraft.shared.training.loader.POLL_S", 0.05)
    assert len(worker_batches(SlowStart(seconds=1.5))) == 3
    monkeypatch.setattr("samgraft.shared.training.loader.WORKER_START_TIMEOUT_S", 0.1)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out: no worker within 0\.1 seconds"):
        worker_batches(SlowStart(seconds=0.5))


def load_and_report(tell: int) -> None:
    """In a child: load with two workers, say which processes that took, wait to be killed."""
    loader = build_step_loader(
        TinyDataset(), batch_sampler=[[(0, 0)], [(1, 1)]], collate_fn=default_collate, num_workers=2
    )
    batches = iter(loader)
    next(batches)
    pids = [worker.pid for worker in multiprocessing.active_children()]
    os.write(tell, repr([*pids, forkserver._forkserver._forkserver_pid]).encode())
    signal.pause()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigkill__workers_and_their_fork_server_end_too() -> None:
    """They wait for each other: killed trainers left them all, and their memory, for ever."""
    child, said = start_child(load_and_report)
    pids = ast.literal_eval(said.decode())
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


def test_worker_dies_at_its_start__said_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) exited unexpectedly"):
        worker_batches(NoStart())
    assert time.monotonic() - started < 60  # the time-out of a batch is 120 s


def test_worker_dies_at_its_start__is_not_hidden_by_what_fails_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_worker(_: StepLoader) -> None:
        raise RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")

    monkeypatch.setattr(StepLoader, "__iter__", no_worker)
    with pytest.raises(SamgraftError, match="a data worker died") as refusal:
        tiny_fit(tmp_path, "a", tiny_config())
    assert refusal.value.kept == "nothing was saved yet"


def test_out_of_memory__names_the_same_global_batch(tmp_path: Path) -> None:
    class Greedy(TinyModule):
        def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
            if self.trainer.global_step == 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().training_step(batch)

    with pytest.raises(SamgraftError, match=r"out of memory with batch_size 4 and trainer\.accumulate 1") as refusal:
        tiny_fit(tmp_path, "a", tiny_config(), module=Greedy)
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
def test_loader_failures__said_in_words(text: str, message: str) -> None:
    error = explain_failure(RuntimeError(text), batch_size=4, accumulate=1, num_workers=4, kept="all")
    assert isinstance(error, SamgraftError)
    assert message in str(error)


def test_other_failures__stay_themselves() -> None:
    error = KeyError("x")
    assert explain_failure(error, batch_size=4, accumulate=1, num_workers=0, kept="all") is error


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_worker_dies_while_it_hands_a_batch_over__said_in_words(tmp_path: Path) -> None:
    """The announced batch lies in the memory of a process that is gone: no word of torch's, only a broken socket."""
    with pytest.raises(OSError, match=r"No such file|refused") as lost:
        resource_sharer._resource_sharer.get_connection((str(tmp_path / "socket"), 1))
    said = explain_failure(lost.value, batch_size=4, accumulate=1, num_workers=2, kept="all")
    assert re.search(r"a data worker died \(unexpectedly, probably because memory ran out\)", str(said))
    other = ConnectionResetError("of an object store")
    assert explain_failure(other, batch_size=4, accumulate=1, num_workers=2, kept="all") is other
