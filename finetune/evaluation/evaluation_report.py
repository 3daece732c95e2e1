"""HTML report of an evaluation with intervals, all cases and pictures of the worst and best ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from samgraft.finetune.classes import IGNORE_LABEL, ClassTable
from samgraft.finetune.evaluation.evaluate import Evaluation
from samgraft.finetune.evaluation.overlays import (
    TRUTH_AND_PREDICTION,
    choose_slices,
    class_key,
    overlay,
    slice_pictures,
)
from samgraft.finetune.evaluation.scores import (
    AVERAGING,
    EMPTY_RULE,
    METRICS,
    Row,
    class_names,
    count_one_sided,
    per_patient,
)
from samgraft.finetune.evaluation.statistics import Interval
from samgraft.finetune.evaluation.subgroups import Subgroups
from samgraft.finetune.evaluation.viewer import ViewedCase, fetch_bundle, viewer_html, viewer_scripts
from samgraft.shared.counting import counted
from samgraft.shared.files import write_private_text, write_text
from samgraft.shared.report.page import (
    FIGURE_COLORS,
    FIGURE_STYLE,
    KeyValues,
    Picture,
    RawHtml,
    Section,
    SectionPart,
    Table,
    Text,
    figure_png,
    image_grid,
    next_section,
    render_report,
)
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.store.names import NAMES_WORD, Names
from samgraft.shared.store.store import SliceStore

SLICES_PER_CASE = 4
MAX_CASE_ROWS = 4000
METRIC_TITLES = {metric.key: metric.title for metric in METRICS}
CASE_METRICS = ("dice", "nsd", "hd95_mm", "mean_surface_distance_mm", "volume_error_ml", "sensitivity", "precision")
NO_PICTURES = (
    "Pictures of patients are left out. They are shown only for data that was declared shareable "
    "(watch.log_images of the run, or --log-images here)."
)
NO_VIEWER = "The 3D viewer is left out, because niivue is not installed. `make install` downloads it."


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """Data for pictures of patients."""

    store: SliceStore
    intensity: IntensityPreset
    classes: ClassTable

    def true_labels(self, series_id: str) -> npt.NDArray[np.int32]:
        """Return the truth as the model's ids or bits, with other labels as background and ``IGNORE_LABEL``."""
        label = self.store.read_label_volume(series_id)
        true = np.where(label == IGNORE_LABEL, IGNORE_LABEL, 0).astype(np.int32)
        for channel, label_id in enumerate(self.classes.ids):
            # A voxel has one id of exclusive classes, or several bits of overlapping ones.
            true[self.classes.true_mask(label, channel)] |= label_id
        return true


def write_evaluation_report(
    evaluation: Evaluation,
    folder: Path,
    *,
    title: str,
    provenance: Mapping[str, Any],
    subgroups: Sequence[Subgroups] = (),
    pictured: Pictured | None = None,
    names: Names | None = None,
    next_commands: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` next to the tables and return its path. With names it is ``report.names.html``.

    Args:
        evaluation: Scores, with predictions for pictures.
        folder: Folder of ``cases.csv``.
        title: Name of the model; it is escaped.
        provenance: Hashes of model, store and split.
        subgroups: Subgroups with a table each.
        pictured: Data for pictures; None leaves them out.
        names: Names of patients and scans for a report that only their owner may read.
        next_commands: Commands that use the model, shown at the end.
    """
    rows, names = evaluation.rows, names or Names()
    pictures, scripts = _picture_section(evaluation, pictured, names)
    sections = [
        Section(title="Result", parts=_headline(evaluation)),
        pictures,
        Section(title="Scores", parts=[_metric_table(evaluation), _strip_plot(rows)]),
        *(Section(title=f"By {one.attribute}", parts=[_subgroup_table(one, rows)]) for one in subgroups),
        Section(title="Cases", parts=[_case_table(rows, names)]),
        Section(title="How it was measured", parts=[KeyValues(items=_facts(evaluation, provenance))]),
        *next_section(next_commands),
    ]
    subtitle = f"evaluation on {evaluation.part}, {counted(evaluation.num_cases, 'scan')}"
    subtitle += ", with the names of patients: do not share" if names else ""
    page = render_report(title, sections, subtitle=subtitle, scripts=scripts)
    path = folder / (f"report{NAMES_WORD}html" if names else "report.html")
    (write_private_text if names else write_text)(path, page)
    return path


def _picture_section(evaluation: Evaluation, pictured: Pictured | None, names: Names) -> tuple[Section, list[str]]:
    """Return the section with masks on slices and the viewer, and the scripts of the viewer."""
    if pictured is None:
        return Section(title="Pictures", parts=[Text(text=NO_PICTURES)]), []
    chosen = choose_pictured_cases(evaluation.rows)
    viewer, scripts = _viewer(evaluation, chosen, pictured, names)
    title = "Worst, median, best" if len(chosen) > 1 else "Masks"
    return Section(title=title, parts=[*_pictures(evaluation, chosen, pictured, names), *viewer]), scripts


def choose_pictured_cases(rows: Sequence[Row]) -> dict[str, str]:
    """Return the series with the worst, median and best mean Dice over classes."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["dice"] is not None:
            values.setdefault(row["series_id"], []).append(row["dice"])
    # The id breaks ties, so that equal tables choose equal cases.
    ranked = sorted(values, key=lambda series_id: (float(np.mean(values[series_id])), series_id))
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    chosen: dict[str, str] = {}
    for name, place in places.items():
        if ranked and ranked[place] not in chosen.values():
            chosen[name] = ranked[place]
    return chosen


def _headline(evaluation: Evaluation) -> list[SectionPart]:
    rows, overall = evaluation.rows, evaluation.overall
    text = f"Dice {overall.render()}." if overall else "No case could be measured."
    distance = evaluation.intervals[None, "hd95_mm"]
    if distance:
        text += f" HD95 in mm {distance.render()}."
    warnings = []
    if evaluation.part == "train":
        warnings.append("These are training cases. Their scores do not estimate those of new patients.")
    if evaluation.part == "val":
        warnings.append("The model was chosen on these patients. Only the test part estimates new ones.")
    if one_sided := count_one_sided(rows):
        warnings.append(
            f"In {one_sided} of {counted(len(rows), 'row')} a class is only true (missed) or only predicted "
            "(invented). Dice is 0 and distances are the diagonal of the scan in these rows."
        )
    # What failed comes first, and nothing is marked as good then.
    failed = [Text(text=warning, kind="warning") for warning in evaluation.warnings]
    headline = Text(text=text, kind="plain" if failed or overall is None else "good")
    return [*failed, headline, *(Text(text=warning, kind="warning") for warning in warnings)]


def _metric_table(evaluation: Evaluation) -> Table:
    names = class_names(evaluation.rows)
    shown = [None, *(names if len(names) > 1 else [])]
    columns = ["metric", "better", *(name or "all classes" for name in shown)]
    lines = [[m.title, m.better, *(_short(evaluation.intervals[name, m.key]) for name in shown)] for m in METRICS]
    return Table(columns=columns, rows=lines, caption=f"{AVERAGING[0].upper()}{AVERAGING[1:]}.")


def _subgroup_table(subgroups: Subgroups, rows: Sequence[Row]) -> Table:
    keys = ("mean", "low", "high", "num_patients")
    lines = [
        [line["group"], line["class"], METRIC_TITLES[line["metric"]], *(line[key] for key in keys)]
        for line in subgroups.table(rows)
        if line["metric"] in {"dice", "nsd", "hd95_mm"}
    ]
    columns = ["group", "class", "metric", "mean", "low", "high", "patients"]
    caption = "Means over the patients of each group with 95 % bootstrap intervals; n/a: too few patients."
    return Table(columns=columns, rows=lines, caption=caption, sortable=True, max_rows=MAX_CASE_ROWS)


def _case_table(rows: Sequence[Row], names: Names) -> Table:
    # Rows without a Dice are last, after every possible value.
    ranked = sorted(rows, key=lambda row: row["dice"] if row["dice"] is not None else 2.0)
    lines = [
        [
            names.patient(row["patient_id"]),
            names.scan(row["series_id"]),
            *(row[key] for key in ("class", *CASE_METRICS, "true_ml", "predicted_ml")),
        ]
        for row in ranked
    ]
    columns = ["patient", "scan", "class", *(METRIC_TITLES[key] for key in CASE_METRICS), "true (ml)", "predicted (ml)"]
    caption = "Worst Dice first; a click on a heading sorts. n/a: cannot be measured. All columns are in cases.csv."
    return Table(columns=columns, rows=lines, caption=caption, sortable=True, max_rows=MAX_CASE_ROWS)


def _strip_plot(rows: Sequence[Row]) -> Picture:
    """Draw a dot per patient and class, and the mean as a line."""
    names = class_names(rows)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.45 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            values = np.array(list(per_patient(rows, "dice", class_name=name).values()))
            # Dots are moved sideways so that equal values stay visible; the seed keeps reports reproducible.
            offsets = np.random.default_rng([place, 5]).uniform(-0.16, 0.16, size=len(values))
            axes.plot(values, place + offsets, "o", color=FIGURE_COLORS[0], alpha=0.55, markersize=4, markeredgewidth=0)
            if len(values):
                axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=FIGURE_COLORS[1], linewidth=2)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("Dice per patient")
        return Picture(png=figure_png(figure), caption="Dice of every patient (dots) and the mean (line).")


def _pictures(evaluation: Evaluation, chosen: Mapping[str, str], pictured: Pictured, names: Names) -> list[SectionPart]:
    parts: list[SectionPart] = []
    for name, series_id in chosen.items():
        predicted, true = evaluation.predictions[series_id].unpack(), pictured.true_labels(series_id)
        indexes = choose_slices(np.maximum(true > 0, predicted > 0), number=SLICES_PER_CASE)
        pictures = slice_pictures(pictured.store, series_id, indexes, intensity=pictured.intensity)
        tiles = [
            overlay(image, true_HW=true[index], predicted_HW=predicted[index])
            for index, (image, _) in zip(indexes, pictures, strict=True)
        ]
        plain_tiles = [overlay(image) for image, _ in pictures]
        ignored = (true == IGNORE_LABEL).any()
        titles = [f"slice {index}" for index in indexes]
        parts.append(
            Picture(
                png=image_grid([plain_tiles, tiles], column_titles=titles, cell_in=1.9),
                caption=f"{_ranked(name, chosen)}{_case_title(evaluation.rows, series_id, names)}. "
                f"{TRUTH_AND_PREDICTION}{' Dark areas are not annotated.' if ignored else ''}",
                key=class_key(pictured.classes),
            )
        )
    return parts


def _viewer(
    evaluation: Evaluation, chosen: Mapping[str, str], pictured: Pictured, names: Names
) -> tuple[list[SectionPart], list[str]]:
    bundle = fetch_bundle()
    if bundle is None:
        return [Text(text=NO_VIEWER)], []
    cases = []
    for name, series_id in chosen.items():
        record = pictured.store.record(series_id)
        volume = pictured.store.read_volume(series_id)
        cases.append(
            ViewedCase(
                title=f"{_ranked(name, chosen)}{_case_title(evaluation.rows, series_id, names)}",
                image_ZHW=np.stack([normalise(one, record.stats, pictured.intensity) for one in volume]),
                true_ZHW=pictured.true_labels(series_id),
                predicted_ZHW=evaluation.predictions[series_id].unpack(),
                affine=record.affine,
            )
        )
    return [RawHtml(html=viewer_html(cases))], viewer_scripts(bundle)


def _facts(evaluation: Evaluation, provenance: Mapping[str, Any]) -> dict[str, Any]:
    num_patients = len({row["patient_id"] for row in evaluation.rows})
    return {
        "part": evaluation.part,
        "cases": f"{counted(evaluation.num_cases, 'scan')} of {counted(num_patients, 'patient')}",
        "grid": "the scans' own, nothing was resampled before measuring",
        "averages": AVERAGING,
        "empty cases": EMPTY_RULE,
        "surface Dice": f"share of both surfaces within {evaluation.tolerance_mm:g} mm of the other",
        "HD95": "larger of the two directed distances that 95 % of the surface area stay below",
        "post-processing": evaluation.postprocessing,
        **provenance,
    }


def _ranked(name: str, chosen: Mapping[str, str]) -> str:
    """Return the rank of a case for its title, which is empty for the only case."""
    return f"{name.capitalize()} " if len(chosen) > 1 else ""


def _case_title(rows: Sequence[Row], series_id: str, names: Names) -> str:
    scores = [row["dice"] for row in rows if row["series_id"] == series_id and row["dice"] is not None]
    return f"scan {names.scan(series_id)}, Dice {np.mean(scores):.3f}"


def _short(interval: Interval | None) -> str | None:
    if interval is None:
        return None
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
