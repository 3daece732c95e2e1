"""Pseudo-labels from the averaged probabilities of several models.

Shape letters: C = foreground classes, Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.inference import (
    NO_FLIPS,
    Flips,
    InferenceConfig,
    average_planes,
    check_planes,
    segment_probabilities,
)
from samgraft.finetune.model_folder import CARD_FILE, FinishedModel, read_model
from samgraft.finetune.pseudo_labels import FACTS_KEY, PseudoFacts, ignored_share, pseudo_record
from samgraft.finetune.selftraining.parts import Round
from samgraft.finetune.task import Task
from samgraft.finetune.training.unlabelled import UnlabelledScans
from samgraft.shared.scans.orientation import Plane, change_plane, has_mirror_image
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import COMPLETE, SCHEMA, SERIES, SliceStore, read_table
from samgraft.shared.store.write import finish_store, read_record, start_store, write_series
from samgraft.shared.training.device import DeviceChoice, release_memory
from samgraft.shared.weights.card import Card

log = logging.getLogger(__name__)

LARGEST_USUAL_SHARE = 0.25
"""Share of ignored voxels above which the labelling warns."""
LEFT_RIGHT: Flips = ((), (-1,))
"""A slice and its left-right mirror image."""


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Averaged opinion of the teachers on one scan."""

    label_ZHW: npt.NDArray[np.int32]
    """Label ids, with ``IGNORE_LABEL`` where the agreement is too low."""
    agreement_ZHW: npt.NDArray[np.float32]
    """Averaged probability of the chosen class, 0 to 1."""
    slice_agreement_Z: npt.NDArray[np.float32]
    """Mean agreement of the voxels that any teacher labels as a class, and 1 for slices without such a voxel."""


def label_scans(
    one: Round, scans: UnlabelledScans, config: FinetuneConfig, device: DeviceChoice, *, check_stop: Callable[[], None]
) -> SliceStore:
    """Write the pseudo-labels of a round and return their store. Scans that are complete are not labelled again.

    Args:
        one: Round, whose teachers are finished.
        scans: Scans to label.
        config: Settings of the self-training.
        device: Device of the teachers.
        check_stop: Called before every scan. It may raise to stop.
    """
    facts = _facts_of(one, scans, config)
    path = one.pseudo_path
    if (path / COMPLETE).is_file():
        # Another teacher or threshold since then makes these labels out of date.
        if read_table(path).get(FACTS_KEY) == dataclasses.asdict(facts):
            labels = SliceStore.open(path)
            # A user who resumes may not have the terminal of the session that labelled.
            _report_ignored(labels, min_agreement=config.selftrain.min_agreement)
            return labels
        (path / COMPLETE).unlink()
    # The key changes with the teachers and the settings, so that labels of an earlier attempt are not taken for these.
    build_key = hashlib.sha256(json.dumps(dataclasses.asdict(facts), sort_keys=True).encode()).hexdigest()
    if not (path / "zarr.json").is_file():
        start_store(path, modality=scans.images.modality)
    models = [read_model(teacher.path) for teacher in one.teachers]
    for model in models:
        model.segmenter.to(device.torch_device)
    records = []
    for number, series_id in enumerate(scans.series, start=1):
        check_stop()
        finished = read_record(path / SERIES / series_id, build_key=build_key)
        if finished is None:
            consensus = find_consensus(models, scans.images, series_id, config, device)
            records.append(
                _write_scan(
                    path, scans.images.record(series_id), consensus, planes=config.data.planes, build_key=build_key
                )
            )
        else:
            records.append(finished[0])
        log.info("pseudo-labels: %d of %d scans", number, len(scans.series))
    classes = models[0].task.classes
    _write_table(path, scans.images, records, classes, facts)
    # The student trains in another process on the same GPU.
    del models
    release_memory(device)
    labels = SliceStore.open(path)
    _report_ignored(labels, min_agreement=config.selftrain.min_agreement)
    return labels


def _report_ignored(labels: SliceStore, *, min_agreement: float) -> None:
    """Log the share of ignored voxels, and warn if it is so large that the student learns little."""
    share = ignored_share(labels)
    log.info("pseudo-labels: %.1f %% of the voxels are ignored (agreement below %g)", 100 * share, min_agreement)
    # Nearly all voxels are background, of which trained models are sure. Elsewhere only borders are in doubt.
    if share > LARGEST_USUAL_SHARE:
        log.warning(
            "%.0f %% of the voxels are ignored, also clear background, so the teachers are hardly trained. Train them "
            "longer (selftrain.every_teacher=[trainer.max_steps=N]) or with another learning rate.",
            100 * share,
        )


def _facts_of(one: Round, scans: UnlabelledScans, config: FinetuneConfig) -> PseudoFacts:
    folders = [teacher.path / "model" for teacher in one.teachers]
    return PseudoFacts(
        source_fingerprint=scans.images.fingerprint,
        round=one.number,
        teachers=[teacher.name.removeprefix("teacher ") for teacher in one.teachers],
        teacher_sha256=[str(Card.read(folder / CARD_FILE).weights_sha256) for folder in folders],
        class_ids=list(Task.read(folders[0]).classes.ids),
        min_agreement=config.selftrain.min_agreement,
        min_slice_agreement=config.selftrain.min_slice_agreement,
        flips=config.selftrain.flips,
        transductive=scans.transductive,
        planes=[plane.value for plane in config.data.planes],
    )


def _write_table(
    path: Path, scans: SliceStore, records: Sequence[SeriesRecord], classes: ClassTable, facts: PseudoFacts
) -> None:
    finish_store(
        path,
        {
            "schema": SCHEMA,
            "modality": scans.modality.value,
            "label_names": {str(i): name for i, name in zip(classes.ids, classes.names, strict=True)},
            "intensity": scans.intensity.to_dict(),
            "series": [record.to_dict() for record in sorted(records, key=lambda record: record.series_id)],
            FACTS_KEY: dataclasses.asdict(facts),
        },
    )


def find_consensus(
    models: Sequence[FinishedModel],
    store: SliceStore,
    series_id: str,
    config: FinetuneConfig,
    device: DeviceChoice,
) -> Consensus:
    """Average the probabilities of the models on one scan and choose its labels."""
    volume_ZHW, record = store.read_volume(series_id), store.record(series_id)
    total: npt.NDArray[np.float32] | None = None
    is_class_ZHW = np.zeros(volume_ZHW.shape, dtype=bool)
    for model in models:
        # Teachers differ in their input, e.g. in neighbours and size, so that each prepares the slices itself.
        inference = model.task.inference(batch_size=config.watch.batch_size)
        with torch.autocast(device.torch_device.type, dtype=torch.bfloat16, enabled=device.precision == "bf16-mixed"):
            found = _plane_probabilities(model, volume_ZHW, record, config, inference)
        # Every teacher counts, because a structure that only one of them finds is a disagreement.
        is_class_ZHW |= found.argmax(axis=0) > 0
        total = found if total is None else total + found
    assert total is not None
    settings = config.selftrain
    mean_CZHW: npt.NDArray[np.float32] = np.divide(total, len(models), dtype=np.float32)
    return choose_labels(
        mean_CZHW,
        is_class_ZHW,
        models[0].task.classes,
        min_agreement=settings.min_agreement,
        min_slice_agreement=settings.min_slice_agreement,
    )


def _plane_probabilities(
    model: FinishedModel,
    volume_ZHW: npt.NDArray[Any],
    record: SeriesRecord,
    config: FinetuneConfig,
    inference: InferenceConfig,
) -> npt.NDArray[np.float32]:
    """Return the probabilities (1 + C, Z, H, W) of a model, averaged over its planes if it has several."""
    check_planes(record, inference, name=record.series_id)

    def segment(cut_ZHW: npt.NDArray[Any], plane: Plane) -> npt.NDArray[np.float32]:
        flips = allowed_flips(config, plane)
        return segment_probabilities(model.segmenter, cut_ZHW, record.stats, inference, flips=flips)

    if not inference.planes:
        return segment(volume_ZHW, record.plane)
    return average_planes(volume_ZHW, inference.planes, segment)


def choose_labels(
    mean_CZHW: npt.NDArray[np.float32],
    is_class_ZHW: npt.NDArray[np.bool_],
    classes: ClassTable,
    *,
    min_agreement: float,
    min_slice_agreement: float,
) -> Consensus:
    """Choose the most probable class of every voxel, and ignore voxels and slices of low agreement.

    Args:
        mean_CZHW: Averaged probabilities (1 + C, Z, H, W), background first.
        is_class_ZHW: True where any teacher's most probable class is not the background.
        classes: Classes of the teachers.
        min_agreement: Smallest agreement of a voxel that is not ignored.
        min_slice_agreement: Smallest agreement of a slice that is not ignored.
    """
    # A confident average needs teachers that are confident and of one opinion.
    agreement_ZHW = mean_CZHW.max(axis=0)
    label_ZHW = np.asarray([0, *classes.ids], dtype=np.int32)[mean_CZHW.argmax(axis=0)]
    counts_Z = is_class_ZHW.sum(axis=(1, 2))
    sums_Z = np.where(is_class_ZHW, agreement_ZHW, 0).sum(axis=(1, 2), dtype=np.float64)
    # Over all voxels of the slice the background, on which all models agree, would hide every disagreement.
    slice_agreement_Z = np.where(counts_Z > 0, sums_Z / np.maximum(1, counts_Z), 1.0).astype(np.float32)
    label_ZHW[agreement_ZHW < min_agreement] = IGNORE_LABEL
    label_ZHW[slice_agreement_Z < min_slice_agreement] = IGNORE_LABEL
    return Consensus(label_ZHW=label_ZHW, agreement_ZHW=agreement_ZHW, slice_agreement_Z=slice_agreement_Z)


def allowed_flips(config: FinetuneConfig, plane: Plane) -> Flips:
    """Return the flips to average over. A flip that the training never shows is left out."""
    augment = config.data.augment
    if config.selftrain.flips and has_mirror_image(plane) and augment.flip_columns_probability > 0:
        return LEFT_RIGHT
    return NO_FLIPS


def _write_scan(
    path: Path, record: SeriesRecord, consensus: Consensus, *, planes: Sequence[Plane], build_key: str
) -> SeriesRecord:
    # The smallest signed type that has all ids and IGNORE_LABEL.
    smallest = np.result_type(np.int8, np.min_scalar_type(int(consensus.label_ZHW.max())))
    label_ZHW = consensus.label_ZHW.astype(smallest)
    # One byte per voxel in a store is enough for reports and pictures.
    percent_ZHW = (100 * consensus.agreement_ZHW).round().astype(np.uint8)
    # The acquired plane is always there, because reports show its slices.
    present = [record.plane, *(p for p in planes if p in record.planes and p is not record.plane)]
    labels = {plane: change_plane(label_ZHW, record.plane, plane) for plane in present}
    return write_series(
        path,
        pseudo_record(record, labels, label_sha256=hashlib.sha256(label_ZHW.tobytes()).hexdigest()),
        {plane: change_plane(percent_ZHW, record.plane, plane) for plane in present},
        labels,
        build_key=build_key,
    )
