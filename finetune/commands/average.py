"""Command ``samgraft average``, the mean of the weights of several fine-tuned models."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command, keywords
from samgraft.shared.errors import ExitCode

if TYPE_CHECKING:
    from samgraft.finetune.release.averaging import AverageResult

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="finished runs or releases of one task")
    parser.add_argument("--out", type=Path, required=True, help="folder of the averaged model, e.g. runs/mean")
    parser.add_argument(
        "--data", help="labelled store, to score on the validation scans; default the store of the first run"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    average(**keywords(arguments))
    return int(ExitCode.OK)


def average(
    runs: Sequence[Path | str], *, out: Path | str, data: Path | str | None = None, device: str = "auto"
) -> AverageResult:
    """Write one model whose weights are the mean of several fine-tuned models.

    Args:
        runs: Two or more finished runs or releases from the same initial weights.
        out: Folder to write, which must not exist.
        data: Labelled store, to score on the validation scans; None takes the store of the first run.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SamgraftError: If the models are of different tasks or initial weights, or ``out`` exists.
    """
    from samgraft.finetune.evaluation.run_inputs import read_run_inputs
    from samgraft.finetune.release.averaging import average_models
    from samgraft.shared.store.store import SliceStore
    from samgraft.shared.training.device import choose_device

    paths = [Path(path) for path in runs]
    source = data or read_run_inputs(paths[0]).store
    store = SliceStore.open(source) if source else None
    result = average_models(paths, Path(out), store=store, device=choose_device(device))
    _describe(result)
    log.info("written: %s", result.path)
    given = shlex.quote(str(source)) if source else "STORE.zarr"
    log.info("  next     make evaluate RUN=%s DATA=%s SPLIT=test", shlex.quote(str(out)), given)
    return result


def _describe(result: AverageResult) -> None:
    for name, dice in result.member_dice.items():
        log.info("foreground Dice on validation: %.3f  %s", dice, name)
    if result.dice is None:
        log.warning(
            "the average was not compared with its members, because no store was given or no validation patient was "
            "left out of the training of all of them. Evaluate it on the test part."
        )
        return
    log.info("foreground Dice on validation: %.3f  average", result.dice)
    best = max(result.member_dice, key=lambda name: result.member_dice[name])
    if result.dice < result.member_dice[best]:
        log.warning("the average is not better than its best member on validation. Use %s instead.", best)


COMMAND = Command(help="one model from the mean of several runs' weights", add_arguments=add_arguments, run=run)
