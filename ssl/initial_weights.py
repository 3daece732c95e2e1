"""Initial weights of stage 1, loaded strictly into an encoder of the wanted architecture and size."""

from __future__ import annotations

import dataclasses
import logging
import shlex

from samgraft.shared.encoders.base import ImageEncoder, freeze_batch_norm, has_batch_norm
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import absent_by_nature, card_of, load_into, read_weights
from samgraft.shared.weights.official import official_name
from samgraft.ssl.config import RANDOM, ModelConfig, PretrainConfig
from samgraft.ssl.objectives import Objective, build_objective
from samgraft.ssl.scope import apply_scope
from samgraft.ssl.ssl_state import restore_ssl_state

log = logging.getLogger(__name__)


def build_initial_objective(config: PretrainConfig) -> tuple[Objective, Card, list[str]]:
    """Build the objective around the initial encoder, with the ``ssl_state`` of an earlier run if there is one.

    Returns:
        The objective, the card of the initial weights, and notes for the card of the result.
    """
    encoder, card = load_initial_encoder(config.model)
    encoder.activation_checkpointing = config.trainer.activation_checkpointing
    # Before the state is restored, which must match this objective tensor by tensor.
    objective = build_objective(encoder, config.objective, seed=config.seed, max_steps=config.trainer.max_steps)
    notes = restore_ssl_state(
        objective,
        initial_weights=config.model.initial_weights,
        objective_name=config.objective.name,
        use=config.model.ssl_state,
    )
    return objective, card, notes


def load_initial_encoder(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    """Build the encoder, load the initial weights and make the configured scope trainable.

    Returns:
        The encoder in training mode and the card of the initial weights.

    Raises:
        WeightsError: If the weights are no weights file, incomplete, or of another architecture than ``config.arch``.
        UsageError: If the image size does not fit, or everything would be frozen.
    """
    encoder, card = load_whole_encoder(config)
    # After loading, because LoRA changes the names of the layers.
    apply_scope(encoder, config.scope, num_frozen_depths=config.num_frozen_depths)
    return encoder.train(), card


def load_whole_encoder(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    """Build the encoder with the initial weights under SAM's names, before the scope is applied.

    Returns:
        The encoder and the card of the initial weights.
    """
    return _random_encoder(config) if config.has_random_weights else _load_encoder(config)


def _random_encoder(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    spec = arch_spec(config.arch)
    encoder = spec.build(image_size=config.image_size)
    log.warning("the encoder has random initial weights (BASE=random), so it has no anchor and no interpolation")
    if config.num_frozen_depths:
        log.warning(
            "model.num_frozen_depths=%d: these depths keep random weights; 0 trains them", config.num_frozen_depths
        )
    notes = []
    if has_batch_norm(encoder):
        # Published weights contain the statistics of many images. New ones are 0 and 1, which fit no features, so that
        # the features would shrink to nothing if they stayed frozen.
        freeze_batch_norm(encoder, frozen=False)
        notes = ["batch norms learnt their statistics in this run"]
        log.info("batch norms learn their statistics too (with weights from a file they keep the file's)")
    card = Card(
        arch=spec.arch,
        stem=spec.variant,
        image_size=config.image_size,
        pixel_mean=list(spec.pixel_mean),
        pixel_std=list(spec.pixel_std),
        base_name=RANDOM,
        notes=notes,
    )
    return encoder, card


def _load_encoder(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    weights = read_weights(config.initial_weights)
    if weights.is_partial and (config.ckpt is None or config.base is None):
        raise WeightsError(
            f"the initial weights are a {weights.format} without SAM's relative positions and neck, and no base SAM "
            "weights supply them. Pass this file as CKPT and the SAM that it was trained from, or SAM itself, as BASE.",
            where=weights.name,
            next_command=f"make pretrain CKPT={shlex.quote(config.initial_weights)} BASE={official_name(config.arch)}",
        )
    # A plain ViT (MAE, DINO) overwrites everything that it has in the base SAM; the rest stays SAM's.
    complete = read_weights(config.base) if weights.is_partial and config.base else weights
    spec = complete.spec if complete.spec.arch == config.arch else arch_spec(config.arch)
    encoder = spec.build(image_size=config.image_size)
    load_into(encoder, complete, part="image_encoder", resize_positions=True)
    card = dataclasses.replace(
        card_of(weights, image_size=config.image_size),
        base_name=weights.name,
        base_sha256=weights.sha256,
        weights_sha256=None,
        # The statistics of the trained encoder, because a plain ViT's file does not contain them.
        pixel_mean=list(spec.pixel_mean),
        pixel_std=list(spec.pixel_std),
    )
    if complete is not weights:
        load_into(encoder, weights, resize_positions=True, allow_missing=absent_by_nature(encoder))
        card = dataclasses.replace(card, notes=[*card.notes, f"relative positions and neck from {complete.name}"])
    return encoder, card


def describe_trained_share(objective: Objective) -> str:
    """Return the numbers of trained parameters of the encoder and of decoder and heads, for the pre-flight."""
    inside = {id(p) for p in objective.encoder.parameters()}
    trained = sum(p.numel() for p in objective.encoder.parameters() if p.requires_grad)
    # A teacher is a frozen copy of encoder and heads, which must not be counted a second time.
    outside = sum(p.numel() for p in objective.parameters() if p.requires_grad and id(p) not in inside)
    total = sum(p.numel() for p in objective.encoder.parameters())
    encoder = f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters of the encoder"
    return f"{encoder}, {outside / 1e6:.2f} M of decoder and heads"
