"""Scores of a finished model on one part of a split, as files; nothing about the model changes."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samgraft.finetune.classes import ClassTable
from samgraft.finetune.metrics import mean_or_none
from samgraft.finetune.model_folder import FinishedModel
from samgraft.finetune.statistics import Interval, bootstrap_mean
from samgraft.finetune.validation import CaseResult, labelled_series, measure
from samgraft.shared.data.split import Split
from samgraft.shared.data.store import SliceStore
from samgraft.shared.errors import DataError

log = logging.getLogger(__name__)

CASE_COLUMNS = (
    "patient_id",
    "series_id",
    "label_id",
    "class",
    "dice",
    "true_voxels",
    "predicted_voxels",
    "true_ml",
    "predicted_ml",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All cases of one part of the split and what they amount to."""

    part: str
    rows: list[dict[str, Any]]
    """One per case and class, keys ``CASE_COLUMNS``; dice None where the class is neither true nor predicted."""
    per_class: dict[str, Interval | None]
    overall: Interval | None
    """Mean over classes per scan, over scans per patient, over patients."""


def evaluate(
    model: FinishedModel, store: SliceStore, split: Split, *, part: str, batch_size: int = 8
) -> tuple[Evaluation, list[CaseResult]]:
    """Segment and score every labelled scan of one part of the split, on the scans' own grids.

    Raises:
        DataError: If the model's training patients are in the part, the store lacks its classes, or it is empty.
    """
    classes = model.task.classes
    _refuse_foreign_store(model, store)
    _refuse_training_cases(model, store, split, part)
    series_ids = labelled_series(store, split.part(part))
    results = measure(model.segmenter, store, series_ids, classes, model.task.inference(batch_size=batch_size))
    return summarise(results, store, classes, part=part), results


def summarise(results: Sequence[CaseResult], store: SliceStore, classes: ClassTable, *, part: str) -> Evaluation:
    """Put case results into rows and intervals over patients."""
    rows = [row for result in results for row in _rows(result, store)]
    per_class = {name: bootstrap_mean(_per_patient(results, channel)) for channel, name in enumerate(classes.names)}
    return Evaluation(part=part, rows=rows, per_class=per_class, overall=bootstrap_mean(_per_patient(results, None)))


def write_evaluation(evaluation: Evaluation, folder: Path, *, provenance: dict[str, Any]) -> None:
    """Write ``cases.csv`` and ``summary.json``; equal inputs give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=CASE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: _cell(v) for k, v in row.items()} for row in evaluation.rows])
    _write(folder / "cases.csv", text.getvalue())
    summary = {
        **provenance,
        "part": evaluation.part,
        "num_cases": len({row["series_id"] for row in evaluation.rows}),
        "empty_rule": "a class that a case has neither truly nor predicted is n/a and enters no mean; one-sided is 0",
        "averaging": "mean over classes per scan, over scans per patient, over patients; 95 % bootstrap over patients",
        "dice": _plain(evaluation.overall),
        "dice_per_class": {name: _plain(interval) for name, interval in evaluation.per_class.items()},
    }
    _write(folder / "summary.json", json.dumps(summary, indent=2, sort_keys=True) + "\n")


def _rows(result: CaseResult, store: SliceStore) -> list[dict[str, Any]]:
    z_mm, row_mm, column_mm = store.record(result.series_id).spacing_mm
    voxel_ml = z_mm * row_mm * column_mm / 1000
    return [
        {
            "patient_id": result.patient_id,
            "series_id": result.series_id,
            "label_id": score.label_id,
            "class": score.class_name,
            "dice": score.dice,
            "true_voxels": score.true_voxels,
            "predicted_voxels": score.predicted_voxels,
            "true_ml": score.true_voxels * voxel_ml,
            "predicted_ml": score.predicted_voxels * voxel_ml,
        }
        for score in result.scores
    ]


def _per_patient(results: Sequence[CaseResult], channel: int | None) -> list[float]:
    """Return one mean per patient, of one class or (None) of the classes' mean."""
    values: dict[str, list[float | None]] = {}
    for result in results:
        values.setdefault(result.patient_id, []).append(result.dice if channel is None else result.scores[channel].dice)
    means = [mean_or_none(v) for v in values.values()]
    return [mean for mean in means if mean is not None]


def _refuse_foreign_store(model: FinishedModel, store: SliceStore) -> None:
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


def _refuse_training_cases(model: FinishedModel, store: SliceStore, split: Split, part: str) -> None:
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


def _cell(value: object) -> object:
    if value is None:
        return "n/a"
    return f"{value:.4f}" if isinstance(value, float) else value


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(interval).items()}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    temporary.replace(path)
