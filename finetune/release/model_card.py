"""The model card of a fine-tuned model, the README.md of its release.

Every number is read from files of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.finetune.evaluation.scores import METRIC_BY_KEY, class_names, interval_of, read_cases
from samgraft.finetune.evaluation.statistics import Interval
from samgraft.finetune.model_folder import BASE_FILE
from samgraft.finetune.task import Task
from samgraft.shared.counting import counted
from samgraft.shared.encoders.base import SAM_PIXEL_MEAN
from samgraft.shared.release.card_page import (
    LIMITS,
    contents_section,
    front_matter,
    input_section,
    licence_section,
    statement_section,
    table_cell,
    transformers_lines,
    write_card_page,
)
from samgraft.shared.release.formats import SAM2_FILE, Artefact
from samgraft.shared.release.licence import Licence
from samgraft.shared.release.sam2_client import sam2_build, why_not_sam2
from samgraft.shared.release.subject import Subject
from samgraft.shared.weights.card import Card

SLICE_LIMIT = "Slices are segmented one by one, so the masks of neighbouring slices may differ."
MEMORY_LIMIT = "SAM 2's memory of videos was not trained and does not take part: no mask is propagated between slices."
SHOWN = ("dice", "nsd", "hd95_mm")
"""Columns of cases.csv that the card shows."""


@dataclass(frozen=True, kw_only=True)
class TestScores:
    """Scores of the test part, from its cases.csv."""

    num_patients: int
    num_cases: int
    per_class: dict[str, dict[str, Interval | None]]
    """Mean over patients of each metric, by class name and then by metric."""
    mean: float | None
    """Dice, averaged over classes, scans and patients."""


def read_test_scores(path: Path) -> TestScores | None:
    """Read ``cases.csv`` of an evaluation, or return None if the file does not exist.

    Raises:
        DataError: If the file was not written by ``evaluate``.
    """
    if not path.is_file():
        return None
    rows = read_cases(path)
    overall = interval_of(rows, "dice")
    return TestScores(
        num_patients=len({row["patient_id"] for row in rows}),
        num_cases=len({row["series_id"] for row in rows}),
        per_class={
            name: {metric: interval_of(rows, metric, class_name=name) for metric in SHOWN} for name in class_names(rows)
        },
        mean=overall.mean if overall else None,
    )


def write_model_card(
    folder: Path,
    *,
    title: str,
    card: Card,
    task: Task,
    subject: Subject,
    licence: Licence,
    scores: TestScores | None,
    artefacts: Sequence[Artefact],
    statement: str | None = None,
    postprocessing: str = "none",
) -> None:
    """Write ``README.md`` after the weights, which decide what it describes.

    Args:
        folder: Release folder with its weights.
        title: Name of the release.
        card: Card of the released weights.
        task: Classes, input and split of the model.
        subject: Released weights.
        licence: Terms.
        scores: Scores of the test part, None if it was not evaluated.
        artefacts: Files and folders with weights.
        statement: Sentence of the releaser on the scans.
        postprocessing: Description of the post-processing.
    """
    sections = {
        "": _summary(card, task),
        "Scores": _scores(task, scores),
        "Files": contents_section(artefacts, in_registry=subject.why_not_stock is None),
        "Use": _use(folder, card, task, subject, {a.path for a in artefacts}),
        "Post-processing": f"Chosen on validation patients: {postprocessing}. `predict` and `evaluate` apply it.",
        "Input": input_section(
            card, image_size=task.image_size, intensity=task.intensity, keep_aspect=task.keep_aspect
        ),
        "Data": f"{statement_section(statement)}\n\n{_data(card, task)}",
        "Limits": "\n".join(
            f"- {limit}" for limit in (*LIMITS, SLICE_LIMIT, *([MEMORY_LIMIT] if subject.memory else []))
        ),
        "Licence": licence_section(licence),
    }
    front = front_matter(card, licence, pipeline="mask-generation", modality=task.modality, tags=["segmentation"])
    write_card_page(folder, front=front | _results(title, scores), title=title, sections=sections)


def _results(title: str, scores: TestScores | None) -> dict[str, Any]:
    if scores is None or scores.mean is None:
        return {}
    metric = {"type": "dice", "name": "Dice, mean over patients", "value": round(scores.mean, 4)}
    dataset = {
        "type": "custom",
        "name": f"test part ({counted(scores.num_patients, 'patient')}, {counted(scores.num_cases, 'scan')})",
    }
    result = {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": [metric]}
    return {"model-index": [{"name": title, "results": [result]}]}


def _summary(card: Card, task: Task) -> str:
    classes = ", ".join(f"{name} (label {i})" for i, name in zip(task.class_ids, task.class_names, strict=True))
    history = f" Its image encoder went through {card.objective} on unlabelled scans first." if card.objective else ""
    warning = f"**Warning.** {task.warning}\n\n" if task.warning else ""
    return (
        f"{warning}Segment Anything ({card.arch}, {task.image_size} px) fine-tuned to segment {classes} in "
        f"{task.modality} slices automatically, without prompts.{history} Base weights: "
        f"{card.base_name or 'unknown'}, sha256 `{card.base_sha256}`."
    )


def _scores(task: Task, scores: TestScores | None) -> str:
    titles = [METRIC_BY_KEY[metric].title for metric in SHOWN]
    lines = [f"| part | class | {' | '.join(titles)} |", "|---" * (2 + len(SHOWN)) + "|"]
    if scores:
        for name, intervals in scores.per_class.items():
            cells = [interval.render() if (interval := intervals[metric]) else "n/a" for metric in SHOWN]
            lines.append(f"| test | {table_cell(name)} | {' | '.join(cells)} |")
    else:
        lines.append("| test | - | not evaluated |" + " |" * (len(SHOWN) - 1))
    validation = task.validation
    for key, name in (("zero_shot", "base weights, no prompt"), ("start", "before training"), ("best", "this model")):
        value = validation.get(key)
        text = "n/a" if value is None else f"{value:.3f}"
        lines.append(f"| validation | all, {name} | {text} |" + " |" * (len(SHOWN) - 1))
    return "\n".join(lines) + (
        "\n\nVolumes on the scans' own grids; means over patients with 95 % bootstrap intervals. The model was chosen "
        "on the validation part: only the test part estimates new patients."
    )


def _use(folder: Path, card: Card, task: Task, subject: Subject, paths: set[str]) -> str:
    """Return the lines of Python that load each format, which a test executes."""
    output = (
        "the first mask (`multimask_output=False`), pixels with logit above 0"
        if len(task.class_ids) == 1
        else f"masks 1 to {len(task.class_ids)} (`multimask_output=True`) are the classes in order; background has "
        "logit 0, the largest logit wins"
    )
    blocks = [f"{_sam_lines(task, subject, paths)}\n\nNo prompt; {output}."]
    if "transformers" in paths:
        blocks.append(transformers_lines(folder, variable="model"))
    if "peft" in paths:
        blocks.append(_peft_lines(folder / "peft", task))
    if list(card.pixel_mean) != list(SAM_PIXEL_MEAN):
        blocks.append(
            "Pixel statistics are not SAM's: `load_sam` sets them from `card.json`; with other builders set "
            f"`sam.pixel_mean` to {card.pixel_mean} and `sam.pixel_std` to {card.pixel_std}."
        )
    return "\n\n".join(blocks)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _sam_lines(task: Task, subject: Subject, paths: set[str]) -> str:
    if BASE_FILE in paths:
        return _python(
            "from samgraft.finetune.model_folder import read_model",
            f'sam = read_model(".").segmenter.sam  # {BASE_FILE} with adapter/',
        )
    if SAM2_FILE in paths:
        return _sam2_lines(task, subject)
    reason = subject.why_not_stock
    if reason is None:
        return _python(
            "from segment_anything import sam_model_registry",
            f'sam = sam_model_registry["{subject.spec.registry_name}"](checkpoint="sam.pth")',
        )
    lines = _python(
        "from samgraft.shared.weights.load import load_sam", f'sam = load_sam("sam.pth", image_size={task.image_size})'
    )
    return f"{lines}\n\nsegment_anything's `sam_model_registry` does not load `sam.pth`, because {reason}."


def _sam2_lines(task: Task, subject: Subject) -> str:
    ours = _python(
        "from samgraft.shared.weights.load import load_sam",
        f'sam = load_sam("sam.safetensors", image_size={task.image_size})',
    )
    if (reason := why_not_sam2(subject)) is not None:
        return f"{ours}\n\nThe package `sam2` does not load `{SAM2_FILE}`, because {reason}."
    build = sam2_build(subject)
    theirs = _python(
        "from sam2.build_sam import build_sam2",
        "from sam2.sam2_image_predictor import SAM2ImagePredictor",
        f"overrides = {list(build.overrides)}",
        "model = build_sam2(",
        f'    "{build.config}", "{SAM2_FILE}", device="cpu", hydra_overrides_extra=overrides,',
        "    apply_postprocessing=False,",
        ")",
        "predictor = SAM2ImagePredictor(model)",
        f"predictor._bb_feat_sizes = {list(build.feature_sizes)}",
    )
    return (
        f"{ours}\n\nor with the package `sam2`. `apply_postprocessing=True` would exchange unstable masks for those of "
        f"other mask tokens.\n\n{theirs}"
    )


def _peft_lines(folder: Path, task: Task) -> str:
    # Published base weights are not copied into the release. The adapter's configuration then names them.
    base = str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    path = f"peft/{base}" if (folder / base).is_file() else f"PATH_OF_{base}"
    return _python(
        "from peft import PeftModel",
        "from samgraft.shared.weights.load import load_sam",
        f'base = load_sam("{path}", image_size={task.image_size})',
        'model = PeftModel.from_pretrained(base, "peft")',
    )


def _data(card: Card, task: Task) -> str:
    counts = ", ".join(f"{part} {len(task.split.get(part, []))}" for part in ("train", "val", "test"))
    manifest = card.data_manifest.get("fingerprint", "unknown")
    text = f"Patients: {counts}. Store sha256 `{task.store_fingerprint}`, training manifest `{manifest}`."
    if task.transductive:
        text += " **Transductive**: validation or test patients were among the unlabelled training scans."
    return text
