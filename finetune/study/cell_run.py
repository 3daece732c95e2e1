"""One cell: fine-tune and evaluate in processes of their own, under a lock, with a result that is written last."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from samgraft.finetune.evaluation.scores import per_patient, read_cases
from samgraft.finetune.study.cells import Cell
from samgraft.shared.errors import ExitCode
from samgraft.shared.files import write_json

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "samgraft.finetune.study.child")
WAIT_FOR_ORPHAN_S = 180.0
"""How long a child of a killed study may take to save and end before its cell is taken up again."""
KIB = 1024 if sys.platform != "darwin" else 1


@dataclass(frozen=True, kw_only=True)
class CellFolder:
    """Where a study keeps its cells."""

    root: Path

    @property
    def runs(self) -> Path:
        """Run folders of the fine-tunings, named by key."""
        return self.root / "runs"

    def result(self, key: str) -> Path:
        """Scores and cost; exists when the cell is complete."""
        return self.root / "cells" / f"{key}.json"

    def log(self, key: str) -> Path:
        """What the processes of the cell print."""
        return self.root / "cells" / f"{key}.log"

    def cost(self, key: str) -> Path:
        """Seconds and memory of sessions that ended; a resumed cell adds to it."""
        return self.root / "cells" / f"{key}.cost.json"

    def lock(self, key: str) -> Path:
        """Held while the cell runs."""
        return self.root / "cells" / f"{key}.lock"

    def read(self, key: str) -> dict[str, Any] | None:
        """Return a complete cell's result; a damaged one counts as none."""
        try:
            values = json.loads(self.result(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) and values.get("key") == key else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    key: str
    status: str
    """done, failed, stopped (everything saved), busy (another process has it)."""
    exit_code: int = 0
    last_line: str = ""
    """Of its log, for a failed cell."""


@dataclass(kw_only=True)
class Processes:
    """Child processes that a stop signal must reach."""

    running: set[int] = field(default_factory=set)
    stopping: bool = False

    def stop(self) -> None:
        """Ask every child to save and end."""
        self.stopping = True
        for pid in list(self.running):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue


Run = Callable[[Sequence[str], Path, int, Processes], tuple[int, float, float]]
"""Runs ``samgraft`` with arguments, a log file and a number of threads; returns exit code, seconds and peak MiB."""


def run_samgraft(
    arguments: Sequence[str], log_file: Path, num_threads: int, processes: Processes
) -> tuple[int, float, float]:
    """Run one command in a process of its own and measure it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log_file.open("a", encoding="utf-8") as out:
        # The pipe is never written to: it ends when this process does, in whatever way, and the child then stops.
        child = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, env=environment
        )
        processes.running.add(child.pid)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        finally:
            processes.running.discard(child.pid)
            assert child.stdin is not None
            child.stdin.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, time.monotonic() - started, usage.ru_maxrss * KIB / 2**20


def run_cell(
    cell: Cell,
    folder: CellFolder,
    *,
    num_threads: int = 1,
    processes: Processes | None = None,
    run: Run = run_samgraft,
) -> Outcome:
    """Bring one cell to its end, from wherever it stands.

    A killed fine-tuning goes on from its last saved step; a complete cell is not touched.
    """
    processes = processes or Processes()
    folder.result(cell.key).parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.lock(cell.key), timeout=0):
            if folder.read(cell.key) is not None:
                return Outcome(key=cell.key, status="done")
            _wait_for_orphan(folder.runs / cell.key)
            return _run_locked(cell, folder, num_threads, processes, run)
    except Timeout:
        return Outcome(key=cell.key, status="busy", last_line="another process has it")


def _run_locked(cell: Cell, folder: CellFolder, num_threads: int, processes: Processes, run: Run) -> Outcome:
    log_file = folder.log(cell.key)
    for arguments in (cell.finetune_arguments(folder.runs), cell.evaluate_arguments(folder.runs)):
        if processes.stopping:
            return Outcome(key=cell.key, status="stopped", exit_code=ExitCode.STOPPED_SAVED)
        code, seconds, peak_mib = run(arguments, log_file, num_threads, processes)
        if arguments[0] == "finetune":
            _add_cost(folder.cost(cell.key), seconds=seconds, peak_mib=peak_mib)
        if code == ExitCode.STOPPED_SAVED or (code != 0 and processes.stopping):
            return Outcome(key=cell.key, status="stopped", exit_code=ExitCode.STOPPED_SAVED)
        if code != 0:
            return Outcome(key=cell.key, status="failed", exit_code=code, last_line=_refusal(log_file))
    write_json(folder.result(cell.key), read_scores(cell, folder), sort_keys=False)
    return Outcome(key=cell.key, status="done")


def _wait_for_orphan(run: Path) -> None:
    if (run / ".lock").exists():
        with FileLock(run / ".lock", timeout=WAIT_FOR_ORPHAN_S):
            return


def read_scores(cell: Cell, folder: CellFolder) -> dict[str, Any]:
    """Return what a finished cell measured: Dice per patient, validation, cost."""
    run = folder.runs / cell.key
    task = json.loads((run / "model" / "task.json").read_text(encoding="utf-8"))
    cost = json.loads(folder.cost(cell.key).read_text(encoding="utf-8"))
    rows = read_cases(run / "evaluation" / cell.part / "cases.csv")
    return {
        "key": cell.key,
        "dice_per_patient": per_patient(rows, "dice"),
        "validation_dice": task["validation"].get("best"),
        "zero_shot_dice": task["validation"].get("zero_shot"),
        "trainable_millions": round(sum(task["trainable_millions"].values()), 4),
        "train_seconds": cost["seconds"],
        "peak_mib": cost["peak_mib"],
    }


def _add_cost(path: Path, *, seconds: float, peak_mib: float) -> None:
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "peak_mib": 0.0}
    total = {"seconds": round(before["seconds"] + seconds, 2), "peak_mib": round(max(before["peak_mib"], peak_mib), 1)}
    write_json(path, total, sort_keys=False)


def _refusal(log_file: Path) -> str:
    """Return the last refusal in a log, else its last line."""
    lines = [
        line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1][:300]
