"""Overlap of a predicted and a true label volume, per class, with stated rules for empty cases.

Rules: neither has the class: nothing to measure, the value is n/a and does not enter a mean (1 would reward scans
without a lesion, 0 would punish them). One of the two has it: Dice is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable

Labels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class of one case."""

    label_id: int
    class_name: str
    true_voxels: int
    predicted_voxels: int
    intersection_voxels: int

    @property
    def dice(self) -> float | None:
        """2 |A and B| / (|A| + |B|); None when both are empty."""
        total = self.true_voxels + self.predicted_voxels
        return 2 * self.intersection_voxels / total if total else None


def class_scores(predicted: Labels, true: Labels, classes: ClassTable) -> list[ClassScore]:
    """Count voxels per class.

    Args:
        predicted: Label ids of any shape.
        true: Label ids of the same shape.
        classes: Which ids to score.

    Raises:
        ValueError: If the shapes differ.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predicted must have the shape of true {true.shape}, got {predicted.shape}.")
    scores = []
    for channel, (label_id, name) in enumerate(zip(classes.ids, classes.names, strict=True)):
        in_prediction, in_truth = classes.predicted_mask(predicted, channel), classes.true_mask(true, channel)
        scores.append(
            ClassScore(
                label_id=label_id,
                class_name=name,
                true_voxels=int(in_truth.sum()),
                predicted_voxels=int(in_prediction.sum()),
                intersection_voxels=int((in_prediction & in_truth).sum()),
            )
        )
    return scores


def mean_or_none(values: list[float | None]) -> float | None:
    """Return the mean of the values that exist; None when there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
