"""Pre-flight: what a run will do, on what, for how long, before anything is trained or written."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from samgraft.shared.data.dataset import SliceDataset, SliceRef, batch_to_input, collate_slices
from samgraft.shared.data.split import (
    Split,
    default_split_path,
    load_split,
    make_split,
    pretrain_manifest,
    refuse_leak,
)
from samgraft.shared.data.store import SliceStore
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.progress import format_duration
from samgraft.shared.training.trainer import state_bytes
from samgraft.shared.training.training_state import finished_states
from samgraft.ssl.config import DataConfig, PretrainConfig
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.start import trained_share
from torch import nn

log = logging.getLogger(__name__)

HELD_OUT_FRACTIONS = (0.75, 0.25, 0.0)
"""Without a split file: every fourth patient is held out for the loss and the pictures, none for a test."""
MEASURE_S = 8.0
MAX_MEASURED_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Measured cost of one micro-step on this device."""

    seconds: float
    num_measured: int


def pretraining_split(config: DataConfig, store: SliceStore, *, seed: int) -> Split:
    """Return the split by patient; without a file, one that holds out a quarter of the patients."""
    path = Path(config.split) if config.split else None
    if path is None and not default_split_path(store.path).is_file():
        return make_split(store, fractions=HELD_OUT_FRACTIONS, seed=seed)
    return load_split(path, store)


def leak_check(config: DataConfig, store: SliceStore, patient_ids: Sequence[str]) -> list[str]:
    """Compare the training slices with the validation and test patients of every store in ``config.test_stores``.

    Returns:
        One line per store for the pre-flight and the card.

    Raises:
        DataError: If a patient leaks and ``allow_transductive`` is not set.
    """
    manifest = pretrain_manifest(store, patient_ids)
    lines = []
    for name in config.test_stores:
        labelled = SliceStore.open(name)
        try:
            refuse_leak(manifest, load_split(None, labelled), labelled)
        except DataError as leak:
            if not config.allow_transductive:
                raise DataError(
                    leak.what,
                    where=leak.where,
                    kept="nothing was written",
                    next_command="samgraft pretrain ... data.allow_transductive=true, if that is meant",
                ) from leak
            lines.append(f"transductive: test patients of {labelled.path.name} are among the training slices")
        else:
            lines.append(f"no patient of {labelled.path.name}'s validation or test part is among the training slices")
    return lines


def describe_data(store: SliceStore, split: Split, slices: Sequence[SliceRef]) -> str:
    """Return patients, volumes and slices after filters, in one line."""
    series = {ref.series_id for ref in slices}
    return (
        f"{store.path.name} ({store.modality.value}): {len(slices)} training slices, volumes: {len(series)}, "
        f"patients: {len(split.train)} for training, {len(split.val)} held out"
    )


def measure_step(objective: Objective, images_B1SS: torch.Tensor, *, precision: str) -> StepTime:
    """Time forward and backward on real slices, a few times; leaves weights, gradients and random state as they were.

    The first step is not counted: it pays for allocations.
    """
    assert isinstance(objective, nn.Module)
    device = images_B1SS.device
    objective.to(device)
    counters = list(range(len(images_B1SS)))
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 1 + MAX_MEASURED_STEPS and (len(times) < 2 or time.perf_counter() - started < MEASURE_S):
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            total = objective.loss(images_B1SS, sample_counters=counters, step=0).total
        total.backward()
        objective.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    counted = sorted(times[1:])
    return StepTime(seconds=counted[len(counted) // 2], num_measured=len(counted))


def check_disk(folder: Path, objective: Objective, *, keep_last: int) -> str:
    """Return what the run will write against what is free.

    Raises:
        StorageError: If it does not fit.
    """
    assert isinstance(objective, nn.Module)
    # The newest states, the one being written, and the weights that are handed on.
    needed = state_bytes(objective) * (keep_last + 2)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"free space must be at least {needed / 1e9:.2f} GB for the training states, got {free / 1e9:.2f} GB.",
            where=folder.name,
            kept="nothing was written",
            next_command="free space, then run the same command again",
        )
    return f"{needed / 1e6:.0f} MB needed, {free / 1e9:.0f} GB free"


def preflight(
    config: PretrainConfig,
    objective: Objective,
    dataset: SliceDataset,
    split: Split,
    *,
    leaks: Sequence[str],
    device: DeviceChoice,
    run_path: Path,
) -> None:
    """Say what the run will do and what it will cost; refuse what cannot work before anything is written.

    Raises:
        UsageError: If one batch needs more slices than there are.
        StorageError: If the training states do not fit on the disk.
    """
    batch_size = config.data.batch_size
    if batch_size * device.devices * device.num_nodes > len(dataset):
        raise UsageError(
            f"batch_size must not exceed the {len(dataset)} training slices, got {batch_size} on each of "
            f"{device.devices * device.num_nodes} processes.",
            where="data.batch_size",
        )
    step_time = measure_step(objective, _first_batch(config, dataset, device), precision=device.precision)
    seconds = run_seconds(config, step_time)
    show = "shown in TensorBoard and the report" if config.watch.log_images else "not shown (watch.log_images=false)"
    lines = {
        "device": device.reason,
        "data": describe_data(dataset.store, split, dataset.slices),
        "leak check": "; ".join(leaks) or "no labelled store named (data.test_stores): nothing to compare with",
        "model": f"{objective.encoder.spec.title} at {config.model.image_size} px, trained {trained_share(objective)}",
        "objective": config.objective.name.value,
        "time": f"{step_time.seconds:.2f} s per step of {batch_size} slices ({step_time.num_measured} measured); "
        f"{config.trainer.max_steps} steps take about {format_duration(seconds)}",
        "disk": check_disk(run_path, objective, keep_last=config.trainer.keep_last),
        "pictures": show,
        "run": describe_run(run_path, max_steps=config.trainer.max_steps),
        "watch it": f"tensorboard --logdir {run_path}/tb --host localhost",
        "stop it": "Ctrl-C saves and ends; the same command goes on",
    }
    for name, text in lines.items():
        log.info("  %-10s %s", name, text)


def describe_run(run_path: Path, *, max_steps: int) -> str:
    """Return whether this is a new run, or where an interrupted one goes on."""
    checkpoints = run_path / "checkpoints"
    states = finished_states(checkpoints) if checkpoints.is_dir() else []
    if not states:
        return f"new run {run_path}"
    return f"{run_path}, resuming step {int(states[-1].name.removeprefix('step-'))} of {max_steps}"


def run_seconds(config: PretrainConfig, step_time: StepTime) -> float:
    """Return the expected length of a whole run, held-out looks included (a look costs a third of a step per slice)."""
    steps = config.trainer.max_steps * config.trainer.accumulate
    looks = 2 + config.trainer.max_steps // config.watch.every_n_steps
    per_slice = step_time.seconds / config.data.batch_size
    return steps * step_time.seconds + looks * config.data.num_held_out_slices * per_slice / 3


def _first_batch(config: PretrainConfig, dataset: SliceDataset, device: DeviceChoice) -> torch.Tensor:
    batch = collate_slices([dataset[index, 0] for index in range(config.data.batch_size)])
    images_B1SS, _, _ = batch_to_input(
        batch,
        image_size=config.model.image_size,
        keep_aspect=config.data.keep_aspect,
        device=device.torch_device,
    )
    return images_B1SS
