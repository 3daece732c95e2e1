"""What a run starts from: base weights into an encoder of the wanted architecture and size, strictly."""

from __future__ import annotations

import dataclasses
import logging

from samgraft.shared.encoders.base import ImageEncoder, freeze_batch_norm, has_batch_norm
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import absent_by_nature, card_of, load_into, read_weights
from samgraft.ssl.config import ModelConfig, PretrainConfig
from samgraft.ssl.objectives import build_objective
from samgraft.ssl.objectives.objective import Objective
from samgraft.ssl.scope import apply_scope
from samgraft.ssl.ssl_state import take_up_state

log = logging.getLogger(__name__)

RANDOM = "random"


def start_objective(config: PretrainConfig) -> tuple[Objective, Card, list[str]]:
    """Build the objective around what the run starts from, with the decoder and heads of an earlier run if it has any.

    Returns:
        The objective, the card of what it starts from, and notes for the card of the result.
    """
    encoder, card = load_start(config.model)
    encoder.activation_checkpointing = config.trainer.activation_checkpointing
    objective = build_objective(encoder, config.objective, seed=config.seed, max_steps=config.trainer.max_steps)
    notes = take_up_state(
        objective,
        base=config.model.base,
        objective_name=config.objective.name,
        use=config.model.ssl_state,
    )
    return objective, card, notes


def load_start(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    """Build the encoder, load the base weights and make the configured scope trainable.

    Returns:
        The encoder in training mode and the card of what it starts from.

    Raises:
        WeightsError: If the base is no weights file, incomplete, or of another architecture than ``config.arch``.
        UsageError: If the image size does not fit, or everything would be frozen.
    """
    if config.base == RANDOM:
        encoder, card = _random_start(config)
    else:
        encoder, card = _load_base(config)
    apply_scope(encoder, config.scope, num_frozen_depths=config.num_frozen_depths)
    return encoder.train(), card


def _random_start(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    """Build an encoder of random weights; vit_t's batch norms move, or its features would shrink to nothing."""
    _refuse_rest(config, "random weights need no other file")
    spec = arch_spec(config.arch)
    encoder = spec.build(image_size=config.image_size)
    log.warning("the encoder starts from random weights, because BASE=random was asked for.")
    if config.num_frozen_depths:
        log.warning(
            "model.num_frozen_depths=%d: these depths keep their random weights; 0 trains them.",
            config.num_frozen_depths,
        )
    notes = []
    if has_batch_norm(encoder):
        # Published weights come with statistics of many images; fresh ones are 0 and 1, and fit nothing.
        freeze_batch_norm(encoder, frozen=False)
        notes = ["batch norms learnt their statistics in this run"]
        log.info("batch norms learn their statistics too (from weights of a file they keep the file's)")
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


def _load_base(config: ModelConfig) -> tuple[ImageEncoder, Card]:
    """Load the base; a plain ViT (MAE, DINO) has neither relative positions nor neck and takes them from the rest."""
    weights = read_weights(config.base)
    if weights.is_partial and config.rest is None:
        raise WeightsError(
            f"base is a {weights.format} without SAM's relative positions and neck: model.rest must name the SAM that "
            "gives them (the one it was started from, if it was).",
            where=weights.name,
            next_command=f"... ARGS='model.rest=sam_{config.arch}'",
        )
    if not weights.is_partial:
        _refuse_rest(config, f"{weights.name} has everything itself")
    whole = weights if config.rest is None else read_weights(config.rest)
    spec = whole.spec if whole.spec.arch == config.arch else arch_spec(config.arch)
    encoder = spec.build(image_size=config.image_size)
    load_into(encoder, whole, part="image_encoder", resize_positions=True)
    card = dataclasses.replace(
        card_of(weights, image_size=config.image_size),
        base_name=weights.name,
        base_sha256=weights.sha256,
        weights_sha256=None,
        # Of the encoder that is trained: a plain ViT's file does not know them.
        pixel_mean=list(spec.pixel_mean),
        pixel_std=list(spec.pixel_std),
    )
    if whole is not weights:
        load_into(encoder, weights, resize_positions=True, allow_missing=absent_by_nature(encoder))
        card = dataclasses.replace(card, notes=[*card.notes, f"relative positions and neck from {whole.name}"])
    return encoder, card


def _refuse_rest(config: ModelConfig, reason: str) -> None:
    if config.rest is not None:
        raise UsageError(f"model.rest would be ignored: {reason}. Remove it.", where="model.rest")


def trained_share(objective: Objective) -> str:
    """Return how much of the module is trained, for the pre-flight."""
    sizes = [(p.numel(), p.requires_grad) for _, p in objective.named_parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters"
