"""Command ``samgraft study``, which runs a grid of fine-tunings."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode, UsageError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file, or a study that is shipped: demo, paper")
    parser.add_argument("--studies", type=Path, default=Path("studies"), help="folder of all studies (default studies)")
    parser.add_argument("--parallel", type=int, default=1, help="number of cells that run at the same time (default 1)")
    parser.add_argument("--slurm", action="store_true", help="run cells as an array job of SLURM (extra slurm)")
    parser.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of submitit, e.g. slurm_partition=gpu, timeout_min=240, gpus_per_node=1; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells without building, fetching or running anything"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    if arguments.slurm_option and not arguments.slurm:
        raise UsageError("--slurm-option needs --slurm.")
    from samgraft.finetune.study.study import log_plan, plan_study, read_slurm_options, run_study
    from samgraft.shared.config import packaged_config

    # A file of the user goes before a shipped study of that name.
    is_name = not arguments.file.exists() and arguments.file.name == str(arguments.file) and not arguments.file.suffix
    file = packaged_config(f"study/{arguments.file}.yaml") if is_name else arguments.file
    plan = plan_study(file, root=arguments.studies, make_inputs=not arguments.dry_run)
    if arguments.dry_run:
        log_plan(plan)
        for cell in plan.grid.cells:
            log.info("%s  %s", cell.key, cell.title)
        return int(ExitCode.OK)
    slurm = read_slurm_options(arguments.slurm_option) if arguments.slurm else None
    run_study(plan, num_parallel=arguments.parallel, slurm=slurm)
    return int(ExitCode.OK)


COMMAND = Command(help="a grid of fine-tunings: one table, one report", add_arguments=add_arguments, run=run)
