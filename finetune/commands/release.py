"""``samgraft release``: weights that open elsewhere, with card and checksums, checked before they exist."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from samgraft.shared.cli import Command
from samgraft.shared.errors import ExitCode

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished stage-2 run")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--license", dest="licence", help="licence of the release, e.g. cc-by-4.0")
    parser.add_argument(
        "--known-identifiers",
        type=Path,
        help="text file, one per line: original ids and names that must not occur in any byte",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    from samgraft.finetune.release import release

    known: list[str] = []
    if arguments.known_identifiers:
        lines = arguments.known_identifiers.read_text(encoding="utf-8").splitlines()
        known = [line.strip() for line in lines if line.strip()]
    checked = release(arguments.run, out=arguments.out, licence=arguments.licence, known_identifiers=known)
    for file in checked:
        log.info("%s: loaded strictly by %s, logits differ by %.1e", file.name, file.builder, file.max_difference)
    log.info("privacy gate: every byte searched, nothing found")
    log.info("released: %s (sha256sum -c SHA256SUMS verifies it)", arguments.out)
    return int(ExitCode.OK)


COMMAND = Command(help="checked weights, card and checksums from a run", add_arguments=add_arguments, run=run)
