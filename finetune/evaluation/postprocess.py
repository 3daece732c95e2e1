"""Post-processing of segmented volumes and its choice by validation patients, never by test patients.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable, drop_ignored
from samgraft.finetune.evaluation.metrics import mean_over_patients
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.files import write_json
from scipy import ndimage

Labels = npt.NDArray[Any]

SCHEMA = 1
POSTPROCESSING_FILE = "postprocessing.json"
MIN_PATIENTS = 3
"""Smallest number of patients for a choice. With fewer, one patient could decide by chance."""
MIN_GAIN = 0.002
"""Smallest rise of the mean Dice that justifies the risk of removing a second, real structure."""
STEPS = ("largest_component", "fill_holes")
CANDIDATES: tuple[tuple[str, ...], ...] = (("largest_component",), ("fill_holes",), ("largest_component", "fill_holes"))


@dataclass(frozen=True, kw_only=True)
class PostProcessing:
    """Steps per class and the measurement that they were chosen by."""

    steps: dict[int, list[str]] = field(default_factory=dict)
    """Steps in order by label id. A class that is not listed has none."""
    weights_sha256: str = ""
    """Hash of the model that it was chosen for."""
    split_sha256: str = ""
    """Hash of the split whose validation part was used."""
    num_patients: int = 0
    """Number of validation patients."""
    dice: dict[int, dict[str, float | None]] = field(default_factory=dict)
    """Mean validation Dice ``before`` and ``after`` by label id."""
    schema: int = SCHEMA

    def describe(self, classes: ClassTable) -> str:
        """Return the names of classes and steps as text, ``none`` without steps."""
        names = dict(zip(classes.ids, classes.names, strict=True))
        parts = [f"{names[i]}: {', '.join(s.replace('_', ' ') for s in steps)}" for i, steps in self.steps.items()]
        return "; ".join(parts) or "none"

    def write(self, folder: Path) -> Path:
        """Write ``postprocessing.json`` and return its path."""
        path = folder / POSTPROCESSING_FILE
        write_json(path, dataclasses.asdict(self), indent=2)
        return path


def read_postprocessing(folder: Path, *, weights_sha256: str | None, classes: ClassTable) -> PostProcessing:
    """Read the post-processing chosen for a model, no steps if none was chosen.

    Raises:
        WeightsError: If the file is damaged, chosen for other weights, or has unknown steps or classes.
    """
    path = folder / POSTPROCESSING_FILE
    if not path.is_file():
        return PostProcessing()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema") != SCHEMA or set(values) != {f.name for f in dataclasses.fields(PostProcessing)}:
            raise WeightsError(
                f"{POSTPROCESSING_FILE} must have schema {SCHEMA} and its fields.", where=folder.parent.name
            )
        steps = {int(label): [str(step) for step in chosen] for label, chosen in values["steps"].items()}
        dice = {int(label): dict(pair) for label, pair in values["dice"].items()}
    except (ValueError, TypeError, AttributeError, KeyError) as err:
        if isinstance(err, WeightsError):
            raise
        raise WeightsError(
            f"{POSTPROCESSING_FILE} is damaged. Delete it, or choose again.",
            where=folder.parent.name,
            next_command="samgraft evaluate RUN --choose-postprocessing",
        ) from err
    found = PostProcessing(**{**values, "steps": steps, "dice": dice})
    unknown = sorted({step for chosen in steps.values() for step in chosen} - set(STEPS))
    if unknown or not set(steps) <= set(classes.ids):
        raise WeightsError(
            f"{POSTPROCESSING_FILE} must name steps among {', '.join(STEPS)} for classes {list(classes.ids)}, got "
            f"{', '.join(unknown) or sorted(steps)}.",
            where=folder.parent.name,
        )
    if found.weights_sha256 != weights_sha256:
        raise WeightsError(
            f"{POSTPROCESSING_FILE} was chosen for other weights. Choose again, or delete it.",
            where=folder.parent.name,
            next_command="samgraft evaluate RUN --choose-postprocessing",
        )
    return found


def apply_postprocessing(
    labels_ZHW: Labels, steps: Mapping[int, Sequence[str]], *, is_overlapping: bool = False
) -> Labels:
    """Apply the steps of every class to a label volume.

    Voxels are connected if they share a face, in three dimensions. A hole is background that a structure encloses
    within one slice. Filling never changes a voxel of another class.

    Args:
        labels_ZHW: Predicted label ids, or bits of overlapping classes.
        steps: Steps by label id or bit.
        is_overlapping: True for bits.
    """
    result = labels_ZHW.copy()
    for label_id, chosen in steps.items():
        mask = (result & label_id) != 0 if is_overlapping else result == label_id
        if not mask.any():
            continue
        if "largest_component" in chosen:
            kept = _largest_component(mask)
            removed = mask & ~kept
            # Only the bit of this class is cleared, because other classes may overlap there.
            result[removed] = result[removed] & ~label_id if is_overlapping else 0
            mask = kept
        if "fill_holes" in chosen:
            # Slice by slice, because thick slices leave a cavity open at its top or bottom.
            filled = np.stack([ndimage.binary_fill_holes(slice_HW) for slice_HW in mask])
            if is_overlapping:
                result[filled] |= label_id
            else:
                result[filled & (result == 0)] = label_id
    return result


def choose_postprocessing(
    cases: Iterable[tuple[str, Labels, Labels]], classes: ClassTable, *, weights_sha256: str, split_sha256: str
) -> PostProcessing:
    """Choose steps per class by the mean Dice over validation patients.

    Args:
        cases: Patient, predicted and true label volume of every validation scan, of which one is in memory at a time.
        classes: Classes of the model.
        weights_sha256: Hash of the model, for the record.
        split_sha256: Hash of the split, for the record.

    Returns:
        Steps with the best mean for every class whose mean they raise by ``MIN_GAIN``, and no steps below
        ``MIN_PATIENTS`` patients.
    """
    if classes.is_overlapping:
        raise UsageError(
            "post-processing can be chosen for exclusive classes only, the model has overlapping regions. Leave "
            "--choose-postprocessing out."
        )
    # The test part is never used here: its scores would be too good after a choice by them.
    scores: dict[tuple[int, tuple[str, ...]], list[tuple[str, float | None]]] = {
        (channel, chosen): [] for channel in range(classes.num_classes) for chosen in ((), *CANDIDATES)
    }
    patients: set[str] = set()
    for patient, predicted, true in cases:
        patients.add(patient)
        for (channel, chosen), found in scores.items():
            found.append((patient, _dice(predicted, true, classes, channel, chosen)))
    means = {key: mean_over_patients(found) for key, found in scores.items()}
    steps: dict[int, list[str]] = {}
    dice: dict[int, dict[str, float | None]] = {}
    for channel, label_id in enumerate(classes.ids):
        before = means[channel, ()]
        dice[label_id] = {"before": before, "after": before}
        if len(patients) < MIN_PATIENTS or before is None:
            continue
        after = {chosen: means[channel, chosen] or 0.0 for chosen in CANDIDATES}
        best = max(CANDIDATES, key=after.__getitem__)
        if after[best] >= before + MIN_GAIN:
            steps[label_id] = list(best)
            dice[label_id]["after"] = after[best]
    rounded = {i: {k: None if v is None else round(v, 4) for k, v in pair.items()} for i, pair in dice.items()}
    return PostProcessing(
        steps=steps, weights_sha256=weights_sha256, split_sha256=split_sha256, num_patients=len(patients), dice=rounded
    )


def _dice(predicted: Labels, true: Labels, classes: ClassTable, channel: int, steps: Sequence[str]) -> float | None:
    if steps:
        predicted = apply_postprocessing(predicted, {classes.ids[channel]: steps})
    found, truth = classes.predicted_mask(drop_ignored(predicted, true), channel), classes.true_mask(true, channel)
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else None


def _largest_component(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    parts, number = ndimage.label(mask)
    if number <= 1:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # background
    return np.asarray(parts == int(sizes.argmax()))
