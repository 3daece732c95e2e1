"""The command ``samgraft demo-data``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from samgraft.shared.cli import Command

log = logging.getLogger(__name__)

EXCLUDED_LINE = (
    "The unlabelled store leaves out the heads brain1 and brain2, the validation and test patients of the labelled one."
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("data/demo"), help="folder of the demo stores")
    parser.add_argument("--modality", default="mri", help="only mri has demo data")


def _run(arguments: argparse.Namespace) -> int:
    # Imported here: `samgraft --help` must not wait for zarr.
    from samgraft.shared.demo import SOURCES, demo_data

    paths = demo_data(arguments.root, arguments.modality)
    log.info(EXCLUDED_LINE)
    for what, path in (
        ("for pretraining", paths.unlabelled),
        ("for fine-tuning", paths.labelled),
        ("its split", paths.split),
        ("base weights", paths.weights),
    ):
        log.info("  %-16s %s", what, path)
    log.info("Sources and their licences:")
    for source, licence in SOURCES.items():
        log.info("  %-24s %s", source, licence)
    log.info("next: make pretrain MODALITY=mri")
    return 0


COMMAND = Command(
    help="fetch the demo scans and base weights by sha256 and build data/demo/*.zarr",
    add_arguments=_add_arguments,
    run=_run,
)
