"""Command ``samgraft compare``, a paired comparison of evaluated runs on the same patients."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="evaluated runs, or folders with cases.csv")
    parser.add_argument("--split", default="test", choices=("train", "val", "test", "all"), help="part (default test)")
    parser.add_argument("--metrics", default="dice,nsd,hd95_mm", help="columns of cases.csv, separated by commas")
    parser.add_argument(
        "--out", type=Path, help="folder for comparison.csv, .json and report.html; default: print only"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from samgraft.finetune.evaluation.comparison import compare_runs, read_evaluated_run, render_pair, write_comparison
    from samgraft.finetune.evaluation.comparison_report import write_comparison_report
    from samgraft.finetune.evaluation.scores import METRIC_BY_KEY, interval_of

    metrics = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    runs = [read_evaluated_run(path, part=arguments.split) for path in arguments.runs]
    results = compare_runs(runs, metrics=metrics)
    for metric in metrics:
        for one in runs:
            interval = interval_of(one.rows, metric)
            log.info("%s, %s: %s", METRIC_BY_KEY[metric].title, one.name, interval.render() if interval else "n/a")
    for result in results:
        log.info("%s", render_pair(result))
    if arguments.out:
        write_comparison(runs, results, arguments.out, metrics=metrics)
        write_comparison_report(runs, results, arguments.out, metrics=metrics)
        log.info("written: comparison.csv, comparison.json and report.html in %s", arguments.out)
    return int(ExitCode.OK)


COMMAND = Command(help="paired comparison of evaluated runs", add_arguments=add_arguments, run=run)
