"""Command ``samgraft compare``, a paired comparison of evaluated runs on the same patients."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samgraft.shared.cli import Command, keywords
from samgraft.shared.errors import ExitCode, UsageError
from samgraft.shared.invocation import log_next

if TYPE_CHECKING:
    from pandas import DataFrame
    from samgraft.finetune.evaluation.comparison import EvaluatedRun
    from samgraft.shared.store.names import Names

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="evaluated runs, or folders with cases.csv")
    parser.add_argument(
        "--split", choices=("train", "val", "test", "all"), help="part (default test, or that of a folder)"
    )
    parser.add_argument("--metrics", default="dice,nsd,hd95_mm", help="columns of cases.csv, separated by commas")
    parser.add_argument(
        "--show-names",
        action="store_true",
        help="list the difference of every patient by name, also in patients.names.csv, which must stay local",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for comparison.csv, .json and report.html; default: print only"
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """Paired comparison of evaluated runs."""

    path: Path | None
    """Folder with the tables and the report, or None if none was given."""
    rows: list[dict[str, Any]]
    """One row per metric, class and pair of runs."""

    @property
    def report(self) -> Path | None:
        """Path of the HTML report."""
        return self.path / "report.html" if self.path else None

    @property
    def table(self) -> DataFrame:
        """Table with differences, intervals and p-values."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    compare(**keywords(arguments))
    return int(ExitCode.OK)


def compare(
    runs: Sequence[Path | str],
    *,
    split: str | None = None,
    metrics: Sequence[str] | str = ("dice", "nsd", "hd95_mm"),
    out: Path | str | None = None,
    show_names: bool = False,
) -> ComparisonResult:
    """Compare evaluated runs on the same patients.

    Args:
        runs: Two or more evaluated runs, or folders with ``cases.csv``.
        split: Part of the split, ``train``, ``val``, ``test`` or ``all``; None takes ``test`` of a run, and the part of
            a folder with ``cases.csv``.
        metrics: Columns of ``cases.csv``, as a list or separated by commas.
        out: Folder for tables and report; None writes nothing.
        show_names: List the differences of all patients by name, in a further file that must stay local.

    Raises:
        SamgraftError: If a run was not evaluated, or not on the same patients.
    """
    from samgraft.finetune.commands.evaluate import next_commands
    from samgraft.finetune.evaluation.comparison import (
        compare_runs,
        patient_differences,
        read_evaluated_run,
        render_pair,
        render_patient,
        write_comparison,
        write_patients,
    )
    from samgraft.finetune.evaluation.comparison_report import write_comparison_report
    from samgraft.shared.report.page import path_for_report
    from samgraft.shared.store.from_data import progress_bar

    keys = _metric_names(metrics)
    evaluated = [read_evaluated_run(Path(path), part=split) for path in runs]
    owner = _read_names([Path(path) for path in runs]) if show_names else None
    with progress_bar("comparing") as on_progress:
        results = compare_runs(evaluated, metrics=keys, on_progress=on_progress)
    _log_scores(evaluated, keys)
    for result in results:
        log.info("%s", render_pair(result))
    patients = patient_differences(evaluated, owner, metrics=keys) if owner else []
    for row in patients:
        log.info("%s", render_patient(row))
    # The tables are printed in any case, because a comparison is often only looked at.
    folder = Path(out) if out else None
    best = _best_model(evaluated)
    if folder:
        write_comparison(evaluated, results, folder, metrics=keys)
        commands = next_commands(Path(best.path), path_for_report(best.path)) if best else []
        write_comparison_report(evaluated, results, folder, metrics=keys, next_commands=commands)
        log.info("written: comparison.csv, comparison.json and report.html in %s", folder)
        if owner:
            log.info("with names, for you only: %s", write_patients(patients, folder).name)
    if best:
        log_next(log, next_commands(Path(best.path), str(Path(best.path))))
    return ComparisonResult(path=folder, rows=results)


def _metric_names(metrics: Sequence[str] | str) -> list[str]:
    names = metrics.split(",") if isinstance(metrics, str) else metrics
    keys = [name.strip() for name in names if name.strip()]
    if not keys:
        raise UsageError("--metrics must name at least one column of cases.csv, got none.")
    return keys


def _log_scores(runs: Sequence[EvaluatedRun], metrics: Sequence[str]) -> None:
    """Print the warnings of every run and its scores with their intervals."""
    from samgraft.finetune.evaluation.scores import METRIC_BY_KEY, interval_of

    for one in runs:
        for warning in one.summary.get("warnings", ()):
            log.warning("%s: %s", one.name, warning)
    for metric in metrics:
        for one in runs:
            interval = interval_of(one.rows, metric)
            log.info("%s, %s: %s", METRIC_BY_KEY[metric].title, one.name, interval.render() if interval else "n/a")


def _best_model(runs: Sequence[EvaluatedRun]) -> EvaluatedRun | None:
    """Return the run or release that was best on its validation patients, or None if only tables were compared."""
    from samgraft.finetune.model_folder import read_task

    # The compared scores are often of test patients, which must not choose a model.
    models = [run for run in runs if not (Path(run.path) / "cases.csv").is_file()]
    return max(models, key=lambda run: read_task(Path(run.path)).validation.get("best") or 0.0, default=None)


def _read_names(runs: Sequence[Path]) -> Names:
    """Return the names of the store that the runs were evaluated on, as the first one that has it gives."""
    from samgraft.finetune.evaluation.run_inputs import read_run_inputs
    from samgraft.shared.store.names import require_names
    from samgraft.shared.store.store import SliceStore

    stores = [inputs.store for inputs in map(read_run_inputs, runs) if inputs.store]
    if not stores:
        raise UsageError("--show-names needs the store, which is named by runs and not by releases. Compare a run.")
    return require_names(SliceStore.open(stores[0]))


COMMAND = Command(help="paired comparison of evaluated runs", add_arguments=add_arguments, run=run)
