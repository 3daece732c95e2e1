"""The command ``samgraft demo``, which runs both stages on the demo scans.

Each step is the command that a user would type, so that the demo shows how the program is used. It works in any folder.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from samgraft.shared.cli import Command, main
from samgraft.shared.errors import ExitCode

log = logging.getLogger(__name__)

ENCODER, MODEL = Path("runs/demo-encoder"), Path("runs/demo-model")
"""Folders of the runs of both stages."""
STEPS = (
    ("demo-data", "--modality", "mri"),
    ("pretrain", "--modality", "mri", "--name", ENCODER.name),
    ("finetune", "--ckpt", str(ENCODER), "--name", MODEL.name),
    ("evaluate", str(MODEL), "--split", "test"),
    ("predict", str(MODEL), "data/demo/scans/S1_scan.nii.gz", "--out", "masks/demo"),
)
"""Commands of the demo in order."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none of them")


def _run(arguments: argparse.Namespace) -> int:
    for number, step in enumerate(STEPS, start=1):
        log.info("%d of %d: samgraft %s", number, len(STEPS), shlex.join(step))
        # A step that is complete ends at once, so that a demo that was stopped resumes where it was.
        if not arguments.dry_run and (code := main(step)) != ExitCode.OK:
            return code
    if not arguments.dry_run:
        log.info("demo complete: open %s and %s", MODEL / "report.html", MODEL / "evaluation" / "test" / "report.html")
    return int(ExitCode.OK)


COMMAND = Command(help="run both stages on the demo scans, in any folder", add_arguments=_add_arguments, run=_run)
