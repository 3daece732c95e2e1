"""Run of one cell, fine-tuning and evaluation in processes of their own.

The cell is locked while it runs, and its result is written last.
"""

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
from samgraft.finetune.ending import describe_ending
from samgraft.finetune.evaluation.scores import per_patient, read_cases
from samgraft.finetune.study.cells import Cell
from samgraft.shared.errors import ExitCode
from samgraft.shared.files import write_json
from samgraft.shared.machine import THREADS

log = logging.getLogger(__name__)

# Not submitit's local executor: its jobs survive a killed study and would train on beside the next one, all of them
# start at once whatever --parallel is, their output and exit codes go through pickles, and peak memory is not measured.
PROGRAM = (sys.executable, "-m", "samgraft.finetune.study.child")
"""Command of a cell's processes."""
WAIT_FOR_ORPHAN_S = 180.0
"""Seconds for a child of a killed study to save and end before its cell is resumed."""
KIB = 1024 if sys.platform != "darwin" else 1
"""Bytes in the unit of ``ru_maxrss``, which is bytes on macOS."""


@dataclass(frozen=True, kw_only=True)
class CellFolder:
    """Files of a study's cells."""

    root: Path

    @property
    def runs(self) -> Path:
        """Folder with the runs, named by the keys of their cells."""
        return self.root / "runs"

    def file(self, key: str, end: str) -> Path:
        """Return a file of a cell.

        ``.json`` has scores and cost and exists when the cell is complete, ``.log`` the output of its processes,
        ``.cost.json`` seconds and memory so far, and ``.lock`` is locked while the cell runs.
        """
        return self.root / "cells" / f"{key}{end}"

    def read_result(self, key: str) -> dict[str, Any] | None:
        """Return the result of a complete cell, None if it is missing or damaged."""
        try:
            values = json.loads(self.file(key, ".json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) and values.get("key") == key else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of a cell."""

    key: str
    status: str
    """Status, one of done, failed, stopped (everything saved) and busy (another process runs it)."""
    exit_code: int = 0
    last_line: str = ""
    """Error or last line in the log of a failed cell."""


@dataclass(kw_only=True)
class Processes:
    """Running processes of a study."""

    running: set[int] = field(default_factory=set)
    stopping: bool = False
    """True after a request to stop."""

    def stop(self) -> None:
        """Send SIGTERM to every process, which then saves and ends."""
        self.stopping = True
        for pid in list(self.running):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:  # it ended meanwhile
                continue


Runner = Callable[[Sequence[str], Path, int, Processes], tuple[int, float, float]]
"""Function from arguments, log file, number of threads and processes to exit code, seconds and peak MiB."""


def run_samgraft(
    arguments: Sequence[str], log_file: Path, num_threads: int, processes: Processes
) -> tuple[int, float, float]:
    """Run one command in a process of its own and return exit code, seconds and peak MiB."""
    environment = {**os.environ, THREADS: str(num_threads), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log_file.open("a", encoding="utf-8") as out:
        # Nothing is written to the pipe. The system closes it when this process ends for any reason, even SIGKILL, and
        # the child then stops.
        child = subprocess.Popen(
            [*PROGRAM, *arguments], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, env=environment
        )
        processes.running.add(child.pid)
        try:
            # wait4 instead of Popen.wait, because it also returns the peak memory of this child alone.
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
    run: Runner = run_samgraft,
) -> Outcome:
    """Run one cell from its last saved step to its end.

    A killed fine-tuning is resumed; a complete cell is left as it is.
    """
    processes = processes or Processes()
    (folder.root / "cells").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.file(cell.key, ".lock"), timeout=0):
            # Read under the lock: another process may have completed the cell while this one waited for a core.
            if folder.read_result(cell.key) is not None:
                return Outcome(key=cell.key, status="done")
            wait_for_orphan(folder.runs / cell.key)
            return _run_locked(cell, folder, num_threads, processes, run)
    except Timeout:
        return Outcome(key=cell.key, status="busy", last_line="another process runs it")


def _run_locked(cell: Cell, folder: CellFolder, num_threads: int, processes: Processes, run: Runner) -> Outcome:
    log_file = folder.file(cell.key, ".log")
    for arguments in (cell.finetune_arguments(folder.runs), cell.evaluate_arguments(folder.runs)):
        if processes.stopping:
            return Outcome(key=cell.key, status="stopped", exit_code=ExitCode.STOPPED_SAVED)
        code, seconds, peak_mib = run(arguments, log_file, num_threads, processes)
        if arguments[0] == "finetune":
            # Counted for every session, so that the minutes of a resumed cell are those of its whole training.
            _add_cost(folder.file(cell.key, ".cost.json"), seconds=seconds, peak_mib=peak_mib)
        # A child that did not start yet is killed by SIGTERM without saving. After a stop that is no failure.
        if code == ExitCode.STOPPED_SAVED or (code != 0 and processes.stopping):
            return Outcome(key=cell.key, status="stopped", exit_code=ExitCode.STOPPED_SAVED)
        if code != 0:
            return Outcome(key=cell.key, status="failed", exit_code=code, last_line=find_error(log_file))
    write_json(folder.file(cell.key, ".json"), read_scores(cell, folder), sort_keys=False)
    return Outcome(key=cell.key, status="done")


def wait_for_orphan(run: Path) -> None:
    """Wait for a fine-tuning of a killed parent, which may still be saving its state."""
    # It holds the lock of its run until then.
    if (run / ".lock").exists():
        with FileLock(run / ".lock", timeout=WAIT_FOR_ORPHAN_S):
            return


def read_scores(cell: Cell, folder: CellFolder) -> dict[str, Any]:
    """Return Dice per patient, validation scores and cost of a finished cell."""
    run = folder.runs / cell.key
    task = json.loads((run / "model" / "task.json").read_text(encoding="utf-8"))
    ending = describe_ending(task["validation"])
    cost = json.loads(folder.file(cell.key, ".cost.json").read_text(encoding="utf-8"))
    rows = read_cases(run / "evaluation" / cell.part / "cases.csv")
    return {
        "key": cell.key,
        "dice_per_patient": per_patient(rows, "dice"),
        "validation_dice": task["validation"].get("best"),
        "zero_shot_dice": task["validation"].get("zero_shot"),
        "has_gain": ending is None or ending.is_good,
        "trainable_millions": round(sum(task["trainable_millions"].values()), 4),
        "train_seconds": cost["seconds"],
        "peak_mib": cost["peak_mib"],
    }


def _add_cost(path: Path, *, seconds: float, peak_mib: float) -> None:
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "peak_mib": 0.0}
    total = {"seconds": round(before["seconds"] + seconds, 2), "peak_mib": round(max(before["peak_mib"], peak_mib), 1)}
    write_json(path, total, sort_keys=False)


def find_error(log_file: Path) -> str:
    """Return the last error in a log, or else its last line."""
    lines = [
        line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    ]
    # Every refusal of `samgraft` starts with "error: "; a crash ends with the line of its exception.
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1][:300]
