"""Scheduling of a study's cells, N at a time on this machine or as jobs of SLURM through submitit."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samgraft.finetune.study.cell_run import CellFolder, Outcome, Processes, Runner, run_cell, run_samgraft
from samgraft.finetune.study.cells import Cell
from samgraft.shared.counting import counted
from samgraft.shared.errors import UsageError
from samgraft.shared.files import write_text
from samgraft.shared.invocation import is_library_call
from samgraft.shared.machine import threads_per_process
from samgraft.shared.training.signals import STOP_SIGNALS

log = logging.getLogger(__name__)

OnEnd = Callable[[Outcome, int, int], None]
"""Callback with an outcome, the number of cells that ended and of all cells."""
POLL_S = 5.0
"""Seconds between queries of SLURM jobs."""


def run_locally(
    cells: Sequence[Cell],
    folder: CellFolder,
    *,
    num_parallel: int,
    on_end: OnEnd,
    on_start: Callable[[Cell], None] | None = None,
    run: Runner = run_samgraft,
) -> list[Outcome]:
    """Run cells N at a time, each in processes of its own.

    SIGTERM and Ctrl-C let running cells save and end. Complete cells are not started, and a failed cell does not stop
    the others.
    """
    if num_parallel < 1:
        raise UsageError(f"--parallel must be at least 1, got {num_parallel}.")
    processes = Processes()
    num_threads = threads_per_process(num_parallel)
    outcomes: list[Outcome] = []
    with forward_stop_signals(processes), ThreadPoolExecutor(max_workers=num_parallel) as pool:

        def one(cell: Cell) -> Outcome:
            if processes.stopping:
                return Outcome(key=cell.key, status="stopped")
            if on_start is not None:
                on_start(cell)
            return run_cell(cell, folder, num_threads=num_threads, processes=processes, run=run)

        futures = [pool.submit(one, cell) for cell in cells]
        for future in as_completed(futures):
            outcomes.append(future.result())
            on_end(outcomes[-1], len(outcomes), len(cells))
    return outcomes


@contextmanager
def forward_stop_signals(processes: Processes) -> Iterator[None]:
    """Forward stop signals to the child processes while a block runs."""
    # Python handles signals in the main thread only, and a program that calls samgraft keeps its own handlers.
    if threading.current_thread() is not threading.main_thread() or is_library_call():
        yield
        return

    def handle(number: int, _: object) -> None:
        log.warning("stopping. Running processes save and end; run the same command to resume.")
        processes.stop()

    handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_on_slurm(
    cells: Sequence[Cell],
    folder: CellFolder,
    *,
    num_parallel: int,
    parameters: dict[str, Any],
    on_end: OnEnd,
    cluster: str | None = None,
) -> list[Outcome]:
    """Submit one array job of at most N cells at a time and wait for it.

    Args:
        cells: Cells to run.
        folder: Files of the cells, on a file system that the nodes share.
        num_parallel: Cells at a time.
        parameters: Parameters of submitit: ``slurm_partition``, ``timeout_min``, ``mem_gb``, ``gpus_per_node``, ...
        on_end: Called after every cell.
        cluster: None uses SLURM; ``local`` and ``debug`` run the jobs on this machine, for tests.
    """
    try:
        import submitit
    except ModuleNotFoundError as err:
        raise UsageError(
            "--slurm needs submitit.", next_command="pip install 'samgraft[slurm]', then the same command"
        ) from err
    executor = submitit.AutoExecutor(folder=folder.root / "slurm", cluster=cluster or "slurm")
    # One array job with a limit instead of N jobs: the scheduler itself keeps at most N cells running.
    executor.update_parameters(name=folder.root.name, **parameters)
    if cluster is None:
        executor.update_parameters(slurm_array_parallelism=num_parallel)
    jobs = executor.map_array(run_stored_cell, [str(folder.root)] * len(cells), [write_cell(c, folder) for c in cells])
    log.info("%s submitted as job %s", counted(len(jobs), "cell"), jobs[0].job_id.split("_")[0])
    outcomes: list[Outcome] = []
    waiting = dict(zip([c.key for c in cells], jobs, strict=True))
    # Polled, because submitit has no call that waits for whichever job ends first.
    while waiting:
        for key in [key for key, job in waiting.items() if job.done()]:
            outcomes.append(_outcome_of_job(key, waiting.pop(key)))
            on_end(outcomes[-1], len(outcomes), len(cells))
        if waiting:
            time.sleep(POLL_S if cluster is None else 0.1)
    return outcomes


def _outcome_of_job(key: str, job: Any) -> Outcome:
    error = job.exception()
    if error is not None:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        return Outcome(key=key, status="failed", exit_code=1, last_line=f"job {job.job_id}: {last[:200]}")
    return Outcome(**job.result())


def write_cell(cell: Cell, folder: CellFolder) -> str:
    """Write a cell to a file for a job and return the file's name."""
    path = folder.root / "cells" / f"{cell.key}.cell.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dataclasses.asdict(cell)) + "\n")
    return path.name


def run_stored_cell(root: str, name: str) -> dict[str, Any]:
    """Run a stored cell inside a job and return its outcome as plain values."""
    folder = CellFolder(root=Path(root))
    values = json.loads((folder.root / "cells" / name).read_text(encoding="utf-8"))
    cell = Cell(**{**values, "settings": tuple(values["settings"])})
    # SLURM sends SIGTERM at the time limit. The cell then saves, and the next call of the study resumes it.
    processes = Processes()
    with forward_stop_signals(processes):
        outcome = run_cell(cell, folder, num_threads=threads_per_process(1), processes=processes)
    return dataclasses.asdict(outcome)
