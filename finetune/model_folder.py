"""The folder of a finished model: runs/NAME/model or a release, written whole and read strictly.

sam.safetensors   merged weights under segment_anything's names
card.json         what it is; task.json: what it segments
adapter/          the peft pair before merging (not with ``full``)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.task import Task
from samgraft.shared.errors import WeightsError
from samgraft.shared.models.card import Card
from samgraft.shared.models.safe_read import file_sha256
from samgraft.shared.models.weights import load_sam, save_tensors
from segment_anything.modeling import Sam

WEIGHTS_FILE = "sam.safetensors"
CARD_FILE = "card.json"


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """A fine-tuned model ready to segment."""

    segmenter: Segmenter
    card: Card
    task: Task
    folder: Path


def write_model(sam: Sam, folder: Path, *, card: Card, task: Task) -> Path:
    """Write merged weights, card and task; return the weights' path. Tasks come last: they mark a complete folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    save_tensors(sam.state_dict(), path)
    Card.from_dict({**card.to_dict(), "weights_sha256": file_sha256(path)}).write(folder / CARD_FILE)
    task.write(folder)
    return path


def read_model(path: Path) -> FinishedModel:
    """Read a finished run or a release.

    Raises:
        WeightsError: If the folder has no finished model, or its weights are not those of its card.
    """
    if not path.exists():
        raise WeightsError(
            "the run or release does not exist.", where=path.name, next_command="make finetune CKPT=runs/NAME"
        )
    folder = path / "model" if (path / "model").is_dir() else path
    task = Task.read(folder)
    if not (folder / CARD_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(f"a finished model must have {WEIGHTS_FILE} and {CARD_FILE}.", where=path.name)
    card = Card.read(folder / CARD_FILE)
    digest = file_sha256(folder / WEIGHTS_FILE)
    if card.weights_sha256 != digest:
        raise WeightsError(
            f"{WEIGHTS_FILE} must be the file its card describes, sha256 differs. It was changed or damaged.",
            where=path.name,
            kept="the run's training states",
        )
    sam = load_sam(folder / WEIGHTS_FILE, image_size=task.image_size)
    return FinishedModel(
        segmenter=Segmenter(sam, num_classes=task.classes.num_classes), card=card, task=task, folder=folder
    )
