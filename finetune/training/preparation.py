"""Everything a fine-tuning decides before it trains: data, classes, weights, what trains; and that in words."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from samgraft.finetune.adapters import adapt, render_parts, trainable_groups, trainable_table
from samgraft.finetune.baselines.networks import Baseline, BaselineStart, as_baseline, build_network, plan_network
from samgraft.finetune.baselines.volume_patches import VolumePatches
from samgraft.finetune.classes import ClassTable, choose_classes
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.evaluation.validation import labelled_series
from samgraft.finetune.few_shot import draw_few_shot
from samgraft.finetune.inference import InferenceConfig
from samgraft.finetune.segmenter import Segmenter, make_room_for_classes
from samgraft.finetune.start import StartingPoint, find_starting_point
from samgraft.finetune.training.sampling import balance_foreground, has_foreground
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.augment import SliceAugmentation
from samgraft.shared.samples.dataset import SliceDataset
from samgraft.shared.samples.slices import keep_train_slices, select_slices
from samgraft.shared.samples.split import Split, load_split, refuse_leak
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.tensor_report import TensorReport

if TYPE_CHECKING:
    from peft import PeftModel
    from samgraft.finetune.training.cached_slices import CachedSlices

log = logging.getLogger(__name__)

BASELINE_IMAGE_SIZE = 256
"""Side of a 2D baseline's input in pixels unless model.image_size says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A fine-tuning ready to train."""

    store: SliceStore
    split: Split
    classes: ClassTable
    dataset: SliceDataset | CachedSlices | VolumePatches
    val_series: list[str]
    start: StartingPoint | BaselineStart
    segmenter: Segmenter
    peft_model: PeftModel | None
    reports: list[TensorReport]
    inference: InferenceConfig
    transductive: bool


def prepare(config: FinetuneConfig, *, run_path: Path | None = None) -> Prepared:
    """Open data and weights, check that they fit, and adapt the model; writes nothing.

    Args:
        config: Everything the run is decided by.
        run_path: A run that may exist: without ``data.split`` its own split comes before what is found or drawn today.

    Raises:
        DataError, WeightsError, UsageError: If the run could not give a trustworthy result.
    """
    store = _open_store(config)
    split = load_run_split(run_path, store) if run_path is not None and not config.data.split else None
    if split is None:
        split = load_split(Path(config.data.split) if config.data.split else None, store)
        split = draw_few_shot(split, store, config.data.few_shot)
    classes = choose_classes(
        store, config.data.classes, regions=config.data.regions or None, train_patients=split.train
    )
    config.loss.check_classes(classes.num_classes)
    val_series = labelled_series(store, split.val)
    if not val_series:
        raise DataError(
            f"validation must have at least one labelled scan, got {len(split.val)} patients and 0 scans. "
            "Make another split.",
            where=store.path.name,
        )
    baseline = as_baseline(config.model.arch)
    if baseline is not None:
        return _prepare_baseline(baseline, config, store, split, classes, val_series)
    return _prepare_sam(config, store, split, classes, val_series)


def _prepare_sam(
    config: FinetuneConfig, store: SliceStore, split: Split, classes: ClassTable, val_series: list[str]
) -> Prepared:
    """Load SAM, check that it fits the data, and adapt it."""
    if not config.model.ckpt:
        raise UsageError("model.ckpt must say what to start from.", next_command="make finetune CKPT=runs/NAME")
    start = find_starting_point(
        Path(config.model.ckpt),
        base=Path(config.model.base) if config.model.base else None,
        image_size=config.model.image_size,
        model=config.model.arch,
    )
    transductive = check_leak(start.encoder.card, split, store, allow=config.data.allow_transductive)
    intensity = intensity_of(start.card, store)
    num_neighbours = neighbours_of(config.data.num_neighbours, start.card)
    dataset = training_set(config, store, split, classes, intensity, num_neighbours=num_neighbours)
    _check_batch(config, dataset)
    sam, reports = start.build()
    sam.image_encoder.activation_checkpointing = config.trainer.activation_checkpointing
    if not config.prompt.is_prompted:
        make_room_for_classes(sam, num_classes=classes.num_classes)
    peft_model = adapt(
        sam,
        config.adapter,
        num_classes=classes.num_classes,
        max_steps=config.trainer.max_steps,
        prompted_tokens=config.prompt.mask_tokens,
    )
    return Prepared(
        store=store,
        split=split,
        classes=classes,
        dataset=dataset,
        val_series=val_series,
        start=start,
        segmenter=Segmenter(sam, num_classes=classes.num_classes),
        peft_model=peft_model,
        reports=reports,
        inference=InferenceConfig(
            intensity=intensity,
            keep_aspect=config.data.keep_aspect,
            num_neighbours=num_neighbours,
            batch_size=config.watch.batch_size,
            prompt=config.prompt.for_evaluation(),
        ),
        transductive=transductive,
    )


def _open_store(config: FinetuneConfig) -> SliceStore:
    store = SliceStore.open(config.data.store)
    if store.modality.value != config.modality:
        raise DataError(
            f"the store must be of modality {config.modality}, got {store.modality.value}. "
            f"Use MODALITY={store.modality.value}.",
            where=store.path.name,
        )
    return store


def _prepare_baseline(
    baseline: Baseline,
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    val_series: list[str],
) -> Prepared:
    """Plan a network without SAM on the same data."""
    if config.model.ckpt or config.model.base:
        raise UsageError(f"MODEL={baseline.value} starts from random weights: leave out CKPT and BASE.")
    if config.prompt.is_prompted:
        raise UsageError(f"MODEL={baseline.value} takes no prompts: leave out prompt.mode.")
    num_neighbours = config.data.num_neighbours or 0
    records = [r for r in store.series if r.has_label and r.patient_id in set(split.train)]
    plan = plan_network(
        baseline,
        config.baseline,
        num_classes=classes.num_classes,
        in_channels=1 if baseline.is_volume else 1 + 2 * num_neighbours,
        image_size=config.model.image_size or BASELINE_IMAGE_SIZE,
        median_shape_zyx=np.median([r.shape_zyx for r in records], axis=0).astype(int).tolist(),
        spacing_zyx=np.median([r.spacing_mm for r in records], axis=0).tolist(),
    )
    log.info("%s: input %s, channels %s, from scratch", baseline.value, plan["sizes"], plan["channels"])
    dataset: SliceDataset | VolumePatches
    if baseline.is_volume:
        dataset = _patches(config, store, split, classes, [r.series_id for r in records], plan["sizes"])
    else:
        dataset = training_set(config, store, split, classes, store.intensity, num_neighbours=num_neighbours)
        _check_batch(config, dataset)
    return Prepared(
        store=store,
        split=split,
        classes=classes,
        dataset=dataset,
        val_series=val_series,
        start=BaselineStart(plan=plan),
        segmenter=build_network(plan),
        peft_model=None,
        reports=[],
        inference=InferenceConfig(
            intensity=store.intensity,
            keep_aspect=config.data.keep_aspect,
            num_neighbours=num_neighbours,
            batch_size=config.watch.batch_size,
        ),
        transductive=False,
    )


def _patches(
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    series_ids: list[str],
    patch_size: list[int],
) -> VolumePatches:
    if split.train_slices:
        raise UsageError("3D baselines learn from volumes: use data.few_shot.unit=patients, or a 2D baseline.")
    # Every draw is another patch: an epoch may show a volume several times.
    repeats = -(-config.data.batch_size // len(series_ids))
    return VolumePatches(
        store,
        series_ids * repeats,
        patch_size=patch_size,
        classes=classes,
        intensity=store.intensity,
        foreground_fraction=config.data.foreground_fraction,
        augment=config.data.augment,
        seed=config.seed,
    )


def _check_batch(config: FinetuneConfig, dataset: SliceDataset) -> None:
    if len(dataset) < config.data.batch_size:
        raise UsageError(
            f"data.batch_size must be at most the number of training slices {len(dataset)}, got "
            f"{config.data.batch_size}.",
            next_command=f"add data.batch_size={len(dataset)}",
        )


def training_set(
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    intensity: IntensityPreset,
    *,
    num_neighbours: int = 0,
) -> SliceDataset:
    """Return the augmented training slices of labelled series, foreground repeated."""
    labelled = {record.series_id for record in store.series if record.has_label}
    refs = select_slices(
        store,
        split.train,
        min_foreground_fraction=config.data.min_foreground_fraction,
        labelled_only=config.data.labelled_slices_only,
    )
    refs = keep_train_slices([ref for ref in refs if ref.series_id in labelled], split)
    flags = [has_foreground(store, ref, classes) for ref in refs]
    if config.prompt.is_prompted:
        # Nothing can be pointed at in the others.
        refs, flags = [ref for ref, flag in zip(refs, flags, strict=True) if flag], [True] * sum(flags)
        log.info("training slices: the %d that show a class; the others have nothing to prompt for", len(refs))
    balanced = balance_foreground(refs, flags, foreground_fraction=config.data.foreground_fraction)
    return SliceDataset(
        store,
        balanced,
        intensity=intensity,
        augment=SliceAugmentation(config.data.augment),
        seed=config.seed,
        with_label=True,
        num_neighbours=num_neighbours,
    )


def check_leak(card: Card | None, split: Split, store: SliceStore, *, allow: bool) -> bool:
    """Compare the encoder's pretraining patients with validation and test; return whether the run is transductive.

    Raises:
        DataError: If they overlap and it was not allowed.
    """
    manifest: Mapping[str, object] = card.data_manifest if card else {}
    if not manifest:
        return False
    try:
        refuse_leak(manifest, split, store)
    except DataError:
        if not allow:
            raise
        log.warning("transductive: validation or test patients were in the pretraining set; the card says so.")
        return True
    log.info("no validation or test patient was in the encoder's pretraining set")
    return False


def intensity_of(card: Card, store: SliceStore) -> IntensityPreset:
    """Return the preset the encoder was pretrained with, else the store's."""
    if not card.intensity:
        return store.intensity
    preset = IntensityPreset.from_dict(card.intensity)
    if preset != store.intensity:
        log.info("intensity preset %s of the encoder, not %s of the store", preset.name, store.intensity.name)
    return preset


def neighbours_of(wanted: int | None, card: Card) -> int:
    """Return how many neighbours of a slice the encoder sees on each side: as wanted, else as in its pretraining."""
    if wanted is None:
        return card.num_neighbours
    if wanted != card.num_neighbours and card.stage != "base":
        log.info("slice neighbours: %d, the encoder was pretrained with %d", wanted, card.num_neighbours)
    return wanted


def describe(prepared: Prepared) -> list[str]:
    """Return the pre-flight lines on data and weights."""
    network = prepared.segmenter.network
    return [*describe_data(prepared), *render_parts(trainable_table(network), trainable_groups(network))]


def describe_data(prepared: Prepared) -> list[str]:
    """Return what the store and the split hold, one line per class."""
    store, split, classes = prepared.store, prepared.split, prepared.classes
    lines = [f"data: {store.path.name} ({store.modality.value}), {len(store.series)} scans"]
    for channel, name in enumerate(classes.names):
        ids = classes.store_ids(channel)
        counts = ", ".join(f"{part} {_voxels(store, split.part(part), ids):,}" for part in ("train", "val", "test"))
        lines.append(f"class {'+'.join(map(str, ids))} {name}: voxels {counts}")
    lines.append(
        f"patients: train {len(split.train)}, val {len(split.val)}, test {len(split.test)}; "
        f"{len(prepared.dataset)} training slices per epoch, {len(prepared.val_series)} validation scans"
    )
    return lines


def _voxels(store: SliceStore, patients: tuple[str, ...], label_ids: tuple[int, ...]) -> int:
    return sum(r.label_voxels.get(i, 0) for r in store.series if r.patient_id in patients for i in label_ids)
