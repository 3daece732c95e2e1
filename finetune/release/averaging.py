"""Average of the weights of several fine-tuned models, which is one model of the same size.

Runs from the same initial weights, for example with other seeds, folds or learning rates, often lie in one basin of the
loss. Their average is then as good as their ensemble and costs one model at prediction.

Source:
    Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from samgraft.finetune.evaluation.validation import labelled_series, mean_dice, score_scans
from samgraft.finetune.model_folder import FinishedModel, read_model, read_task, write_model
from samgraft.finetune.task import Task
from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.samples.leaks import join_manifests
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.weights.card import Card
from torch import Tensor

log = logging.getLogger(__name__)

EQUAL_IN_TASKS = (
    *("class_ids", "class_names", "class_members", "modality", "image_size", "keep_aspect", "intensity"),
    *("num_neighbours", "planes", "prompt"),
)
EQUAL_IN_CARDS = ("arch", "stem", "base_sha256")


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """Averaged model and its validation."""

    path: Path
    """Folder to evaluate, predict with and release."""
    dice: float | None
    """Foreground Dice on the common validation scans, None if they could not be scored."""
    member_dice: dict[str, float]
    """The same of every member."""


def average_models(runs: Sequence[Path], out: Path, *, store: SliceStore | None, device: DeviceChoice) -> AverageResult:
    """Average the weights of fine-tuned models, score the result and its members, and write it.

    Args:
        runs: Two or more runs or releases of one method of preparing slices, from the same initial weights.
        out: Folder to write, which must not exist.
        store: Labelled store to score on. None scores nothing.
        device: Device of the scoring.

    Raises:
        UsageError: If the models are of different tasks or initial weights.
        StorageError: If ``out`` exists.
        WeightsError: If a folder has no finished model.
    """
    if out.exists():
        raise StorageError("the folder exists. Choose another --out.", where=out.name)
    if len({path.resolve() for path in runs}) < 2:
        raise UsageError(f"average needs two or more different runs or releases, got {len(runs)}.")
    first = read_model(runs[0])
    # The tasks are read before any weights of the others, so that a wrong choice is reported at once.
    split = common_split([_checked_task(path, first, runs[0].name) for path in runs])
    series = labelled_series(store, split["val"]) if store is not None else []
    total: dict[str, Tensor] = {}
    cards: list[Card] = []
    member_dice: dict[str, float] = {}
    for path in runs:
        # One model at a time, so that ten large models need the memory of two.
        model = first if path is runs[0] else read_model(path)
        _check_model(model, first, where=path.name)
        _add(total, model.segmenter.sam.state_dict(), where=path.name)
        cards.append(model.card)
        if (score := _dice(model, store, series, device)) is not None:
            member_dice[str(path)] = score
    _set_mean(first, total, num=len(runs))
    dice = _dice(first, store, series, device)
    validation = {**first.task.validation, "best": dice}
    task = dataclasses.replace(first.task, split=split, validation=validation if dice is not None else {})
    write_model(first.segmenter.sam.cpu(), out / "model", card=joined_card(cards), task=task, memory=first.memory)
    return AverageResult(path=out, dice=dice, member_dice=member_dice)


def common_split(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Return the patients of the average. A patient that any member trained on is a training patient.

    Folds validate on the training patients of other folds, so that little or nothing may be left for validation.
    """
    parts = {part: [set(task.split.get(part, ())) for task in tasks] for part in ("train", "val", "test")}
    train = set().union(*parts["train"])
    val = set().union(*parts["val"]) - train
    # Patients on which a member was chosen are not test patients of the average either.
    test = set().union(*parts["test"]) - train - val
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def joined_card(cards: Sequence[Card]) -> Card:
    """Return the card of the average, with the training data of all members."""
    members = ", ".join(str(card.weights_sha256)[:12] for card in cards)
    # Sentences on the ending of one member would be wrong for the average.
    kept = [note for note in cards[0].notes if all(note in card.notes for card in cards)]
    return dataclasses.replace(
        cards[0],
        steps=sum(card.steps for card in cards),
        slices_seen=sum(card.slices_seen for card in cards),
        data_manifest=join_manifests([card.data_manifest for card in cards]),
        notes=[*kept, f"mean of the weights of {len(cards)} models (sha256 {members})"],
        weights_sha256=None,
    )


def _checked_task(path: Path, first: FinishedModel, name: str) -> Task:
    task = read_task(path)
    if task.network:
        raise UsageError(
            f"{task.network['name']} starts from random weights, and the mean of networks from different random "
            "weights is no network of use. Leave it out.",
            where=path.name,
        )
    odd = [key for key in EQUAL_IN_TASKS if getattr(task, key) != getattr(first.task, key)]
    _refuse_differences(odd, where=path.name, first=name)
    return task


def _check_model(model: FinishedModel, first: FinishedModel, *, where: str) -> None:
    if not model.is_merged:
        raise UsageError(
            "the method of this model cannot be merged into the weights, so that they have no mean. Leave it out.",
            where=where,
        )
    odd = [key for key in EQUAL_IN_CARDS if getattr(model.card, key) != getattr(first.card, key)]
    if model.card.data_manifest.get("pretraining") != first.card.data_manifest.get("pretraining"):
        odd.append("pretraining of the encoder")
    _refuse_differences(odd, where=where, first=first.folder.parent.name)


def _refuse_differences(odd: Sequence[str], *, where: str, first: str) -> None:
    if odd:
        raise UsageError(
            f"only models of one task from the same initial weights can be averaged. This one differs from {first} in "
            f"{', '.join(odd)}. Leave it out.",
            where=where,
        )


def _add(total: dict[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
    if total and {n: t.shape for n, t in total.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UsageError("the tensors of this model have other names or shapes. Leave it out.", where=where)
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        # In double precision, because the order of the runs should not matter.
        total[name] = total[name] + value if name in total else value.double() if value.is_floating_point() else value


def _set_mean(model: FinishedModel, total: Mapping[str, Tensor], *, num: int) -> None:
    present = model.segmenter.sam.state_dict()
    with torch.no_grad():
        for name, tensor in present.items():
            # Counters of batch norms are whole numbers.
            mean = total[name] / num if tensor.is_floating_point() else total[name] // num
            tensor.copy_(mean.to(tensor))


def _dice(model: FinishedModel, store: SliceStore | None, series: Sequence[str], device: DeviceChoice) -> float | None:
    if store is None or not series:
        return None
    segmenter = model.segmenter.to(device.torch_device).eval()
    return mean_dice(score_scans(segmenter, store, series, model.task.classes, model.task.inference()))
