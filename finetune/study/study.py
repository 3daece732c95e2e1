"""Plan and run of a study, from its YAML file to table and report."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from samgraft.finetune.study.cell_run import CellFolder, Outcome, Runner, run_samgraft
from samgraft.finetune.study.cells import Cell, Grid, expand
from samgraft.finetune.study.config import StudyConfig
from samgraft.finetune.study.report import next_commands, table_lines, write_results
from samgraft.finetune.study.schedule import run_locally, run_on_slurm
from samgraft.shared.config import config_to_yaml, load_config
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, ExitCode, SamgraftError, StoppedAndSaved, UsageError
from samgraft.shared.files import write_text
from samgraft.shared.invocation import log_next
from samgraft.shared.machine import format_duration
from samgraft.shared.synthetic import synthetic_store

log = logging.getLogger(__name__)

SYNTHETIC = Path("data") / "synthetic"
"""Folder of synthetic stores."""


class StudyIncomplete(SamgraftError):
    """Failure of some cells of a study. The others are kept."""

    exit_code = ExitCode.DATA


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Study that is ready to run."""

    config: StudyConfig
    grid: Grid
    folder: CellFolder
    missing: list[Cell] = field(default_factory=list)
    """Cells without a result."""


def plan_study(file: Path, *, root: Path, make_inputs: bool = True) -> StudyPlan:
    """Read a study and list the cells without a result.

    Args:
        file: YAML file of the study.
        root: Folder of all studies.
        make_inputs: Make synthetic stores and download the demo's weights that the study names.

    Raises:
        UsageError: If the file is wrong.
        DataError: If a store does not exist.
    """
    config = load_config(StudyConfig, layers=[file])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name):
        raise UsageError(
            f"name must be a plain folder name of letters, digits and _.-, got {config.name!r}.", where=file.name
        )
    stores = {}
    for data_set in config.data_sets:
        path = Path(data_set.store) if data_set.store else SYNTHETIC / f"{data_set.synthetic_patients}.zarr"
        if data_set.synthetic_patients and make_inputs:
            synthetic_store(path, num_patients=data_set.synthetic_patients)
        if make_inputs and not path.exists():
            raise DataError(
                "the store of a data set must exist.",
                where=f"{data_set.name}: {path}",
                next_command=f"samgraft store build FOLDER --out {path} --modality {data_set.modality}",
            )
        stores[data_set.name] = str(path)
    grid = expand(config, stores=stores)
    if make_inputs:
        _fetch_demo_weights(grid)
    folder = CellFolder(root=root / config.name)
    return StudyPlan(
        config=config, grid=grid, folder=folder, missing=[c for c in grid.cells if folder.read_result(c.key) is None]
    )


def run_study(
    plan: StudyPlan, *, num_parallel: int = 1, slurm: dict[str, Any] | None = None, run: Runner = run_samgraft
) -> Path:
    """Run every cell without a result, write ``table.csv`` and ``report.html``, and return the report.

    Raises:
        UsageError: If another process runs this study.
        StoppedAndSaved: If a signal stopped the study.
        StudyIncomplete: If cells failed; the next call runs them again.
    """
    folder = plan.folder
    folder.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.root / ".lock", timeout=0):
            write_text(folder.root / "study.yaml", config_to_yaml(plan.config))
            log_plan(plan)
            outcomes = _run_missing(plan, num_parallel=num_parallel, slurm=slurm, run=run)
            return _finish(plan, outcomes)
    except Timeout as err:
        raise UsageError("another process runs this study. Wait for it or stop it.", where=folder.root.name) from err


def _run_missing(plan: StudyPlan, *, num_parallel: int, slurm: dict[str, Any] | None, run: Runner) -> list[Outcome]:
    if not plan.missing:
        return []
    titles = {cell.key: cell.title for cell in plan.missing}
    done_before, started = len(plan.grid.cells) - len(plan.missing), time.monotonic()

    def on_start(cell: Cell) -> None:
        log.info("running %s (its output: %s)", cell.title, plan.folder.file(cell.key, ".log"))

    def on_end(outcome: Outcome, ended: int, total: int) -> None:
        line = f": {outcome.last_line}" if outcome.last_line else ""
        # Cells that run at the same time shorten the rest in the same way as what is done.
        left_s = (time.monotonic() - started) / ended * (total - ended)
        left = f", about {format_duration(left_s)} left" if total > ended and outcome.status != "stopped" else ""
        log.info("[%d/%d] %s %s (%s)%s%s", done_before + ended, len(plan.grid.cells), outcome.status,
                 titles[outcome.key], outcome.key, line, left)  # fmt: skip

    if slurm is not None:
        return run_on_slurm(plan.missing, plan.folder, num_parallel=num_parallel, parameters=slurm, on_end=on_end)
    return run_locally(plan.missing, plan.folder, num_parallel=num_parallel, on_end=on_end, on_start=on_start, run=run)


def _finish(plan: StudyPlan, outcomes: list[Outcome]) -> Path:
    cells, folder = plan.grid.cells, plan.folder
    # Table and report are written in every case, also after a stop, from the cells that are complete.
    results = {cell.key: found for cell in cells if (found := folder.read_result(cell.key)) is not None}
    failed = {o.key: o.last_line for o in outcomes if o.status in {"failed", "busy"}}
    rows = write_results(plan.config, cells, results, folder.root, failed=failed)
    for line in table_lines(rows):
        log.info("%s", line)
    report = folder.root / "report.html"
    log.info("  table    %s", folder.root / "table.csv")
    log.info("  report   %s", report)
    log_next(log, next_commands(cells, results, folder.root))
    counts = Counter(outcome.status for outcome in outcomes)
    if counts["stopped"]:
        raise StoppedAndSaved(
            f"the study was stopped with {len(results)} of {counted(len(cells), 'cell')} complete.",
            kept="every complete cell and the last states of the others",
            next_command="run the same command to resume",
        )
    if failed:
        first = next(iter(failed))
        raise StudyIncomplete(
            f"{len(failed)} of {counted(len(cells), 'cell')} failed, the first one with: {failed[first]}",
            where=str(folder.file(first, ".log")),
            kept=f"{counted(len(results), 'complete cell')}, which are in table and report",
            next_command="fix the cause and run the same command: complete cells are not run again",
        )
    return report


def log_plan(plan: StudyPlan) -> None:
    """Print the number of cells to run."""
    grid, num = plan.grid, len(plan.grid.cells)
    notes = [f"{grid.num_duplicates} more with equal work"] if grid.num_duplicates else []
    notes += [f"{grid.num_skipped} left out by skip"] if grid.num_skipped else []
    extra = f" ({', '.join(notes)})" if notes else ""
    log.info(
        "study %s: %s%s, %d complete already", plan.config.name, counted(num, "cell"), extra, num - len(plan.missing)
    )


def _fetch_demo_weights(grid: Grid) -> None:
    # Imported here, because the networks take seconds that a study itself does not need.
    from samgraft.finetune.initial_weights import DEMO_BASE

    named = {cell.ckpt for cell in grid.cells} | {cell.base for cell in grid.cells}
    if str(DEMO_BASE) in named and not DEMO_BASE.is_file():
        from samgraft.shared.demo.heads import fetch_base_weights
        from samgraft.shared.fetch import cache_folder

        fetch_base_weights(DEMO_BASE, cache=cache_folder())


def read_slurm_options(texts: list[str]) -> dict[str, Any]:
    """Convert ``key=value`` options of submitit to values of YAML's types.

    Raises:
        UsageError: If an option has no key or no value.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"--slurm-option must look like key=value, got {text!r}.")
        values[key] = yaml.safe_load(value)
    return values
