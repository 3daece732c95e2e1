"""Overlap of a predicted and a true label volume per class, with rules for empty cases.

If neither volume has the class, there is nothing to measure: every value is n/a and enters no mean (1 would reward
scans without a lesion, 0 would punish them). If only one of them has it, Dice and IoU are 0. Sensitivity needs a true
voxel, precision a predicted one and a relative volume error a true volume; otherwise they are n/a.

Voxels whose truth is not annotated (``IGNORE_LABEL``) count neither as true nor as predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable, drop_ignored

Labels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Overlap of one class in one case."""

    label_id: int
    class_name: str
    true_voxels: int
    predicted_voxels: int
    intersection_voxels: int

    @property
    def dice(self) -> float | None:
        """Dice 2 |A and B| / (|A| + |B|), None when both are empty."""
        total = self.true_voxels + self.predicted_voxels
        return 2 * self.intersection_voxels / total if total else None

    @property
    def iou(self) -> float | None:
        """Jaccard index |A and B| / |A or B|, None when both are empty."""
        union = self.true_voxels + self.predicted_voxels - self.intersection_voxels
        return self.intersection_voxels / union if union else None

    @property
    def sensitivity(self) -> float | None:
        """Share of the true voxels that were found, None without a true voxel."""
        return self.intersection_voxels / self.true_voxels if self.true_voxels else None

    @property
    def precision(self) -> float | None:
        """Share of the predicted voxels that are true, None without a predicted voxel."""
        return self.intersection_voxels / self.predicted_voxels if self.predicted_voxels else None

    @property
    def relative_volume_error(self) -> float | None:
        """Signed ratio (predicted - true) / true volume, None without a true voxel."""
        return (self.predicted_voxels - self.true_voxels) / self.true_voxels if self.true_voxels else None

    @property
    def is_one_sided(self) -> bool:
        """True if exactly one of prediction and truth has the class."""
        return bool(self.true_voxels) != bool(self.predicted_voxels)


def class_scores(predicted: Labels, true: Labels, classes: ClassTable) -> list[ClassScore]:
    """Count the voxels of every class.

    Args:
        predicted: Label ids of any shape.
        true: Label ids of the same shape.
        classes: Classes to score.

    Raises:
        ValueError: If the shapes differ.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"predicted must have the shape of true {true.shape}, got {predicted.shape}.")
    scores = []
    predicted = drop_ignored(predicted, true)
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


def mean_over_patients(values: Iterable[tuple[str, float | None]]) -> float | None:
    """Return the mean over patients of (patient, value) pairs, averaged within each patient first."""
    of_patient: dict[str, list[float | None]] = {}
    for patient, value in values:
        of_patient.setdefault(patient, []).append(value)
    return mean_or_none([mean_or_none(own) for own in of_patient.values()])


def mean_or_none(values: list[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    if len(known) == 1:  # most scans and patients of a table; np.mean takes ten times as long
        return float(known[0])
    return float(np.mean(known)) if known else None
