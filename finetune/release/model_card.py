"""README.md of a release: a Hugging Face model card whose every number is read from files of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.finetune.evaluation.scores import METRIC_BY_KEY, class_names, interval_of, read_cases
from samgraft.finetune.evaluation.statistics import Interval
from samgraft.finetune.task import Task
from samgraft.shared.encoders.base import SAM_PIXEL_MEAN
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.release.card_page import (
    LIMITS,
    contents_section,
    front_matter,
    input_section,
    licence_section,
    statement_section,
    write_card_page,
)
from samgraft.shared.release.formats import Artefact
from samgraft.shared.release.licence import Licence
from samgraft.shared.weights.card import Card

SAM_IMAGE_SIZE = 1024
SAM_CLASSES = 3
"""segment_anything's registry builds three multimask tokens."""
SLICE_LIMIT = "Slices are segmented one by one: neighbouring slices may disagree."


SHOWN = ("dice", "nsd", "hd95_mm")
"""Columns of cases.csv that the card shows; all others are in the file."""


@dataclass(frozen=True, kw_only=True)
class TestScores:
    """What cases.csv of the test part says."""

    num_patients: int
    num_cases: int
    per_class: dict[str, dict[str, Interval | None]]
    """Class name to metric to its mean over patients."""
    mean: float | None
    """Dice over classes, scans, patients."""


def read_test_scores(path: Path) -> TestScores | None:
    """Read ``cases.csv`` of an evaluation; None if there is none.

    Raises:
        DataError: If it is not what ``evaluate`` writes.
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
    licence: Licence,
    scores: TestScores | None,
    artefacts: Sequence[Artefact],
    statement: str | None = None,
    postprocessing: str = "none",
) -> None:
    """Write ``README.md``."""
    sections = {
        "": _what(card, task),
        "Scores": _scores(task, scores),
        "Files": contents_section(artefacts),
        "Use": _use(card, task, {a.path for a in artefacts}),
        "Post-processing": f"Chosen on validation patients: {postprocessing}. `predict` and `evaluate` apply it.",
        "Input": input_section(
            card, image_size=task.image_size, intensity=task.intensity, keep_aspect=task.keep_aspect
        ),
        "Data": f"{statement_section(statement)}\n\n{_data(card, task)}",
        "Limits": "\n".join(f"- {limit}" for limit in (*LIMITS, SLICE_LIMIT)),
        "Licence": licence_section(licence),
    }
    front = front_matter(card, licence, pipeline="mask-generation", modality=task.modality, tags=["segmentation"])
    write_card_page(folder, front=front | _results(title, scores), title=title, sections=sections)


def _results(title: str, scores: TestScores | None) -> dict[str, Any]:
    if scores is None or scores.mean is None:
        return {}
    metric = {"type": "dice", "name": "Dice, mean over patients", "value": round(scores.mean, 4)}
    dataset = {"type": "custom", "name": f"test part ({scores.num_patients} patients, {scores.num_cases} scans)"}
    result = {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": [metric]}
    return {"model-index": [{"name": title, "results": [result]}]}


def _what(card: Card, task: Task) -> str:
    classes = ", ".join(f"{name} (label {i})" for i, name in zip(task.class_ids, task.class_names, strict=True))
    history = f" Its image encoder went through {card.objective} on unlabelled scans first." if card.objective else ""
    return (
        f"Segment Anything ({card.arch}, {task.image_size} px) fine-tuned to segment {classes} in {task.modality} "
        f"slices automatically, without prompts.{history} Base weights: {card.base_name or 'unknown'}, sha256 "
        f"`{card.base_sha256}`."
    )


def _scores(task: Task, scores: TestScores | None) -> str:
    titles = [METRIC_BY_KEY[metric].title for metric in SHOWN]
    lines = [f"| part | class | {' | '.join(titles)} |", "|---" * (2 + len(SHOWN)) + "|"]
    if scores:
        for name, intervals in scores.per_class.items():
            cells = [interval.render() if (interval := intervals[metric]) else "n/a" for metric in SHOWN]
            lines.append(f"| test | {name} | {' | '.join(cells)} |")
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


def _use(card: Card, task: Task, paths: set[str]) -> str:
    in_registry = arch_spec(card.arch, card.stem).registry_name is not None
    stock = in_registry and task.image_size == SAM_IMAGE_SIZE and len(task.class_ids) <= SAM_CLASSES
    builder = (
        "from segment_anything import sam_model_registry\n"
        f'sam = sam_model_registry["{card.arch}"](checkpoint="sam.pth")'
        if stock
        else "from samgraft.shared.weights.load import load_sam\n"
        f'sam = load_sam("sam.safetensors", image_size={task.image_size})'
    )
    output = (
        "the first mask (`multimask_output=False`), pixels with logit above 0"
        if len(task.class_ids) == 1
        else f"masks 1 to {len(task.class_ids)} (`multimask_output=True`) are the classes in order; background has "
        "logit 0, the largest logit wins"
    )
    if "base.safetensors" in paths:
        builder = (
            "from pathlib import Path\nfrom samgraft.finetune.model_folder import read_model\n"
            'sam = read_model(Path(".")).segmenter.sam  # base.safetensors with adapter/'
        )
    blocks = [f"```python\n{builder}\n```\n\nNo prompt; {output}."]
    if "transformers" in paths:
        blocks.append(
            '```python\nfrom transformers import SamModel\nmodel = SamModel.from_pretrained("transformers")\n```'
        )
    if "peft" in paths:
        blocks.append(
            "```python\nfrom peft import PeftModel\nfrom samgraft.shared.weights.load import load_sam\n"
            f'base = load_sam("peft/base.safetensors", image_size={task.image_size})  '
            "# or the base named in adapter_config.json\n"
            'model = PeftModel.from_pretrained(base, "peft")\n```'
        )
    if list(card.pixel_mean) != list(SAM_PIXEL_MEAN):
        blocks.append(
            "Pixel statistics are not SAM's: `load_sam` sets them from `card.json`; with other builders set "
            f"`sam.pixel_mean` to {card.pixel_mean} and `sam.pixel_std` to {card.pixel_std}."
        )
    return "\n\n".join(blocks)


def _data(card: Card, task: Task) -> str:
    counts = ", ".join(f"{part} {len(task.split.get(part, []))}" for part in ("train", "val", "test"))
    manifest = card.data_manifest.get("fingerprint", "unknown")
    text = f"Patients: {counts}. Store sha256 `{task.store_fingerprint}`, training manifest `{manifest}`."
    if task.transductive:
        text += " **Transductive**: validation or test patients were in the unlabelled pretraining set."
    return text
