"""Pre-flight: what a run will do, on what, for how long, before anything is trained or written.

Memory that a run will need, from one measured step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.machine import granted_memory
from samgraft.shared.runs.inputs import kept_split
from samgraft.shared.runs.training_state import finished_states
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.samples.split import (
    Split,
    load_split,
    load_split_beside,
    make_split,
    pretrain_manifest,
    refuse_leak,
)
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.failures import explain_out_of_memory
from samgraft.shared.training.preflight import check_disk
from samgraft.shared.training.progress import format_duration
from samgraft.ssl.config import DataConfig, PretrainConfig
from samgraft.ssl.monitor.monitor import Watched
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.start import trained_share
from torch import Tensor, nn

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
    saved_bytes: int
    """Saved by the forward pass for the backward pass: what activations cost."""


def pretraining_split(config: DataConfig, store: SliceStore, *, seed: int, run_path: Path | None = None) -> Split:
    """Return the split by patient; without a file, one that holds out a quarter of the patients.

    What an earlier session of the run at ``run_path`` trained on comes before what is found or drawn today.
    """
    if config.split:
        return load_split(Path(config.split), store)
    if run_path is not None and (kept := kept_split(run_path, store)) is not None:
        return kept
    return load_split_beside(store) or make_split(store, fractions=HELD_OUT_FRACTIONS, seed=seed)


def leak_check(
    config: DataConfig, store: SliceStore, patient_ids: Sequence[str], *, probe: tuple[SliceStore, Split] | None
) -> list[str]:
    """Compare the training slices with the validation and test patients of the probe and of ``config.test_stores``.

    Returns:
        For the pre-flight and the card: a line per store that leaks, one for all that do not.

    Raises:
        DataError: If a patient leaks and ``allow_transductive`` is not set.
    """
    manifest = pretrain_manifest(store, patient_ids)
    lines, apart = [], []
    for labelled, split, use in _compared_with(config, probe):
        name = f"{labelled.path.name}{use}"
        try:
            refuse_leak(manifest, split, labelled)
        except DataError as leak:
            if not config.allow_transductive:
                raise DataError(
                    leak.what, where=f"{leak.where}{use}", kept=leak.kept, next_command=leak.next_command
                ) from leak
            lines.append(f"transductive: validation or test patients of {name} are among the training slices")
        else:
            apart.append(name)
    return lines + ([f"no val or test patient of {', '.join(apart)} among the training slices"] if apart else [])


def _compared_with(
    config: DataConfig, probe: tuple[SliceStore, Split] | None
) -> Iterator[tuple[SliceStore, Split, str]]:
    """Yield each labelled store and split once, with what it is for where that is not only the user's test."""
    named = [SliceStore.open(name) for name in config.test_stores]
    compared = [(store, load_split(None, store)) for store in named]
    is_probe = [probe is not None and (store.path, split) == (probe[0].path, probe[1]) for store, split in compared]
    for (store, split), also in zip(compared, is_probe, strict=True):
        yield store, split, " (test and probe)" if also else ""
    if probe is not None and not any(is_probe):
        yield *probe, " (probe)"


def describe_data(store: SliceStore, split: Split, slices: Sequence[SliceRef]) -> str:
    """Return patients, volumes and slices after filters, in one line."""
    series = {ref.series_id for ref in slices}
    return (
        f"{store.path.name} ({store.modality.value}): {len(slices)} training slices, volumes: {len(series)}, "
        f"patients: {len(split.train)} for training, {len(split.val)} held out"
    )


def measure_step(
    objective: Objective, images_B1SS: torch.Tensor, *, precision: str, channels_last: bool = False
) -> StepTime:
    """Time forward and backward on real slices, a few times; leaves weights, buffers and gradients as they were.

    The first step is not counted: it pays for allocations.
    """
    device = images_B1SS.device
    objective.to(device)
    if channels_last:
        objective.to(memory_format=torch.channels_last)
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    counters = list(range(len(images_B1SS)))
    times: list[float] = []
    saved = SavedBytes(objective)
    started = time.perf_counter()
    while len(times) < 1 + MAX_MEASURED_STEPS and (len(times) < 2 or time.perf_counter() - started < MEASURE_S):
        begin = time.perf_counter()
        counting = contextlib.nullcontext() if times else saved.count()
        with counting, torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            total = objective.loss(images_B1SS, sample_counters=counters, step=0).total
        total.backward()
        objective.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    for buffer, before in buffers:
        buffer.copy_(before)
    counted = sorted(times[1:])
    return StepTime(seconds=counted[len(counted) // 2], num_measured=len(counted), saved_bytes=saved.total)


def check_memory(objective: Objective, step_time: StepTime, *, device: torch.device, batch_size: int) -> str:
    """Return what the run will hold in memory against what is free; warn where it does not fit."""
    needed = training_bytes(objective, step_time.saved_bytes)
    line, fits = describe_memory(needed, free_bytes(device), batch_size=batch_size)
    if not fits:
        log.warning(
            "memory is short: %s. A smaller data.batch_size with trainer.accumulate keeps the global batch.", line
        )
    return line


def preflight(
    config: PretrainConfig,
    objective: Objective,
    dataset: SliceDataset,
    split: Split,
    watched: Watched,
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
    images_B1SS = _first_batch(config, dataset, device)
    try:
        step_time = measure_step(
            objective, images_B1SS, precision=device.precision, channels_last=config.trainer.channels_last
        )
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(batch_size=batch_size, accumulate=config.trainer.accumulate) from error
    seconds = run_seconds(config, step_time, watched)
    show = "shown in TensorBoard and the report" if config.watch.log_images else "not shown (watch.log_images=false)"
    lines = {
        "device": device.reason,
        "data": describe_data(dataset.store, split, dataset.slices),
        "leak check": "; ".join(leaks) or "no labelled store named (data.test_stores): nothing to compare with",
        "model": f"{objective.encoder.spec.title} at {config.model.image_size} px, trained {trained_share(objective)}",
        "objective": config.objective.name,
        "time": f"{step_time.seconds:.2f} s per step of {batch_size} slices ({step_time.num_measured} measured); "
        f"{config.trainer.max_steps} steps take about {format_duration(seconds)}",
        "memory": check_memory(objective, step_time, device=images_B1SS.device, batch_size=batch_size),
        "disk": check_disk(objective, config.trainer, run_path),
        "probe": watched.probe.describe() if watched.probe else "off: no labelled store named (probe.store)",
        "drift": watched.gauge_note,
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


def run_seconds(config: PretrainConfig, step_time: StepTime, watched: Watched) -> float:
    """Return the expected length of a whole run, the looks included: they cost a third of a step per slice."""
    max_steps = config.trainer.max_steps
    looked_at = (
        (watched.held_out.images_N1SS if watched.held_out else (), config.watch.every_n_steps),
        (watched.probe.train.labels if watched.probe else (), config.probe.every_n_steps),
        (watched.probe.test.labels if watched.probe else (), config.probe.every_n_steps),
    )
    num_slices = sum(len(slices) * (2 + max_steps // every) for slices, every in looked_at)
    per_slice = step_time.seconds / config.data.batch_size
    return max_steps * config.trainer.accumulate * step_time.seconds + num_slices * per_slice / 3


def _first_batch(config: PretrainConfig, dataset: SliceDataset, device: DeviceChoice) -> torch.Tensor:
    batch = collate_slices([dataset[index, 0] for index in range(config.data.batch_size)])
    images_B1SS, _, _ = batch_to_input(
        batch,
        image_size=config.model.image_size,
        keep_aspect=config.data.keep_aspect,
        device=device.torch_device,
    )
    return images_B1SS


GIB = 2**30


class SavedBytes:
    """Counts what the forward pass keeps for the backward pass; weights, which are there anyway, are left out."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count inside the block; storages that several tensors share are counted once."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def training_bytes(module: nn.Module, saved_bytes: int) -> int:
    """Return weights and buffers, gradients and AdamW's two moments of what trains, and activations."""
    held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return held + 3 * trained + saved_bytes


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on the device; None where nobody says."""
    if device.type == "cuda":
        # What torch's allocator keeps for later is free for the run.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    granted = granted_memory()
    left = [int(words[1]) * 1024 for words in found] + ([granted[1]] if granted else [])
    return min(left, default=None)


def describe_memory(needed: int, free: int | None, *, batch_size: int) -> tuple[str, bool]:
    """Return the line of the pre-flight, and whether it fits as far as one can tell.

    Temporary buffers of single operations come on top: a tenth of headroom is asked for.
    """
    line = f"about {needed / GIB:.1f} GiB for weights, gradients, AdamW and the activations of {batch_size} slices"
    if free is None:
        return line, True
    return f"{line}; {free / GIB:.1f} GiB free", 1.1 * needed < free
