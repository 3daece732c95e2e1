"""The command ``samgraft pretrain``.

Its imports are inside the functions, because ``samgraft --help`` must not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from samgraft.shared.cli import Command

log = logging.getLogger(__name__)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--modality", default=None, help="mri, ct, xray or ultrasound (default: that of the store, or mri)")
    add(
        "--data",
        default=None,
        help="slice store (folder or s3:// address) or scans (default: the demo scans)",
    )
    add(
        "--labelled",
        action="append",
        default=[],
        metavar="STORE",
        help="labelled store or scans, whose validation and test patients are left out; may be repeated",
    )
    add("--model", default=None, help="vit_t, vit_b, vit_l or vit_h (default: that of the weights, or vit_t)")
    add("--method", default=None, help="objective (default: depends on the model)")
    add(
        "--ckpt",
        default=None,
        help="initial encoder weights: a stage-1 run, any encoder or SAM file (default: those of --base)",
    )
    add(
        "--base",
        default=None,
        help="base SAM weights, which supply what --ckpt lacks; or random (default: the demo's for vit_t)",
    )
    add("--name", default=None, help="name of the run under runs/; the same name resumes the same run")
    add("--preset", default=None, help="cpu or gpu (default: what this machine has)")
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="YAML on top of the preset")
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    add(
        "--dry-run",
        action="store_true",
        help="stop after the pre-flight and write no run (scans become a store first, demo data are fetched)",
    )
    add("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4 trainer.max_steps=500")


def _run(arguments: argparse.Namespace) -> int:
    from samgraft.shared.training.signals import exit_on_stop_signals

    with exit_on_stop_signals(shlex.join(["samgraft", *sys.argv[1:]])):
        return _pretrain(arguments)


def _pretrain(arguments: argparse.Namespace) -> int:
    from samgraft.shared.runs.run_folder import check_run_folder
    from samgraft.shared.stage_config import TypedSettings
    from samgraft.shared.store.from_data import describe_dry_run
    from samgraft.shared.training.device import choose_device
    from samgraft.ssl.prepare import prepare
    from samgraft.ssl.pretrain import pretrain

    typed = TypedSettings(
        options={
            "modality": arguments.modality,
            "data.store": arguments.data,
            "model.arch": arguments.model,
            "model.ckpt": arguments.ckpt,
            "model.base": arguments.base,
            "objective.name": arguments.method,
        },
        lists={"data.labelled": arguments.labelled},
        files=tuple(arguments.config),
        overrides=tuple(arguments.overrides),
    )
    # The device is chosen twice. Without settings it selects the preset, and the settings of the preset may then change
    # it.
    has_gpu = choose_device().accelerator != "cpu"
    config, name = prepare(typed, preset=arguments.preset, name=arguments.name, has_gpu=has_gpu)
    # Checked before the pre-flight trains some steps, and again when the run opens its folder.
    check_run_folder(arguments.runs, name, config=config, stage="pretrain")
    trainer = config.trainer
    device = choose_device(trainer.device, precision=trainer.precision, devices=trainer.devices)
    pretrain(config, name=name, runs=arguments.runs, device=device, dry_run=arguments.dry_run)
    if arguments.dry_run:
        log.info("dry run: %s.", describe_dry_run(typed.by_key().get("data.store"), config.data.store))
    return 0


COMMAND = Command(
    help="stage 1: train SAM's image encoder on unlabelled slices",
    add_arguments=_add_arguments,
    run=_run,
)
