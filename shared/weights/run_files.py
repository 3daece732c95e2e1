"""Choice of the file to read in a run, release, adapter or transformers folder.

A training state contains weights under the names of the module that trains. The card beside it, which a run writes
before its first step, gives the pixel statistics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_text
from samgraft.shared.weights.card import Card

STATE_FILE = "state.safetensors"
CARD_FILE = "card.json"
STATES_FOLDER = "checkpoints"
ADAPTER_BASE_FILE = "adapter_base.json"
"""File beside peft's own two that identifies the base weights of an adapter."""
FOLDER_FILES = (
    "encoder/encoder.safetensors",
    "model/sam.safetensors",
    "encoder.safetensors",
    "sam.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    STATE_FILE,
)
"""Places of weights in our folders and in those of transformers. The first that exists is read."""
SSL_STATE_METADATA: Final[Mapping[str, str]] = MappingProxyType({"samgraft": "ssl_state"})
"""Header entry of an ``ssl_state`` file."""
FINISH_RUN = "the command that started the run, which resumes it; BASE=runs/NAME is then its result"
_BASE_KEY = "base_tensors_sha256"
_OWN_ROOTS = (["model", "objective"], ["model", "segmenter"])
_SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


def find_weights_file(path: Path) -> Path:
    """Return the weights file of a folder, or ``path`` itself if it is no folder.

    Raises:
        WeightsError: If the folder contains no readable weights, or ``path`` is one of several shards.
    """
    if not path.is_dir():
        # transformers numbers the files of a large model, and each contains a part of the tensors only.
        if (match := _SHARD_NAME.search(path.name)) and int(match[1]) > 1:
            raise WeightsError(f"the file is one of {int(match[1])} shards. Give the whole folder.", where=path.name)
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    # The run is not finished: its newest training state contains the weights under the names of the training module.
    if (state := _newest_state_file(path)) is not None:
        return state
    if (path / ".metadata").exists() or any(path.glob("*.distcp")):
        raise WeightsError(
            "weights must be one file, got a distributed checkpoint folder, whose table is a pickle. Convert it on the "
            "machine that wrote it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.",
            where=path.name,
        )
    for folder in (path, path / "model"):
        if (folder / "base.safetensors").is_file() and (folder / "adapter").is_dir():
            raise WeightsError(
                "weights folder contains base weights and an adapter that cannot be merged into them, so no plain SAM "
                "file has its result. evaluate, predict and release read the run. For one file train with METHOD=lora.",
                where=path.name,
            )
    _refuse_lone_adapter(path)
    raise WeightsError(
        f"weights folder contains none of {', '.join(FOLDER_FILES)}. Was the run finished?", where=path.name
    )


def is_training_state(names: Iterable[object]) -> bool:
    """Return whether tensor names are those of a training state of either stage."""
    return any(str(name).split(".")[:2] in _OWN_ROOTS for name in names)


def card_of_state(file: Path) -> Card:
    """Return the card that the run of a training state wrote at its start.

    Raises:
        WeightsError: If there is no card, because the pixel statistics would have to be guessed.
    """
    # The parent is checkpoints/, or the run itself for the state of a step that became NaN.
    above = file.absolute().parent.parent
    for path in (above / CARD_FILE, above / STATES_FOLDER / CARD_FILE):
        if path.is_file():
            step = re.search(r"step-(\d+)$", file.absolute().parent.name)
            return replace(Card.read(path), steps=int(step[1]) if step else 0)
    raise WeightsError(
        f"weights are the training state of an unfinished run without {STATES_FOLDER}/{CARD_FILE}, so their pixel "
        "statistics are unknown.",
        where=file.name,
        kept="the run",
        next_command=FINISH_RUN,
    )


def encoder_of_ssl_state(file: Path) -> Path:
    """Return the encoder file of an ``ssl_state``, which contains everything but the encoder.

    Raises:
        WeightsError: If the encoder is not in the same run or release folder.
    """
    above = file.absolute().parent.parent
    for path in (above / "encoder" / "encoder.safetensors", above / "encoder.safetensors"):
        if path.is_file():
            return path
    raise WeightsError(
        "weights are an ssl_state, which contains everything but the trained encoder, and the encoder is missing from "
        "its folder. Give the whole run or release folder.",
        where=file.name,
    )


def write_adapter_base(folder: Path, sha256: str) -> None:
    """Record the base weights of the adapter in ``folder`` by their ``tensors_sha256``."""
    write_text(folder / ADAPTER_BASE_FILE, json.dumps({_BASE_KEY: sha256}) + "\n")


def read_adapter_base(folder: Path) -> str | None:
    """Return the recorded sha256 of an adapter's base weights, or None for an adapter of other programs.

    Raises:
        WeightsError: If the file is damaged.
    """
    path = folder / ADAPTER_BASE_FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[_BASE_KEY]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise WeightsError(f"{ADAPTER_BASE_FILE} is damaged (no {_BASE_KEY}).", where=folder.name) from err
    return str(value)


def _newest_state_file(run: Path) -> Path | None:
    # A state under its final name is complete, because the name is given last. This also holds while the run trains.
    states = [p for p in run.glob(f"{STATES_FOLDER}/step-*/{STATE_FILE}") if p.parent.name[5:].isdigit()]
    return max(states, key=lambda p: int(p.parent.name[5:]), default=None)


def _refuse_lone_adapter(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        return
    sha256 = read_adapter_base(folder)
    base = f"the base weights with tensors_sha256 {sha256[:16]}..." if sha256 else "base weights that it does not name"
    raise WeightsError(
        f"weights folder contains an adapter alone, for {base}. Give the whole run or release folder.",
        where=folder.name,
    )
