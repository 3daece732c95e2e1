"""What a finished run hands on: the encoder for stage 2, and beside it the state of the objective for more SSL."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from samgraft.shared.config import config_sha256
from samgraft.shared.data.intensity import IntensityPreset
from samgraft.shared.data.split import Split, pretrain_manifest
from samgraft.shared.data.store import SliceStore
from samgraft.shared.models.card import Card
from samgraft.shared.models.weights import save_encoder, save_tensors
from samgraft.shared.training.environment import code_revision, processes_expected
from samgraft.shared.training.run_folder import RunFolder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives.objective import Objective
from torch import nn

ENCODER_FOLDER = "encoder"
STATE_FOLDER = "ssl_state"
STATE_SCHEMA = 1


def write_encoder_weights(objective: Objective, run_path: Path, card: Card) -> Path:
    """Write ``encoder/{encoder.safetensors,card.json}`` and ``ssl_state/``; return the encoder's file."""
    encoder = objective.encoder
    assert isinstance(encoder, nn.Module)
    path = save_encoder(encoder, run_path / ENCODER_FOLDER, card)
    write_ssl_state(objective, run_path / STATE_FOLDER, objective_name=card.objective or "")
    return path


def write_ssl_state(objective: Objective, folder: Path, *, objective_name: str) -> None:
    """Write everything of the objective but the encoder (decoder, heads, teacher), so that others can go on with it.

    It is derived from the training slices and is left out of releases unless asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(state_without_encoder(objective), folder / "state.safetensors")
    about = {"schema": STATE_SCHEMA, "objective": objective_name}
    (folder / "state.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def state_without_encoder(objective: Objective) -> dict[str, torch.Tensor]:
    """Return the tensors that are thrown away when only the encoder is wanted."""
    assert isinstance(objective, nn.Module)
    return {name: tensor for name, tensor in objective.state_dict().items() if not name.startswith("encoder.")}


def hand_over(
    objective: Objective,
    run: RunFolder,
    config: PretrainConfig,
    start: Card,
    *,
    store: SliceStore,
    split: Split,
    intensity: IntensityPreset,
    notes: Sequence[str],
) -> Path:
    """Write the results of a finished run with their card, and mark the run complete; return the encoder's file."""
    manifest = pretrain_manifest(store, split.train)
    card = dataclasses.replace(
        start,
        stage="encoder",
        objective=config.objective.name.value,
        steps=config.trainer.max_steps,
        slices_seen=config.trainer.max_steps
        * config.trainer.accumulate
        * config.data.batch_size
        * processes_expected(),
        intensity=intensity.to_dict(),
        num_neighbours=config.data.num_neighbours,
        data_manifest=manifest,
        config_sha256=config_sha256(config),
        code_revision=code_revision(),
        notes=list(dict.fromkeys([*start.notes, *notes])),
    )
    path = run.path / ENCODER_FOLDER / "encoder.safetensors"
    if run.is_writer:
        path = write_encoder_weights(objective, run.path, card)
        run.mark_complete(data_fingerprint=store.fingerprint, base_sha256=start.base_sha256, split_sha256=split.sha256)
    return path
