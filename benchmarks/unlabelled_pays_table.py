"""Table and figure of ``unlabelled_pays.py`` from its finished cells."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from samgraft.finetune.evaluation.statistics import bootstrap_mean
from ssl_helps_table import gain_cells, patient_means, seed_interval
from unlabelled_pays_plan import ARMS, DATA_SETS

Record = dict[str, Any]
HEAD = (
    "| arm | seeds | test Dice (95 % interval over patients) | gain over labels alone, paired | the same over seeds "
    "| Wilcoxon p | Dice of the pseudo-labels | core-minutes |",
    "|---|---|---|---|---|---|---|---|",
)


def arm_cells(records: Sequence[Record], *, data: str, arm: str, labels: int | None) -> dict[int, Record]:
    """Return the finished cells of an arm by seed."""
    return {
        record["seed"]: record
        for record in records
        if (record["data"], record["arm"], record["labels"]) == (data, arm, labels)
    }


def row_of(records: Sequence[Record], *, data: str, arm: str, labels: int | None) -> list[str] | None:
    """Return the cells of a table row, None where nothing is finished."""
    own = arm_cells(records, data=data, arm=arm, labels=labels)
    if not own:
        return None
    interval = bootstrap_mean(list(patient_means(list(own.values())).values()))
    assert interval is not None
    row = [ARMS[arm].title, str(len(own)), f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"]
    gain = paired_gain(records, data=data, arm=arm, labels=labels)
    if gain is None:
        row += ["", "", ""]
    else:
        found, over_seeds, chance = gain_cells(*gain)
        number = len(gain[1])
        row += [f"{found}, {number} seed{'s' * (number > 1)}", over_seeds or "needs 3 seeds", chance]
    pseudo = [cell["pseudo_dice"] for cell in own.values() if "pseudo_dice" in cell]
    minutes = [cell["cpu_minutes"] for cell in own.values() if cell["cpu_minutes"]]
    row += [f"{np.mean(pseudo):.3f}" if pseudo else "", f"{np.median(minutes):.0f}" if minutes else "in another arm"]
    return row


def label_numbers(records: Sequence[Record], data: str) -> list[int]:
    """Return the numbers of labelled patients of which a data set has cells."""
    return sorted({r["labels"] for r in records if r["data"] == data and r["labels"] is not None})


def cell_dice(cell: Record) -> float:
    """Return the mean Dice over the patients of a cell."""
    return float(np.mean(list(cell["dice"].values())))


def paired_cells(records: Sequence[Record], *, data: str, arm: str, labels: int | None) -> list[tuple[Record, Record]]:
    """Return the cells of labels alone and of an arm, over the seeds that both have."""
    baseline = ARMS[arm].baseline
    if baseline is None:
        return []
    alone, more = (arm_cells(records, data=data, arm=name, labels=labels) for name in (baseline, arm))
    return [(alone[seed], more[seed]) for seed in sorted(set(alone) & set(more))]


def paired_gain(
    records: Sequence[Record], *, data: str, arm: str, labels: int | None
) -> tuple[list[float], list[float]] | None:
    """Return the gain over labels alone per patient and per seed, over the seeds that both arms have."""
    pairs = paired_cells(records, data=data, arm=arm, labels=labels)
    if not pairs:
        return None
    alone, more = (patient_means(cells) for cells in zip(*pairs, strict=True))
    per_seed = [float(np.mean([b["dice"][p] - a["dice"][p] for p in more])) for a, b in pairs]
    return [more[p] - alone[p] for p in more], per_seed


def render(records: Sequence[Record], *, stage_1: Sequence[Record] = ()) -> str:
    """Return the whole result as Markdown, from the records of the cells and of the stage-1 runs."""
    lines = [
        f"# What do unlabelled scans buy? {datetime.date.today()}",
        "",
        "Every seed draws other labelled patients; all other training patients are scans without labels. The test "
        "patients are looked at once per model, nothing is chosen on them unless the words below say so, and the "
        "weights of the last step count (moving averages). Dice is the mean over scans and classes per patient on the "
        "scan's own grid. The interval over patients does not cover the choice of the labelled ones. The interval "
        "over seeds (t, from three on) covers that choice and everything else that a training draws, not the test "
        "patients. The pseudo-labels are compared with the labels that no training saw, without their ignored voxels. "
        "Core-minutes are processor time of the training, teachers and labelling included, unless another arm has "
        "them.",
        "",
    ]
    for data in DATA_SETS:
        for labels in label_numbers(records, data):
            lines += [*section(records, data=data, labels=labels), ""]
        for record in stage_1:
            if record["data"] == data:
                lines += [describe_stage_1(record), ""]
    everything = (*records, *stage_1)
    hardware = sorted({f"{r['hardware']}, torch {r['torch']}, code {r['code_revision'][:9]}" for r in everything})
    lines += ["Hardware: " + "; ".join(hardware) + ". Other work ran beside it.", ""]
    lines += [
        "Command: `python benchmarks/unlabelled_pays.py FOLDER --data NAME --base lite_medsam.pth --work WORK`, then "
        "`--table`. All settings are in `benchmarks/unlabelled_pays_plan.py`.",
        "",
    ]
    return "\n".join(lines)


def describe_stage_1(record: Record) -> str:
    """Return one sentence on the stage-1 run of a data set."""
    first, last = record["ends"]["held_out/loss"]
    return (
        f"Stage 1: `masked_image` from LiteMedSAM's weights, {record['epochs']:.0f} epochs over the training patients, "
        f"{record['cpu_minutes']:.0f} core-minutes. The loss on held-out slices went from {first:.3f}, the error of "
        f"smoothing, to {last:.3f}. The encoder half way between the initial and the trained weights was fine-tuned."
    )


def section(records: Sequence[Record], *, data: str, labels: int) -> list[str]:
    """Return the table of one data set and number of labels."""
    about = DATA_SETS[data]
    rows = [row_of(records, data=data, arm=arm, labels=None if ARMS[arm].once else labels) for arm in ARMS]
    steps = ", ".join(f"{network} {number}" for network, number in about.steps.items())
    return [
        f"## {about.title}, {labels} labelled {about.unit}",
        "",
        f"Steps, equal in all arms of a network unless said: {steps}; {about.image_size} px.",
        "",
        *HEAD,
        *("| " + " | ".join(row) + " |" for row in rows if row is not None),
    ]


ALONE_COLOUR, MORE_COLOUR = "#8a8a8a", "#1f77b4"


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the figure with the Dice of labels alone and of labels and unlabelled scans, seed by seed."""
    rows = [
        (data, arm, labels)
        for data in DATA_SETS
        for labels in label_numbers(records, data)
        for arm in ARMS
        if ARMS[arm].short and paired_cells(records, data=data, arm=arm, labels=labels)
    ]
    figure = Figure(figsize=(8, 1.3 + 1.05 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    for place, (data, arm, labels) in enumerate(rows):
        _draw_pairs(axes, place, records, data=data, arm=arm, labels=labels)
    names = [f"{DATA_SETS[data].short}, {labels} labelled\n{ARMS[arm].short}" for data, arm, labels in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlabel("Dice on test patients (thin: one seed with its own labelled patients, thick: mean)")
    for colour, title in ((ALONE_COLOUR, "labels alone"), (MORE_COLOUR, "labels and unlabelled scans")):
        axes.scatter([], [], color=colour, s=60, label=title)
    axes.scatter([], [], color="black", marker="|", s=120, label="all labels")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_pairs(axes: Axes, place: int, records: Sequence[Record], *, data: str, arm: str, labels: int) -> None:
    """Draw one comparison at a height of the figure, with its gain in points."""
    pairs = paired_cells(records, data=data, arm=arm, labels=labels)
    alone, more = ([cell_dice(cell) for cell in cells] for cells in zip(*pairs, strict=True))
    heights = place + (np.linspace(-0.22, 0.22, len(pairs)) if len(pairs) > 1 else np.zeros(1))
    for height, start, end in zip(heights, alone, more, strict=True):
        axes.plot([start, end], [height, height], color="0.8", linewidth=1, zorder=1)
    axes.plot([np.mean(alone), np.mean(more)], [place, place], color="0.4", linewidth=3, zorder=3)
    for values, colour in ((alone, ALONE_COLOUR), (more, MORE_COLOUR)):
        axes.scatter(values, heights, color=colour, s=12, alpha=0.7, zorder=2)
        axes.scatter([np.mean(values)], [place], color=colour, s=90, zorder=4)
    for name, what in ARMS.items():
        # What all labels reach in as many steps bounds what any use of unlabelled scans can add.
        if what.once and (what.network, what.times_steps) == (ARMS[arm].network, ARMS[arm].times_steps):
            for cell in arm_cells(records, data=data, arm=name, labels=None).values():
                axes.scatter([cell_dice(cell)], [place], color="black", marker="|", s=260, zorder=5)
    gains = [end - start for start, end in zip(alone, more, strict=True)]
    interval = seed_interval(gains)
    text = f"{100 * np.mean(gains):+.1f} points"
    if interval is None:
        text += f" ({len(pairs)} seed{'s' * (len(pairs) > 1)}, no interval)"
    else:
        text += f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f} over {len(pairs)} seeds)"
    axes.text(float(np.mean(more)), place - 0.32, text, ha="center", va="bottom", fontsize=9)
