"""Pre-flight of stage 1, with the checks and the estimates before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.leaks import (
    Leak,
    count_rules,
    find_leaks,
    find_patients_again,
    have_one_salt,
    pretrain_manifest,
    refuse_leaks,
)
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.samples.split import Split, load_split, load_split_beside, make_split, refuse_empty_train
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.preflight import StepCost, describe_cost, log_preflight, measure_step
from samgraft.ssl.config import DataConfig, PretrainConfig
from samgraft.ssl.initial_weights import describe_trained_share
from samgraft.ssl.monitor.labelled import NO_LABELS
from samgraft.ssl.monitor.monitor import MonitorData
from samgraft.ssl.objectives import Objective
from samgraft.ssl.objectives.anchor import AnchorKind

log = logging.getLogger(__name__)

HELD_OUT_FRACTIONS = (0.75, 0.25, 0.0)
"""Fractions of a drawn split. Every fourth patient is held out for the loss and the pictures, none for a test."""


def pretraining_split(
    config: DataConfig,
    store: SliceStore,
    *,
    seed: int,
    run_path: Path | None = None,
    left_out: Collection[str] = (),
) -> Split:
    """Return the split by patient, without the patients that are left out.

    It is, in this order, the configured file, the split of an earlier session of the run, the file next to the store,
    or a drawn split. A resumed run must not train on other patients because a file next to the store has changed.

    Raises:
        DataError: If no patient is left to train on.
    """
    if config.split:
        split = load_split(Path(config.split), store)
    elif run_path is not None and (kept := load_run_split(run_path, store)) is not None:
        return kept
    else:
        split = load_split_beside(store) or make_split(store, fractions=HELD_OUT_FRACTIONS, seed=seed, without=left_out)
    if left_out:
        # Left out of val as well: the held-out loss and its pictures must not show patients that are scored later.
        train, val = (tuple(p for p in part if p not in left_out) for part in (split.train, split.val))
        split = replace(split, train=train, val=val, folds=())
        if train and not val and not config.split:
            # The store is its own labelled store, so that the patients of val are left out and others are held out.
            without = {*left_out, *split.test}
            split = make_split(store, fractions=HELD_OUT_FRACTIONS, seed=seed, without=without)
    if left_out and not split.train:
        raise DataError(
            f"no patient is left to train on: all training patients of {len(store.patient_ids)} are validation or "
            f"test patients of {', '.join(Path(name).name for name in config.labelled)}. Add unlabelled scans, or "
            "remove LABELLED=.",
            where=store.path.name,
        )
    refuse_empty_train(split, store)
    return split


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Patients that a pretraining leaves out, because a labelled store validates or tests on them."""

    patients: frozenset[str] = frozenset()
    lines: tuple[str, ...] = ()
    """One sentence per labelled store, for the pre-flight, the card and ``run.json``."""


def find_left_out(store: SliceStore, labelled: Sequence[tuple[SliceStore, Split]]) -> LeftOut:
    """Find the validation and test patients of labelled stores in the unlabelled store.

    They are matched by id, by equal voxels and as near-duplicates.
    """
    patients: set[str] = set()
    lines = []
    for other, split in labelled:
        found = find_patients_again(store, other, split.held_out)
        patients |= found.keys()
        rules = f" ({count_rules(found)})" if found else ""
        lines.append(
            f"left out {len(found)} of {counted(len(store.patient_ids), 'patient')} of {store.path.name}{rules}: "
            f"they are among the {len(split.held_out)} validation and test patients of {other.path.name}"
        )
        if not have_one_salt(store, other):
            log.warning(
                "%s and %s have ids of different folders, so that patients are matched by their voxels only. Build "
                "both stores in one folder to match ids too.",
                store.path.name,
                other.path.name,
            )
    return LeftOut(patients=frozenset(patients), lines=tuple(lines))


def open_labelled(config: DataConfig) -> list[tuple[SliceStore, Split]]:
    """Open the stores of ``config.labelled`` with their splits."""
    stores = [SliceStore.open(name) for name in dict.fromkeys(config.labelled)]
    return [(store, load_split(None, store)) for store in stores]


def check_leaks(
    config: DataConfig,
    store: SliceStore,
    patient_ids: Sequence[str],
    *,
    labelled: Sequence[tuple[SliceStore, Split]] = (),
    probe: tuple[SliceStore, Split] | None,
) -> list[str]:
    """Compare the training patients with the validation and test patients of labelled stores.

    Args:
        config: Settings, whose ``test_stores`` are compared too.
        store: Store of the training slices.
        patient_ids: Training patients.
        labelled: The stores of ``config.labelled`` with their splits.
        probe: Store and split of the linear probe.

    Returns:
        Lines for the pre-flight and the card, one per store that leaks and one for all that do not.

    Raises:
        DataError: If patients leak and ``allow_transductive`` is not set, with all of them.
    """
    # Patients are compared by id and by content hash, because one patient can have two ids.
    manifest = pretrain_manifest(store, patient_ids)
    leaks: dict[str, list[Leak]] = {}
    for other, split, use in _compared_stores(config.test_stores, labelled, probe):
        leaks.setdefault(f"{other.path.name}{use}", []).extend(find_leaks(manifest, split, other))
    leaking = [name for name, found in leaks.items() if found]
    if leaking and not config.allow_transductive:
        refuse_leaks(leaks, way_out="the same command with LABELLED=STORE")
    lines = [f"transductive: validation or test patients of {name} are among the training slices" for name in leaking]
    if disjoint := [name for name, found in leaks.items() if not found]:
        lines.append(f"no val or test patient of {', '.join(disjoint)} among the training slices")
    return lines


def _compared_stores(
    test_stores: Sequence[str], labelled: Sequence[tuple[SliceStore, Split]], probe: tuple[SliceStore, Split] | None
) -> Iterator[tuple[SliceStore, Split, str]]:
    """Yield each labelled store and split once, with its use for the linear probe as text."""
    known = {store.path for store, _ in labelled}
    named = [store for store in map(SliceStore.open, dict.fromkeys(test_stores)) if store.path not in known]
    compared = [*((store, load_split(None, store)) for store in named), *labelled]
    is_probe = [probe is not None and (store.path, split) == (probe[0].path, probe[1]) for store, split in compared]
    for (store, split), also in zip(compared, is_probe, strict=True):
        yield store, split, " (test and probe)" if also else ""
    if probe is not None and not any(is_probe):
        yield *probe, " (probe)"


def describe_data(store: SliceStore, split: Split, slices: Sequence[SliceRef]) -> str:
    """Return patients, volumes and slices after filters, in one line."""
    series = {ref.series_id for ref in slices}
    return (
        f"{store.path.name} ({store.modality.value}): {counted(len(slices), 'training slice')}, volumes: "
        f"{len(series)}, patients: {len(split.train)} for training, {len(split.val)} held out"
    )


def preflight(
    config: PretrainConfig,
    objective: Objective,
    dataset: SliceDataset,
    split: Split,
    monitored: MonitorData,
    *,
    leaks: Sequence[str],
    device: DeviceChoice,
    run_path: Path,
) -> None:
    """Print what the run will do and cost, and refuse what cannot work before anything is written.

    Raises:
        UsageError: If one batch needs more slices than there are.
        StorageError: If the training states do not fit on the disk.
    """
    batch_size = config.data.batch_size
    if batch_size * device.devices * device.num_nodes > len(dataset):
        raise UsageError(
            f"batch_size must not exceed the {counted(len(dataset), 'training slice')}, got {batch_size} on each of "
            f"{counted(device.devices * device.num_nodes, 'process', 'processes')}.",
            where="data.batch_size",
        )
    slices_seen = config.trainer.max_steps * config.trainer.accumulate * batch_size * device.world_size
    # Real slices, because crops and masks of an empty picture would not take their usual time.
    images_B1SS = _first_batch(config, dataset, device)
    cost = measure_step(
        objective,
        lambda: objective.loss(images_B1SS, sample_counters=list(range(len(images_B1SS))), step=0).total,
        config=config.trainer,
        device=device,
        batch_size=batch_size,
    )
    show = "shown in TensorBoard and the report" if config.watch.log_images else "not shown (watch.log_images=false)"
    log_preflight(
        {
            "device": device.reason,
            "data": describe_data(dataset.store, split, dataset.slices),
            "leak check": "; ".join(leaks) or "not done, because no labels are given (LABELLED=STORE.zarr)",
            "model": f"{objective.encoder.spec.title} at {config.model.image_size} px, "
            f"trained {describe_trained_share(objective)}",
            "objective": config.objective.name,
            "epochs": f"{slices_seen / len(dataset):.3g} over {counted(len(dataset), 'slice')}",
            "probe": monitored.probe.describe() if monitored.probe else NO_LABELS,
            "boxes": monitored.box_check_note,
            "pictures": show,
            "export": _describe_export(config),
            **describe_cost(
                objective,
                cost,
                config=config.trainer,
                device=device,
                batch_size=batch_size,
                run_path=run_path,
                evaluation_s=monitoring_seconds(config, cost, monitored),
                has_average=config.optim.ema_decay is not None,
            ),
        }
    )


def monitoring_seconds(config: PretrainConfig, cost: StepCost, monitored: MonitorData) -> float:
    """Return the expected duration of all monitoring rounds in seconds."""
    max_steps, shares = config.trainer.max_steps, config.export.interpolate
    held_out = len(monitored.held_out.refs) if monitored.held_out else 0
    labelled = len(monitored.probe.train) + len(monitored.probe.test) if monitored.probe else 0
    # The candidates of the export and the initial encoder are measured once more at the end.
    num_candidates = len(shares) + 1 if len(shares) > 1 else 0
    num_slices = held_out * (2 + max_steps // config.watch.every_n_steps)
    num_slices += labelled * (2 + max_steps // config.probe.every_n_steps + num_candidates)
    # A forward pass without gradients takes about a third of a training step per slice.
    return num_slices * cost.seconds / (config.data.batch_size * config.trainer.accumulate) / 3


def _describe_export(config: PretrainConfig) -> str:
    """Return the anchor and the candidates of the export in one line."""
    anchor, shares = config.objective.anchor, config.export.interpolate
    kept = "no anchor" if anchor.kind is AnchorKind.NONE else f"anchor {anchor.kind.value} of weight {anchor.weight:g}"
    if shares == [1.0]:
        return f"the trained encoder ({kept})"
    listed = ", ".join(f"{100 * share:g}" for share in shares)
    return f"one of {listed} % of the way from the initial to the trained weights ({kept})"


def _first_batch(config: PretrainConfig, dataset: SliceDataset, device: DeviceChoice) -> torch.Tensor:
    batch = collate_slices([dataset[index, 0] for index in range(config.data.batch_size)])
    images_B1SS, _, _ = batch_to_input(
        batch,
        image_size=config.model.image_size,
        keep_aspect=config.data.keep_aspect,
        device=device.torch_device,
    )
    return images_B1SS
