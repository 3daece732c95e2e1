"""Dice of a model on whole scans of a part of the split, during training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.metrics import ClassScore, class_scores, mean_or_none, mean_over_patients
from samgraft.finetune.inference import InferenceConfig, segment_series
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.errors import DataError
from samgraft.shared.store.store import SliceStore

Labels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Scores of one scan and its predicted label ids."""

    series_id: str
    patient_id: str
    scores: tuple[ClassScore, ...]
    """Score of every class, in the order of the model's classes."""
    predicted: Labels
    """Predicted label ids on the scan's own grid."""

    @property
    def dice(self) -> float | None:
        """Mean Dice over the classes that can be measured."""
        return mean_or_none([score.dice for score in self.scores])


def labelled_series(store: SliceStore, patient_ids: Iterable[str]) -> list[str]:
    """Return the labelled series of some patients in the order of the store."""
    patients = set(patient_ids)
    return [record.series_id for record in store.series if record.patient_id in patients and record.has_label]


def score_scans(
    segmenter: Segmenter,
    store: SliceStore,
    series_ids: Iterable[str],
    classes: ClassTable,
    config: InferenceConfig,
) -> list[CaseResult]:
    """Segment and score whole scans without changing the model or any random generator."""
    results = []
    for series_id in series_ids:
        predicted = segment_series(segmenter, store, series_id, classes, config)
        true = store.read_label_volume(series_id).astype(np.int32)
        results.append(
            CaseResult(
                series_id=series_id,
                patient_id=store.record(series_id).patient_id,
                scores=tuple(class_scores(predicted, true, classes)),
                predicted=predicted,
            )
        )
    if not results:
        raise DataError("0 labelled scans to measure in this part of the split.", where=store.path.name)
    return results


def mean_dice(results: Iterable[CaseResult]) -> float | None:
    """Return the mean Dice over classes per scan, over scans per patient, then over patients."""
    return mean_over_patients((result.patient_id, result.dice) for result in results)


def select_example_cases(results: Sequence[CaseResult]) -> dict[str, list[str]]:
    """Return the series with the best, median and worst Dice of every class, for pictures.

    Returns:
        Series id to its ranks, e.g. ``["worst lesion"]``. A scan without a class has no rank in it.
    """
    ranks: dict[str, list[str]] = {}
    for place in range(len(results[0].scores) if results else 0):
        measured = [(r.scores[place].dice, r.series_id) for r in results]
        ranked = sorted((dice, series_id) for dice, series_id in measured if dice is not None)
        if not ranked:
            continue
        name = results[0].scores[place].class_name
        chosen = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
        for rank, (_, series_id) in chosen.items():
            ranks.setdefault(series_id, []).append(f"{rank} {name}")
    return ranks
