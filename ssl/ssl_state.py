"""Self-supervised state of a run (decoder, heads, student, centers), for further pretraining.

The folder ``ssl_state/`` is next to the exported encoder. It is derived from the training slices, so that releases
contain it only on request. Its tensors are those of the objective with LoRA merged, without the exported encoder, which
is in ``encoder/``. AdamW's moments are in the same folder (:mod:`samgraft.ssl.optimizer`).
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
from samgraft.shared.weights.official import fetch_from_hub, is_hub_address
from samgraft.shared.weights.positions import resize_positions
from samgraft.shared.weights.run_files import SSL_STATE_METADATA
from samgraft.shared.weights.safe_read import read_raw_weights
from samgraft.shared.weights.tensor_report import shorten
from samgraft.ssl.objectives import Objective
from samgraft.ssl.scope import merged_state, unadapted_tensors

log = logging.getLogger(__name__)

STATE_FOLDER = "ssl_state"
STATE_FILE = "state.safetensors"
ABOUT_FILE = "state.json"
STATE_SCHEMA = 1
POSITIONS = ("pos_embed", "rel_pos_h", "rel_pos_w")


class StateUse(Enum):
    """Use of the ``ssl_state`` of the run that the initial weights are from."""

    AUTO = "auto"
    """Restore the state if there is one of the same objective, and print either way."""
    REQUIRE = "require"
    """Refuse initial weights without a state of the same objective."""
    IGNORE = "ignore"
    """Train new decoder and heads."""


def write_ssl_state(objective: Objective, folder: Path, *, objective_name: str) -> None:
    """Write every tensor of the objective but those of the exported encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / STATE_FILE, state_without_encoder(objective), metadata=SSL_STATE_METADATA)
    about = {"schema": STATE_SCHEMA, "objective": objective_name}
    write_json(folder / ABOUT_FILE, about, sort_keys=False)


def state_without_encoder(objective: Objective) -> dict[str, torch.Tensor]:
    """Return the tensors of the objective outside the exported encoder and the anchor, LoRA merged."""
    left_out = _prefixes_left_out(objective)
    return {name: tensor for name, tensor in merged_state(objective).items() if not name.startswith(left_out)}


def exported_prefix(objective: Objective) -> str:
    """Return the prefix of the exported encoder's tensor names."""
    return next(f"{name}." for name, part in objective.named_modules() if part is objective.exported_encoder)


def _prefixes_left_out(objective: Objective) -> tuple[str, str]:
    """Return the prefixes of the tensors that an ``ssl_state`` does not contain."""
    # A later run has its own anchor, whose copy is of the weights that this run exports.
    return exported_prefix(objective), "anchor."


def restore_ssl_state(objective: Objective, *, initial_weights: str, objective_name: str, use: StateUse) -> list[str]:
    """Load the ``ssl_state`` next to the initial encoder weights, strictly.

    Args:
        objective: Built around the encoder with the initial weights.
        initial_weights: Path or name of the initial weights, as the user gave it.
        objective_name: Name of this run's objective.
        use: Whether to restore, require or ignore a state.

    Returns:
        Notes for the card; empty if nothing was restored.

    Raises:
        UsageError: If a state is required and there is none of this objective.
        WeightsError: If it is damaged, or does not match the objective's settings tensor by tensor.
    """
    folder = find_state(initial_weights)
    if use is StateUse.IGNORE:
        if folder is not None:
            log.info("decoder and heads are new (model.ssl_state=ignore)")
        return []
    found = _read_objective_name(folder) if folder is not None else None
    if found != objective_name:
        if use is StateUse.REQUIRE:
            raise UsageError(
                f"model.ssl_state=require must have initial weights with an ssl_state of {objective_name}, got "
                f"{f'one of {found}' if found else 'none'}.",
                where=Path(initial_weights).name,
            )
        if found is not None:
            log.info("ssl_state of %s is one of %s: decoder and heads are new", Path(initial_weights).name, found)
        return []
    assert folder is not None
    tensors = dict(read_raw_weights(folder / STATE_FILE).content)
    num_resized = _load_strictly(objective, tensors, name=folder.parent.name)
    resized = f", {num_resized} position tables resized" if num_resized else ""
    summary = f"{len(tensors)}/{len(tensors)} tensors of decoder, heads and teacher restored{resized}"
    log.info("ssl_state of %s: %s", folder.parent.name, summary)
    return [f"continued from the ssl_state of {folder.parent.name}: {summary}"]


def find_state(weights: str) -> Path | None:
    """Return the ``ssl_state`` folder of a run, given the run, or a folder or file of its encoder or state."""
    path = fetch_from_hub(weights).path if is_hub_address(weights) else Path(weights)
    for run in (path, path.parent, path.parent.parent):
        folder = run / STATE_FOLDER
        # A file that only happens to be next to an ssl_state must not bring that state along.
        is_named = path == run or bool({path.name, path.parent.name} & {"encoder", STATE_FOLDER})
        if is_named and (folder / STATE_FILE).is_file() and (folder / ABOUT_FILE).is_file():
            return folder
    return None


def _read_objective_name(folder: Path) -> str:
    where = f"{folder.parent.name}/{folder.name}"
    try:
        about: Any = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        schema, objective = about["schema"], str(about["objective"])
    except (ValueError, KeyError, TypeError) as err:
        raise WeightsError(f"{ABOUT_FILE} must contain schema and objective, and does not.", where=where) from err
    if schema != STATE_SCHEMA:
        raise WeightsError(
            f"the schema of ssl_state must be {STATE_SCHEMA}, got {schema!r}. Update samgraft to read it.", where=where
        )
    return objective


def _load_strictly(objective: Objective, tensors: Mapping[str, torch.Tensor], *, name: str) -> int:
    """Copy all tensors into the objective or none, and return how many position tables were resized."""
    left_out = _prefixes_left_out(objective)
    wanted = {key: t for key, t in unadapted_tensors(objective).items() if not key.startswith(left_out)}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong, ready, num_resized = [], {}, 0
    for key in wanted.keys() & tensors.keys():
        tensor, target = tensors[key], wanted[key]
        # A student or teacher in the state may have been trained at another image size.
        if tensor.shape != target.shape and key.endswith(POSITIONS) and tensor.ndim == target.ndim:
            tensor = resize_positions(tensor, target.shape[1] if target.ndim == 4 else (target.shape[0] + 1) // 2)
            num_resized += 1
        if tensor.shape != target.shape:
            wrong.append(f"{key} {list(tensor.shape)} for {list(target.shape)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"ssl_state must be finite, got NaN or Inf in {key}.", where=name)
        ready[key] = tensor
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(wrong)))
    listed = [f"{len(names)} {what} ({shorten(names)})" for what, names in problems if names]
    if listed:
        raise WeightsError(
            f"ssl_state must match the objective's settings, got {len(wanted) - len(missing) - len(wrong)}/"
            f"{len(wanted)} tensors: {'; '.join(listed)}. Use the settings of that run (its config.yaml), or train new "
            "decoder and heads with model.ssl_state=ignore.",
            where=name,
            kept="nothing was loaded",
        )
    with torch.no_grad():
        for key, tensor in ready.items():
            wanted[key].copy_(tensor)
    return num_resized
