"""The command ``samgraft release``, which writes checked weights with card and checksums."""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode, WeightsError

log = logging.getLogger(__name__)

FORMATS = ("sam", "transformers", "peft", "onnx", "monai")
RESULT_OF_STAGE = {"model": "model/task.json", "encoder": "encoder/encoder.safetensors"}
"""File of a finished run, by the entry point that releases it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run of stage 1 (encoder) or stage 2 (model)")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--license", dest="licence", help="licence of the release, e.g. cc-by-4.0; there is no default")
    parser.add_argument(
        "--format",
        dest="formats",
        help=f"comma-separated list of {', '.join(FORMATS)}; default all that apply (sam is always written)",
    )
    parser.add_argument(
        "--data-statement",
        dest="statement",
        help="a sentence for the card on origin, consent and de-identification of the scans",
    )
    parser.add_argument(
        "--known-identifiers",
        type=Path,
        help="text file with one original id or name per line, none of which may occur in the release",
    )
    parser.add_argument(
        "--force", action="store_true", help="release a model that segments nothing or ended below its start"
    )
    parser.add_argument(
        "--continuable",
        action="store_true",
        help="stage 1: add decoder, teacher and optimizer, so that others can continue; prints a membership audit",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from samgraft.shared.release.request import Released, ReleaseRequest

    request = ReleaseRequest(
        run=arguments.run,
        out=arguments.out,
        licence=arguments.licence,
        formats=_names(arguments.formats),
        statement=arguments.statement,
        identifiers=_identifiers(arguments.known_identifiers),
        continuable=arguments.continuable,
        force=arguments.force,
    )
    released: Released = _releaser(arguments.run)(request)
    for file in released.checked:
        log.info(
            "%s: loaded back by %s; %s differ by %.1e",
            file.path,
            file.loaded_by,
            ", ".join(file.outputs),
            file.max_difference,
        )
    for line in released.left_out:
        log.info("%s", line)
    log.info("privacy gate: every byte searched, nothing found")
    log.info("released: %s (sha256sum -c SHA256SUMS verifies it)", arguments.out)
    return int(ExitCode.OK)


def _releaser(path: Path) -> Any:
    """Return the release function of the stage that the run folder belongs to."""
    if not path.exists():
        raise WeightsError("the run does not exist.", where=path.name, next_command="make finetune CKPT=runs/NAME")
    for stage, result in RESULT_OF_STAGE.items():
        if (path / result).is_file():
            [point] = entry_points(group="samgraft.releases", name=stage)
            return point.load()
    raise WeightsError(
        f"the run is not finished (it has neither {' nor '.join(RESULT_OF_STAGE.values())}).",
        where=path.name,
        next_command="the command that started the run; it resumes",
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None


def _identifiers(path: Path | None) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    return tuple(line.strip() for line in lines if line.strip())


COMMAND = Command(help="checked weights, card and checksums from a run", add_arguments=add_arguments, run=run)
