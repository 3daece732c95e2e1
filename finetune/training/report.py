"""Report of a fine-tuning, ``report.html``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samgraft.finetune.adapters import TensorGroup
from samgraft.finetune.baselines.networks import as_baseline
from samgraft.finetune.baselines.volume_patches import VolumePatches
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.evaluation.overlays import (
    TRUTH_AND_PREDICTION,
    choose_slices,
    class_key,
    overlay,
    slice_pictures,
)
from samgraft.finetune.evaluation.validation import CaseResult, select_example_cases
from samgraft.finetune.inference import segment_volume
from samgraft.finetune.initial_weights import InitialWeights
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.training.preparation import Prepared, describe_data
from samgraft.finetune.training.rounds import Record
from samgraft.shared.files import write_text
from samgraft.shared.report.page import (
    KeyValues,
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
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.training.progress import format_rate

MAX_PICTURED_SCANS = 12
FEW_EPOCHS = 5
"""Number of times that each training slice must be seen before no longer training is suggested."""
NO_TEST_PART = (
    "The split has no test patients. The model was chosen on the validation patients, so their scores are better than "
    "those of new patients."
)


def write_report(
    run: RunFolder,
    config: FinetuneConfig,
    prepared: Prepared,
    record: Record,
    results: Sequence[CaseResult],
    *,
    trainable: Sequence[tuple[str, int, int]],
    groups: Sequence[TensorGroup],
    slices_per_s: float,
) -> None:
    """Write the report. ``prepared.segmenter`` must be the finished model."""
    sections = [
        Section(title="Result", parts=_result(record, prepared, short_training(config, prepared))),
        Section(title="Segmentations", parts=_pictures(config, prepared, results)),
        Section(title="Scores", parts=[_comparison(prepared, record), _cases(results)]),
        Section(title="Training", parts=_curves(run, record)),
        Section(title="What was trained", parts=_trained(trainable, groups, _facts(config, prepared))),
        Section(title="Data", parts=[Text(text="\n\n".join(describe_data(prepared)))]),
        *next_section(next_commands(path_for_report(run.path), prepared.split.test, is_good=record.ending.is_good)),
    ]
    subtitle = f"stage 2, {prepared.store.modality.value}, {format_rate(slices_per_s)} slices/s in training"
    write_text(run.report, render_report(f"Fine-tuning {run.path.name}", sections, subtitle=subtitle))


def short_training(config: FinetuneConfig, prepared: Prepared) -> str | None:
    """Return a sentence if each training slice was seen a few times only, or None."""
    num_seen, num_slices = config.trainer.max_steps * config.data.batch_size, len(prepared.dataset)
    # The slices of a self-training are many, and every patch of a scan is another one, so that epochs say little there.
    is_counted = prepared.further is None and not isinstance(prepared.dataset, VolumePatches)
    if not is_counted or num_seen >= FEW_EPOCHS * num_slices:
        return None
    steps = -(-10 * num_slices // config.data.batch_size)
    return (
        f"Each training slice was seen {num_seen / num_slices:.1f} times. Longer training is likely to give a better "
        f"model: ARGS='trainer.max_steps={steps}' with another NAME= shows each slice 10 times."
    )


def _result(record: Record, prepared: Prepared, short: str | None) -> list[Text]:
    notes = [] if prepared.split.test else [Text(kind="warning", text=NO_TEST_PART)]
    ending = Text(kind="good" if record.ending.is_good else "warning", text=record.ending.text)
    return [ending, *([Text(text=short)] if short else []), *notes]


def _comparison(prepared: Prepared, record: Record) -> Table:
    encoder, base = prepared.initial.encoder.name, prepared.initial.base.name
    best = record.best_step
    assert best is not None
    rows: list[list[Any]] = [
        ["zero-shot", f"{base}, no prompt, untrained", record.zero_shot],
        ["start", f"encoder {encoder}, decoder {base}, before the first step", record.start],
        ["best", f"this model, step {best}", record.rounds[best]],
    ]
    return Table(
        columns=["model", "what it is", "foreground Dice"],
        rows=rows,
        caption="Validation scans, as whole volumes on their own grid. Mean over classes per scan, over scans per "
        "patient, and over patients. The model was chosen on these scans, so only the test part estimates "
        "new patients.",
    )


def _cases(results: Sequence[CaseResult]) -> Table:
    rows = [
        [result.patient_id, result.series_id, s.class_name, s.dice, s.true_voxels, s.predicted_voxels]
        for result in sorted(results, key=lambda r: r.dice if r.dice is not None else 2.0)
        for s in result.scores
    ]
    columns = ["patient", "scan", "class", "Dice", "true voxels", "predicted voxels"]
    return Table(
        columns=columns,
        rows=rows,
        caption="Validation scans, worst first. n/a means that neither truth nor prediction has the class.",
    )


def _pictures(config: FinetuneConfig, prepared: Prepared, results: Sequence[CaseResult]) -> list[Text | Picture]:
    if not config.watch.log_images:
        return [Text(text="Pictures of patients are written only with watch.log_images=true.")]
    # Models are built again from their files: the finished one has replaced them in memory.
    models: dict[str, Segmenter] = {}
    # A prompted model is shown alone, because the other models find nothing without prompts.
    if isinstance(prepared.initial, InitialWeights) and not config.prompt.is_prompted:
        models["zero-shot"] = Segmenter(prepared.initial.build_base(), num_classes=prepared.segmenter.num_classes)
        if prepared.initial.is_continued:
            models["start"] = Segmenter(prepared.initial.build()[0], num_classes=prepared.segmenter.num_classes)
    parts: list[Text | Picture] = []
    told = select_example_cases(results)
    for result in [result for result in results if result.series_id in told][:MAX_PICTURED_SCANS]:
        rows, indexes = _rows(prepared, result, models, number=config.watch.num_overlays)
        parts.append(
            Picture(
                png=image_grid(rows, column_titles=["slice", "this model", *models], cell_in=2.0),
                caption=f"Scan {result.series_id} ({', '.join(told[result.series_id])}), slices "
                f"{', '.join(map(str, indexes))}. {TRUTH_AND_PREDICTION}",
                key=class_key(prepared.classes),
            )
        )
    return parts


def _rows(
    prepared: Prepared, result: CaseResult, models: dict[str, Segmenter], *, number: int
) -> tuple[list[list[Any]], list[int]]:
    store, series_id = prepared.store, result.series_id
    indexes = choose_slices(store.read_label_volume(series_id), number=number)
    pictures = slice_pictures(store, series_id, indexes, intensity=prepared.inference.intensity)
    volume_ZHW, stats = store.read_volume(series_id), store.record(series_id).stats
    predictions = [
        segment_volume(model, volume_ZHW, stats, prepared.classes, prepared.inference, only=indexes)
        for model in models.values()
    ]
    # The finished model comes first, because it must be seen on a narrow screen too.
    predictions.insert(0, result.predicted[indexes])
    rows = [
        [overlay(image), *(overlay(image, true_HW=label, predicted_HW=p[row]) for p in predictions)]
        for row, (image, label) in enumerate(pictures)
    ]
    return rows, indexes


def _curves(run: RunFolder, record: Record) -> list[Picture]:
    lines = [line for line in run.metrics.read() if "train/loss" in line]
    steps = [float(line["step"]) for line in lines]
    loss = curve_figure({"loss": (steps, [line["train/loss"] for line in lines])}, ylabel="Dice + CE loss", smooth=9)
    rounds = sorted(record.rounds)
    # The value before training is the first point, so that a run with one round has a curve too.
    start = [] if record.start is None else [(0.0, record.start)]
    points = [*start, *((float(step), record.rounds[step]) for step in rounds)]
    dice = curve_figure(
        {"validation": ([step for step, _ in points], [value for _, value in points])},
        ylabel="foreground Dice",
        baseline=("before training", record.start or 0.0),
    )
    return [
        Picture(png=loss, caption="Training loss per step."),
        Picture(png=dice, caption="Foreground Dice on validation per round."),
    ]


def _trained(
    trainable: Sequence[tuple[str, int, int]], groups: Sequence[TensorGroup], facts: Mapping[str, Any]
) -> list[Table | KeyValues]:
    rows = [[part, t / 1e6, total / 1e6, f"{100 * t / total:.1f} %"] for part, t, total in trainable]
    kinds = [[group.name, group.tensors, group.parameters, f"{100 * group.share:.1f} %"] for group in groups]
    return [
        Table(columns=["part", "trainable (M)", "all (M)", "share"], rows=rows),
        KeyValues(items=facts),
        Table(
            columns=["trained tensors", "number", "parameters", "share"],
            rows=kinds,
            caption="The * replaces the numbers in which names of one kind differ.",
            summary="All trained tensors",
        ),
    ]


def _facts(config: FinetuneConfig, prepared: Prepared) -> dict[str, Any]:
    baseline = as_baseline(config.model.arch)
    facts = {
        # A baseline has no adapter, whatever the settings of adapters say.
        "method": f"{baseline.value}, all weights" if baseline else config.adapter.describe(),
        "steps": f"{config.trainer.max_steps} of {config.trainer.accumulate * config.data.batch_size} slices",
        "image size": f"{prepared.segmenter.image_size} px",
        "intensity": prepared.inference.intensity.name,
        "encoder sha256": prepared.initial.encoder.sha256,
        "base sha256": prepared.initial.base.sha256,
        "tensors": "; ".join(f"{r.part} {r.num_loaded}/{r.num_requested} from {r.source}" for r in prepared.reports),
        "pretraining leak": "allowed by the user (transductive)" if prepared.transductive else "none found",
    }
    # Networks from random weights have read no tensors.
    return {name: value for name, value in facts.items() if value != ""}


def next_commands(run_path: str, test_patients: Sequence[str], *, is_good: bool) -> list[str]:
    """Return the commands that evaluate and release a finished run.

    Args:
        run_path: Path of the run as the user types it.
        test_patients: Patients of the test part. Without any, the validation part is evaluated.
        is_good: False for a model that segments hardly anything or did not improve, whose release would be refused.
    """
    part = "test" if test_patients else "val"
    evaluate = f"make evaluate RUN={shlex.quote(run_path)} SPLIT={part}"
    return [evaluate, release_command(run_path)] if is_good else [evaluate]


def release_command(run_path: str) -> str:
    """Return the command that releases a run."""
    path, out = shlex.quote(run_path), shlex.quote(f"releases/{Path(run_path).name}")
    return f"make release RUN={path} OUT={out} LICENSE=..."
