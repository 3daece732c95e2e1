"""Folder of a finished model, which is runs/NAME/model or a release.

sam.safetensors   merged weights under segment_anything's names
base.safetensors  weights before tuning, instead, when the method cannot be merged: they need the adapter
card.json         origin of the weights
task.json         classes and input of the model
adapter/          peft's files before merging, not present when SAM's own tensors were trained
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import load_file
from samgraft.finetune.adapters import base_tensors, load_adapter
from samgraft.finetune.baselines.networks import build_network
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.task import TASK_FILE, Task
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import file_sha256, write_tensors
from samgraft.shared.runs.other_folder import refuse_other_folder
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import load_sam, read_weights
from torch import Tensor, nn

WEIGHTS_FILE = "sam.safetensors"
BASE_FILE = "base.safetensors"
NETWORK_FILE = "network.safetensors"
ADAPTER_FOLDER = "adapter"
PAIR_FILES = (BASE_FILE, f"{ADAPTER_FOLDER}/adapter_config.json", f"{ADAPTER_FOLDER}/adapter_model.safetensors")
CARD_FILE = "card.json"


@dataclass(frozen=True, kw_only=True)
class FinishedModel:
    """Fine-tuned model that is ready to segment."""

    segmenter: Segmenter
    card: Card
    task: Task
    folder: Path
    is_merged: bool = True
    """False for base weights with an adapter, which plain SAM weights cannot express."""

    @property
    def memory(self) -> dict[str, Tensor]:
        """Tensors of SAM 2's memory of videos, as they came with the initial weights."""
        return read_weights(self.folder / (WEIGHTS_FILE if self.is_merged else BASE_FILE)).memory


def write_model(
    sam: nn.Module,
    folder: Path,
    *,
    card: Card,
    task: Task,
    is_merged: bool = True,
    memory: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write weights, card and task, and return the path of the weights.

    Args:
        sam: Plain SAM or a baseline's network. With ``is_merged`` False a SAM with an adapter that is already in
            ``folder``.
        folder: Folder of the model.
        card: Origin of the weights.
        task: Classes and input of the model.
        is_merged: False writes the weights before tuning, which need the adapter.
        memory: Tensors of SAM 2's memory of videos, which are written beside the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (NETWORK_FILE if task.network else WEIGHTS_FILE if is_merged else BASE_FILE)
    tensors = sam.state_dict() if is_merged else base_tensors(sam)
    write_tensors(path, {**tensors, **memory})
    Card.from_dict({**card.to_dict(), "weights_sha256": weights_digest(folder)}).write(folder / CARD_FILE)
    # The task is written last, because it marks a complete folder.
    task.write(folder)
    return path


def read_task(path: Path) -> Task:
    """Read the task of a finished run or a release, without its weights.

    Raises:
        WeightsError: If the folder has no finished model.
    """
    folder = _model_folder(path)
    if not (folder / TASK_FILE).is_file():
        raise refuse_other_folder(path, expected="a finished run of stage 2, or a release of one")
    return Task.read(folder)


def _model_folder(path: Path) -> Path:
    # A run has its model in a sub-folder, a release is the folder itself.
    return path / "model" if (path / "model").is_dir() else path


def read_model(path: Path) -> FinishedModel:
    """Read a finished run or a release.

    Raises:
        WeightsError: If the folder has no finished model, or its weights do not match its card.
    """
    task, folder = read_task(path), _model_folder(path)
    if task.network:
        return _read_baseline(folder, task)
    is_merged = (folder / WEIGHTS_FILE).is_file()
    if not (folder / CARD_FILE).is_file() or not (is_merged or (folder / BASE_FILE).is_file()):
        raise WeightsError(
            f"{WEIGHTS_FILE} or {CARD_FILE} of the finished model is missing. Restore it or train again.",
            where=path.name,
        )
    card = Card.read(folder / CARD_FILE)
    name = WEIGHTS_FILE if is_merged else f"{BASE_FILE} with its adapter"
    if card.weights_sha256 != weights_digest(folder):
        raise WeightsError(
            f"{name} does not match its card: its sha256 differs, so it was changed or damaged. Restore it "
            "or train again.",
            where=path.name,
            kept="the run's training states",
        )
    sam = load_sam(folder / (WEIGHTS_FILE if is_merged else BASE_FILE), image_size=task.image_size)
    if not is_merged:
        load_adapter(sam, folder / ADAPTER_FOLDER)
    return FinishedModel(
        segmenter=Segmenter(sam, num_classes=task.classes.num_classes).eval(),
        card=card,
        task=task,
        folder=folder,
        is_merged=is_merged,
    )


def _read_baseline(folder: Path, task: Task) -> FinishedModel:
    path = folder / NETWORK_FILE
    if not path.is_file() or not (folder / CARD_FILE).is_file():
        raise WeightsError(
            f"{NETWORK_FILE} or {CARD_FILE} of the finished baseline is missing. Restore it or train again.",
            where=folder.parent.name,
        )
    card = Card.read(folder / CARD_FILE)
    if card.weights_sha256 != weights_digest(folder):
        raise WeightsError(
            f"{NETWORK_FILE} does not match its card: its sha256 differs, so it was changed or damaged. Restore it or "
            "train again.",
            where=folder.parent.name,
            kept="the run's training states",
        )
    segmenter = build_network(task.network)
    try:
        segmenter.net.load_state_dict(load_file(path), strict=True)
    except RuntimeError as err:
        raise WeightsError(f"{NETWORK_FILE} does not fit the network of task.json.", where=folder.parent.name) from err
    return FinishedModel(segmenter=segmenter.eval(), card=card, task=task, folder=folder)


def weights_digest(folder: Path) -> str:
    """Return the sha256 of the merged weights, or of base weights and adapter together."""
    for single in (WEIGHTS_FILE, NETWORK_FILE):
        if (folder / single).is_file():
            return file_sha256(folder / single)
    # Base weights and adapter have one digest, so that replacing either of them is found.
    if missing := [name for name in PAIR_FILES if not (folder / name).is_file()]:
        raise WeightsError(
            f"a finished model must have {WEIGHTS_FILE}, or all of {', '.join(PAIR_FILES)}; {missing[0]} is missing.",
            where=folder.name,
        )
    return hashlib.sha256(" ".join(file_sha256(folder / name) for name in PAIR_FILES).encode()).hexdigest()
