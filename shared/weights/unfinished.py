"""Files of our own runs that are not what a run hands on: training states and ``ssl_state``, read as weights.

A training state holds weights under the names of the module that trains. What they expect of images stands in
``checkpoints/card.json``, which a run writes before its first step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.card import Card

STATE_FILE = "state.safetensors"
CARD_FILE = "card.json"
STATES_FOLDER = "checkpoints"
SSL_STATE_METADATA: Final[Mapping[str, str]] = MappingProxyType({"samgraft": "ssl_state"})
"""In the header of an ``ssl_state``. One entry: safetensors writes several in no fixed order."""
FINISH_RUN = "the command that the run was started with: it goes on, and BASE=runs/NAME is then its result"
_OWN_ROOTS = (["model", "objective"], ["model", "segmenter"])


def newest_state_file(run: Path) -> Path | None:
    """Return the newest complete training state of a run that has not handed its weights over yet.

    A state under its final name is complete (``samgraft.shared.training`` renames it last), also while the run goes on.
    """
    states = [p for p in run.glob(f"{STATES_FOLDER}/step-*/{STATE_FILE}") if p.parent.name[5:].isdigit()]
    return max(states, key=lambda p: int(p.parent.name[5:]), default=None)


def is_training_state(names: Iterable[object]) -> bool:
    """Tell a training state of either stage by the names of its tensors, wherever the file lies."""
    return any(str(name).split(".")[:2] in _OWN_ROOTS for name in names)


def card_of_state(file: Path) -> Card:
    """Return the card that the run of a training state wrote at its start.

    Raises:
        WeightsError: If there is none: how images must be normalised would be a guess.
    """
    above = file.absolute().parent.parent  # checkpoints/, or the run for the state of a step that became NaN
    for path in (above / CARD_FILE, above / STATES_FOLDER / CARD_FILE):
        if path.is_file():
            step = re.search(r"step-(\d+)$", file.absolute().parent.name)
            return replace(Card.read(path), steps=int(step[1]) if step else 0)
    raise WeightsError(
        f"weights are the training state of a run that was not finished, without {STATES_FOLDER}/{CARD_FILE}: which "
        "pixel statistics they expect is unknown.",
        where=file.name,
        kept="the run",
        next_command=FINISH_RUN,
    )


def encoder_of_ssl_state(file: Path) -> Path:
    """Return the encoder that was handed on with an ``ssl_state``, which holds everything but that encoder.

    Raises:
        WeightsError: If it does not lie beside it.
    """
    above = file.absolute().parent.parent
    for path in (above / "encoder" / "encoder.safetensors", above / "encoder.safetensors"):
        if path.is_file():
            return path
    raise WeightsError(
        "weights are an ssl_state, which holds everything but the encoder that was trained, and that one does not lie "
        "beside it. Give the whole run or release folder.",
        where=file.name,
    )
