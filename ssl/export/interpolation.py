"""Interpolation between the initial and the trained encoder, from which a run exports one point.

Weights on the line between a pretrained and a further trained network often keep the abilities of both (WiSE-FT). The
running statistics of ``vit_t``'s batch norms are equal at both ends, because stage 1 keeps those of the initial
weights, and so the interpolations have them too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.training.resume import preserve_rng
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.initial_weights import load_whole_encoder
from samgraft.ssl.monitor.exported import Exported, choose_share
from samgraft.ssl.monitor.held_out import held_out_loss
from samgraft.ssl.monitor.monitor import MonitorData, check_encoder
from samgraft.ssl.objectives import Objective
from samgraft.ssl.scope import merged_state

State = Mapping[str, torch.Tensor]


def choose_encoder(objective: Objective, config: PretrainConfig, monitored: MonitorData) -> tuple[State, Exported]:
    """Return the tensors of the encoder to export, under SAM's names, and the choice that led to them.

    Args:
        objective: The trained objective with unsharded parameters.
        config: Settings of the run.
        monitored: Labelled slices, by which the share is chosen where there are some.
    """
    trained, shares = merged_state(objective.exported_encoder), config.export.interpolate
    if shares == [1.0]:
        return trained, Exported()
    device = next(objective.parameters()).device
    # The generators must not depend on the choice, because other work of this process may follow.
    with preserve_rng():
        encoder, _ = load_whole_encoder(config.model)
    initial = {name: tensor.clone() for name, tensor in encoder.to(device).eval().state_dict().items()}
    measured = {}
    if monitored.probe is not None and len(shares) > 1:
        for share in (0.0, *shares):
            encoder.load_state_dict(interpolate(initial, trained, share))
            measured[share] = check_encoder(encoder, monitored, config, device=device)
    exported = choose_share(shares, measured)
    chosen = interpolate(initial, trained, exported.share)
    if exported.share < 1:
        encoder.load_state_dict(chosen)
        error = _held_out_grey_error(objective, encoder, monitored, batch_size=config.data.batch_size)
        exported = dataclasses.replace(exported, grey_error=error)
    return chosen, exported


def _held_out_grey_error(
    objective: Objective, encoder: ImageEncoder, monitored: MonitorData, *, batch_size: int
) -> float | None:
    """Return the error of the hidden pixels with another encoder, or None for an objective that predicts none."""
    held_out, device = monitored.held_out, next(objective.parameters()).device
    # Only an objective with references has an error that can be compared with theirs.
    if held_out is None or not objective.references(
        held_out.images_N1SS.to(device), sample_counters=held_out.sample_counters
    ):
        return None
    with_other = copy.deepcopy(objective).eval()
    with_other.encoder, with_other.anchor = encoder, None
    step = objective.max_steps
    return held_out_loss(with_other, held_out, batch_size=batch_size, step=step, device=device)["grey_error"]


def interpolate(initial: State, trained: State, share: float) -> State:
    """Return the tensors at a share of the way from the initial to the trained ones."""
    if share == 1:
        return trained
    assert initial.keys() == trained.keys()
    # Counters of batch norms are whole numbers, which are equal at both ends.
    return {
        name: torch.lerp(tensor, trained[name].to(tensor), share) if tensor.is_floating_point() else trained[name]
        for name, tensor in initial.items()
    }
