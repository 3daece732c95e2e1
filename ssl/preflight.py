"""Pre-flight: what a run will do, on what, for how long, before anything is trained or written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.inputs import load_run_split
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
from samgraft.shared.training.preflight import StepCost, describe_cost, log_preflight, measure_step
from samgraft.ssl.config import DataConfig, PretrainConfig
from samgraft.ssl.monitor.monitor import Watched
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.start import trained_share

log = logging.getLogger(__name__)

HELD_OUT_FRACTIONS = (0.75, 0.25, 0.0)
"""Without a split file: every fourth patient is held out for the loss and the pictures, none for a test."""


def pretraining_split(config: DataConfig, store: SliceStore, *, seed: int, run_path: Path | None = None) -> Split:
    """Return the split by patient; without a file, one that holds out a quarter of the patients.

    What an earlier session of the run at ``run_path`` trained on comes before what is found or drawn today.
    """
    if config.split:
        return load_split(Path(config.split), store)
    if run_path is not None and (kept := load_run_split(run_path, store)) is not None:
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
    counters = list(range(len(images_B1SS)))
    cost = measure_step(
        objective,
        lambda: objective.loss(images_B1SS, sample_counters=counters, step=0).total,
        config=config.trainer,
        device=device,
        batch_size=batch_size,
    )
    show = "shown in TensorBoard and the report" if config.watch.log_images else "not shown (watch.log_images=false)"
    log_preflight(
        {
            "device": device.reason,
            "data": describe_data(dataset.store, split, dataset.slices),
            "leak check": "; ".join(leaks) or "no labelled store named (data.test_stores): nothing to compare with",
            "model": f"{objective.encoder.spec.title} at {config.model.image_size} px, "
            f"trained {trained_share(objective)}",
            "objective": config.objective.name,
            "probe": watched.probe.describe() if watched.probe else "off: no labelled store named (probe.store)",
            "drift": watched.gauge_note,
            "pictures": show,
            **describe_cost(
                objective,
                cost,
                config=config.trainer,
                device=device,
                batch_size=batch_size,
                run_path=run_path,
                evaluation_s=evaluation_seconds(config, cost, watched),
            ),
        }
    )


def evaluation_seconds(config: PretrainConfig, cost: StepCost, watched: Watched) -> float:
    """Return the expected duration of all evaluation rounds, at a third of a training step per slice."""
    max_steps = config.trainer.max_steps
    evaluated = (
        (watched.held_out.images_N1SS if watched.held_out else (), config.watch.every_n_steps),
        (watched.probe.train.labels if watched.probe else (), config.probe.every_n_steps),
        (watched.probe.test.labels if watched.probe else (), config.probe.every_n_steps),
    )
    num_slices = sum(len(slices) * (2 + max_steps // every) for slices, every in evaluated)
    return num_slices * cost.seconds / (config.data.batch_size * config.trainer.accumulate) / 3


def _first_batch(config: PretrainConfig, dataset: SliceDataset, device: DeviceChoice) -> torch.Tensor:
    batch = collate_slices([dataset[index, 0] for index in range(config.data.batch_size)])
    images_B1SS, _, _ = batch_to_input(
        batch,
        image_size=config.model.image_size,
        keep_aspect=config.data.keep_aspect,
        device=device.torch_device,
    )
    return images_B1SS
