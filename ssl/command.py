"""The command ``samgraft pretrain``.

Its imports are inside the functions, because ``samgraft --help`` must not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command, keywords

if TYPE_CHECKING:
    from samgraft.shared.runs.result import TrainingResult
    from samgraft.shared.stage_config import Settings, TypedSettings

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
    add(
        "--model",
        default=None,
        help="vit_t, vit_b, vit_l, vit_h, sam2_t, sam2_s, sam2_bp or sam2_l (default: that of the weights, or vit_t)",
    )
    add("--method", default=None, help="objective (default: depends on the model)")
    add(
        "--ckpt",
        default=None,
        help="initial encoder weights: a stage-1 run, any encoder or SAM file, an official name or hf://OWNER/NAME "
        "(default: those of --base)",
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
    add("settings", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4 trainer.max_steps=500")


def _run(arguments: argparse.Namespace) -> int:
    from samgraft.shared.training.signals import exit_on_stop_signals

    with exit_on_stop_signals():
        pretrain(**keywords(arguments))
    return 0


def pretrain(
    data: Path | str | None = None,
    *,
    labelled: Sequence[Path | str] = (),
    modality: str | None = None,
    model: str | None = None,
    method: str | None = None,
    ckpt: Path | str | None = None,
    base: Path | str | None = None,
    name: str | None = None,
    preset: str | None = None,
    config: Sequence[Path | str] = (),
    runs: Path | str = Path("runs"),
    dry_run: bool = False,
    settings: Settings = (),
) -> TrainingResult:
    """Train SAM's image encoder on unlabelled slices, or resume the run of this name.

    Args:
        data: Slice store (folder or ``s3://`` address) or scans; None takes the demo scans.
        labelled: Labelled stores or scans, whose validation and test patients are left out.
        modality: ``mri``, ``ct``, ``xray`` or ``ultrasound``; None takes that of the store, or ``mri``.
        model: Architecture, such as vit_b; None takes that of the weights.
        method: Objective; None takes the one of the architecture.
        ckpt: Initial encoder weights, a stage-1 run or any encoder or SAM file; None takes those of ``base``.
        base: Base SAM weights, which supply what ``ckpt`` lacks, or ``random``.
        name: Name of the run; None makes it from data, architecture and objective.
        preset: ``cpu`` or ``gpu``; None takes what this machine has.
        config: YAML files on top of the preset.
        runs: Folder of all runs.
        dry_run: Stop after the pre-flight. No run is written, so that the paths of the result do not exist.
        settings: Settings by dotted key, such as ``{"trainer.max_steps": 500}``, or ``key=value`` strings.

    Raises:
        SamgraftError: For everything that would make the run fail or its result wrong, with what to do.
    """
    from samgraft.shared.stage_config import TypedSettings, settings_texts

    typed = TypedSettings(
        options={
            "modality": modality,
            "data.store": data,
            "model.arch": model,
            "model.ckpt": ckpt,
            "model.base": base,
            "objective.name": method,
        },
        lists={"data.labelled": [str(store) for store in labelled]},
        files=tuple(Path(file) for file in config),
        overrides=settings_texts(settings),
    )
    return _train(typed, preset=preset, name=name, runs=Path(runs), dry_run=dry_run)


def _train(typed: TypedSettings, *, preset: str | None, name: str | None, runs: Path, dry_run: bool) -> TrainingResult:
    from samgraft.shared.runs.result import ENCODER_FILE, TrainingResult
    from samgraft.shared.runs.run_folder import check_run_folder
    from samgraft.shared.store.from_data import describe_dry_run
    from samgraft.shared.training.device import choose_device
    from samgraft.ssl.prepare import prepare
    from samgraft.ssl.pretrain import pretrain as train_encoder

    # The device is chosen twice. Without settings it selects the preset, and the settings of the preset may then change
    # it.
    has_gpu = choose_device().accelerator != "cpu"
    # The name is made from the resolved data and objective, so that the same call resumes the same run.
    config, name = prepare(typed, preset=preset, name=name, has_gpu=has_gpu)
    # Checked before the pre-flight trains some steps, and again when the run opens its folder.
    check_run_folder(runs, name, config=config, stage="pretrain")
    trainer = config.trainer
    device = choose_device(trainer.device, precision=trainer.precision, devices=trainer.devices)
    weights = train_encoder(config, name=name, runs=runs, device=device, dry_run=dry_run)
    if dry_run:
        log.info("dry run: %s.", describe_dry_run(typed.by_key().get("data.store"), config.data.store))
    return TrainingResult(path=runs / name, weights=weights or runs / name / ENCODER_FILE)


COMMAND = Command(
    help="stage 1: train SAM's image encoder on unlabelled slices",
    add_arguments=_add_arguments,
    run=_run,
)
