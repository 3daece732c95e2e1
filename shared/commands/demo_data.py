"""The command ``samgraft demo-data``."""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from samgraft.shared.cli import Command

log = logging.getLogger(__name__)

EXCLUDED_LINE = (
    "The unlabelled store leaves out the validation and test heads of the labelled one (SRI24 template, pycortex S1)."
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("data/demo"), help="folder of the demo stores")
    parser.add_argument("--modality", default="mri", help="only mri has demo data")
    parser.add_argument(
        "--task",
        choices=("hippocampus",),
        help="instead of the demo, fetch this data set of the Medical Segmentation Decathlon from its server",
    )


def _run(arguments: argparse.Namespace) -> int:
    # Imported here: `samgraft --help` must not wait for zarr.
    if arguments.task:
        return _fetch_task(arguments.task, arguments.root.parent)
    from samgraft.shared.demo.heads import SOURCES, demo_data

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


def _fetch_task(name: str, root: Path) -> int:
    from samgraft.shared.demo.decathlon import TASKS, decathlon_data
    from samgraft.shared.fetch import cache_folder

    store = decathlon_data(name, root=root, cache=cache_folder(root))
    log.info("  store    %s (%s)", store, TASKS[name].description)
    log.info("  licence  %s, Medical Segmentation Decathlon", TASKS[name].licence)
    typed = shlex.quote(str(store))
    log.info("  next     samgraft pretrain --data %s --labelled %s", typed, typed)
    log.info("  or       samgraft finetune --data %s", typed)
    return 0


COMMAND = Command(
    help="fetch the demo scans and base weights by sha256 and build data/demo/*.zarr",
    add_arguments=_add_arguments,
    run=_run,
)
