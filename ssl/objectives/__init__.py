"""What the encoder learns from: one module per objective, chosen by name from ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from samgraft.shared.models.image_encoder import MaskableEncoder
from samgraft.ssl.objectives.mae import MAE
from samgraft.ssl.objectives.masked_image import MaskedImage
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, Panel
from samgraft.ssl.objectives.settings import Method, ObjectiveConfig

__all__ = ["OBJECTIVES", "Method", "Objective", "ObjectiveConfig", "ObjectiveLoss", "Panel"]


def _masked_image(encoder: MaskableEncoder, config: ObjectiveConfig, seed: int) -> Objective:
    return MaskedImage(encoder, config.masked_image, seed=seed)


def _mae(encoder: MaskableEncoder, config: ObjectiveConfig, seed: int) -> Objective:
    return MAE(encoder, config.mae, seed=seed)


OBJECTIVES: Mapping[Method, Callable[[MaskableEncoder, ObjectiveConfig, int], Objective]] = {
    Method.MASKED_IMAGE: _masked_image,
    Method.MAE: _mae,
}
"""(encoder, settings, seed of the run) -> objective."""
