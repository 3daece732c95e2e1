"""What a run starts from: base weights into an encoder of the wanted architecture and size, strictly."""

from __future__ import annotations

import dataclasses
import logging

from samgraft.shared.errors import UsageError
from samgraft.shared.models.architecture import arch_spec
from samgraft.shared.models.card import Card
from samgraft.shared.models.image_encoder import ImageEncoder, build_image_encoder
from samgraft.shared.models.tiny_vit import TinyViTEncoder
from samgraft.shared.models.weights import card_of, load_into, read_weights
from samgraft.ssl.config import ModelConfig
from samgraft.ssl.objectives.objective import Objective

log = logging.getLogger(__name__)

RANDOM = "random"
Encoder = ImageEncoder | TinyViTEncoder


def load_start(config: ModelConfig) -> tuple[Encoder, Card]:
    """Build the encoder, load the base weights and freeze the lowest depths.

    Returns:
        The encoder in training mode and the card of what it starts from.

    Raises:
        WeightsError: If the base is no weights file, incomplete, or of another architecture than ``config.arch``.
        UsageError: If the image size does not fit, or everything would be frozen.
    """
    if config.base == RANDOM:
        spec = arch_spec(config.arch)
        encoder = build_image_encoder(spec, image_size=config.image_size)
        card = Card(
            arch=spec.arch.value,
            stem=spec.stem.value if spec.stem else None,
            image_size=config.image_size,
            pixel_mean=list(spec.pixel_mean),
            pixel_std=list(spec.pixel_std),
            base_name=RANDOM,
        )
        log.warning("the encoder starts from random weights, because BASE=random was asked for.")
    else:
        weights = read_weights(config.base)
        spec = weights.spec if weights.spec.arch is config.arch else arch_spec(config.arch)
        encoder = build_image_encoder(spec, image_size=config.image_size)
        load_into(encoder, weights, part="image_encoder", resize_positions=True)
        card = dataclasses.replace(
            card_of(weights, image_size=config.image_size),
            base_name=weights.name,
            base_sha256=weights.sha256,
            weights_sha256=None,
        )
    freeze_depths(encoder, config.num_frozen_depths)
    return encoder.train(), card


def freeze_depths(encoder: Encoder, num_frozen_depths: int) -> list[str]:
    """Stop training the lowest depths; return the names of the parameters that keep their weights.

    Raises:
        UsageError: If no depth but the neck would be left.
    """
    groups = list(encoder.layer_groups())
    deepest = max(depth for depth, _ in groups)
    if num_frozen_depths >= deepest:
        raise UsageError(
            f"num_frozen_depths must be below {deepest} for {encoder.spec.title}, got {num_frozen_depths}: nothing "
            "would be trained.",
            where="model.num_frozen_depths",
        )
    frozen = {id(p) for depth, parameters in groups if depth < num_frozen_depths for p in parameters}
    for parameter in encoder.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    return [name for name, parameter in encoder.named_parameters() if id(parameter) in frozen]


def trained_share(objective: Objective) -> str:
    """Return how much of the module is trained, for the pre-flight."""
    sizes = [(p.numel(), p.requires_grad) for _, p in objective.named_parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters"
