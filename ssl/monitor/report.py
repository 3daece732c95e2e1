"""``report.html`` of a stage-1 run: did it learn, what does it see, what to do next."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from samgraft.shared.files import write_text
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
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.progress import format_duration
from samgraft.shared.training.trainer import FitResult
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.monitor.health import target_moves
from samgraft.ssl.monitor.held_out import HeldOut, held_out_panel, split_picture
from samgraft.ssl.monitor.monitor import Watched, curves_of, find_worries, panel_path
from samgraft.ssl.monitor.report_curves import (
    SMOOTH_STEPS,
    Curve,
    Lines,
    curve,
    drift_verdict,
    engine_parts,
    feature_parts,
    probe_parts,
    probe_verdict,
)
from samgraft.ssl.objectives import Objective, Panel
from samgraft.ssl.start import RANDOM

log = logging.getLogger(__name__)

OUTPUT_COLUMN = "output"


def write_report(
    run: RunFolder,
    config: PretrainConfig,
    objective: Objective,
    watched: Watched,
    *,
    result: FitResult,
    notes: Sequence[str],
) -> None:
    """Write the report of a finished run from its metrics and pictures."""
    if not run.is_writer:
        return
    lines, held_out = list(run.metrics.read()), watched.held_out
    sections = [
        Section(title="Summary", parts=_summary(config, lines, watched, result=result)),
        Section(title="Signs for segmentation: probe and drift gauge", parts=probe_parts(lines, watched)),
        Section(title="Loss", parts=_loss(lines, objective, held_out)),
        Section(
            title="What the encoder makes of slices it was not trained on",
            parts=_pictures(run, config, objective, held_out),
        ),
        Section(title="Features", parts=feature_parts(lines)),
        Section(title="Training", parts=engine_parts(lines)),
        Section(title="What to do next", parts=_next_steps(run, config)),
        Section(title="How this run was made", parts=[KeyValues(items=_facts(config, notes))]),
    ]
    for text in verdict(lines, watched):
        (log.warning if text.kind == "warning" else log.info)("%s", text.text)
    title = f"Stage 1: {run.path.name}"
    subtitle = f"{config.objective.name} on {config.model.arch}, {config.modality}"
    write_text(run.report, render_report(title, sections, subtitle=subtitle))


def verdict(lines: Lines, watched: Watched) -> list[Text]:
    """Say in words whether the run learned, and what a person should worry about; what matters most comes first."""
    found = {worry.rule: Text(text=worry.text, kind="warning") for worry in find_worries(lines, is_final=True)}
    is_sound = not found
    probe = found.pop("probe", None) or probe_verdict(lines)
    if probe is not None and watched.probe is not None:
        # How few slices a Dice stands on is part of what it says.
        probe = replace(probe, text=f"{probe.text} ({watched.probe.describe()}.)")
    measured = [probe, found.pop("drift", None) or drift_verdict(lines)]
    remarks = [text for text in measured if text is not None]
    return [*remarks, _loss_verdict(lines, is_sound=is_sound), *found.values()]


def _loss_verdict(lines: Lines, *, is_sound: bool) -> Text:
    """Say what became of the held-out loss; good only where it fell, means something and nothing else is wrong."""
    loss = curve(lines, "held_out/loss")[1]
    if len(loss) < 2:
        return Text(text="No patient was held out: the loss on unseen slices is not known.", kind="warning")
    change = f"The loss on held-out slices went from {loss[0]:.4g} to {loss[-1]:.4g}"
    if target_moves(curves_of(lines)):
        return Text(
            text=f"{change}. Its height means little: the student is compared with a teacher that moves. Look at the "
            "teacher's entropy and the effective rank instead, whether they stay away from a collapse."
        )
    if loss[-1] >= loss[0]:
        return Text(text=f"{change}.")
    fall = 100 * (1 - loss[-1] / loss[0])
    return Text(text=f"{change}: {fall:.0f} % lower than at the start.", kind="good" if is_sound else "plain")


def _summary(config: PretrainConfig, lines: Lines, watched: Watched, *, result: FitResult) -> list[Any]:
    facts: dict[str, Any] = {
        "steps": result.step,
        "slices seen": result.slices_seen,
    }
    if result.slices_per_s:  # nothing was trained when a finished run is asked for again
        facts["time of the last session"] = format_duration(result.seconds)
        facts["speed"] = f"{result.slices_per_s:.3g} slices/s, {100 * result.data_wait_share:.1f} % waiting for data"
    return [*verdict(lines, watched), KeyValues(items=facts)]


def _next_steps(run: RunFolder, config: PretrainConfig) -> list[Any]:
    """Return what to do with the encoder: the comparison that decides whether this run was worth it."""
    run_path = path_for_report(run.path)
    parts: list[Any] = [
        Text(
            text="Neither a lower loss nor a better probe proves a better encoder for your task. Fine-tune from this "
            "run and from the weights it started with, on the same few labelled patients, and compare; the result "
            "decides."
        ),
        Text(text=f"make finetune CKPT={shlex.quote(run_path)}", kind="command"),
    ]
    if config.model.base != RANDOM:
        base = shlex.quote(path_for_report(config.model.base))
        parts.append(Text(text=f"make finetune CKPT={base} NAME=from-the-start", kind="command"))
    parts.append(
        Text(
            text="More steps, more patients or another objective: give the run another NAME=. This run's curves stay "
            f"in TensorBoard: tensorboard --logdir {shlex.quote(f'{run_path}/tb')}"
        )
    )
    return parts


def _loss(lines: Lines, objective: Objective, held_out: HeldOut | None) -> list[Any]:
    curves: dict[str, Curve] = {"training slices": curve(lines, "train/loss")}
    if held_out is not None:
        curves["held-out slices"] = curve(lines, "held_out/loss")
    parts: list[Any] = [
        Picture(png=curve_figure(curves, ylabel="loss", smooth=SMOOTH_STEPS), caption=_loss_caption(lines, held_out))
    ]
    table = _reference_table(lines, objective, held_out)
    return [*parts, table] if table else parts


def _loss_caption(lines: Lines, held_out: HeldOut | None) -> str:
    if held_out is None:
        return "Training loss. No patient was held out."
    caption = (
        f"Training loss, and the loss on {len(held_out.refs)} slices of held-out patients "
        f"({held_out.num_patients}) that were never trained on, always with the same random numbers (masks, views). "
        "The slices are spread evenly by rule."
    )
    if target_moves(curves_of(lines)):
        caption += " The target moves while the run goes on: compare the two curves, not the start with the end."
    return caption


def _reference_table(lines: Lines, objective: Objective, held_out: HeldOut | None) -> Table | None:
    """Compare with answers that need no network, in grey values; None where an objective has none."""
    if held_out is None:
        return None
    _, errors = curve(lines, "held_out/grey_error")
    references = objective.references(
        held_out.images_N1SS.to(_device(objective)), sample_counters=held_out.sample_counters
    )
    if not errors or not references:
        return None
    rows: list[list[Any]] = [["this run, at the start", errors[0]], ["this run, at the end", errors[-1]]]
    rows += [[name, value] for name, value in references.items()]
    return Table(
        columns=["what fills the hidden pixels", "mean absolute error"],
        rows=rows,
        caption="Held-out slices, grey values from 0 to 1. Smoothing is hard to beat in a short run: it copies the "
        "nearest grey value. The encoder has to know what lies there instead.",
    )


def _pictures(run: RunFolder, config: PretrainConfig, objective: Objective, held_out: HeldOut | None) -> list[Any]:
    if held_out is None:
        return [Text(text="No patient was held out, so there is nothing unseen to show.", kind="warning")]
    if not config.watch.log_images:
        return [
            Text(
                text="Pictures are off: slices are patient images. If these may be shown, run with "
                "watch.log_images=true."
            )
        ]
    panel = held_out_panel(objective, held_out, num_rows=config.watch.num_panel_rows, device=_device(objective))
    titles, columns = _columns_with_start(run, panel)
    rows = [[column[row] for column in columns] for row in range(panel.images_KBHW.shape[1])]
    shown = [str(held_out.refs[i].slice_index) for i in held_out.panel_rows(config.watch.num_panel_rows)]
    caption = f"Held-out slices {', '.join(shown)}, chosen by even spacing. {panel.caption}"
    return [Picture(png=image_grid(rows, column_titles=titles), caption=caption.strip())]


def _columns_with_start(run: RunFolder, panel: Panel) -> tuple[list[str], list[npt.NDArray[np.uint8]]]:
    """Return the panel's columns, with the output before training beside the output after it."""
    now = (panel.images_KBHW.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    titles, columns = list(panel.columns), list(now)
    start = panel_path(run.path, 0)
    if OUTPUT_COLUMN in titles and start.is_file():
        picture_HW = np.asarray(Image.open(start))
        before = split_picture(picture_HW, num_columns=len(titles), side=now.shape[-1])
        place = titles.index(OUTPUT_COLUMN)
        columns.insert(place, before[place])
        titles[place : place + 1] = ["output before", "output after"]
    return titles, columns


def _facts(config: PretrainConfig, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "start": path_for_report(config.model.base),
        "image size": f"{config.model.image_size} px",
        "frozen depths": config.model.num_frozen_depths,
        "learning rate": config.optim.lr,
        "seed": config.seed,
        "leak check": "; ".join(notes) or "no labelled store was named",
        "everything": "config.yaml and run.json in the run folder",
    }


def _device(objective: Objective) -> Any:
    return next(iter(objective.named_parameters()))[1].device
