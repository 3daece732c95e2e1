"""Evaluation of a finished model on one part of a split, written as tables."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.ending import LOW_DICE, SMALLEST_DICE
from samgraft.finetune.evaluation.metrics import Labels, mean_over_patients
from samgraft.finetune.evaluation.postprocess import PostProcessing, apply_postprocessing, choose_postprocessing
from samgraft.finetune.evaluation.scores import (
    AVERAGING,
    CASE_COLUMNS,
    EMPTY_RULE,
    METRICS,
    case_rows,
    class_names,
    count_one_sided,
    interval_table,
    render_csv,
)
from samgraft.finetune.evaluation.statistics import Interval
from samgraft.finetune.evaluation.subgroups import Subgroups
from samgraft.finetune.evaluation.surface import DEFAULT_TOLERANCE_MM
from samgraft.finetune.evaluation.validation import CaseResult, labelled_series
from samgraft.finetune.inference import segment_series
from samgraft.finetune.model_folder import FinishedModel
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.files import write_json, write_private_text, write_text
from samgraft.shared.samples.leaks import find_leaks
from samgraft.shared.samples.split import Split
from samgraft.shared.store.names import NAMES_WORD, Names
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

OnCase = Callable[[int, int, Sequence[Mapping[str, Any]]], None]
"""Callback with the number of finished scans, of all scans, and the rows of the last one."""


@dataclass(frozen=True)
class PackedLabels:
    """Compressed label volume, about a hundredth of its size, so that all predictions of a part fit in memory."""

    content: bytes
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def pack(cls, labels: Labels) -> PackedLabels:
        """Compress label ids losslessly, in the smallest type that holds them."""
        # Label volumes are mostly runs of one value, which the fastest level compresses a hundredfold.
        small = np.ascontiguousarray(labels, dtype=np.min_scalar_type(int(labels.max(initial=0))))
        return cls(content=zlib.compress(small.tobytes(), level=1), shape=small.shape, dtype=small.dtype.str)

    def unpack(self) -> Labels:
        """Return the label ids."""
        return np.frombuffer(zlib.decompress(self.content), dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of all cases of one part of the split."""

    part: str
    """Part of the split, train, val or test."""
    rows: list[dict[str, Any]]
    """Rows per case and class with the keys ``scores.CASE_COLUMNS``, None for what cannot be measured."""
    tolerance_mm: float
    postprocessing: str = "none"
    predictions: Mapping[str, PackedLabels] = field(default_factory=dict)
    """Predicted label ids by series on the scans' own grids, for pictures."""
    notes: tuple[str, ...] = ()
    """Sentences on a model with a bad ending, and on patients of its encoder's pretraining."""

    @property
    def warnings(self) -> list[str]:
        """Notes, and a sentence on a model that failed on these scans."""
        found = list(self.notes)
        if self.overall is None or self.overall.mean >= LOW_DICE:
            return found
        what = "segments hardly anything"
        if self.overall.mean < SMALLEST_DICE:
            none = all(row["predicted_voxels"] == 0 for row in self.rows)
            what = "predicted no voxel of any class" if none else "found no voxel of any class where it is"
        found.append(f"The model {what} in {counted(self.num_cases, 'scan')}.")
        return found

    @cached_property
    def intervals(self) -> dict[tuple[str | None, str], Interval | None]:
        """Intervals by class and metric, computed once for tables and report. Class None is the mean over classes."""
        return interval_table(self.rows, class_names(self.rows))

    @property
    def overall(self) -> Interval | None:
        """Mean Dice over classes per scan, over scans per patient, over patients."""
        return self.intervals[None, "dice"]

    @property
    def per_class(self) -> dict[str, Interval | None]:
        """Dice of every class."""
        return {name: self.intervals[name, "dice"] for name in class_names(self.rows)}

    @property
    def num_cases(self) -> int:
        """Number of scans."""
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
    """Segment and score every labelled scan of one part of the split on its own grid.

    Args:
        model: Model; its parameters, buffers and modes do not change, nor do random generators.
        store: Labelled scans.
        split: Split by patient.
        part: ``train``, ``val`` or ``test``.
        batch_size: Slices per forward pass; changes speed and memory only.
        tolerance_mm: Tolerance of the surface Dice.
        postprocessing: Steps chosen earlier on validation patients; None applies none.
        bf16: Compute in bf16 instead of float32.
        on_case: Called after every scan.

    Raises:
        DataError: If training patients of the model are in the part, the store lacks its classes, or it is empty.
        NumericalError: If the model gives NaN or Inf.
    """
    classes = model.task.classes
    series_ids = _series_to_score(model, store, split, part)
    config = model.task.inference(batch_size=batch_size)
    device = next(model.segmenter.parameters()).device
    rows: list[dict[str, Any]] = []
    predictions: dict[str, PackedLabels] = {}
    for number, series_id in enumerate(series_ids, start=1):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            predicted = segment_series(model.segmenter, store, series_id, classes, config)
        if postprocessing is not None:
            predicted = apply_postprocessing(predicted, postprocessing.steps, is_overlapping=classes.is_overlapping)
        # int32, because unsigned labels of the store would wrap around in differences and bit operations.
        true = store.read_label_volume(series_id).astype(np.int32)
        new = case_rows(predicted, true, store.record(series_id), classes, tolerance_mm=tolerance_mm)
        rows += new
        predictions[series_id] = PackedLabels.pack(predicted)
        if on_case is not None:
            on_case(number, len(series_ids), new)
    described = postprocessing.describe(classes) if postprocessing is not None else "none"
    return Evaluation(
        part=part,
        rows=rows,
        tolerance_mm=tolerance_mm,
        postprocessing=described,
        predictions=predictions,
        notes=tuple(filter(None, (model.task.warning, _note_pretrained(model, store, split, part)))),
    )


def summarise(
    results: Iterable[CaseResult],
    store: SliceStore,
    classes: ClassTable,
    *,
    part: str,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> Evaluation:
    """Score scans that validation has segmented."""
    rows: list[dict[str, Any]] = []
    for result in results:
        true = store.read_label_volume(result.series_id).astype(np.int32)
        record = store.record(result.series_id)
        rows += case_rows(result.predicted, true, record, classes, tolerance_mm=tolerance_mm)
    return Evaluation(part=part, rows=rows, tolerance_mm=tolerance_mm)


def dice_per_class(results: Sequence[CaseResult]) -> dict[str, float]:
    """Return the mean Dice over patients of every class that can be measured."""
    dice: dict[str, list[tuple[str, float | None]]] = {}
    for result in results:
        for score in result.scores:
            dice.setdefault(score.class_name, []).append((result.patient_id, score.dice))
    means = {name: mean_over_patients(values) for name, values in dice.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def choose_on_validation(
    model: FinishedModel, store: SliceStore, split: Split, *, batch_size: int = 8
) -> PostProcessing:
    """Choose the post-processing by the validation scans without reading test scans.

    Raises:
        DataError: For the reasons of ``evaluate``.
    """
    series_ids = _series_to_score(model, store, split, "val")
    config = model.task.inference(batch_size=batch_size)
    cases = (
        (
            store.record(series_id).patient_id,
            segment_series(model.segmenter, store, series_id, model.task.classes, config),
            store.read_label_volume(series_id).astype(np.int32),
        )
        for series_id in series_ids
    )
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
    """Write ``cases.csv``, ``summary.json`` and, with subgroups, ``subgroups.csv``.

    Equal inputs give equal bytes.
    """
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
        "dice": interval_to_json(evaluation.overall),
        "dice_per_class": {name: interval_to_json(interval) for name, interval in evaluation.per_class.items()},
        "metrics": {
            metric.key: {
                "better": metric.better,
                "overall": interval_to_json(evaluation.intervals[None, metric.key]),
                "per_class": {
                    name: interval_to_json(evaluation.intervals[name, metric.key]) for name in class_names(rows)
                },
            }
            for metric in METRICS
        },
        **({"warnings": evaluation.warnings} if evaluation.warnings else {}),
        "subgroups": {one.attribute: one.counts(rows) for one in subgroups},
    }
    write_json(folder / "summary.json", summary, indent=2)
    if subgroups:
        table = [row for one in subgroups for row in one.table(rows)]
        write_text(folder / "subgroups.csv", render_csv(table, tuple(table[0])))


def write_named_cases(evaluation: Evaluation, folder: Path, names: Names) -> Path:
    """Write ``cases.names.csv``, the table of cases with the names of patients and scans, for its owner only."""
    path = folder / f"cases{NAMES_WORD}csv"
    rows = [
        {**row, "patient": names.patient(row["patient_id"]), "scan": names.scan(row["series_id"])}
        for row in evaluation.rows
    ]
    write_private_text(path, render_csv(rows, ("patient", "scan", *CASE_COLUMNS)))
    return path


def _series_to_score(model: FinishedModel, store: SliceStore, split: Split, part: str) -> list[str]:
    check_store(model, store)
    check_patients(model, store, split, part)
    series_ids = labelled_series(store, split.part(part))
    if not series_ids:
        raise DataError(
            f"part {part} of the split must have at least one labelled scan, got none. Make another split.",
            where=store.path.name,
        )
    return series_ids


def check_store(model: FinishedModel, store: SliceStore) -> None:
    """Refuse a store without the model's classes and warn about another modality."""
    known = {label for record in store.series for label in record.label_voxels}
    classes = model.task.classes
    wanted = sorted({label for channel in range(classes.num_classes) for label in classes.store_ids(channel)})
    if missing := [label for label in wanted if label not in known]:
        raise DataError(
            f"the store must have the model's classes, label ids {missing} do not occur; it has {sorted(known)}.",
            where=store.path.name,
        )
    # Only a warning: a model may work on a modality that looks similar, and its scores show whether it does.
    if store.modality.value != model.task.modality:
        log.warning(
            "the model was trained on %s, this store has %s. Expect low scores.",
            model.task.modality,
            store.modality.value,
        )


def check_patients(model: FinishedModel, store: SliceStore, split: Split, part: str) -> None:
    """Refuse a validation or test part with patients that the model was trained on."""
    if part == "train":
        log.warning("these are training cases. Their scores do not estimate those of new patients.")
        return
    patients = set(split.part(part))
    trained_ids = set(model.task.split.get("train", ()))
    # Patient ids differ between stores built with other salts. Equal voxels show the same scan all the same.
    trained_content = set(model.card.data_manifest.get("content_sha256", ()))
    # A patient leaks by id, or by voxels that were trained on under another id.
    leaked = {
        record.patient_id
        for record in store.series
        if record.patient_id in patients
        and (record.patient_id in trained_ids or record.content_sha256 in trained_content)
    }
    if leaked:
        raise DataError(
            f"{counted(len(leaked), f'patient of {part} was', f'patients of {part} were')} trained on "
            f"({', '.join(sorted(leaked)[:3])}). Use the split that the model was trained with.",
            where=f"{store.path.name}, part {part}",
        )


def _note_pretrained(model: FinishedModel, store: SliceStore, split: Split, part: str) -> str | None:
    """Return a sentence if scored patients were in the unlabelled pretraining of the encoder, also of another store."""
    manifest = model.card.data_manifest.get("pretraining") or {}
    scored = replace(split, train=(), val=(), test=split.part(part), folds=())
    if part == "train" or not (leaks := find_leaks(manifest, scored, store)):
        return None
    return (
        f"{counted(len(leaks[0].patients), 'of these patients was', 'of these patients were')} in the pretraining of "
        "the encoder, without labels. Scores of new patients may be lower."
    )


def interval_to_json(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval as plain values, rounded to four decimals."""
    if interval is None:
        return None
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(interval).items()}


def _of_class(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["class"] == name]
