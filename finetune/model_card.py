"""README.md of a release: a Hugging Face model card whose every number is read from files of the run."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from samgraft.finetune.metrics import mean_or_none
from samgraft.finetune.statistics import bootstrap_mean
from samgraft.finetune.task import Task
from samgraft.shared.errors import DataError
from samgraft.shared.models.card import Card

LIMITS = (
    "Research software: not a medical device, not for diagnosis or treatment decisions.",
    "Slices are segmented one by one: neighbouring slices may disagree.",
    "Scans of another sequence, scanner, site or population than the training data may be segmented badly without "
    "any sign of it.",
)


@dataclass(frozen=True, kw_only=True)
class TestScores:
    """What cases.csv of the test part says."""

    num_patients: int
    num_cases: int
    per_class: dict[str, str]
    """Class name to a rendered mean with interval."""
    mean: float | None


def read_test_scores(path: Path) -> TestScores | None:
    """Read ``cases.csv`` of an evaluation; None if there is none.

    Raises:
        DataError: If it is not what ``evaluate`` writes.
    """
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        by_class: dict[str, dict[str, list[float | None]]] = {}
        for row in rows:
            value = None if row["dice"] == "n/a" else float(row["dice"])
            by_class.setdefault(row["class"], {}).setdefault(row["patient_id"], []).append(value)
        num_cases = len({row["series_id"] for row in rows})
    except (KeyError, ValueError) as err:
        raise DataError(f"cases.csv must be as `evaluate` writes it ({type(err).__name__}).", where=path.name) from err
    per_class, means = {}, []
    for name, patients in by_class.items():
        values = [v for v in (mean_or_none(scores) for scores in patients.values()) if v is not None]
        interval = bootstrap_mean(values)
        per_class[name] = interval.render() if interval else "n/a (no test case has it)"
        means.append(interval.mean if interval else None)
    num_patients = len({row["patient_id"] for row in rows})
    return TestScores(num_patients=num_patients, num_cases=num_cases, per_class=per_class, mean=mean_or_none(means))


def write_model_card(
    folder: Path, *, title: str, card: Card, task: Task, licence: str, scores: TestScores | None
) -> None:
    """Write ``README.md``."""
    front = yaml.safe_dump(_front_matter(title, card, task, licence, scores), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(
        [
            f"# {title}",
            _what(card, task),
            "## Scores\n\n" + _scores(task, scores),
            "## Use\n\n" + _use(card, task),
            "## Input\n\n" + _input(card, task),
            "## Data\n\n" + _data(card, task),
            "## Limits\n\n" + "\n".join(f"- {limit}" for limit in LIMITS),
            f"## Licence\n\n{licence}, as stated by whoever made this release. The licence of the base weights applies "
            "too.",
        ]
    )
    (folder / "README.md").write_text(f"---\n{front}---\n\n{body}\n", encoding="utf-8")


def _front_matter(title: str, card: Card, task: Task, licence: str, scores: TestScores | None) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": licence,
        "library_name": "samgraft",
        "pipeline_tag": "mask-generation",
        "tags": ["medical-imaging", "segmentation", "segment-anything", card.arch, task.modality],
    }
    if scores and scores.mean is not None:
        metric = {"type": "dice", "name": "Dice, mean over patients", "value": round(scores.mean, 4)}
        dataset = {"type": "custom", "name": f"test part ({scores.num_patients} patients, {scores.num_cases} scans)"}
        result = {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": [metric]}
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _what(card: Card, task: Task) -> str:
    classes = ", ".join(f"{name} (label {i})" for i, name in zip(task.class_ids, task.class_names, strict=True))
    history = f" Its image encoder went through {card.objective} on unlabelled scans first." if card.objective else ""
    return (
        f"Segment Anything ({card.arch}, {task.image_size} px) fine-tuned to segment {classes} in {task.modality} "
        f"slices automatically, without prompts.{history} Base weights: {card.base_name or 'unknown'}, sha256 "
        f"`{card.base_sha256}`."
    )


def _scores(task: Task, scores: TestScores | None) -> str:
    validation = task.validation
    lines = ["| part | class | Dice |", "|---|---|---|"]
    if scores:
        lines += [f"| test | {name} | {text} |" for name, text in scores.per_class.items()]
    else:
        lines.append("| test | - | not evaluated |")
    for key, name in (("zero_shot", "base weights, no prompt"), ("start", "before training"), ("best", "this model")):
        value = validation.get(key)
        text = "n/a" if value is None else f"{value:.3f}"
        lines.append(f"| validation | all, {name} | {text} |")
    return "\n".join(lines) + (
        "\n\nVolumes on the scans' own grids; means over patients with 95 % bootstrap intervals. The model was chosen "
        "on the validation part: only the test part estimates new patients."
    )


def _use(card: Card, task: Task) -> str:
    stock = card.arch != "vit_t"
    builder = (
        "from segment_anything import sam_model_registry\n"
        f'sam = sam_model_registry["{card.arch}"](checkpoint="sam.pth")'
        if stock and task.image_size == 1024
        else "from samgraft.shared.models.weights import load_sam\n"
        f'sam = load_sam("sam.safetensors", image_size={task.image_size})'
    )
    output = (
        "the first mask (`multimask_output=False`), pixels with logit above 0"
        if len(task.class_ids) == 1
        else f"masks 1 to {len(task.class_ids)} (`multimask_output=True`) are the classes in order; background has "
        "logit 0, the largest logit wins"
    )
    return f"```python\n{builder}\n```\n\nNo prompt; {output}."


def _input(card: Card, task: Task) -> str:
    preset = ", ".join(f"{key} {value}" for key, value in sorted(task.intensity.items()))
    fit = "aspect kept, padded right and bottom" if task.keep_aspect else "resized to the square"
    return (
        f"One slice, {fit}, {task.image_size} px; intensity to [0, 1] per volume by this preset: {preset}. Then three "
        f"equal channels times 255, minus {card.pixel_mean}, over {card.pixel_std}."
    )


def _data(card: Card, task: Task) -> str:
    counts = ", ".join(f"{part} {len(task.split.get(part, []))}" for part in ("train", "val", "test"))
    manifest = card.data_manifest.get("fingerprint", "unknown")
    text = f"Patients: {counts}. Store sha256 `{task.store_fingerprint}`, training manifest `{manifest}`."
    if task.transductive:
        text += " **Transductive**: validation or test patients were in the unlabelled pretraining set."
    return text
