"""Command ``samgraft finetune``, which trains a segmentation model on labelled slices."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.finetune.baselines import Baseline
from samgraft.shared.cli import Command, keywords
from samgraft.shared.errors import ExitCode, UsageError
from samgraft.shared.invocation import log_next

if TYPE_CHECKING:
    from samgraft.finetune.config import FinetuneConfig
    from samgraft.finetune.training.preparation import Prepared
    from samgraft.shared.runs.result import TrainingResult
    from samgraft.shared.stage_config import Settings, TypedSettings
    from samgraft.shared.training.device import DeviceChoice

log = logging.getLogger(__name__)

RUNS = Path("runs")
BASELINES = tuple(baseline.value for baseline in Baseline)
"""Names of networks without SAM, which are trained from scratch for comparison."""


KEY_OF_OPTION = {
    "modality": "modality",
    "data": "data.store",
    "unlabelled": "data.unlabelled",
    "ckpt": "model.ckpt",
    "base": "model.base",
    "model": "model.arch",
    "method": "adapter.method",
}
"""Setting of every option that is a setting."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--ckpt",
        help="initial encoder weights: a stage-1 run, any encoder or SAM file, an official name or hf://OWNER/NAME; "
        "default BASE's own encoder",
    )
    parser.add_argument("--data", help="labelled slice store, or folder of scans with labels; default the demo scans")
    parser.add_argument("--modality", help="mri, ct, xray or ultrasound (default: the store's, or mri)")
    parser.add_argument(
        "--model",
        help="expected architecture (vit_t, vit_b, vit_l, vit_h, sam2_t, sam2_s, sam2_bp, sam2_l; default that of the "
        f"weights), or a baseline without SAM: {', '.join(BASELINES)}",
    )
    parser.add_argument("--method", help="fine-tuning method: lora, adapter, full, dora, ...; default the preset's")
    parser.add_argument(
        "--base",
        help="base SAM weights, a full SAM file, official name or hf://OWNER/NAME that supplies what CKPT lacks; "
        "default CKPT's or the demo's",
    )
    parser.add_argument("--name", help="run name; default from the weights and DATA, so that the same command resumes")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs")
    parser.add_argument(
        "--preset", default="auto", help="a file of configs/finetune; auto takes cpu or gpu_8gb, gpu_12gb, gpu_24gb"
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings that have priority over the preset")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="stop after the pre-flight without writing a run (a store is built and demo data are fetched if needed)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. trainer.max_steps=500")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from samgraft.shared.training.signals import exit_on_stop_signals

    with exit_on_stop_signals():
        finetune(**keywords(arguments))
    return int(ExitCode.OK)


def finetune(
    data: Path | str | None = None,
    *,
    ckpt: Path | str | None = None,
    modality: str | None = None,
    model: str | None = None,
    method: str | None = None,
    base: Path | str | None = None,
    name: str | None = None,
    runs: Path | str = RUNS,
    preset: str = "auto",
    config: Path | str | None = None,
    dry_run: bool = False,
    settings: Settings = (),
) -> TrainingResult:
    """Train a segmentation model on labelled slices, or resume the run of this name.

    Args:
        data: Labelled slice store, or folder of scans with labels; None takes the demo scans.
        ckpt: Initial encoder weights, a stage-1 run or any encoder or SAM file; None takes those of ``base``.
        modality: ``mri``, ``ct``, ``xray`` or ``ultrasound``; None takes that of the store, or ``mri``.
        model: Expected architecture, or a baseline without SAM such as ``unet2d``.
        method: Fine-tuning method, such as ``lora``; None takes the one of the preset.
        base: Base SAM weights, a full SAM file that supplies what ``ckpt`` lacks.
        name: Name of the run; None makes it from weights and data.
        runs: Folder of all runs.
        preset: File of ``configs/finetune``; ``auto`` takes the one for this machine.
        config: YAML file of settings that have priority over the preset.
        dry_run: Stop after the pre-flight. No run is written, so that the paths of the result do not exist.
        settings: Settings by dotted key, such as ``{"trainer.max_steps": 500}``, or ``key=value`` strings.

    Raises:
        SamgraftError: For everything that would make the run fail or its result wrong, with what to do.
    """
    typed = typed_settings(
        data=data,
        ckpt=ckpt,
        modality=modality,
        model=model,
        method=method,
        base=base,
        config=config,
        settings=settings,
    )
    given = typed.by_key()
    path = check_early(given, name=name, runs=Path(runs), command="finetune")
    return train_config(build_config(typed, preset=preset), data=given.get("data.store"), path=path, dry_run=dry_run)


def check_early(given: Mapping[str, str], *, name: str | None, runs: Path, command: str) -> Path:
    """Return the folder of the run, after the checks that need no networks.

    Args:
        given: Settings that the user gave, by dotted key.
        name: Name of the run, None to make it from weights and data.
        runs: Folder of all runs.
        command: Name of the command, for the name of the run.

    Raises:
        UsageError: If there are no weights.
        DataError: If the encoder was pretrained on validation or test patients.
    """
    weights, arch = given.get("model.ckpt") or given.get("model.base"), given.get("model.arch")
    if not weights and arch not in BASELINES:
        from samgraft.finetune.initial_weights import advise_weights

        raise UsageError(f"CKPT and BASE are both missing. {advise_weights()}")
    from samgraft.shared.runs.result import checked_run_path

    store, fold = given.get("data.store"), given.get("data.fold")
    path = checked_run_path(
        runs, default_name(weights or arch or "", store, command=command, fold=fold) if name is None else name
    )
    # A run that exists has its own split and has passed the check.
    if not path.exists():
        from samgraft.finetune.early_checks import refuse_known_leak

        refuse_known_leak(given)
    return path


def train_config(config: FinetuneConfig, *, data: str | None, path: Path, dry_run: bool) -> TrainingResult:
    """Run a fine-tuning with resolved settings.

    Args:
        config: Settings of the run.
        data: Labelled data as the user gave it, None for the demo scans.
        path: Folder of the run.
        dry_run: Stop after the pre-flight.
    """
    # Imported after the first checks: torch and peft take seconds, and a typing error should be reported at once.
    from samgraft.finetune.training.train import finetune as train_model
    from samgraft.finetune.training.train import prepare_seeded
    from samgraft.shared.runs.result import MODEL_FOLDER, TrainingResult
    from samgraft.shared.runs.run_folder import RunFolder, check_run_folder
    from samgraft.shared.store.from_data import describe_dry_run
    from samgraft.shared.training.config import check_warmup
    from samgraft.shared.training.device import choose_device

    started = time.monotonic()
    # Made before the training, because a dry run and a complete run return it too.
    result = TrainingResult(path=path, weights=path / MODEL_FOLDER)
    trainer = config.trainer
    check_run_folder(path.parent, path.name, config=config, stage="finetune")
    check_warmup(config.optim.warmup_steps, trainer.max_steps)
    device = choose_device(trainer.device, precision=trainer.precision, devices=trainer.devices)
    log.info("device: %s", device.reason)
    prepared = prepare_seeded(config, run_path=result.path)
    from samgraft.finetune.training.preparation import describe, describe_embeddings

    for line in [*describe(prepared), *describe_embeddings(prepared, config, device)]:
        log.info("%s", line)
    _list_trained(prepared)
    # A run with training states was measured when it began.
    if dry_run or not (result.path / "checkpoints").is_dir():
        _log_cost(prepared, config, device, run_path=result.path)
    if dry_run:
        left = describe_dry_run(data, config.data.store)
        log.info("dry run: %s would train for %d steps; %s.", result.path, trainer.max_steps, left)
        return result
    with RunFolder.open(path.parent, path.name, config=config, stage="finetune") as folder:
        if folder.is_complete:
            log.info("%s is already complete. Use another NAME= to train again.", folder.path)
        else:
            log.info("all trained tensors: %s, later in report.html too", folder.path / "run.json")
            train_model(config, folder, device, prepared)
        log_end(folder.path, prepared.split.test, seconds=time.monotonic() - started)
    return result


def _log_cost(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice, *, run_path: Path) -> None:
    from samgraft.finetune.training.train import measure_cost
    from samgraft.shared.training.preflight import describe_cost, log_preflight

    log_preflight(
        describe_cost(
            prepared.segmenter,
            measure_cost(prepared, config, device),
            config=config.trainer,
            device=device,
            batch_size=config.data.batch_size,
            run_path=run_path,
            has_average=config.optim.ema_decay is not None,
        )
    )


def _list_trained(prepared: Prepared) -> None:
    from samgraft.finetune.adapters import render_groups, trainable_groups

    # Hundreds of lines, which --debug shows; the report has them in any case.
    for line in render_groups(trainable_groups(prepared.segmenter.network)):
        log.debug("  %s", line)


def build_config(typed: TypedSettings, *, preset: str = "auto", with_teachers: bool = False) -> FinetuneConfig:
    """Merge preset, file, options and overrides. Without DATA the demo data are fetched.

    Args:
        typed: What the user gave.
        preset: File of configs/finetune, or ``auto``.
        with_teachers: Add the preset of a self-training from configs/selftrain.
    """
    from samgraft.finetune.config import FinetuneConfig
    from samgraft.finetune.training.presets import preset_layers
    from samgraft.shared.config import packaged_config
    from samgraft.shared.stage_config import DemoSettings, build_stage_config

    layers = preset_layers(preset)
    presets = [packaged_config(f"finetune/{part}.yaml") for part in layers]
    if with_teachers:
        presets.append(packaged_config(f"selftrain/{'cpu' if layers == ['cpu'] else 'gpu'}.yaml"))
    return build_stage_config(
        FinetuneConfig,
        typed,
        presets=presets,
        # The demo scans are public, so their pictures may be shown.
        demo=DemoSettings(
            store=lambda paths: paths.labelled,
            layer=lambda paths: {"data": {"split": str(paths.split)}, "watch": {"log_images": True}},
        ),
        defaults={},
    )


def typed_settings(
    *, config: Path | str | None = None, settings: Settings = (), **options: Path | str | None
) -> TypedSettings:
    """Return what the user gave in the file, the options and the settings."""
    from samgraft.shared.stage_config import TypedSettings, settings_texts

    return TypedSettings(
        options={KEY_OF_OPTION[name]: value for name, value in options.items()},
        files=(Path(config),) if config else (),
        overrides=settings_texts(settings),
    )


def default_name(weights: str, data: str | None, *, command: str, fold: str | None = None) -> str:
    """Return the default name of a run, which depends only on its weights, data and fold, and the command."""
    path = Path(weights)
    parts = [path.stem if path.is_file() else path.resolve().name]
    if data:
        parts.append(Path(data).resolve().name.removesuffix(".zarr"))
    return "-".join([*parts, command, *([f"fold{fold}"] if fold else [])])


def log_end(path: Path, test_patients: Sequence[str], *, seconds: float, best: Path | None = None) -> None:
    """Print where the results of a run are and the commands that use them.

    Args:
        path: Folder of the run.
        test_patients: Patients of the test part.
        seconds: Duration of the session.
        best: Run to use instead, if another one is better.
    """
    from samgraft.finetune.task import Task
    from samgraft.finetune.training.report import NO_TEST_PART, next_commands

    log.info("done in %.1f min", seconds / 60)
    log.info("  model    %s", path / "model")
    log.info("  report   %s", path / "report.html")
    if not test_patients:
        log.warning("%s", NO_TEST_PART)
    best = best or path
    is_good = Task.read(best / "model").warning is None
    log_next(log, next_commands(str(best), test_patients, is_good=is_good))


COMMAND = Command(
    help="stage 2: fine-tune SAM on labelled slices (LoRA in encoder and decoder)",
    add_arguments=add_arguments,
    run=run,
)
