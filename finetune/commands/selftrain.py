"""Command ``samgraft selftrain``, which trains on labelled scans and on scans that it labels itself."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.finetune.commands import finetune
from samgraft.shared.cli import Command, keywords
from samgraft.shared.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from samgraft.finetune.config import FinetuneConfig
    from samgraft.shared.runs.result import TrainingResult
    from samgraft.shared.stage_config import Settings, TypedSettings

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, which are those of ``finetune`` and those of the unlabelled scans."""
    parser.add_argument(
        "--unlabelled",
        help="store or folder of scans without labels; default the scans of DATA without labels and the training "
        "patients outside of the few-shot draw",
    )
    parser.add_argument("--parallel", type=int, default=1, help="number of teachers that train at the same time")
    finetune.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from samgraft.shared.training.signals import exit_on_stop_signals

    with exit_on_stop_signals():
        selftrain(**keywords(arguments))
    return int(ExitCode.OK)


def selftrain(
    data: Path | str | None = None,
    *,
    unlabelled: Path | str | None = None,
    ckpt: Path | str | None = None,
    modality: str | None = None,
    model: str | None = None,
    method: str | None = None,
    base: Path | str | None = None,
    name: str | None = None,
    runs: Path | str = finetune.RUNS,
    preset: str = "auto",
    config: Path | str | None = None,
    parallel: int = 1,
    dry_run: bool = False,
    settings: Settings = (),
) -> TrainingResult:
    """Train a segmentation model on labelled scans and on scans that it labels itself, or resume this run.

    Args:
        data: Labelled slice store, or folder of scans with labels; None takes the demo scans.
        unlabelled: Store or folder of scans without labels; None takes those of ``data``.
        ckpt: Initial encoder weights, a stage-1 run or any encoder or SAM file; None takes those of ``base``.
        modality: ``mri``, ``ct``, ``xray`` or ``ultrasound``; None takes that of the store, or ``mri``.
        model: Expected architecture of the student, or a 2D baseline without SAM such as ``unet2d``.
        method: Fine-tuning method of the student, such as ``lora``; None takes the one of the preset.
        base: Base SAM weights, a full SAM file that supplies what ``ckpt`` lacks.
        name: Name of the run; None makes it from weights and data.
        runs: Folder of all runs.
        preset: File of ``configs/finetune``; ``auto`` takes the one for this machine.
        config: YAML file of settings that have priority over the preset.
        parallel: Number of teachers that train at the same time.
        dry_run: Stop after the pre-flight. No run is written, so that the paths of the result do not exist.
        settings: Settings by dotted key, such as ``{"selftrain.rounds": 2}``, or ``key=value`` strings.

    Raises:
        SamgraftError: For everything that would make the run fail or its result wrong, with what to do.
    """
    _check_processes(parallel)
    typed = finetune.typed_settings(
        data=data,
        unlabelled=unlabelled,
        ckpt=ckpt,
        modality=modality,
        model=model,
        method=method,
        base=base,
        config=config,
        settings=settings,
    )
    return _train(typed, preset=preset, name=name, runs=Path(runs), num_parallel=parallel, dry_run=dry_run)


def _train(
    typed: TypedSettings, *, preset: str, name: str | None, runs: Path, num_parallel: int, dry_run: bool
) -> TrainingResult:
    given = typed.by_key()
    store = given.get("data.store")
    path = finetune.check_early(given, name=name, runs=runs, command="selftrain")
    # Imported after the first checks: torch and peft take seconds, and a typing error should be reported at once.
    from samgraft.finetune.config import SelftrainMode

    merged = _build_config(typed, preset=preset)
    if merged.selftrain.mode is SelftrainMode.OFF:
        raise UsageError("selftrain.mode must be offline or online, got off. Use finetune without self-training.")
    if merged.selftrain.mode is SelftrainMode.OFFLINE:
        return _run_offline(merged, data=store, path=path, num_parallel=num_parallel, dry_run=dry_run)
    # The online form has one process, so that the number would be ignored.
    if num_parallel > 1:
        raise UsageError("--parallel is for teachers, which selftrain.mode=online does not train. Leave it out.")
    return finetune.train_config(merged, data=store, path=path, dry_run=dry_run)


def _check_processes(num_parallel: int) -> None:
    from samgraft.shared.runs.environment import processes_expected

    if num_parallel < 1:
        raise UsageError(f"--parallel must be at least 1, got {num_parallel}.")
    if processes_expected() > 1:
        raise UsageError(
            f"selftrain is one process that starts others, got {processes_expected()} processes. Run it without "
            "torchrun and with one task; trainer.devices=N uses several GPUs."
        )


def _run_offline(
    config: FinetuneConfig, *, data: str | None, path: Path, num_parallel: int, dry_run: bool
) -> TrainingResult:
    from samgraft.finetune.selftraining.report import best_model
    from samgraft.finetune.selftraining.selftraining import plan_selftraining, run_selftraining
    from samgraft.shared.runs.result import MODEL_FOLDER, TrainingResult
    from samgraft.shared.store.from_data import describe_dry_run
    from samgraft.shared.training.config import check_warmup
    from samgraft.shared.training.device import choose_device

    started = time.monotonic()
    trainer = config.trainer
    check_warmup(config.optim.warmup_steps, trainer.max_steps)
    device = choose_device(trainer.device, precision=trainer.precision, devices=trainer.devices)
    log.info("device: %s", device.reason)
    # A self-training that began was measured then.
    plan = plan_selftraining(config, path, device, measure=dry_run or not path.exists())
    for line in plan.lines:
        log.info("%s", line)
    result = TrainingResult(path=path, weights=path / MODEL_FOLDER)
    if dry_run:
        left = describe_dry_run(data, config.data.store)
        log.info("dry run: %s would train %d models; %s.", path, len(plan.parts), left)
        return result
    run_selftraining(plan, device, num_parallel=num_parallel)
    log.info("  teachers and pseudo-labels: %s", path / "selftraining.html")
    best = best_model(plan.rounds).path
    finetune.log_end(path, plan.split.test, seconds=time.monotonic() - started, best=best)
    return result


def _build_config(typed: TypedSettings, *, preset: str) -> FinetuneConfig:
    """Merge the settings, and build the store of unlabelled scans if they are files."""
    from samgraft.shared.store.from_data import store_from_data

    config = finetune.build_config(typed, preset=preset, with_teachers=True)
    if config.data.unlabelled is None:
        return config
    store = store_from_data(config.data.unlabelled, modality=config.modality)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, unlabelled=str(store)))


COMMAND = Command(
    help="stage 2 with few labels: teachers label further scans, and a student trains on both",
    add_arguments=add_arguments,
    run=run,
)
