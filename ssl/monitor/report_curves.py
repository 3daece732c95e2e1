"""Curves of a stage-1 report: probe and drift against the start, loss parts, health, the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samgraft.shared.report.page import Picture, Table, Text, curve_figure
from samgraft.ssl.monitor.health import PROBE_NOISE
from samgraft.ssl.monitor.monitor import Watched

Curve = tuple[list[float], list[float]]
Lines = Sequence[Mapping[str, Any]]
SMOOTH_STEPS = 5
DICE_SPAN = 0.2
"""Least height of a Dice axis."""
NO_LOSS_PARTS = ("train/loss", "train/lr", "train/grad_norm")


def curve(lines: Lines, name: str) -> Curve:
    """Return (steps, values) of one metric."""
    found = [(float(line["step"]), float(line[name])) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def probe_verdict(lines: Lines) -> Text | None:
    """Say what the probe found; None where it did not run. That it fell is said by the rules.

    A rise is not called good: in our own comparison (benchmarks/results/ssl_helps-2026-11-26.md) the probe rose for
    encoders that fine-tuned worse, and fell for the one that fine-tuned better.
    """
    dice = curve(lines, "probe/dice")[1]
    if len(dice) < 2:
        return None
    change = f"a Dice of {dice[-1]:.3f}, {dice[0]:.3f} at the start"
    if dice[-1] > dice[0] + PROBE_NOISE:
        return Text(
            text=f"The frozen-feature probe rose to {change}: a linear head reads the labelled structures better than "
            "before. A sign, not a verdict: it did not foretell which encoder fine-tunes better where we compared. "
            "Fine-tune from both and compare."
        )
    return Text(
        text=f"The frozen-feature probe is where it was: {change}. A difference below {PROBE_NOISE:g} is noise."
    )


def drift_verdict(lines: Lines) -> Text | None:
    """Say in one sentence what the drift gauge found; None where it did not run."""
    dice = curve(lines, "drift/box_dice")[1]
    if len(dice) < 2:
        return None
    return Text(
        text=f"SAM's own decoder, asked with boxes, scores a Dice of {dice[-1]:.3f} on the new encoder, {dice[0]:.3f} "
        "at the start."
    )


def probe_parts(lines: Lines, watched: Watched) -> list[Any]:
    """Return the section on probe and drift gauge: curves against the start's value, and how they were taken."""
    steps, dice = curve(lines, "probe/dice")
    if watched.probe is None or not dice:
        return [
            Text(
                text="Not measured: no labelled store was named. With a few labelled patients, "
                "ARGS='probe.store=STORE.zarr' measures at every look how well a linear head reads the labels from the "
                "features: a sign, not a verdict, before any fine-tuning is paid for."
            )
        ]
    figure = curve_figure(
        {"probe": (steps, dice)}, ylabel="Dice", baseline=("start: the line to beat", dice[0]), min_span=DICE_SPAN
    )
    caption = (
        f"A linear head on the frozen features, fitted anew at every look ({watched.probe.describe()}); foreground "
        "Dice on the slices' own pixels. Compare with the dashed line, not with a fine-tuned model."
    )
    parts: list[Any] = [Picture(png=figure, caption=caption)]
    parts += _drift_parts(lines, watched)
    return [*parts, _probe_table(lines)]


def _drift_parts(lines: Lines, watched: Watched) -> list[Any]:
    steps, dice = curve(lines, "drift/box_dice")
    if watched.gauge is None or not dice:
        return [Text(text=f"Drift gauge {watched.gauge_note}.")]
    curves = {"SAM's decoder on the new encoder": (steps, dice)}
    if len(steps) > 1:
        curves["the box itself, filled"] = ([steps[0], steps[-1]], [watched.gauge.filled_box_dice] * 2)
    figure = curve_figure(curves, ylabel="Dice", baseline=("start", dice[0]), min_span=DICE_SPAN)
    caption = (
        f"Drift gauge: {len(watched.gauge.boxes)} tight boxes, decoded by SAM's own untouched decoder. It falls as the "
        "embeddings move away from what the decoder knows; fine-tuning with a trained decoder mends that, zero-shot "
        "prompting does not."
    )
    return [Picture(png=figure, caption=caption)]


def _probe_table(lines: Lines) -> Table:
    drift = dict(zip(*curve(lines, "drift/box_dice"), strict=True))
    steps, dice = curve(lines, "probe/dice")
    rows = [[int(step), value, value - dice[0], drift.get(step)] for step, value in zip(steps, dice, strict=True)]
    return Table(columns=["step", "probe Dice", "against the start", "box-prompt Dice"], rows=_thinned(rows))


def feature_parts(lines: Lines) -> list[Any]:
    """Return the section on the health of the features."""
    rank, spread = curve(lines, "held_out/effective_rank"), curve(lines, "held_out/feature_std")
    if not rank[1]:
        return [Text(text="Not measured.")]
    parts: list[Any] = [
        Picture(
            png=curve_figure(
                {"effective rank": rank}, ylabel="effective rank", baseline=("start", rank[1][0]), from_zero=True
            ),
            caption="How many directions the held-out slices spread over in feature space; 1 is a collapse.",
        ),
        Picture(
            png=curve_figure(
                {"feature std": spread}, ylabel="feature std", baseline=("start", spread[1][0]), from_zero=True
            ),
            caption="How much the features of different slices differ; 0 is a collapse.",
        ),
    ]
    entropy = curve(lines, "held_out/teacher_entropy")
    if entropy[1]:
        figure = curve_figure({"teacher entropy": entropy}, ylabel="share of maximum", from_zero=True)
        caption = "Entropy of the teacher's answers: near 0 one prototype has won, near 1 all are alike."
        parts.append(Picture(png=figure, caption=caption))
    rows = [[int(step), r, s] for step, r, s in zip(rank[0], rank[1], spread[1], strict=True)]
    return [*parts, Table(columns=["step", "effective rank", "feature std"], rows=_thinned(rows))]


def engine_parts(lines: Lines) -> list[Any]:
    """Return the section on loss parts, gradient norm and waiting for data."""
    names = sorted({name for line in lines for name in line if name.startswith("train/")} - set(NO_LOSS_PARTS))
    parts: list[Any] = []
    if names:
        curves = {name.removeprefix("train/"): curve(lines, name) for name in names}
        figure = curve_figure(curves, ylabel="value", smooth=SMOOTH_STEPS)
        parts.append(Picture(png=figure, caption="Parts of the loss, on training slices."))
    norm = curve(lines, "train/grad_norm")
    if norm[1]:
        figure = curve_figure({"gradient norm": norm}, ylabel="norm", log_y=min(norm[1]) > 0, smooth=SMOOTH_STEPS)
        parts.append(Picture(png=figure, caption="Norm of the whole gradient before clipping."))
    wait = curve(lines, "perf/data_wait_percent")
    if wait[1]:
        figure = curve_figure({"data wait": wait}, ylabel="% of the time", from_zero=True, min_span=5.0)
        caption = "Time spent waiting for slices. Above a few per cent, raise trainer.num_workers."
        parts.append(Picture(png=figure, caption=caption))
    return parts or [Text(text="Not measured.")]


def _thinned(rows: list[list[Any]], *, most: int = 12) -> list[list[Any]]:
    """Return first, last and evenly spaced rows: the curve shows the rest."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
