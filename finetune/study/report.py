"""Table and report of a study with quality, cost, ranks and few-shot curves."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from samgraft.finetune.evaluation.scores import csv_cell
from samgraft.finetune.study.cells import SETTING_AXES, Cell
from samgraft.finetune.study.config import ALL, StudyConfig
from samgraft.finetune.study.results import (
    Ranking,
    SettingScore,
    group_similar_settings,
    rank_settings,
    score_settings,
    short_names,
)
from samgraft.finetune.training.report import release_command
from samgraft.shared.counting import counted
from samgraft.shared.files import write_text
from samgraft.shared.report.page import (
    FIGURE_STYLE,
    KeyValues,
    Picture,
    Section,
    Table,
    Text,
    curve_figure,
    figure_png,
    next_section,
    path_for_report,
    render_report,
    strip_folders,
)

TABLE_COLUMNS = (
    "data set", *SETTING_AXES, "shots", "seeds", "dice", "low", "high", "patients", "seed std", "train min", "peak GiB",
    "trainable M", "no gain",
)  # fmt: skip


def write_results(
    config: StudyConfig,
    cells: Sequence[Cell],
    results: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    failed: Mapping[str, str],
) -> list[SettingScore]:
    """Write ``table.csv`` and ``report.html`` of the complete cells and return the rows of the table."""
    rows = score_settings(cells, results)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TABLE_COLUMNS)
    writer.writerows([[_plain(v) for v in _values(row)] for row in rows])
    write_text(folder / "table.csv", text.getvalue())
    ranking = rank_settings(cells, results)
    sections = [
        Section(title="Summary", parts=[*_settings_without_gain(rows), *_summary(config, cells, results, failed)]),
        Section(title="Results", parts=[_table(rows)]),
        Section(title="Ranks", parts=[*_settings_without_gain(rows), *_ranks(ranking)]),
    ]
    if len(config.shots) > 1:
        sections.append(Section(title="Few shots", parts=_curves(rows, config.shot_unit)))
    sections.append(
        Section(title="Quality and cost", parts=[Picture(png=cost_figure(rows), caption=_COST)] if rows else [])
    )
    sections += next_section(next_commands(cells, results, path_for_report(folder)))
    page = render_report(f"Study: {config.name}", sections, subtitle=config.question)
    write_text(folder / "report.html", page)
    return rows


def next_commands(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]], folder: Path | str) -> list[str]:
    """Return the command that completes a study, or those that score and release the best of its models.

    Args:
        cells: All cells.
        results: Results of the complete ones by key.
        folder: Folder of the study as it is shown.
    """
    if len(results) < len(cells):
        file, root = Path(folder) / "study.yaml", Path(folder).parent
        return [f"samgraft study {shlex.quote(str(file))} --studies {shlex.quote(str(root))}"]
    # By validation, because the scores of the table must not choose a model and judge it as well.
    ranked = sorted(cells, key=lambda cell: results[cell.key].get("validation_dice") or 0.0, reverse=True)
    best, runs = ranked[0], Path(folder) / "runs"
    run = str(runs / best.key)
    same = [cell for cell in ranked[1:] if (cell.store, cell.split, cell.fold) == (best.store, best.split, best.fold)]
    if best.part != "test":
        first = f"make evaluate RUN={shlex.quote(run)} SPLIT=test"
    elif same:
        first = f"samgraft compare {shlex.quote(run)} {shlex.quote(str(runs / same[0].key))} --split test"
    else:
        first = f"make predict RUN={shlex.quote(run)} DATA=SCANS OUT=masks"
    return [first, release_command(run)]


_COST = "Mean Dice against trainable parameters and wall minutes of training, which depend on the load of the machine."


def _settings_without_gain(rows: Sequence[SettingScore]) -> list[Text]:
    """Return a warning on models without gain by setting, because a rank alone would hide them."""
    names = short_names([row.setting for row in rows])
    counts: dict[str, int] = {}
    for row in rows:
        counts[names[row.setting]] = counts.get(names[row.setting], 0) + row.num_without_gain
    if not (bad := {name: count for name, count in counts.items() if count}):
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in bad.items())
    text = (
        f"Models that segment hardly anything or did not improve, by setting: {listed}. They are ranked all the same."
    )
    return [Text(text=text, kind="warning")]


def table_lines(rows: Sequence[SettingScore]) -> list[str]:
    """Return the lines of the result table for a terminal, best first within a data set."""
    names = short_names([row.setting for row in rows])
    cells = [["data set", "setting", "shots", "seeds", "Dice (95 % interval)", "min", "GiB", "M trained", "no gain"]]
    ordered = sorted(rows, key=lambda r: (r.data_set, r.shots, -(r.dice.mean if r.dice else -1.0)))
    cells += [
        [
            row.data_set, names[row.setting], _shots(row.shots), str(row.num_seeds),
            row.dice.render() if row.dice else "n/a", f"{row.train_minutes:.1f}", f"{row.peak_gib:.1f}",
            f"{row.trainable_millions:.3f}", str(row.num_without_gain or "-"),
        ]
        for row in ordered
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def rank_figure(ranking: Ranking) -> bytes:
    """Draw mean ranks, best on the left, with bars over settings without a significant difference."""
    names = short_names(list(ranking.mean_ranks))
    ordered = sorted(ranking.mean_ranks.items(), key=lambda item: item[1])
    groups = group_similar_settings(ranking)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.32 * len(ordered) + 0.18 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, value) in enumerate(ordered):
            axes.plot([value], [place], "o", color="#1f5fa8", markersize=6)
            axes.annotate(f"{value:.2f}", (value, place), xytext=(7, -3), textcoords="offset points", fontsize=8)
        for number, group in enumerate(groups):
            ranks = [ranking.mean_ranks[setting] for setting in group]
            height = len(ordered) - 0.3 + 0.5 * number
            axes.plot([min(ranks), max(ranks)], [height, height], color="#c4572b", linewidth=3, solid_capstyle="butt")
        axes.set_yticks(range(len(ordered)), [names[setting] for setting, _ in ordered])
        axes.set_ylim(len(ordered) + 0.5 * len(groups), -0.6)
        axes.set_xlim(0.8, len(ordered) + 0.4)
        axes.set_xlabel(f"mean rank over {ranking.num_patients} blocks (1 is best)")
        axes.set_title(f"critical difference {ranking.critical_difference:.2f}", fontsize=9, loc="right")
        return figure_png(figure)


def cost_figure(rows: Sequence[SettingScore]) -> bytes:
    """Draw Dice against trainable parameters and training minutes."""
    names = short_names([row.setting for row in rows])
    settings = list(names)
    colors = mpl.colormaps["tab10"]
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes_pair = figure.subplots(1, 2, sharey=True)
        for row in rows:
            if row.dice is None:
                continue
            number = settings.index(row.setting)
            # Ten colours, then the next marker: settings stay distinct beyond ten.
            marker = "osD^v<>p*h"[number // 10 % 10]
            for axes, x in zip(axes_pair, (row.trainable_millions, row.train_minutes), strict=True):
                axes.plot([x], [row.dice.mean], marker, color=colors(number % 10), label=names[row.setting])
        axes_pair[0].set_xlabel("trainable parameters, millions")
        axes_pair[1].set_xlabel("training, minutes")
        axes_pair[0].set_ylabel("Dice, mean over patients")
        handles = dict(zip(*reversed(axes_pair[0].get_legend_handles_labels()), strict=True))
        if len(handles) <= 12:
            axes_pair[1].legend(handles.values(), handles.keys(), fontsize=7, loc="best")
        return figure_png(figure)


def _summary(
    config: StudyConfig, cells: Sequence[Cell], results: Mapping[str, Any], failed: Mapping[str, str]
) -> list[Text | KeyValues]:
    done = sum(cell.key in results for cell in cells)
    parts: list[Text | KeyValues] = []
    if done < len(cells):
        cells_are = counted(len(cells), "cell is", "cells are")
        text = f"{done} of {cells_are} complete. Tables and ranks below contain only these."
        parts.append(Text(text=text, kind="warning"))
    titles = {cell.key: cell.title for cell in cells}
    parts += [
        Text(text=f"Failed: {titles.get(key, key)}: {strip_folders(line)}", kind="warning")
        for key, line in failed.items()
    ]
    if config.folds:
        text = (
            f"Scores are pooled over {counted(len(config.folds), 'fold')}: every patient was scored by a model that "
            "did not train on it. The best step of each model was chosen on the same patients, so that the scores "
            "are a little higher than those of new patients, for all settings alike."
        )
        parts.append(Text(text=text, kind="warning"))
    if any(data_set.synthetic_patients for data_set in config.data_sets):
        text = "Some scans are synthetic. The scores show that the study runs, and nothing about real scans."
        parts.append(Text(text=text, kind="warning"))
    facts = {
        "Data sets": ", ".join(d.name for d in config.data_sets),
        "Initial weights": ", ".join(i.name for i in config.initialisations),
        "Architectures": ", ".join(config.architectures),
        "Scopes": ", ".join(config.scopes),
        "Methods": ", ".join(config.methods),
        "Variants": ", ".join(v.name for v in config.variants),
        "Shots": ", ".join(_shots(s) for s in config.shots) + f" ({config.shot_unit})",
        "Seeds": ", ".join(map(str, config.seeds)),
        **({"Folds": ", ".join(map(str, config.folds))} if config.folds else {}),
        "Scored part": config.part,
        "Cells": f"{done} of {len(cells)} complete",
    }
    return [*parts, KeyValues(items=facts)]


def _table(rows: Sequence[SettingScore]) -> Table:
    values = [_values(row) for row in rows]
    # Names that never vary are in the summary and would make the table too wide. table.csv has every column.
    names = 1 + len(SETTING_AXES)
    different = [len({row[i] for row in values}) > 1 for i in range(len(TABLE_COLUMNS))]
    measured = [any(row[i] is not None for row in values) for i in range(len(TABLE_COLUMNS))]
    shown = [i for i in range(len(TABLE_COLUMNS)) if (different[i] if i < names else measured[i])]
    return Table(
        columns=[TABLE_COLUMNS[i] for i in shown],
        rows=[[_shown(row[i]) for i in shown] for row in values],
        caption=(
            "Dice on the scans' own grids, seeds averaged per patient; low and high are a 95 % bootstrap interval over "
            "patients (none below six). Peak memory is the resident memory of the training process. Columns with one "
            "value are left out; table.csv has them."
        ),
        max_rows=2000,
    )


def _ranks(ranking: Ranking | None) -> list[Text | Picture]:
    if ranking is None:
        return [Text(text="Ranks need at least two settings with scores of the same patient.")]
    test = (
        "Friedman's test needs three settings and ten patients, so it is left out."
        if ranking.p_value is None
        else f"Friedman's test of equal settings has p = {ranking.p_value:.2g}."
    )
    caption = (
        f"{test} Orange bars join settings whose mean ranks differ by less than the Nemenyi critical difference "
        f"{ranking.critical_difference:.2f} at 5 %. A block is a patient of one data set and one number of shots; the "
        "same patient at several numbers of shots is not independent, so the true critical difference is larger."
    )
    return [Picture(png=rank_figure(ranking), caption=caption)]


def _curves(rows: Sequence[SettingScore], unit: str) -> list[Text | Picture]:
    names = short_names([row.setting for row in rows])
    pictures: list[Text | Picture] = []
    for data_set in dict.fromkeys(row.data_set for row in rows):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        ticks: dict[float, str] = {}
        mine = [row for row in rows if row.data_set == data_set and row.dice is not None]
        # "All" is drawn at twice the largest number of shots, because its real number differs between data sets.
        last = max((row.shots for row in mine), default=0)
        for row in sorted(mine, key=lambda r: r.shots if r.shots != ALL else last + 1):
            assert row.dice is not None
            x, y = curves.setdefault(names[row.setting], ([], []))
            x.append(float(row.shots if row.shots != ALL else 2 * last or 1))
            ticks[x[-1]] = _shots(row.shots)
            y.append(row.dice.mean)
        if any(len(x) > 1 for x, _ in curves.values()):
            caption = (
                f"{data_set}. The right-most point uses all training data."
                if any(row.shots == ALL for row in mine)
                else data_set
            )
            pictures.append(
                Picture(
                    png=curve_figure(curves, ylabel="Dice", xlabel=f"training {unit}", ticks=ticks), caption=caption
                )
            )
    return pictures or [Text(text="No setting is complete at two numbers of shots yet.")]


def _values(row: SettingScore) -> list[Any]:
    dice = row.dice
    return [
        row.data_set, *row.setting, _shots(row.shots), row.num_seeds,
        dice.mean if dice else None, dice.low if dice else None, dice.high if dice else None,
        dice.num_patients if dice else 0, row.seed_std, row.train_minutes, row.peak_gib, row.trainable_millions,
        row.num_without_gain or None,
    ]  # fmt: skip


def _shots(shots: int) -> str:
    return "all" if shots == ALL else str(shots)


def _plain(value: Any) -> Any:
    return "" if value is None else csv_cell(value)


def _shown(value: Any) -> Any:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value
