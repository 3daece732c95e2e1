"""Scores of a finished model on one part of a split, as files; nothing about the model changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.metrics import mean_or_none
from samgraft.finetune.evaluation.packed import PackedLabels
from samgraft.finetune.evaluation.postprocess import PostProcessing, apply_postprocessing, choose_postprocessing
from samgraft.finetune.evaluation.scores import (
    AVERAGING,
    CASE_COLUMNS,
    EMPTY_RULE,
    METRICS,
    case_rows,
    class_names,
    count_one_sided,
    interval_of,
    render_csv,
)
from samgraft.finetune.evaluation.statistics import Interval
from samgraft.finetune.evaluation.subgroups import Subgroups
from samgraft.finetune.evaluation.surface import DEFAULT_TOLERANCE_MM
from samgraft.finetune.evaluation.validation import CaseResult, labelled_series
from samgraft.finetune.inference import segment_series
from samgraft.finetune.model_folder import FinishedModel
from samgraft.shared.errors import DataError
from samgraft.shared.files import write_text
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

OnCase = Callable[[int, int, Sequence[Mapping[str, Any]]], None]
"""Called with the number of finished scans, of all scans, and the rows of the last one."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All cases of one part of the split and what they amount to."""

    part: str
    rows: list[dict[str, Any]]
    """One per case and class, keys ``scores.CASE_COLUMNS``; None where a value cannot be measured."""
    tolerance_mm: float
    postprocessing: str = "none"
    predictions: Mapping[str, PackedLabels] = field(default_factory=dict)
    """Predicted label ids by series, on the scans' own grids; empty when nobody asked for them."""

    @property
    def overall(self) -> Interval | None:
        """Dice: mean over classes per scan, over scans per patient, over patients."""
        return interval_of(self.rows, "dice")

    @property
    def per_class(self) -> dict[str, Interval | None]:
        """Dice of every class."""
        return {name: interval_of(self.rows, "dice", class_name=name) for name in class_names(self.rows)}

    @property
    def num_cases(self) -> int:
        """Scans."""
        return len({row["series_id"] for row in self.rows})


def evaluate(
    model: FinishedModel,
    store: SliceStore,
    split: Split,
    *,
    part: str,
    batch_size: int = 8,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    postprocessing: PostProcessing | None = None,
    bf16: bool = False,
    on_case: OnCase | None = None,
) -> Evaluation:
    """Segment and score every labelled scan of one part of the split, on the scans' own grids.

    Args:
        model: Left as it is: parameters, buffers and modes, and the generators too.
        store: Labelled scans.
        split: By patient.
        part: ``train``, ``val`` or ``test``.
        batch_size: Slices per forward pass; changes speed and memory only.
        tolerance_mm: Of the surface Dice.
        postprocessing: Chosen earlier on validation patients.
        bf16: Compute in bf16; the reference is float32.
        on_case: Told after each scan.

    Raises:
        DataError: If the model's training patients are in the part, the store lacks its classes, or it is empty.
    """
    classes = model.task.classes
    refuse_foreign_store(model, store)
    refuse_training_cases(model, store, split, part)
    series_ids = labelled_series(store, split.part(part))
    if not series_ids:
        raise DataError("0 labelled scans to measure in this part of the split.", where=store.path.name)
    config = model.task.inference(batch_size=batch_size)
    device = next(model.segmenter.parameters()).device
    rows: list[dict[str, Any]] = []
    predictions: dict[str, PackedLabels] = {}
    for number, series_id in enumerate(series_ids, start=1):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            predicted = segment_series(model.segmenter, store, series_id, classes, config)
        if postprocessing is not None:
            predicted = apply_postprocessing(predicted, postprocessing.steps, is_overlapping=classes.is_overlapping)
        true = store.read_label_volume(series_id).astype(np.int32)
        new = case_rows(predicted, true, store.record(series_id), classes, tolerance_mm=tolerance_mm)
        rows += new
        predictions[series_id] = PackedLabels.pack(predicted)
        if on_case is not None:
            on_case(number, len(series_ids), new)
    described = postprocessing.describe(classes) if postprocessing is not None else "none"
    return Evaluation(
        part=part, rows=rows, tolerance_mm=tolerance_mm, postprocessing=described, predictions=predictions
    )


def summarise(
    results: Iterable[CaseResult],
    store: SliceStore,
    classes: ClassTable,
    *,
    part: str,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> Evaluation:
    """Score scans that are segmented already, as validation leaves them."""
    rows: list[dict[str, Any]] = []
    for result in results:
        true = store.read_label_volume(result.series_id).astype(np.int32)
        record = store.record(result.series_id)
        rows += case_rows(result.predicted, true, record, classes, tolerance_mm=tolerance_mm)
    return Evaluation(part=part, rows=rows, tolerance_mm=tolerance_mm)


def dice_per_class(results: Sequence[CaseResult]) -> dict[str, float]:
    """Return the mean Dice over patients of every class that can be measured; cheap enough for every round."""
    values: dict[str, dict[str, list[float | None]]] = {}
    for result in results:
        for score in result.scores:
            values.setdefault(score.class_name, {}).setdefault(result.patient_id, []).append(score.dice)
    means = {name: mean_or_none([mean_or_none(v) for v in patients.values()]) for name, patients in values.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def choose_on_validation(
    model: FinishedModel, store: SliceStore, split: Split, *, batch_size: int = 8
) -> PostProcessing:
    """Segment the validation scans and choose the post-processing by them; test patients play no part.

    Raises:
        DataError: As ``evaluate``.
    """
    refuse_foreign_store(model, store)
    refuse_training_cases(model, store, split, "val")
    config = model.task.inference(batch_size=batch_size)
    cases = [
        (
            store.record(series_id).patient_id,
            segment_series(model.segmenter, store, series_id, model.task.classes, config),
            store.read_label_volume(series_id).astype(np.int32),
        )
        for series_id in labelled_series(store, split.val)
    ]
    if not cases:
        raise DataError("0 labelled scans in the validation part of the split.", where=store.path.name)
    return choose_postprocessing(
        cases, model.task.classes, weights_sha256=model.card.weights_sha256 or "", split_sha256=split.sha256
    )


def write_evaluation(
    evaluation: Evaluation,
    folder: Path,
    *,
    provenance: dict[str, Any],
    subgroups: Sequence[Subgroups] = (),
) -> None:
    """Write ``cases.csv`` and ``summary.json``, and ``subgroups.csv`` where asked; equal inputs give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "cases.csv", render_csv(evaluation.rows, CASE_COLUMNS))
    rows = evaluation.rows
    summary = {
        **provenance,
        "part": evaluation.part,
        "num_cases": evaluation.num_cases,
        "num_patients": len({row["patient_id"] for row in rows}),
        "empty_rule": EMPTY_RULE,
        "averaging": AVERAGING,
        "surface_tolerance_mm": evaluation.tolerance_mm,
        "postprocessing": evaluation.postprocessing,
        "num_one_sided": {name: count_one_sided(_of_class(rows, name)) for name in class_names(rows)},
        "dice": plain(evaluation.overall),
        "dice_per_class": {name: plain(interval) for name, interval in evaluation.per_class.items()},
        "metrics": {
            metric.key: {
                "better": metric.better,
                "overall": plain(interval_of(rows, metric.key)),
                "per_class": {
                    name: plain(interval_of(rows, metric.key, class_name=name)) for name in class_names(rows)
                },
            }
            for metric in METRICS
        },
        "subgroups": {one.attribute: one.counts(rows) for one in subgroups},
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")
    if subgroups:
        table = [row for one in subgroups for row in one.table(rows)]
        write_text(folder / "subgroups.csv", render_csv(table, tuple(table[0])))


def refuse_foreign_store(model: FinishedModel, store: SliceStore) -> None:
    """Refuse a store without the model's classes; warn about another kind of scan."""
    known = {label for record in store.series for label in record.label_voxels}
    classes = model.task.classes
    wanted = sorted({label for channel in range(classes.num_classes) for label in classes.store_ids(channel)})
    if missing := [label for label in wanted if label not in known]:
        raise DataError(
            f"the store must hold the model's classes, label ids {missing} do not occur; it has {sorted(known)}.",
            where=store.path.name,
        )
    if store.modality.value != model.task.modality:
        log.warning(
            "the model was trained on %s, this store is %s: expect low scores.",
            model.task.modality,
            store.modality.value,
        )


def refuse_training_cases(model: FinishedModel, store: SliceStore, split: Split, part: str) -> None:
    """Refuse to call patients new that the model was trained on."""
    if part == "train":
        log.warning("these are training cases: the scores say nothing about new patients.")
        return
    patients = set(split.part(part))
    trained_ids = set(model.task.split.get("train", ()))
    trained_content = set(model.card.data_manifest.get("content_sha256", ()))
    leaked = {
        record.patient_id
        for record in store.series
        if record.patient_id in patients
        and (record.patient_id in trained_ids or record.content_sha256 in trained_content)
    }
    if leaked:
        raise DataError(
            f"{len(leaked)} patients of {part} were trained on ({', '.join(sorted(leaked)[:3])}). "
            "Use the split the model was trained with.",
            where=f"{store.path.name}, part {part}",
        )


def plain(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval for JSON."""
    if interval is None:
        return None
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(interval).items()}


def _of_class(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["class"] == name]
