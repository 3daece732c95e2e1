"""Preparation of a fine-tuning, with its data, classes, weights and trainable tensors, and the pre-flight lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from samgraft.finetune.adapters import adapt, render_parts, trainable_groups, trainable_table
from samgraft.finetune.baselines import Baseline
from samgraft.finetune.baselines.networks import RandomWeights, as_baseline, build_network, plan_network
from samgraft.finetune.baselines.volume_patches import VolumePatches
from samgraft.finetune.classes import ClassTable, choose_classes
from samgraft.finetune.config import FinetuneConfig, SelftrainMode
from samgraft.finetune.early_checks import pretrain_again
from samgraft.finetune.embedding_cache import EmbeddingMemory
from samgraft.finetune.evaluation.validation import labelled_series
from samgraft.finetune.few_shot import draw_few_shot
from samgraft.finetune.inference import InferenceConfig
from samgraft.finetune.initial_weights import InitialWeights, read_initial_weights
from samgraft.finetune.pseudo_labels import PseudoLabels, ignored_slices, open_pseudo_labels
from samgraft.finetune.segmenter import Segmenter, add_class_tokens
from samgraft.finetune.training.cached_slices import CachedSlices, fill_cache, plan_cache
from samgraft.finetune.training.sampling import balance_foreground, has_foreground
from samgraft.finetune.training.unlabelled import FurtherScans, UnlabelledScans, choose_unlabelled
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.augment import SliceAugmentation
from samgraft.shared.samples.dataset import JoinedSamples, SliceDataset
from samgraft.shared.samples.leaks import find_leaks, refuse_leaks
from samgraft.shared.samples.slices import SliceRef, keep_train_slices, select_slices
from samgraft.shared.samples.split import Split, choose_fold, load_split, refuse_empty_train
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import NEAR_ISOTROPIC_RATIO, Plane
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.tensor_report import TensorReport

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

BASELINE_IMAGE_SIZE = 256
"""Default of ``model.image_size`` for 2D baselines, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data, model and settings of a fine-tuning that is ready to train."""

    store: SliceStore
    split: Split
    classes: ClassTable
    dataset: SliceDataset | JoinedSamples | CachedSlices | VolumePatches
    val_series: list[str]
    initial: InitialWeights | RandomWeights
    segmenter: Segmenter
    peft_model: PeftModel | None
    reports: list[TensorReport]
    inference: InferenceConfig
    transductive: bool
    further: FurtherScans | None = None
    """Scans of a self-training, None without one."""


def prepare(config: FinetuneConfig, *, run_path: Path | None = None) -> Prepared:
    """Open data and weights, check that they fit, and adapt the model. Nothing is written.

    Args:
        config: Settings of the run.
        run_path: Folder of a run that may exist. Without ``data.split`` its own split has priority over the split next
            to the store and over a drawn one.

    Raises:
        DataError, WeightsError, UsageError: If data, weights and settings do not fit.
    """
    store = _open_store(config)
    split = load_run_split(run_path, store) if run_path is not None and not config.data.split else None
    if split is None:
        split = choose_fold(load_split(Path(config.data.split) if config.data.split else None, store), config.data.fold)
        refuse_empty_train(split, store)
        # A resumed run keeps its own split, in which the few-shot draw is already made.
        split = draw_few_shot(split, store, config.data.few_shot)
    classes = choose_classes(
        store, config.data.classes, regions=config.data.regions or None, train_patients=split.train
    )
    config.loss.check_classes(classes.num_classes)
    val_series = labelled_series(store, split.val)
    if not val_series:
        raise DataError(
            f"validation must have at least one labelled scan, got {counted(len(split.val), 'patient')} and 0 scans. "
            "Make another split.",
            where=store.path.name,
        )
    further = _open_further_scans(config, store, split, classes)
    baseline = as_baseline(config.model.arch)
    if baseline is not None:
        return _prepare_baseline(baseline, config, store, split, classes, val_series, further)
    return _prepare_sam(config, store, split, classes, val_series, further)


def open_unlabelled(config: FinetuneConfig, store: SliceStore) -> SliceStore:
    """Return the store of the scans that a self-training labels itself.

    Raises:
        DataError: If it is of another modality than the labelled store.
    """
    if config.data.unlabelled is None:
        return store
    unlabelled = SliceStore.open(config.data.unlabelled)
    if unlabelled.modality is not store.modality:
        raise DataError(
            f"the unlabelled store must be of modality {store.modality.value}, got {unlabelled.modality.value}. Give "
            "another store.",
            where=unlabelled.path.name,
        )
    return unlabelled


def _open_further_scans(
    config: FinetuneConfig, store: SliceStore, split: Split, classes: ClassTable
) -> PseudoLabels | UnlabelledScans | None:
    """Return the scans of a self-training, with pseudo-labels or to be labelled in the run."""
    mode, allow = config.selftrain.mode, config.data.allow_transductive
    if config.data.pseudo_labels is not None:
        return open_pseudo_labels(
            Path(config.data.pseudo_labels),
            images=open_unlabelled(config, store),
            store=store,
            split=split,
            classes=classes,
            allow_transductive=allow,
        )
    if mode is SelftrainMode.OFFLINE:
        raise UsageError(
            "selftrain.mode=offline needs samgraft selftrain (make selftrain). Use it, or remove the mode."
        )
    if mode is SelftrainMode.ONLINE:
        return choose_unlabelled(open_unlabelled(config, store), store, split, allow_transductive=allow)
    return None


def _prepare_sam(
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    val_series: list[str],
    further: PseudoLabels | UnlabelledScans | None,
) -> Prepared:
    """Load SAM, check that it fits the data, and adapt it."""
    initial = read_initial_weights(
        Path(config.model.ckpt) if config.model.ckpt else None,
        base=Path(config.model.base) if config.model.base else None,
        image_size=config.model.image_size,
        model=config.model.arch,
    )
    way_out = pretrain_again(config.model.ckpt, config.data.store)
    allow = config.data.allow_transductive
    transductive = check_leak(initial.encoder.card, split, store, allow=allow, way_out=way_out)
    intensity = intensity_of(initial.card, store)
    num_neighbours = neighbours_of(config.data.num_neighbours, initial.card)
    # The encoder must get slices prepared as in its pretraining, so its card has priority over the store.
    dataset = training_set(config, store, split, classes, intensity, num_neighbours=num_neighbours, further=further)
    sam, reports = initial.build()
    sam.image_encoder.activation_checkpointing = config.trainer.activation_checkpointing
    # Prompted models use SAM's own mask tokens for any number of classes.
    if not config.prompt.is_prompted:
        add_class_tokens(sam, num_classes=classes.num_classes)
    peft_model = adapt(
        sam,
        config.adapter,
        num_classes=classes.num_classes,
        max_steps=config.trainer.max_steps,
        prompted_tokens=config.prompt.mask_tokens,
    )
    inference = InferenceConfig(
        intensity=intensity,
        keep_aspect=config.data.keep_aspect,
        num_neighbours=num_neighbours,
        batch_size=config.watch.batch_size,
        prompt=config.prompt.for_evaluation(),
        # A prompt belongs to one slice of one plane.
        planes=() if config.prompt.is_prompted else tuple(config.data.planes),
    )
    return Prepared(
        store=store,
        split=split,
        classes=classes,
        dataset=dataset,
        val_series=val_series,
        initial=initial,
        segmenter=Segmenter(sam, num_classes=classes.num_classes),
        peft_model=peft_model,
        reports=reports,
        inference=inference,
        transductive=transductive or (further is not None and further.transductive),
        further=further,
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
    further: PseudoLabels | UnlabelledScans | None,
) -> Prepared:
    """Plan a network without SAM on the same data."""
    if config.model.ckpt or config.model.base:
        raise UsageError(f"MODEL={baseline.value} starts from random weights. Remove CKPT and BASE.")
    if config.prompt.is_prompted:
        raise UsageError(f"MODEL={baseline.value} takes no prompts. Remove prompt.mode.")
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
    dataset: SliceDataset | JoinedSamples | VolumePatches
    if baseline.is_volume:
        dataset = _patches(config, store, split, classes, plan["sizes"], further=further)
    else:
        dataset = training_set(
            config, store, split, classes, store.intensity, num_neighbours=num_neighbours, further=further
        )
    return Prepared(
        store=store,
        split=split,
        classes=classes,
        dataset=dataset,
        val_series=val_series,
        initial=RandomWeights(plan=plan),
        segmenter=build_network(plan),
        peft_model=None,
        reports=[],
        inference=InferenceConfig(
            intensity=store.intensity,
            keep_aspect=config.data.keep_aspect,
            num_neighbours=num_neighbours,
            batch_size=config.watch.batch_size,
            planes=tuple(config.data.planes),
        ),
        transductive=further is not None and further.transductive,
        further=further,
    )


def _patches(
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    patch_size: list[int],
    *,
    further: PseudoLabels | UnlabelledScans | None,
) -> VolumePatches | JoinedSamples:
    """Return the training patches, those with labels and those with pseudo-labels."""
    if config.data.planes:
        raise UsageError("a 3D baseline trains on volumes, not on slices of planes. Remove data.planes.")
    if split.train_slices:
        raise UsageError(
            "a 3D baseline trains on volumes, not slices. Use data.few_shot.unit=patients or a 2D baseline."
        )
    if isinstance(further, UnlabelledScans):
        raise UsageError(
            f"MODEL={config.model.arch} cannot label scans while it trains. Use selftrain.mode=offline or a 2D network."
        )

    def patches(scans: SliceStore, series_ids: list[str], num: int, labels: SliceStore | None = None) -> VolumePatches:
        # Every sample is another random patch, so an epoch may contain a volume several times.
        return VolumePatches(
            scans,
            series_ids * -(-num // len(series_ids)),
            patch_size=patch_size,
            classes=classes,
            intensity=store.intensity,
            foreground_fraction=config.data.foreground_fraction,
            augment=config.data.augment,
            seed=config.seed,
            labels=labels,
        )

    labelled = [r.series_id for r in store.series if r.has_label and r.patient_id in set(split.train)]
    if further is None:
        return patches(store, labelled, config.data.batch_size)
    num = config.num_pseudo_per_batch
    usable = [r.series_id for r in further.labels.series if not ignored_slices(r).all()]
    if not usable:
        raise DataError("every voxel of the pseudo-labels is ignored. Lower selftrain.min_agreement.")
    parts = [
        patches(store, labelled, config.data.batch_size - num),
        patches(further.images, usable, num, further.labels),
    ]
    return JoinedSamples(parts, per_batch=[config.data.batch_size - num, num])


def _check_batch(dataset: SliceDataset, *, per_batch: int, kind: str = "") -> None:
    if len(dataset) < per_batch:
        raise UsageError(
            f"data.batch_size must be at most the number of training slices{kind} {len(dataset)}, got {per_batch}.",
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
    further: PseudoLabels | UnlabelledScans | None = None,
) -> SliceDataset | JoinedSamples:
    """Return the augmented training slices, those with labels and those of a self-training.

    Raises:
        DataError: If there are no slices.
        UsageError: If a batch needs more slices than there are.
    """
    labelled = labelled_set(config, store, split, classes, intensity, num_neighbours=num_neighbours)
    # The parts of a batch are fixed numbers, so that every step has labels.
    num_further = 0 if further is None else config.num_pseudo_per_batch
    _check_batch(labelled, per_batch=config.data.batch_size - num_further)
    if further is None:
        return labelled
    others = SliceDataset(
        further.images,
        _further_slices(config, further, split, classes),
        intensity=intensity,
        augment=SliceAugmentation(config.data.augment),
        seed=config.seed,
        with_label=True,
        num_neighbours=num_neighbours,
        labels=further.labels if isinstance(further, PseudoLabels) else None,
        hide_labels=isinstance(further, UnlabelledScans),
    )
    _check_batch(others, per_batch=num_further, kind=" without labels of their own")
    return JoinedSamples([labelled, others], per_batch=[config.data.batch_size - num_further, num_further])


def _further_slices(
    config: FinetuneConfig,
    further: PseudoLabels | UnlabelledScans,
    split: Split,
    classes: ClassTable,
) -> list[SliceRef]:
    """Return the slices of a self-training without those that are ignored or labelled."""
    # Which unlabelled slices show a class is not known, so that only pseudo-labels can be balanced.
    is_labelled = isinstance(further, PseudoLabels)
    table = further.labels if isinstance(further, PseudoLabels) else further.images
    refs = select_slices(
        table,
        further.patients,
        planes=config.data.planes,
        min_foreground_fraction=config.data.min_foreground_fraction,
        annotated_only=is_labelled,
    )
    # A scan of which single slices are labelled is unlabelled on the others only.
    series, labelled = set(further.series), set(split.train_slices)
    refs = [ref for ref in refs if ref.series_id in series and (ref.series_id, ref.slice_index) not in labelled]
    if not is_labelled:
        return refs
    flags = [has_foreground(table, ref, classes) for ref in refs]
    return balance_foreground(refs, flags, foreground_fraction=config.data.foreground_fraction)


def labelled_set(
    config: FinetuneConfig,
    store: SliceStore,
    split: Split,
    classes: ClassTable,
    intensity: IntensityPreset,
    *,
    num_neighbours: int = 0,
) -> SliceDataset:
    """Return the augmented training slices of labelled series, with foreground slices repeated.

    Raises:
        DataError: If a training scan has no slices of one of ``data.planes``, or was acquired in another plane.
        UsageError: If ``data.planes`` does not fit a few-shot draw of slices.
    """
    labelled = {record.series_id for record in store.series if record.has_label}
    _check_planes(config.data.planes, store, split)
    refs = select_slices(
        store,
        split.train,
        planes=config.data.planes,
        min_foreground_fraction=config.data.min_foreground_fraction,
        labelled_only=config.data.labelled_slices_only,
        # Such a slice adds nothing to the loss, and a batch of them would be a step without a gradient.
        annotated_only=True,
    )
    refs = keep_train_slices([ref for ref in refs if ref.series_id in labelled], split)
    flags = [has_foreground(store, ref, classes) for ref in refs]
    if config.prompt.is_prompted:
        # A slice without a class has nothing that a prompt could mark.
        refs, flags = [ref for ref, flag in zip(refs, flags, strict=True) if flag], [True] * sum(flags)
        log.info("training slices: %d that show a class; prompts need one", len(refs))
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


def _check_planes(planes: Sequence[Plane], store: SliceStore, split: Split) -> None:
    """Check that every labelled training scan has slices of all planes."""
    patients = set(split.train)
    scans = [record for record in store.series if record.patient_id in patients and record.has_label]
    # A scan in one plane only would silently count less than the others, so it is no note but an error.
    lacking = [record for record in scans if not set(planes) <= set(record.planes)]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(scans)} labelled training scans do not have slices of every plane "
            f"({', '.join(plane.value for plane in planes)}). Build the store with --planes axial,coronal,sagittal. "
            f"Scans whose spacing ratio is above {NEAR_ISOTROPIC_RATIO:g} have one plane only: leave data.planes out.",
            where=store.path.name,
        )
    if planes and any(record.plane not in planes for record in scans):
        raise DataError(
            "data.planes must contain the plane in which the training scans were acquired "
            f"({', '.join(sorted({record.plane.value for record in scans}))}), because scans are segmented in it.",
            where=store.path.name,
        )
    if planes and split.train_slices:
        raise UsageError(
            "data.few_shot.unit=slices draws slices of the acquired plane. Leave data.planes out, or draw patients.",
            where="data.planes",
        )


def check_leak(card: Card | None, split: Split, store: SliceStore, *, allow: bool, way_out: str = "") -> bool:
    """Return True when the encoder was pretrained on validation or test patients, and this is allowed.

    Args:
        card: Card of the encoder.
        split: The split of this run.
        store: The store of this run.
        allow: Setting ``data.allow_transductive``.
        way_out: Command that makes an encoder without these patients.

    Raises:
        DataError: If they overlap and ``allow`` is False.
    """
    # Published weights have no list of patients, so there is nothing to compare.
    manifest: Mapping[str, object] = card.data_manifest if card else {}
    if not manifest:
        return False
    leaks = find_leaks(manifest, split, store)
    if leaks and not allow:
        refuse_leaks({store.path.name: leaks}, way_out=way_out)
    if leaks:
        log.warning("transductive: the encoder was pretrained on validation or test patients; the card reports it.")
    else:
        log.info("the encoder was not pretrained on validation or test patients")
    return bool(leaks)


def intensity_of(card: Card, store: SliceStore) -> IntensityPreset:
    """Return the intensity preset of the encoder's pretraining, or else the store's."""
    if not card.intensity:
        return store.intensity
    preset = IntensityPreset.from_dict(card.intensity)
    if preset != store.intensity:
        log.info("intensity preset: the encoder's (%s), not the store's (%s)", preset.name, store.intensity.name)
    return preset


def neighbours_of(wanted: int | None, card: Card) -> int:
    """Return how many neighbours of a slice the encoder gets on each side, by default as in its pretraining."""
    # Without this an encoder with 2.5D pretraining would get three equal channels, unlike in its pretraining.
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
    """Return the pre-flight lines on store, classes and split."""
    store, split, classes = prepared.store, prepared.split, prepared.classes
    lines = [f"data: {store.path.name} ({store.modality.value}), {counted(len(store.series), 'scan')}"]
    for channel, name in enumerate(classes.names):
        ids = classes.store_ids(channel)
        counts = ", ".join(f"{part} {_voxels(store, split.part(part), ids):,}" for part in ("train", "val", "test"))
        lines.append(f"class {'+'.join(map(str, ids))} {name}: voxels {counts}")
    lines.append(
        f"patients: train {len(split.train)}, val {len(split.val)}, test {len(split.test)}; "
        f"{counted(len(prepared.dataset), 'training slice')} per epoch, "
        f"{counted(len(prepared.val_series), 'validation scan')}"
    )
    if prepared.further is not None:
        lines.append(f"self-training: {prepared.further.describe()}")
    return lines


def _voxels(store: SliceStore, patients: tuple[str, ...], label_ids: tuple[int, ...]) -> int:
    return sum(r.label_voxels.get(i, 0) for r in store.series if r.patient_id in patients for i in label_ids)


def describe_embeddings(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> list[str]:
    """Return the pre-flight line on cached embeddings. None without a cache.

    Raises:
        StorageError: If the disk is too small.
    """
    if not config.cache.variants or not isinstance(prepared.dataset, SliceDataset):
        return []
    cache, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision=device.precision)
    size = cache.num_records * cache.shape.expected_bytes / 1e9
    state = "all cached" if cache.is_complete else f"{cache.check_disk() / 1e9:.2f} GB of it to compute and write"
    return [f"embeddings: {counted(len(cached.unique), 'slice')} x {cached.variants} variants, {size:.2f} GB, {state}"]


def use_cached_embeddings(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> Prepared:
    """Return the run with cached embeddings. The same run when the encoder trains or there is no cache."""
    if not config.freezes_encoder or isinstance(prepared.dataset, VolumePatches):
        return prepared
    # The labels of an online self-training would fill the memory of validation embeddings with training slices.
    if config.cache.validation_mb and config.selftrain.mode is not SelftrainMode.ONLINE:
        prepared.segmenter.embedding_memory = EmbeddingMemory(limit_bytes=config.cache.validation_mb * 2**20)
    if not config.cache.variants or not isinstance(prepared.dataset, SliceDataset):
        return prepared
    _, cached = plan_cache(prepared.dataset, prepared.segmenter, config, precision=device.precision)
    fill_cache(cached, prepared.dataset, prepared.segmenter, config, device)
    return replace(prepared, dataset=cached)
