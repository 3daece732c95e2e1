"""What the encoder learns from: one module per objective, chosen by name from ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from samgraft.shared.encoders.vit import MaskableEncoder
from samgraft.ssl.objectives.dino import DINO
from samgraft.ssl.objectives.feature import Feature
from samgraft.ssl.objectives.lejepa import LeJEPA
from samgraft.ssl.objectives.mae import MAE
from samgraft.ssl.objectives.masked_image import MaskedImage
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, Panel
from samgraft.ssl.objectives.settings import Method, ObjectiveConfig

__all__ = ["OBJECTIVES", "Method", "Objective", "ObjectiveConfig", "ObjectiveLoss", "Panel"]


class BuildObjective(Protocol):
    """Makes an objective around an encoder; ``max_steps`` is the length of the run, which schedules need."""

    def __call__(self, encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
        """Build it."""
        ...


def _masked_image(encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
    return MaskedImage(encoder, config.masked_image, seed=seed)


def _mae(encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
    return MAE(encoder, config.mae, seed=seed)


def _dino(encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
    return DINO(encoder, config.dino, seed=seed, max_steps=max_steps)


def _lejepa(encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
    return LeJEPA(encoder, config.lejepa, seed=seed)


def _feature(encoder: MaskableEncoder, config: ObjectiveConfig, *, seed: int, max_steps: int) -> Objective:
    return Feature(encoder, config.feature, seed=seed)


OBJECTIVES: Mapping[Method, BuildObjective] = {
    Method.MASKED_IMAGE: _masked_image,
    Method.MAE: _mae,
    Method.DINO: _dino,
    Method.LEJEPA: _lejepa,
    Method.FEATURE: _feature,
}
