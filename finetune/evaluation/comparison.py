"""Comparison of evaluated models on the same patients, with paired tests corrected for their number.

Only ``cases.csv`` and ``summary.json`` are read, so that models that need different software can be compared too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from samgraft.finetune.evaluation.evaluate import interval_to_json
from samgraft.finetune.evaluation.scores import (
    METRIC_BY_KEY,
    Row,
    class_names,
    interval_of,
    per_patient,
    read_cases,
    render_csv,
)
from samgraft.finetune.evaluation.statistics import compare_paired, holm
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.files import write_json, write_private_text, write_text
from samgraft.shared.store.names import NAMES_WORD, Names

DEFAULT_METRICS = ("dice", "nsd", "hd95_mm")
ALL_CLASSES = "all"
SAME_KEYS = ("store_fingerprint", "split_sha256", "part", "surface_tolerance_mm", "precision")
"""Keys of ``summary.json`` that must be equal, so that two tables have the same patients, measures and numerics."""
_OPTIONS = {
    "part": "SPLIT={}",
    "surface_tolerance_mm": "ARGS='--tolerance-mm {}'",
    "precision": "ARGS='--precision {}'",
}
"""Options of ``evaluate`` by key."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """Evaluation of a run as read from its files."""

    name: str
    path: str
    """Path as the user gave it."""
    rows: list[dict[str, Any]]
    """Rows of ``cases.csv``."""
    summary: Mapping[str, Any]
    """Content of ``summary.json``."""


def read_evaluated_run(path: Path, *, part: str | None) -> EvaluatedRun:
    """Read the evaluation of a run or release, or of a folder with ``cases.csv``.

    Args:
        path: Run, release or folder.
        part: Part of the split; None takes ``test`` of a run, and the part of a folder.

    Raises:
        DataError: If there is none, it is of another part, or it is damaged.
    """
    wanted, part = part, part or "test"
    folder = path if (path / "cases.csv").is_file() else path / "evaluation" / part
    if not (folder / "cases.csv").is_file():
        raise DataError(
            f"the run must be evaluated on {part} before a comparison, it has no cases.csv.",
            where=path.name,
            next_command=f"make evaluate RUN={shlex.quote(str(path))} SPLIT={part}",
        )
    rows = read_cases(folder / "cases.csv")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        name = path.name if folder != path or path.parent.name != "evaluation" else path.parent.parent.name
        found = EvaluatedRun(name=name, path=str(path), rows=rows, summary=dict(summary))
    except (OSError, ValueError, TypeError) as err:
        raise DataError(
            "summary.json of the evaluation is missing or damaged. Evaluate again.", where=path.name
        ) from err
    if wanted is not None and found.summary.get("part") != wanted:
        raise DataError(
            f"the folder is an evaluation of {found.summary.get('part')} (expected {wanted}). Give the folder of that "
            "part, or leave --split out.",
            where=path.name,
        )
    num_cases = len({row["series_id"] for row in rows})
    if found.summary.get("num_cases") != num_cases:
        raise DataError(
            f"cases.csv must have every scan of the evaluation ({found.summary.get('num_cases')}), got {num_cases}. "
            "Evaluate again.",
            where=path.name,
        )
    return found


def compare_runs(
    runs: Sequence[EvaluatedRun],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Compare every pair of runs, patient by patient.

    Args:
        runs: Two or more; of each pair the earlier one is first.
        metrics: Columns of ``cases.csv``.
        on_progress: Function of the number of finished comparisons and of all.

    Returns:
        Rows of ``comparison.csv``: per metric the mean over classes (class ``all``), then every class of several, for
        every pair. ``num_patients_dropped`` counts patients with a value in one of the runs only. Holm's correction
        uses all tests of one metric.

    Raises:
        UsageError: With fewer than two runs, equal names, or an unknown metric.
        DataError: If the runs were not evaluated on the same scans.
    """
    _check_comparable(runs, metrics)
    rows: list[dict[str, Any]] = []
    pairs = list(combinations([run.name for run in runs], 2))
    names = class_names(runs[0].rows)
    # The mean over one class is that class. Counted twice, it would double its p-values in Holm's correction.
    classes = (None, *names) if len(names) > 1 else (None,)
    total = len(metrics) * len(classes) * len(pairs)
    for metric in metrics:
        family: list[dict[str, Any]] = []
        for class_name in classes:
            values = {run.name: per_patient(run.rows, metric, class_name=class_name) for run in runs}
            for first, second in pairs:
                named = {"metric": metric, "class": class_name or ALL_CLASSES, "first": first, "second": second}
                family.append({**named, **_compare_patients(values[first], values[second])})
                if on_progress is not None:
                    on_progress(len(rows) + len(family), total)
        for row, p_holm in zip(family, holm([row["p_wilcoxon"] for row in family]), strict=True):
            row["p_holm"] = p_holm
        rows += family
    return rows


def _compare_patients(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    # Paired by patient, because the rows of two tables may be in different orders.
    both = sorted(set(first) & set(second))
    pair = compare_paired([first[p] for p in both], [second[p] for p in both])
    return {
        "difference": pair.difference.mean if pair else None,
        "low": pair.difference.low if pair else None,
        "high": pair.difference.high if pair else None,
        "effect": pair.effect.mean if pair else None,
        "effect_low": pair.effect.low if pair else None,
        "effect_high": pair.effect.high if pair else None,
        "p_wilcoxon": pair.p_value if pair else None,
        "p_holm": None,
        "num_patients": len(both),
        "num_patients_dropped": len(set(first) | set(second)) - len(both),
    }


def patient_differences(runs: Sequence[EvaluatedRun], names: Names, *, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return the values of every patient by name, for every pair of runs, the largest loss first."""
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        values = {run.name: per_patient(run.rows, metric) for run in runs}
        for one, two in combinations(runs, 2):
            both = set(values[one.name]) & set(values[two.name])
            pairs = [(values[one.name][patient], values[two.name][patient], names.patient(patient)) for patient in both]
            rows += [
                {
                    "metric": metric,
                    "first": one.name,
                    "second": two.name,
                    "patient": patient,
                    "first_value": before,
                    "second_value": after,
                    "difference": after - before,
                }
                for before, after, patient in sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair[2]))
            ]
    return rows


def render_patient(row: Row) -> str:
    """Return one line on one patient."""
    values = f"{row['first']} {row['first_value']:.3f}, {row['second']} {row['second_value']:.3f}"
    return f"{METRIC_BY_KEY[row['metric']].title}, {row['patient']}: {values}, difference {row['difference']:+.3f}"


def write_patients(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``patients.names.csv``, which its owner alone may read."""
    columns = ("metric", "first", "second", "patient", "first_value", "second_value", "difference")
    path = folder / f"patients{NAMES_WORD}csv"
    write_private_text(path, render_csv(rows, columns))
    return path


def write_comparison(
    runs: Sequence[EvaluatedRun], rows: Sequence[Row], folder: Path, *, metrics: Sequence[str]
) -> None:
    """Write ``comparison.csv`` and ``comparison.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.csv", render_csv(rows, tuple(rows[0])))
    values = {
        "part": runs[0].summary.get("part"),
        "store_fingerprint": runs[0].summary.get("store_fingerprint"),
        "split_sha256": runs[0].summary.get("split_sha256"),
        "test": "two-sided Wilcoxon signed-rank over patients, Holm over all pairs and classes of a metric",
        "difference": "second minus first, mean over patients, 95 % bootstrap",
        "effect": "matched-pairs rank-biserial correlation, 95 % bootstrap",
        "runs": {
            run.name: {
                "weights_sha256": run.summary.get("weights_sha256"),
                **{metric: interval_to_json(interval_of(run.rows, metric)) for metric in metrics},
            }
            for run in runs
        },
        "pairs": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    }
    write_json(folder / "comparison.json", values, indent=2)


def render_pair(row: Row) -> str:
    """Return a row of a comparison as one line of text."""
    text = f"{METRIC_BY_KEY[row['metric']].title}, {row['class']}: {row['second']} - {row['first']} = "
    if row["difference"] is None:
        return f"{text}n/a (no patient in both)"
    text += f"{row['difference']:+.3f}"
    if row["low"] is not None:
        text += f" ({row['low']:+.3f} to {row['high']:+.3f})"
    text += f", effect {row['effect']:+.3f}"
    text += ", too few patients for a test" if row["p_holm"] is None else f", p (Holm) {row['p_holm']:.3g}"
    dropped = f", {row['num_patients_dropped']} without a value in one run" if row["num_patients_dropped"] else ""
    return f"{text}, {counted(row['num_patients'], 'patient')}{dropped}"


def _check_comparable(runs: Sequence[EvaluatedRun], metrics: Sequence[str]) -> None:
    if len(runs) < 2 or len({run.name for run in runs}) != len(runs):
        raise UsageError(
            f"a comparison must have two or more runs with different names, got {[run.name for run in runs]}.",
            next_command="samgraft compare runs/A runs/B --split test",
        )
    if unknown := [metric for metric in metrics if metric not in METRIC_BY_KEY]:
        raise UsageError(f"metrics must be among {', '.join(METRIC_BY_KEY)}, got {', '.join(unknown)}.")
    first = runs[0]
    for run in runs[1:]:
        for key in SAME_KEYS:
            if run.summary.get(key) != first.summary.get(key):
                # The store and the split are not named in a summary, only their hashes.
                again = _OPTIONS.get(key, f"with the store and --split-file of {first.name}")
                raise DataError(
                    f"runs must be evaluated in the same way, {key} of {run.name} differs from that of {first.name}.",
                    where=run.name,
                    next_command=f"make evaluate RUN={shlex.quote(run.path)} {again.format(first.summary.get(key))}",
                )
        _check_same_cases(run.rows, first.rows, name=run.name, first=first.name)


def _check_same_cases(rows: Sequence[Row], reference: Sequence[Row], *, name: str, first: str) -> None:
    ours, theirs = ({(r["series_id"], r["class"]) for r in table} for table in (rows, reference))
    if ours != theirs:
        raise DataError(
            f"runs must have the same scans and classes, {len(ours - theirs)} are only in {name} and "
            f"{len(theirs - ours)} only in {first}. Averages over different cases cannot be compared.",
            where=name,
        )
