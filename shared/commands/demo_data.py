"""``samgraft demo-data``: fetch demo scans and base weights by hash, build the demo stores."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command

if TYPE_CHECKING:
    from samgraft.shared.data.fetch import OnBytes

log = logging.getLogger(__name__)

EXCLUDED_LINE = (
    "The unlabelled store leaves out the heads brain1 and brain2: they are the validation and test patients of the "
    "labelled one."
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("data/demo"), help="folder of the demo stores")
    parser.add_argument("--modality", default="mri", help="only mri has demo data")


def _run(arguments: argparse.Namespace) -> int:
    # Imported here: `samgraft --help` must not wait for zarr.
    from samgraft.shared.data.demo import demo_data

    paths = demo_data(arguments.root, arguments.modality, on_fetch=fetch_progress)
    log.info(EXCLUDED_LINE)
    for what, path in (
        ("for pretraining", paths.unlabelled),
        ("for fine-tuning", paths.labelled),
        ("its split", paths.split),
        ("base weights", paths.weights),
    ):
        log.info("  %-16s %s", what, path)
    log.info("next: make pretrain MODALITY=mri")
    return 0


def fetch_progress(name: str) -> OnBytes:
    """Return a callback that shows a download: a rewritten line on a terminal, every tenth elsewhere."""
    shown = -1

    def show(received: int, expected: int) -> None:
        nonlocal shown
        tenth = min(10, 10 * received // max(1, expected))
        if sys.stderr.isatty():
            end = "\n" if received >= expected else ""
            sys.stderr.write(f"\rfetching {name}: {received / 1e6:.0f} of {expected / 1e6:.0f} MB{end}")
            sys.stderr.flush()
        elif tenth != shown:
            shown = tenth
            log.info("fetching %s: %.0f of %.0f MB", name, received / 1e6, expected / 1e6)

    return show


COMMAND = Command(
    help="fetch the demo scans and base weights by sha256 and build data/demo/*.zarr",
    add_arguments=_add_arguments,
    run=_run,
)
