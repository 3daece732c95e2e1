"""Export of a finished run, the encoder for stage 2 and the state of the objective for more pretraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from samgraft.shared.config import config_sha256
from samgraft.shared.runs.environment import code_revision
from samgraft.shared.runs.run_folder import RunFolder
from samgraft.shared.samples.leaks import pretrain_manifest
from samgraft.shared.samples.split import Split
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.trainer import FitResult
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.run_files import CARD_FILE
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives import Objective
from samgraft.ssl.optimizer import write_moments
from samgraft.ssl.scope import merged_state
from samgraft.ssl.ssl_state import STATE_FOLDER, write_ssl_state

ENCODER_FOLDER = "encoder"


def write_encoder_weights(
    objective: Objective, run_path: Path, card: Card, *, encoder: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write the folders ``encoder`` and ``ssl_state``, and return the encoder's file.

    Args:
        objective: The trained objective with unsharded parameters.
        run_path: Folder of the run.
        card: Card of the encoder.
        encoder: Tensors of the encoder under SAM's names. None takes the objective's own.
    """
    encoder = merged_state(objective.exported_encoder) if encoder is None else encoder
    path = save_encoder(encoder, run_path / ENCODER_FOLDER, card)
    write_ssl_state(objective, run_path / STATE_FOLDER, objective_name=card.objective or "")
    return path


def encoder_card(
    config: PretrainConfig,
    initial: Card,
    *,
    store: SliceStore,
    split: Split,
    intensity: IntensityPreset,
    notes: Sequence[str],
) -> Card:
    """Return the card of a run's encoder before its first step, from that of the initial weights."""
    return dataclasses.replace(
        initial,
        stage="encoder",
        objective=config.objective.name,
        steps=0,
        slices_seen=0,
        slices_available=0,
        intensity=intensity.to_dict(),
        num_neighbours=config.data.num_neighbours,
        data_manifest=pretrain_manifest(store, split.train),
        config_sha256=config_sha256(config),
        code_revision=code_revision(),
        notes=list(dict.fromkeys([*initial.notes, *notes])),
    )


def write_training_state_card(run: RunFolder, card: Card) -> None:
    """Write the card next to the training states."""
    # A stopped run can supply initial weights too, and these need its pixel statistics.
    if run.is_writer:
        run.checkpoints.mkdir(exist_ok=True)
        card.write(run.checkpoints / CARD_FILE)


def export_encoder(
    objective: Objective,
    encoder: Mapping[str, torch.Tensor],
    run: RunFolder,
    config: PretrainConfig,
    card: Card,
    result: FitResult,
) -> Path:
    """Write the results of a finished run, mark it as complete, and return the encoder's file.

    Args:
        objective: The trained objective with unsharded parameters.
        encoder: Tensors of the exported encoder under SAM's names.
        run: Folder of the run.
        config: Settings of the run.
        card: Card from :func:`encoder_card`, without the steps.
        result: Result of the training.
    """
    card = dataclasses.replace(
        card,
        steps=config.trainer.max_steps,
        slices_seen=result.slices_seen,
        slices_available=result.slices_available,
    )
    # Only the first process writes, but all return the path.
    path = run.path / ENCODER_FOLDER / "encoder.safetensors"
    if run.is_writer:
        path = write_encoder_weights(objective, run.path, card, encoder=encoder)
        # The moments come from the last verified training state, which is what a resume would restore.
        last_step = run.latest_training_state()
        assert last_step is not None
        write_moments(last_step, objective, config.optim, run.path / STATE_FOLDER)
        run.mark_complete(world_size=result.world_size)
    return path
