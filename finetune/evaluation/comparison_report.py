"""HTML report of a comparison with the runs, all paired differences and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from samgraft.finetune.evaluation.comparison import EvaluatedRun
from samgraft.finetune.evaluation.scores import METRIC_BY_KEY, Row, interval_of
from samgraft.shared.files import write_text
from samgraft.shared.report.page import (
    FIGURE_COLORS,
    FIGURE_STYLE,
    KeyValues,
    Picture,
    Section,
    Table,
    Text,
    figure_png,
    next_section,
    render_report,
)


def write_comparison_report(
    runs: Sequence[EvaluatedRun],
    rows: Sequence[Row],
    folder: Path,
    *,
    metrics: Sequence[str],
    next_commands: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` into the folder of a comparison and return its path."""
    sections = [
        Section(title="Runs", parts=[*_warnings(runs), _runs_table(runs, metrics)]),
        *(
            Section(title=METRIC_BY_KEY[metric].title, parts=[_forest(rows, metric), _pairs_table(rows, metric)])
            for metric in metrics
        ),
        Section(title="How it was compared", parts=[KeyValues(items=_facts(runs))]),
        *next_section(next_commands),
    ]
    names = " and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs"
    page = render_report(f"Comparison of {names}", sections, subtitle=f"part {runs[0].summary.get('part')}")
    path = folder / "report.html"
    write_text(path, page)
    return path


def _warnings(runs: Sequence[EvaluatedRun]) -> list[Text]:
    """Return what the evaluations state about models that failed."""
    return [
        Text(text=f"{run.name}: {warning}", kind="warning")
        for run in runs
        for warning in run.summary.get("warnings", ())
    ]


def _runs_table(runs: Sequence[EvaluatedRun], metrics: Sequence[str]) -> Table:
    lines = [
        [run.name, *(interval.render() if (interval := interval_of(run.rows, m)) else None for m in metrics)]
        for run in runs
    ]
    columns = ["run", *(METRIC_BY_KEY[metric].title for metric in metrics)]
    return Table(columns=columns, rows=lines, caption="Means over patients with 95 % bootstrap intervals.")


def _pairs_table(rows: Sequence[Row], metric: str) -> Table:
    keys = ("difference", "low", "high", "effect", "effect_low", "effect_high", "p_wilcoxon", "p_holm", "num_patients")
    chosen = [row for row in rows if row["metric"] == metric]
    lines = [[row["class"], f"{row['second']} - {row['first']}", *(row[key] for key in keys)] for row in chosen]
    columns = ["class", "pair", "difference", "low", "high", "effect", "low", "high", "p", "p (Holm)", "patients"]
    return Table(
        columns=columns, rows=lines, sortable=True, caption=f"{METRIC_BY_KEY[metric].better.capitalize()} is better."
    )


def _forest(rows: Sequence[Row], metric: str) -> Picture:
    chosen = [row for row in rows if row["metric"] == metric and row["difference"] is not None]
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * max(1, len(chosen))), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(chosen):
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=FIGURE_COLORS[0])
            axes.plot([row["difference"]], [place], "o", color=FIGURE_COLORS[0], markersize=5)
        axes.axvline(0, color="#55606b", linestyle="--", linewidth=1.1)
        axes.set_yticks(range(len(chosen)), [f"{r['class']}: {r['second']} - {r['first']}" for r in chosen])
        axes.set_ylim(max(1, len(chosen)) - 0.5, -0.5)
        axes.set_xlabel(f"difference in {METRIC_BY_KEY[metric].title}")
        caption = "Mean paired difference over patients with its 95 % bootstrap interval."
        return Picture(png=figure_png(figure), caption=caption)


def _facts(runs: Sequence[EvaluatedRun]) -> dict[str, Any]:
    first = runs[0].summary
    return {
        "test": "two-sided Wilcoxon signed-rank test over patients, with Holm's correction over all pairs and classes "
        "of a metric",
        "effect": "matched-pairs rank-biserial correlation: 1 if every patient gains, -1 if every patient loses",
        "patients": first.get("num_patients"),
        "store": first.get("store_fingerprint"),
        "split": first.get("split_sha256"),
    }
