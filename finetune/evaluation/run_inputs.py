"""Store, split and privacy setting of a run, for its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from samgraft.finetune.model_folder import FinishedModel
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.inputs import load_run_split
from samgraft.shared.samples.split import ALL_PARTS, PARTS, Split, choose_fold, load_split
from samgraft.shared.store.store import SliceStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Settings of a run that its evaluation needs. A release has none of them."""

    store: str | None = None
    """Path or address of the labelled store."""
    split_file: str | None = None
    """Setting ``data.split``, None if the split was found next to the store or drawn."""
    fold: int | None = None
    """Setting ``data.fold``."""
    is_few_shot: bool = False
    """True if only a drawn part of the training patients or slices was used."""
    log_images: bool = False
    """True if the data was declared shareable."""

    def require_store(self) -> str:
        """Return the path or address of the store, or refuse a release.

        Raises:
            UsageError: With the option to add.
        """
        if not self.store:
            raise UsageError("a release does not contain the path of its data.", next_command="add DATA=STORE.zarr")
        return self.store


def read_run_inputs(path: Path) -> RunInputs:
    """Read the settings of a run from its ``config.yaml``, none for a release."""
    file = path / "config.yaml"
    if not file.is_file():
        return RunInputs()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    data, watch = values["data"], values.get("watch") or {}
    return RunInputs(
        store=str(data["store"]),
        split_file=data.get("split"),
        fold=data.get("fold"),
        is_few_shot=(data.get("few_shot") or {}).get("num") is not None,
        log_images=bool(watch.get("log_images", False)),
    )


def split_for_evaluation(
    path: Path, model: FinishedModel, store: SliceStore, *, split_file: Path | None = None, part: str = "test"
) -> tuple[Split, str]:
    """Return the split that a model was made with, whatever file it came from, and its sha256.

    A store that is evaluated whole needs no split. All its patients are then in test.

    Args:
        path: Run or release.
        model: Its model, whose task lists the patients of every part.
        store: Store to evaluate on. Another one than the model's has a split of its own.
        split_file: File to use instead.
        part: Part to evaluate.

    Raises:
        DataError: If ``split_file`` or the split of another store is damaged or leaks.
    """
    if part == ALL_PARTS:
        split = Split(train=(), val=(), test=store.patient_ids, seed=0, store_fingerprint=store.fingerprint)
        return split, split.sha256
    fold = read_run_inputs(path).fold
    if split_file is not None or store.fingerprint != model.task.store_fingerprint:
        split = load_split(split_file, store)
        # A fold was chosen for the model's own store. Every fold of another store has the same test patients.
        if split.folds and store.fingerprint == model.task.store_fingerprint:
            split = choose_fold(split, fold)
        return split, split.sha256
    for split in _candidates(path, store):
        if _has_patients_of(model, split):
            return split, split.sha256
    # The file was deleted or changed since. The task of the model lists the patients, but not the seed of the draw,
    # which is part of the hash: the recorded one is used.
    recorded = {name: tuple(model.task.split.get(name, ())) for name in PARTS}
    log.info("split as recorded with the model: the split file of its training is missing or has changed")
    split = Split(
        train=recorded["train"],
        val=recorded["val"],
        test=recorded["test"],
        seed=0,
        store_fingerprint=store.fingerprint,
    )
    return split, model.task.split_sha256


def _candidates(path: Path, store: SliceStore) -> Iterator[Split]:
    inputs = read_run_inputs(path)
    sources: list[Callable[[], Split | None]] = []
    if inputs.split_file:
        sources.append(partial(load_split, Path(inputs.split_file), store))
    # The copy in a few-shot run lists the drawn patients only. Its hash would differ from those of runs with other
    # shots, although all of them are scored on the same patients and may be compared.
    if not inputs.is_few_shot:
        sources.append(partial(load_run_split, path, store))
    sources.append(partial(load_split, None, store))
    for source in sources:
        try:
            split = source()
            if split is not None and split.folds:
                split = choose_fold(split, inputs.fold)
        except (DataError, UsageError) as error:
            log.warning("%s Not used as split of the evaluation.", error.what)
            continue
        if split is not None:
            yield split


def _has_patients_of(model: FinishedModel, split: Split) -> bool:
    """Check that the split has the model's validation and test patients and all its training patients."""
    recorded = {name: set(model.task.split.get(name, ())) for name in PARTS}
    return (
        set(split.val) == recorded["val"]
        and set(split.test) == recorded["test"]
        and set(split.train) >= recorded["train"]
    )
