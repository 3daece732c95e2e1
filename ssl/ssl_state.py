"""``ssl_state/``: what an objective leaves beside the encoder (decoder, heads, student, centers), to go on from.

It is derived from the training slices, so releases leave it out unless asked for. Names and tensors are those of the
objective with LoRA merged, without the encoder that is handed on: that one lies in ``encoder/``. AdamW's state lies
beside it (:mod:`samgraft.ssl.moments`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.files import write_json, write_tensors
from samgraft.shared.weights.positions import resize_positions
from samgraft.shared.weights.safe_read import read_file
from samgraft.shared.weights.tensor_report import shorten
from samgraft.shared.weights.unfinished import SSL_STATE_METADATA
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.scope import merged_state, plain_names

log = logging.getLogger(__name__)

STATE_FOLDER = "ssl_state"
STATE_FILE = "state.safetensors"
ABOUT_FILE = "state.json"
STATE_SCHEMA = 1
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")


class StateUse(Enum):
    """What to do with the ``ssl_state`` of the run that a new one starts from."""

    AUTO = "auto"
    """Take it if the base is a run with one of the same objective; say so either way."""
    REQUIRE = "require"
    """Refuse a base without one that fits."""
    IGNORE = "ignore"
    """Start decoder and heads afresh."""


def write_ssl_state(objective: Objective, folder: Path, *, objective_name: str) -> None:
    """Write everything of the objective but the encoder that is handed on."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / STATE_FILE, state_without_encoder(objective), metadata=SSL_STATE_METADATA)
    about = {"schema": STATE_SCHEMA, "objective": objective_name}
    write_json(folder / ABOUT_FILE, about, sort_keys=False)


def state_without_encoder(objective: Objective) -> dict[str, torch.Tensor]:
    """Return the tensors that are thrown away when only the encoder that is handed on is wanted, LoRA merged."""
    prefix = exported_prefix(objective)
    return {name: tensor for name, tensor in merged_state(objective).items() if not name.startswith(prefix)}


def exported_prefix(objective: Objective) -> str:
    """Return what the names of the handed-on encoder's tensors begin with."""
    parts = objective.named_modules()
    return next(f"{name}." for name, part in parts if part is objective.exported_encoder)


def take_up_state(objective: Objective, *, base: str, objective_name: str, use: StateUse) -> list[str]:
    """Load the ``ssl_state`` beside the encoder that the run starts from, strictly.

    Args:
        objective: Already built around the base's encoder.
        base: What the run starts from, as the user gave it.
        objective_name: Of this run.
        use: Whether to.

    Returns:
        Notes for the card: empty if nothing was taken up.

    Raises:
        UsageError: If a state is required and there is none of this objective.
        WeightsError: If it is damaged, or does not fit the objective's settings tensor by tensor.
    """
    folder = find_state(base)
    if use is StateUse.IGNORE:
        if folder is not None:
            log.info("decoder and heads start afresh (model.ssl_state=ignore)")
        return []
    found = _read_about(folder) if folder is not None else None
    if found != objective_name:
        if use is StateUse.REQUIRE:
            what = f"one of {found}" if found else "none"
            raise UsageError(
                f"model.ssl_state=require must have a base with an ssl_state of {objective_name}, got {what}.",
                where=Path(base).name,
            )
        if found is not None:
            log.info("ssl_state of %s is one of %s: decoder and heads start afresh", Path(base).name, found)
        return []
    assert folder is not None
    tensors = dict(read_file(folder / STATE_FILE).content)
    num_resized = _load_strictly(objective, tensors, name=folder.parent.name)
    resized = f", {num_resized} position tables resized" if num_resized else ""
    account = f"{len(tensors)}/{len(tensors)} tensors of decoder, heads and teacher taken up{resized}"
    log.info("ssl_state of %s: %s", folder.parent.name, account)
    return [f"went on from the ssl_state of {folder.parent.name}: {account}"]


def find_state(base: str) -> Path | None:
    """Return the ``ssl_state`` folder of a run, given the run, or the folder or file of its encoder or of its state."""
    path = Path(base)
    for run in (path, path.parent, path.parent.parent):
        folder = run / STATE_FOLDER
        named = path == run or bool({path.name, path.parent.name} & {"encoder", STATE_FOLDER})
        if named and (folder / STATE_FILE).is_file() and (folder / ABOUT_FILE).is_file():
            return folder
    return None


def _read_about(folder: Path) -> str:
    try:
        about: Any = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        schema, objective = about["schema"], str(about["objective"])
    except (ValueError, KeyError, TypeError) as err:
        raise WeightsError(
            f"{ABOUT_FILE} must hold schema and objective, and does not.", where=f"{folder.parent.name}/{folder.name}"
        ) from err
    if schema != STATE_SCHEMA:
        raise WeightsError(
            f"ssl_state schema must be {STATE_SCHEMA}, got {schema!r}. Update samgraft to read it.",
            where=f"{folder.parent.name}/{folder.name}",
        )
    return objective


def _load_strictly(objective: Objective, tensors: Mapping[str, torch.Tensor], *, name: str) -> int:
    """Copy the tensors into the objective; return how many position tables were resized. All or nothing."""
    prefix = exported_prefix(objective)
    wanted = {key: t for key, t in plain_names(objective).items() if not key.startswith(prefix)}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong, ready, num_resized = [], {}, 0
    for key in wanted.keys() & tensors.keys():
        tensor, target = tensors[key], wanted[key]
        if tensor.shape != target.shape and key.endswith(POSITIONS) and tensor.ndim == target.ndim:
            tensor = resize_positions(tensor, target.shape[1] if target.ndim == 4 else (target.shape[0] + 1) // 2)
            num_resized += 1
        if tensor.shape != target.shape:
            wrong.append(f"{key} {list(tensor.shape)} for {list(target.shape)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"ssl_state must be finite, got NaN or Inf in {key}.", where=name)
        ready[key] = tensor
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(wrong)))
    said = [f"{len(names)} {what} ({shorten(names)})" for what, names in problems if names]
    if said:
        raise WeightsError(
            f"ssl_state must fit the objective's settings, got {len(wanted) - len(missing) - len(wrong)}/{len(wanted)} "
            f"tensors: {'; '.join(said)}. Use the settings of that run (its config.yaml), or start decoder and heads "
            "afresh with model.ssl_state=ignore.",
            where=name,
            kept="nothing was loaded",
        )
    with torch.no_grad():
        for key, tensor in ready.items():
            wanted[key].copy_(tensor)
    return num_resized
