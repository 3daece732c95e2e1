"""What a finished run hands on: the encoder for stage 2, and beside it the state of the objective for more SSL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from samgraft.shared.config import config_sha256
from samgraft.shared.runs.environment import code_revision
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.split import Split, pretrain_manifest
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.trainer import FitResult
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.shared.weights.unfinished import CARD_FILE
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.moments import write_moments
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.scope import merged_state
from samgraft.ssl.ssl_state import STATE_FOLDER, write_ssl_state

ENCODER_FOLDER = "encoder"


def write_encoder_weights(objective: Objective, run_path: Path, card: Card) -> Path:
    """Write ``encoder/{encoder.safetensors,card.json}`` and ``ssl_state/``; return the encoder's file."""
    encoder = objective.exported_encoder
    path = save_encoder(merged_state(encoder), run_path / ENCODER_FOLDER, card)
    write_ssl_state(objective, run_path / STATE_FOLDER, objective_name=card.objective or "")
    return path


def encoder_card(
    config: PretrainConfig,
    start: Card,
    *,
    store: SliceStore,
    split: Split,
    intensity: IntensityPreset,
    notes: Sequence[str],
) -> Card:
    """Return the card of what a run trains, before its first step."""
    return dataclasses.replace(
        start,
        stage="encoder",
        objective=config.objective.name,
        steps=0,
        slices_seen=0,
        intensity=intensity.to_dict(),
        num_neighbours=config.data.num_neighbours,
        data_manifest=pretrain_manifest(store, split.train),
        config_sha256=config_sha256(config),
        code_revision=code_revision(),
        notes=list(dict.fromkeys([*start.notes, *notes])),
    )


def write_card_of_states(run: RunFolder, card: Card) -> None:
    """Write the card beside the training states: who starts from a stopped run needs its pixel statistics too."""
    if run.is_writer:
        run.checkpoints.mkdir(exist_ok=True)
        card.write(run.checkpoints / CARD_FILE)


def hand_over(objective: Objective, run: RunFolder, config: PretrainConfig, card: Card, result: FitResult) -> Path:
    """Write the results of a finished run, and mark it complete; return the encoder's file.

    Args:
        objective: Whole, as the run trained it.
        run: Its folder.
        config: Of the run.
        card: From :func:`encoder_card`; the steps are filled in.
        result: How the training went.
    """
    card = dataclasses.replace(card, steps=config.trainer.max_steps, slices_seen=result.slices_seen)
    path = run.path / ENCODER_FOLDER / "encoder.safetensors"
    if run.is_writer:
        path = write_encoder_weights(objective, run.path, card)
        last_step = run.latest_training_state()
        assert last_step is not None
        write_moments(last_step, objective, config.optim, run.path / STATE_FOLDER)
        run.mark_complete(world_size=result.world_size)
    return path
