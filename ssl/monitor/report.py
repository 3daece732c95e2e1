"""``report.html`` of a stage-1 run, with its conclusions, curves, pictures and next steps."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from samgraft.shared.counting import counted
from samgraft.shared.demo.heads import demo_paths
from samgraft.shared.encoders.registry import DEFAULT_ARCH
from samgraft.shared.files import write_text
from samgraft.shared.machine import format_duration
from samgraft.shared.report.page import (
    KeyValues,
    Picture,
    Section,
    Table,
    Text,
    curve_figure,
    image_grid,
    path_for_report,
    render_report,
)
from samgraft.shared.runs.metrics import curves_of
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.trainer import FitResult
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.official import official_name
from samgraft.ssl.config import RANDOM, PretrainConfig
from samgraft.ssl.monitor.exported import MEASURES, Exported
from samgraft.ssl.monitor.health import has_moving_target, health_warnings, probe_noise
from samgraft.ssl.monitor.held_out import HeldOut, held_out_panel, split_picture
from samgraft.ssl.monitor.monitor import MonitorData, panel_path
from samgraft.ssl.objectives import Objective, Panel

log = logging.getLogger(__name__)

OUTPUT_COLUMN = "output"
SMOOTH_STEPS = 5
DICE_SPAN = 0.2
"""Least height of a Dice axis, so that noise does not fill the figure."""
NO_LOSS_PARTS = ("train/loss", "train/lr", "train/lr_min", "train/grad_norm", "train/epochs")
BEFORE = "before training"
TRAINED = Exported()

Curve = tuple[list[float], list[float]]
"""Steps and values of one metric."""
Lines = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``, one per step."""


def write_report(
    run: RunFolder,
    config: PretrainConfig,
    objective: Objective,
    monitored: MonitorData,
    *,
    result: FitResult,
    exported: Exported,
    notes: Sequence[str],
) -> None:
    """Write the report of a finished run and print its conclusions."""
    if not run.is_writer:
        return
    # Read from the files of the run and not from memory, so that a resumed run reports all of its sessions.
    lines, held_out = list(run.metrics.read()), monitored.held_out
    sections = [
        Section(title="Summary", parts=_summary(lines, monitored, result=result, exported=exported)),
        Section(title="Output on slices of held-out patients", parts=_picture_parts(run, config, objective, held_out)),
        Section(
            title="Signs for segmentation: linear probe and box-prompt check",
            parts=[*probe_parts(lines, monitored), *export_parts(exported)],
        ),
        Section(title="Loss", parts=_loss_parts(lines, objective, held_out, exported)),
        Section(title="Features", parts=feature_parts(lines)),
        Section(title="Training", parts=training_parts(lines)),
        Section(title="Settings of this run", parts=[KeyValues(items=_facts(config, notes))]),
        Section(title="Next steps", parts=_next_steps(run, config)),
    ]
    for text in conclusions(lines, monitored, exported):
        (log.warning if text.kind == "warning" else log.info)("%s", text.text)
    title = f"Stage 1: {run.path.name}"
    subtitle = f"{config.objective.name} on {config.model.arch}, {config.modality}"
    write_text(run.report, render_report(title, sections, subtitle=subtitle))


def conclusions(lines: Lines, monitored: MonitorData, exported: Exported = TRAINED) -> list[Text]:
    """Return what the run learned and all warnings, the most important first.

    Linear probe and box-prompt check are those of the exported encoder, which stage 2 loads.
    """
    if measured := exported.measured.get(exported.share):
        lines = [*lines, {**measured, "step": lines[-1]["step"]}]
    warnings = {w.rule: Text(text=w.text, kind="warning") for w in health_warnings(curves_of(lines), is_final=True)}
    has_warnings = bool(warnings)
    probe = warnings.pop("probe", None) or _probe_conclusion(lines)
    if probe is not None and monitored.probe is not None:
        # The number of slices is part of the statement, because a Dice of few slices is noisy.
        probe = replace(probe, text=f"{probe.text} ({monitored.probe.describe()}.)")
    found = [probe, warnings.pop("drift", None) or _box_prompt_conclusion(lines)]
    if exported.reason:
        sentence = exported.describe()
        found.append(Text(text=f"{sentence[0].upper()}{sentence[1:]}."))
    texts = [text for text in found if text is not None]
    return [*texts, _loss_conclusion(lines, has_warnings=has_warnings), *warnings.values()]


def _probe_conclusion(lines: Lines) -> Text | None:
    """Return the change of the linear probe if it did not fall. The rule of the probe reports a fall."""
    dice = curve(lines, "probe/dice")[1]
    if len(dice) < 2:
        return None
    change = f"a Dice of {dice[-1]:.3f} ({dice[0]:.3f} {BEFORE})"
    noise = probe_noise(dice)
    if dice[-1] > dice[0] + noise:
        # Not marked as good. In our own comparison (benchmarks/results/ssl_helps-2026-11-26.md) the probe rose for
        # encoders that fine-tuned worse, and fell for the one that fine-tuned better.
        return Text(
            text=f"The linear probe rose to {change}, so a linear head segments the labelled structures better than "
            "before. This is a sign only, and it did not predict which encoder fine-tunes better in our comparison. "
            "Fine-tune from both encoders and compare."
        )
    return Text(
        text=f"The linear probe did not change by more than chance: {change}. In this run, a difference below "
        f"{noise:.2f} is noise."
    )


def _box_prompt_conclusion(lines: Lines) -> Text | None:
    dice = curve(lines, "drift/box_dice")[1]
    if len(dice) < 2:
        return None
    return Text(
        text=f"With box prompts, SAM's own decoder has a Dice of {dice[-1]:.3f} on the new encoder ({dice[0]:.3f} "
        f"{BEFORE})."
    )


def _loss_conclusion(lines: Lines, *, has_warnings: bool) -> Text:
    """Return the change of the held-out loss, marked as good only if it means something and nothing warns."""
    loss = curve(lines, "held_out/loss")[1]
    if len(loss) < 2:
        return Text(text="No patient was held out, so the loss on unseen slices was not measured.", kind="warning")
    change = f"The loss on held-out slices went from {loss[0]:.4g} to {loss[-1]:.4g}"
    if has_moving_target(curves_of(lines)):
        return Text(
            text=f"{change}. Its height means little, because the student is compared with a moving teacher. Check the "
            "teacher's entropy and the effective rank instead, which show a collapse."
        )
    if loss[-1] >= loss[0]:
        return Text(text=f"{change}.")
    fall = 100 * (1 - loss[-1] / loss[0])
    return Text(text=f"{change}, {fall:.0f} % lower than {BEFORE}.", kind="plain" if has_warnings else "good")


def _summary(lines: Lines, monitored: MonitorData, *, result: FitResult, exported: Exported) -> list[Any]:
    facts: dict[str, Any] = {
        "steps": result.step,
        "slices seen": result.slices_seen,
        "epochs": f"{result.epochs:.3g} over {counted(result.slices_available, 'slice')}",
    }
    if result.slices_per_s:  # Zero if the run was finished already and trained nothing in this session.
        facts["time of the last session"] = format_duration(result.seconds)
        facts["speed"] = f"{result.slices_per_s:.3g} slices/s, {100 * result.data_wait_share:.1f} % waiting for data"
    return [*conclusions(lines, monitored, exported), KeyValues(items=facts)]


def _full_sam(config: PretrainConfig) -> str | None:
    """Return the weights that supply prompt encoder and mask decoder, or None if stage 2 finds them itself."""
    model = config.model
    if model.has_random_weights:
        return None if model.arch == DEFAULT_ARCH else official_name(model.arch)
    if model.base:
        return None if Path(model.base) == demo_paths().weights else model.base
    # A run as initial weights has only the encoder.
    if Path(model.initial_weights).is_dir():
        return None
    parts = read_weights(model.initial_weights).parts
    return model.initial_weights if {"prompt_encoder", "mask_decoder"} <= parts else None


def finetune_command(config: PretrainConfig, ckpt: str, *, shown: Callable[[str], str] = str) -> str:
    """Return the command that fine-tunes from weights as this run has them.

    Args:
        config: Settings of the run.
        ckpt: Initial weights of the fine-tuning, the run or its own initial weights.
        shown: Function of a path for what is printed.
    """
    given = {"CKPT": ckpt}
    # The store whose patients were left out is the one to fine-tune on.
    if config.data.labelled:
        given["DATA"] = config.data.labelled[0]
    base = _full_sam(config)
    if base not in (None, ckpt):
        given["BASE"] = base
    return f"make finetune {' '.join(f'{name}={shlex.quote(shown(value))}' for name, value in given.items())}"


def _next_steps(run: RunFolder, config: PretrainConfig) -> list[Any]:
    """Return the commands of the comparison that shows whether this run helped."""
    run_path = path_for_report(run.path)
    parts: list[Any] = [
        Text(
            text="Neither a lower loss nor a better linear probe proves a better encoder for your task. Fine-tune from "
            "this run and from its initial weights, on the same few labelled patients, and compare the results."
        ),
        Text(text=finetune_command(config, run_path, shown=path_for_report), kind="command"),
    ]
    if config.model.base != RANDOM:
        initial = finetune_command(config, config.model.initial_weights, shown=path_for_report)
        parts.append(Text(text=f"{initial} NAME=initial-weights", kind="command"))
    parts.append(
        Text(
            text="For more steps, more patients or another objective, give the run another NAME=. This run's curves "
            f"are in TensorBoard: tensorboard --logdir {shlex.quote(f'{run_path}/tb')}"
        )
    )
    return parts


def probe_parts(lines: Lines, monitored: MonitorData) -> list[Any]:
    """Return the section on linear probe and box-prompt check."""
    steps, dice = curve(lines, "probe/dice")
    if monitored.probe is None or not dice:
        return [
            Text(
                text="Not measured, because no labels are given. With a few labelled patients, LABELLED=STORE.zarr "
                "measures in every monitoring round how well a linear head segments the labels from the features. It "
                "is a sign before any fine-tuning."
            )
        ]
    # The axis has a least height, so that noise of a hundredth does not look like a trend.
    figure = curve_figure(
        {"linear probe": (steps, dice)}, ylabel="Dice", baseline=(BEFORE, dice[0]), min_span=DICE_SPAN
    )
    caption = (
        f"A linear head on the frozen features, fitted anew in every round ({monitored.probe.describe()}). Foreground "
        "Dice at the slices' native size. Compare with the dashed line and not with a fine-tuned model."
    )
    parts: list[Any] = [Picture(png=figure, caption=caption)]
    parts += _box_prompt_parts(lines, monitored)
    boxes = dict(zip(*curve(lines, "drift/box_dice"), strict=True))
    rows = [[int(step), value, value - dice[0], boxes.get(step)] for step, value in zip(steps, dice, strict=True)]
    columns = ["step", "linear probe Dice", f"change from {BEFORE}", "box-prompt Dice"]
    return [*parts, Table(columns=columns, rows=_thin_out(rows))]


def export_parts(exported: Exported) -> list[Any]:
    """Return the table of the candidates of the export, or nothing if none was measured."""
    if not exported.measured:
        return []
    names = {0.0: "initial weights", 1.0: "trained weights"}
    rows = [
        [
            f"{names.get(share, f'{share:g} of the change')}{' (exported)' if share == exported.share else ''}",
            *(values.get(name) for name in MEASURES),
        ]
        for share, values in exported.measured.items()
    ]
    caption = (
        "Interpolations between the initial and the trained weights (export.interpolate), of which one is exported. "
        "They were compared on these slices, so that its values are a little too good. The curves above are of the "
        "trained weights."
    )
    return [Table(columns=["encoder", *(f"{name} Dice" for name in MEASURES.values())], rows=rows, caption=caption)]


def _box_prompt_parts(lines: Lines, monitored: MonitorData) -> list[Any]:
    steps, dice = curve(lines, "drift/box_dice")
    check = monitored.box_check
    if check is None or not dice:
        return [Text(text=f"Box-prompt check: {monitored.box_check_note}.")]
    curves = {"SAM's decoder on the new encoder": (steps, dice)}
    if len(steps) > 1:
        curves["filled boxes"] = ([steps[0], steps[-1]], [check.filled_box_dice] * 2)
    figure = curve_figure(curves, ylabel="Dice", baseline=(BEFORE, dice[0]), min_span=DICE_SPAN)
    caption = (
        f"Box-prompt check: {len(check.boxes)} tight boxes, decoded by SAM's own decoder, which is not trained. The "
        "Dice falls as the embeddings move away from those that the decoder was trained with. Fine-tuning with a "
        "trained decoder corrects this; prompting without fine-tuning does not."
    )
    return [Picture(png=figure, caption=caption)]


def _loss_parts(lines: Lines, objective: Objective, held_out: HeldOut | None, exported: Exported) -> list[Any]:
    curves: dict[str, Curve] = {"training slices": curve(lines, "train/loss")}
    caption = "Training loss. No patient was held out."
    if held_out is not None:
        curves["held-out slices"] = curve(lines, "held_out/loss")
        caption = (
            f"Training loss, and loss on {counted(len(held_out.refs), 'slice')} of held-out patients "
            f"({held_out.num_patients}), which were never trained on, always with the same random numbers (masks, "
            "views). The slices are spread evenly by rule."
        )
        if objective.anchor is not None:
            caption += " The training loss contains the penalty of the anchor."
        if has_moving_target(curves_of(lines)):
            caption += " The target moves during the run, so compare the two curves and not first and last values."
    figure = curve_figure(curves, ylabel="loss", smooth=SMOOTH_STEPS)
    table = _reference_table(lines, objective, held_out, exported)
    return [Picture(png=figure, caption=caption), *([table] if table else [])]


def _reference_table(lines: Lines, objective: Objective, held_out: HeldOut | None, exported: Exported) -> Table | None:
    """Return the comparison with predictions that need no network, or None where an objective has none."""
    # Only grey errors can be compared with fillings; other losses have no unit in common with them.
    if held_out is None:
        return None
    _, errors = curve(lines, "held_out/grey_error")
    references = objective.references(
        held_out.images_N1SS.to(_device(objective)), sample_counters=held_out.sample_counters
    )
    if not errors or not references:
        return None
    rows: list[list[Any]] = [[f"this run, {BEFORE}", errors[0]], ["this run, after training", errors[-1]]]
    if exported.grey_error is not None:
        rows.append(["exported encoder with the trained decoder", exported.grey_error])
    rows += [[name, value] for name, value in references.items()]
    return Table(
        columns=["prediction of the hidden pixels", "mean absolute error"],
        rows=rows,
        caption="Held-out slices, grey values from 0 to 1. Smoothing is hard to beat in a short run, because it copies "
        "the nearest grey value, and the encoder has to predict the structure.",
    )


def _picture_parts(run: RunFolder, config: PretrainConfig, objective: Objective, held_out: HeldOut | None) -> list[Any]:
    if held_out is None:
        return [Text(text="No patient was held out, so there are no unseen slices.", kind="warning")]
    if not config.watch.log_images:
        return [
            Text(
                text="Pictures are off, because slices are patient images. If they may be shown, run with "
                "watch.log_images=true."
            )
        ]
    panel = held_out_panel(objective, held_out, num_rows=config.watch.num_panel_rows, device=_device(objective))
    titles, columns = _columns_with_first_output(run, panel)
    rows = [[column[row] for column in columns] for row in range(panel.images_KBHW.shape[1])]
    numbers = [str(held_out.refs[i].slice_index) for i in held_out.panel_rows(config.watch.num_panel_rows)]
    caption = f"Held-out slices {', '.join(numbers)}, chosen by even spacing. {panel.caption}"
    return [Picture(png=image_grid(rows, column_titles=titles), caption=caption.strip())]


def _columns_with_first_output(run: RunFolder, panel: Panel) -> tuple[list[str], list[npt.NDArray[np.uint8]]]:
    """Return the panel's columns, with the output before training next to the present one."""
    # The first picture was written before training; the objective cannot compute it again.
    now = (panel.images_KBHW.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    titles, columns = list(panel.columns), list(now)
    first = panel_path(run.path, 0)
    if OUTPUT_COLUMN in titles and first.is_file():
        picture_HW = np.asarray(Image.open(first))
        before = split_picture(picture_HW, num_columns=len(titles), side=now.shape[-1])
        place = titles.index(OUTPUT_COLUMN)
        columns.insert(place, before[place])
        titles[place : place + 1] = [f"output {BEFORE}", "output after training"]
    return titles, columns


def feature_parts(lines: Lines) -> list[Any]:
    """Return the section on the health of the features."""
    rank, spread = curve(lines, "held_out/effective_rank"), curve(lines, "held_out/feature_std")
    if not rank[1]:
        return [Text(text="Not measured.")]
    captions = {
        "effective rank": "Number of directions over which the features of held-out slices spread; 1 is a collapse.",
        "feature std": "Difference between the features of different slices; 0 is a collapse.",
    }
    parts: list[Any] = []
    for (name, caption), values in zip(captions.items(), (rank, spread), strict=True):
        figure = curve_figure({name: values}, ylabel=name, baseline=(BEFORE, values[1][0]), from_zero=True)
        parts.append(Picture(png=figure, caption=caption))
    entropy = curve(lines, "held_out/teacher_entropy")
    if entropy[1]:
        figure = curve_figure({"teacher entropy": entropy}, ylabel="share of maximum", from_zero=True)
        caption = (
            "Entropy of the teacher's outputs. Near 0 one prototype has all the probability, near 1 all prototypes "
            "have the same."
        )
        parts.append(Picture(png=figure, caption=caption))
    rows = [[int(step), r, s] for step, r, s in zip(rank[0], rank[1], spread[1], strict=True)]
    return [*parts, Table(columns=["step", "effective rank", "feature std"], rows=_thin_out(rows))]


def training_parts(lines: Lines) -> list[Any]:
    """Return the section on loss parts, gradient norm and waiting for data."""
    names = sorted({name for line in lines for name in line if name.startswith("train/")} - set(NO_LOSS_PARTS))
    parts: list[Any] = []
    if names:
        curves = {name.removeprefix("train/"): curve(lines, name) for name in names}
        figure = curve_figure(curves, ylabel="value", smooth=SMOOTH_STEPS)
        parts.append(Picture(png=figure, caption="Parts of the loss on training slices."))
    norm = curve(lines, "train/grad_norm")
    if norm[1]:
        figure = curve_figure({"gradient norm": norm}, ylabel="norm", log_y=min(norm[1]) > 0, smooth=SMOOTH_STEPS)
        parts.append(Picture(png=figure, caption="Norm of the whole gradient before clipping."))
    wait = curve(lines, "perf/data_wait_percent")
    if wait[1]:
        figure = curve_figure({"data wait": wait}, ylabel="% of the time", from_zero=True, min_span=5.0)
        caption = "Time spent waiting for slices. If it is above a few per cent, raise trainer.num_workers."
        parts.append(Picture(png=figure, caption=caption))
    return parts or [Text(text="Not measured.")]


def curve(lines: Lines, name: str) -> Curve:
    """Return steps and values of one metric."""
    found = [(float(line["step"]), float(line[name])) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def _facts(config: PretrainConfig, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "initial weights": path_for_report(config.model.initial_weights),
        "image size": f"{config.model.image_size} px",
        "frozen depths": config.model.num_frozen_depths,
        "learning rate": config.optim.lr,
        "seed": config.seed,
        "leak check": "; ".join(notes) or "not done, because no labelled store is set",
        "all settings": "config.yaml and run.json in the run folder",
    }


def _thin_out(rows: list[list[Any]], *, most: int = 12) -> list[list[Any]]:
    """Return the first, the last and evenly spaced rows, because the curve shows the others."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _device(objective: Objective) -> Any:
    return next(objective.parameters()).device
