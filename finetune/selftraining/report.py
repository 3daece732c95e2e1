"""Report of a self-training, ``selftraining.html``, on teachers, pseudo-labels and students."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.overlays import class_key, overlay
from samgraft.finetune.pseudo_labels import ignored_share, ignored_slices
from samgraft.finetune.selftraining.parts import Round, Teacher
from samgraft.finetune.task import Task
from samgraft.finetune.training.report import next_commands
from samgraft.finetune.training.unlabelled import UnlabelledScans
from samgraft.shared.files import write_json, write_text
from samgraft.shared.report.page import (
    Picture,
    Section,
    Table,
    Text,
    curve_figure,
    image_grid,
    next_section,
    path_for_report,
    render_report,
)
from samgraft.shared.scans.intensity import normalise
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)

REPORT_FILE = "selftraining.html"
SUMMARY_FILE = "selftraining.json"
NUM_PICTURES = 6


def best_teacher(rounds: Sequence[Round]) -> Teacher:
    """Return the teacher of the first round that is best on validation."""
    return max(rounds[0].teachers, key=validation_dice)


def best_model(rounds: Sequence[Round]) -> Teacher:
    """Return the last student, or the best teacher if the student is not better on validation."""
    teacher, student = best_teacher(rounds), rounds[-1].student
    return student if validation_dice(student) > validation_dice(teacher) else teacher


def write_report(
    path: Path, rounds: Sequence[Round], scans: UnlabelledScans, *, log_images: bool, test_patients: Sequence[str]
) -> None:
    """Write ``selftraining.html`` and ``selftraining.json``.

    Args:
        path: Folder of the run.
        rounds: Rounds, all of them complete.
        scans: Scans with pseudo-labels.
        log_images: True if pictures of the scans may be shown.
        test_patients: Patients of the test part, which the next command scores.
    """
    dice = {part.name: validation_dice(part) for part in (*rounds[0].teachers, *(one.student for one in rounds))}
    teacher, student, best = best_teacher(rounds), rounds[-1].student, best_model(rounds)
    is_better = best is student
    text = (
        f"Foreground Dice on validation: {dice[student.name]:.3f} of the student, {dice[teacher.name]:.3f} of the best "
        f"teacher ({teacher.name.removeprefix('teacher ')})."
    )
    task, best_task = Task.read(student.path / "model"), Task.read(best.path / "model")
    if not is_better:
        text += " The student is not better. Use the teacher, or train the student longer."
    if task.warning:
        text += f" {task.warning}"
    is_good = is_better and not task.warning
    log.log(logging.INFO if is_good else logging.WARNING, "%s", text)
    stores = [SliceStore.open(one.pseudo_path) for one in rounds]
    histograms = [agreement_histogram(store) for store in stores]
    rows = [
        _describe_round(one, store, histogram) for one, store, histogram in zip(rounds, stores, histograms, strict=True)
    ]
    sections = [
        Section(title="Result", parts=[Text(kind="good" if is_good else "warning", text=text), _dice_table(dice)]),
        Section(title="Unlabelled scans", parts=[Text(text=scans.describe())]),
        Section(
            title="Pseudo-labels",
            parts=[
                Table(columns=list(rows[0]), rows=[list(row.values()) for row in rows], caption=CAPTION),
                _agreement_figure(rounds, histograms),
            ],
        ),
        Section(
            title="Accepted and ignored regions",
            parts=_pictures(scans, stores[-1], task.classes, log_images=log_images),
        ),
        *next_section(next_commands(path_for_report(best.path), test_patients, is_good=not best_task.warning)),
    ]
    write_text(path / REPORT_FILE, render_report(f"Self-training {path.name}", sections))
    write_json(
        path / SUMMARY_FILE,
        {"validation_dice": dice, "rounds": rows, "left_out": scans.left_out, "transductive": scans.transductive},
        sort_keys=False,
    )


CAPTION = (
    "The agreement of a voxel is the averaged probability of its class. That of a slice is the mean over the voxels "
    "that any teacher labels as a class. Ignored voxels and slices do not enter the loss."
)


def validation_dice(part: Teacher) -> float:
    """Return the foreground Dice of a finished run on the validation scans."""
    return float(Task.read(part.path / "model").validation["best"])


def agreement_histogram(store: SliceStore) -> npt.NDArray[np.float64]:
    """Return the share of voxels with an agreement of 0, 1, ..., 100 percent."""
    counts = np.zeros(101, dtype=np.int64)
    for record in store.series:
        counts += np.bincount(store.read_volume(record.series_id).ravel(), minlength=101)
    shares: npt.NDArray[np.float64] = counts / counts.sum()
    return shares


def _describe_round(one: Round, store: SliceStore, histogram: npt.NDArray[np.float64]) -> dict[str, Any]:
    num_slices = sum(record.shape_zyx[0] for record in store.series)
    dropped = sum(int(ignored_slices(record).sum()) for record in store.series)
    return {
        "round": one.number,
        "teachers": ", ".join(part.name.removeprefix("teacher ") for part in one.teachers),
        "patients": len(store.patient_ids),
        "scans": len(store.series),
        "slices": num_slices,
        "ignored slices": dropped,
        "ignored voxels (%)": round(100 * ignored_share(store), 2),
        "mean agreement": round(float(histogram @ np.arange(101)) / 100, 4),
    }


def _dice_table(dice: dict[str, float]) -> Table:
    return Table(
        columns=["model", "foreground Dice"],
        rows=[[name, value] for name, value in dice.items()],
        caption="Validation scans. Every model is the best of its own validation rounds, so only the test part "
        "estimates new patients.",
    )


def _agreement_figure(rounds: Sequence[Round], histograms: Sequence[npt.NDArray[np.float64]]) -> Picture:
    # Nearly all voxels are background on which all teachers agree, so the shares are cumulated from below.
    curves = {
        f"round {one.number}": (list(range(100)), (100 * np.cumsum(histogram))[:100].tolist())
        for one, histogram in zip(rounds, histograms, strict=True)
    }
    png = curve_figure(curves, ylabel="voxels below (%)", xlabel="agreement (%)", from_zero=True)
    return Picture(png=png, caption="Share of voxels whose agreement is at most the value on the abscissa.")


def _pictures(
    scans: UnlabelledScans, labels: SliceStore, classes: ClassTable, *, log_images: bool
) -> list[Text | Picture]:
    if not log_images:
        return [Text(text="Pictures of patients are written only with watch.log_images=true.")]
    parts: list[Text | Picture] = []
    # Evenly spaced scans in the order of the store, which does not depend on their content.
    records = labels.series[:: max(1, len(labels.series) // NUM_PICTURES)][:NUM_PICTURES]
    for record in records:
        table = record.planes[record.plane]
        # The slice with most labelled voxels shows most of what the student learns from.
        shown = [np.asarray(pixels) for label, pixels in table.label_pixels.items() if label != IGNORE_LABEL]
        index = int(np.sum(shown, axis=0).argmax()) if shown else record.shape_zyx[0] // 2
        image = normalise(scans.images.read_slice(record.series_id, index), record.stats, scans.images.intensity)
        label = labels.read_label_slice(record.series_id, index)
        percent = labels.read_slice(record.series_id, index)
        accepted = np.where(label == IGNORE_LABEL, 0, label)
        ignored = (label == IGNORE_LABEL).astype(np.int32)
        cells = [overlay(image), overlay(image, predicted_HW=accepted), overlay(image, predicted_HW=ignored)]
        parts.append(
            Picture(
                png=image_grid([[*cells, percent / 100.0]], column_titles=["slice", "label", "ignored", "agreement"]),
                caption=f"Scan {record.series_id}, slice {index}: pseudo-label, ignored voxels, and agreement.",
                key=class_key(classes),
            )
        )
    return parts
