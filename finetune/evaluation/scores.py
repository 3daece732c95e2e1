"""Table of an evaluation with one row per case and class, its columns and its averages.

A row is a plain mapping with the keys ``CASE_COLUMNS``. A table read from ``cases.csv`` can therefore replace a new
one. Comparisons and reports use tables, never models.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import IGNORE_LABEL, ClassTable, drop_ignored
from samgraft.finetune.evaluation.metrics import ClassScore, class_scores, mean_or_none
from samgraft.finetune.evaluation.statistics import Interval, bootstrap_mean, bootstrap_means
from samgraft.finetune.evaluation.surface import SurfaceScore, surface_score
from samgraft.shared.errors import DataError
from samgraft.shared.store.series import SeriesRecord

Labels = npt.NDArray[Any]
Row = Mapping[str, Any]

MISSING = "n/a"
"""Text of a value that cannot be measured."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t")
"""First characters that make a spreadsheet run the text of a cell as a formula."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Measured number of a case and class."""

    key: str
    """Name of the column in cases.csv."""
    title: str
    """Title in tables and reports, with the unit."""
    better: Literal["higher", "lower", "near 0"]


METRICS = (
    Metric(key="dice", title="Dice", better="higher"),
    Metric(key="iou", title="IoU", better="higher"),
    Metric(key="nsd", title="surface Dice", better="higher"),
    Metric(key="hd95_mm", title="HD95 (mm)", better="lower"),
    Metric(key="mean_surface_distance_mm", title="mean surface distance (mm)", better="lower"),
    Metric(key="volume_error_ml", title="volume error (ml)", better="near 0"),
    Metric(key="relative_volume_error", title="relative volume error", better="near 0"),
    Metric(key="sensitivity", title="sensitivity", better="higher"),
    Metric(key="precision", title="precision", better="higher"),
)
METRIC_BY_KEY = {metric.key: metric for metric in METRICS}
CASE_COLUMNS = (
    "patient_id",
    "series_id",
    "label_id",
    "class",
    *METRIC_BY_KEY,
    "true_voxels",
    "predicted_voxels",
    "true_ml",
    "predicted_ml",
)
_TEXT = {"patient_id", "series_id", "class"}
_WHOLE = {"label_id", "true_voxels", "predicted_voxels"}

EMPTY_RULE = (
    "a class that is neither true nor predicted has n/a in every column and enters no mean; one that is only true or "
    "only predicted has Dice, IoU and surface Dice 0, and the diagonal of the scan as HD95 and mean surface distance; "
    "sensitivity needs a true voxel, precision a predicted one, a relative volume error a true volume"
)
AVERAGING = "mean over classes per scan, over scans per patient, over patients; 95 % bootstrap over patients"


def case_rows(
    predicted: Labels, true: Labels, record: SeriesRecord, classes: ClassTable, *, tolerance_mm: float
) -> list[dict[str, Any]]:
    """Score one scan in every metric.

    Args:
        predicted: Label ids (Z, H, W) on the scan's own grid.
        true: Label ids of the same shape. Where they are ``IGNORE_LABEL``, nothing is counted.
        record: Scan with its spacing.
        classes: Classes to score.
        tolerance_mm: Tolerance of the surface Dice.
    """
    rows = []
    # Also for the surfaces: a class that is predicted on ignored voxels only is not a false positive.
    predicted = drop_ignored(predicted, true)
    for channel, score in enumerate(class_scores(predicted, true, classes)):
        surface = surface_score(
            classes.predicted_mask(predicted, channel),
            classes.true_mask(true, channel),
            ignored=true == IGNORE_LABEL,
            spacing_mm=record.spacing_mm,
            tolerance_mm=tolerance_mm,
        )
        rows.append(_row(score, surface, record))
    return rows


def _row(score: ClassScore, surface: SurfaceScore | None, record: SeriesRecord) -> dict[str, Any]:
    z_mm, row_mm, column_mm = record.spacing_mm
    voxel_ml = z_mm * row_mm * column_mm / 1000
    nothing = not score.true_voxels and not score.predicted_voxels
    error_ml = (score.predicted_voxels - score.true_voxels) * voxel_ml
    return {
        "patient_id": record.patient_id,
        "series_id": record.series_id,
        "label_id": score.label_id,
        "class": score.class_name,
        "dice": score.dice,
        "iou": score.iou,
        "nsd": surface.nsd if surface else None,
        "hd95_mm": surface.hd95_mm if surface else None,
        "mean_surface_distance_mm": surface.mean_surface_distance_mm if surface else None,
        "volume_error_ml": None if nothing else error_ml,
        "relative_volume_error": score.relative_volume_error,
        "sensitivity": score.sensitivity,
        "precision": score.precision,
        "true_voxels": score.true_voxels,
        "predicted_voxels": score.predicted_voxels,
        "true_ml": score.true_voxels * voxel_ml,
        "predicted_ml": score.predicted_voxels * voxel_ml,
    }


def per_patient(rows: Iterable[Row], metric: str, *, class_name: str | None = None) -> dict[str, float]:
    """Return the mean over classes per scan, then over the scans of every patient.

    Args:
        rows: Rows of any number of patients.
        metric: Name of the column.
        class_name: Class to use; None uses the mean over classes.
    """
    # Scans with few classes, and patients with many scans, must not get another weight than the others.
    scans: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        if class_name is None or row["class"] == class_name:
            scans.setdefault(row["patient_id"], {}).setdefault(row["series_id"], []).append(row[metric])
    means = {patient: mean_or_none([mean_or_none(v) for v in series.values()]) for patient, series in scans.items()}
    return {patient: mean for patient, mean in means.items() if mean is not None}


def interval_of(rows: Iterable[Row], metric: str, *, class_name: str | None = None) -> Interval | None:
    """Return the mean over patients with its bootstrap interval."""
    return bootstrap_mean(list(per_patient(rows, metric, class_name=class_name).values()))


def interval_table(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[str | None, str], Interval | None]:
    """Return the intervals of every class and metric. Class None is the mean over classes.

    Args:
        rows: Rows of any number of patients.
        names: Classes of the table, also those without a row.
    """
    keys = [(name, metric.key) for name in (None, *names) for metric in METRICS]
    columns = [list(per_patient(rows, metric, class_name=name).values()) for name, metric in keys]
    return dict(zip(keys, bootstrap_means(columns), strict=True))


def class_names(rows: Iterable[Row]) -> list[str]:
    """Return the classes of a table in their order."""
    return list(dict.fromkeys(row["class"] for row in rows))


def count_one_sided(rows: Iterable[Row]) -> int:
    """Count rows whose class is only true or only predicted, so that distances are diagonals."""
    return sum(bool(row["true_voxels"]) != bool(row["predicted_voxels"]) for row in rows)


def render_csv(rows: Sequence[Row], columns: Sequence[str] = CASE_COLUMNS) -> str:
    """Return a table as CSV text, equal text for equal tables."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows([{column: csv_cell(row[column]) for column in columns} for row in rows])
    return text.getvalue()


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Read a ``cases.csv`` that ``evaluate`` wrote.

    Raises:
        DataError: If it is missing, damaged or has other columns.
    """
    if not path.is_file():
        raise DataError(
            "the evaluation must have cases.csv, there is none.",
            where=path.parent.name,
            next_command="samgraft evaluate RUN --split test",
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != CASE_COLUMNS:
                missing = [column for column in CASE_COLUMNS if column not in (reader.fieldnames or ())]
                raise DataError(
                    f"cases.csv must have the columns that this version writes, missing: {', '.join(missing)}. "
                    "Evaluate again.",
                    where=path.name,
                )
            return [{column: _parse(column, row[column]) for column in CASE_COLUMNS} for row in reader]
    except (ValueError, UnicodeDecodeError, csv.Error, TypeError) as err:
        if isinstance(err, DataError):
            raise
        raise DataError(f"cases.csv is damaged ({type(err).__name__}). Evaluate again.", where=path.name) from err


def _parse(column: str, text: str) -> Any:
    if column in _TEXT:
        # The apostrophe is removed again, so that patients of two tables still have equal ids.
        return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA_STARTS) else text
    if text == MISSING:
        return None
    convert: Callable[[str], Any] = int if column in _WHOLE else float
    return convert(text)


def csv_cell(value: object) -> object:
    """Return a value for a CSV file, with four decimals and without formulas."""
    if value is None:
        return MISSING
    # Texts come from scans, folders and label files. An apostrophe keeps spreadsheets from running them as formulas.
    if isinstance(value, str):
        text = value.replace("\r", " ")  # the csv module does not quote it, and readers would end the row there
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text
    return f"{value:.4f}" if isinstance(value, float | np.floating) else value
