"""Places of the updates, as full regular expressions over SAM's module names.

Targets are full expressions, and ``adapt`` compares the result with them: peft applies a list of suffixes wherever they
match, also in parts that must stay frozen, and ignores entries that match nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from samgraft.finetune.adapters.choices import Heads, Placement, Targets, TuningScope
from samgraft.finetune.adapters.methods import AdapterConfig
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.sam import DECODERS, Decoder
from samgraft.shared.errors import UsageError

_DECODER_ATTENTION = r"mask_decoder\.transformer\.(layers\.\d+\.\w*attn\w*|final_attn_token_to_image)"
DECODER_QV = rf"{_DECODER_ATTENTION}\.[qv]_proj"
DECODER_NORMS = r"mask_decoder\.transformer\.(layers\.\d+\.norm\d|norm_final_attn)"
ENCODER_PREFIX = "image_encoder."


def chosen_blocks(spec: EncoderSpec, config: AdapterConfig) -> list[str]:
    """Return the encoder blocks that train. None when the scope leaves them out.

    Raises:
        UsageError: If the configuration names a block that this architecture does not have.
    """
    names = [f"{ENCODER_PREFIX}{name}" for name in spec.block_names()]
    if config.scope is not TuningScope.ENCODER_DECODER:
        return []
    if config.last_blocks is not None and config.last_blocks > len(names):
        raise UsageError(
            f"adapter.last_blocks must be at most the {len(names)} transformer blocks of {spec.title}, got "
            f"{config.last_blocks}.",
            where="adapter.last_blocks",
        )
    if beyond := [index for index in config.blocks if index >= len(names)]:
        raise UsageError(
            f"adapter.blocks must be numbers below the {len(names)} transformer blocks of {spec.title}, got {beyond}.",
            where="adapter.blocks",
        )
    if config.last_blocks is not None:
        return names[-config.last_blocks :]
    return [names[index] for index in sorted(config.blocks)] if config.blocks else names


def is_everywhere(config: AdapterConfig) -> bool:
    """Return True when the whole encoder changes and not only chosen blocks."""
    return config.scope is TuningScope.ENCODER_DECODER and not config.blocks and config.last_blocks is None


def target_pattern(spec: EncoderSpec, config: AdapterConfig) -> str:
    """Return the full regular expression of the layers that get an update."""
    placement = config.spec.placement
    if placement is Placement.SUBLAYERS:
        return _either([sequential_pattern(spec, config), parallel_pattern(spec, config)])
    blocks, layers = chosen_blocks(spec, config), spec.layers
    has_encoder = bool(blocks)
    if placement is Placement.NORMS:
        neck = [_in_encoder(layers.neck_norms)] if has_encoder and layers.neck_norms else []
        return _either([*_inside(blocks, layers.norms), *neck, DECODER_NORMS])
    if config.targets is Targets.QV:
        return _either([*_inside(blocks, layers.qkv), DECODER_QV])
    decoder = DECODERS[spec.decoder]
    parts = [*_inside(blocks, layers.linear), _decoder_linear(decoder)]
    if config.targets is Targets.LINEAR_CONV and has_encoder:
        parts += [_in_encoder(layers.neck_convolutions), *map(re.escape, decoder.projections)]
        # Convolutions are outside of the transformer blocks, so they train only when no blocks were chosen.
        if layers.convolutions is not None and is_everywhere(config):
            parts.append(_in_encoder(layers.convolutions))
    return _either(parts)


def sequential_pattern(spec: EncoderSpec, config: AdapterConfig) -> str:
    """Return the modules that a bottleneck adapter follows (encoder attention) or precedes (decoder norms)."""
    in_encoder = _inside(chosen_blocks(spec, config), spec.layers.attention)
    return _either([*in_encoder, r"mask_decoder\.transformer\.layers\.\d+\.norm[24]"])


def parallel_pattern(spec: EncoderSpec, config: AdapterConfig) -> str:
    """Return the modules that get a parallel bottleneck adapter."""
    in_encoder = _inside(chosen_blocks(spec, config), spec.layers.mlp)
    return _either([*in_encoder, r"mask_decoder\.transformer\.layers\.\d+\.mlp"])


def head_names(num_classes: int, *, prompted_tokens: Sequence[int] = ()) -> list[str]:
    """Return the modules that turn mask tokens into logits. They train whole with every method.

    One class uses SAM's first mask token, several classes use its multimask tokens 1, 2, ..., as stock SAM does for
    ``multimask_output`` False and True. With prompts, ``prompted_tokens`` are the tokens whose masks belong to the
    prompts, whatever the number of classes, and the IoU head trains too.
    """
    if prompted_tokens:
        tokens = [f"mask_decoder.output_hypernetworks_mlps.{token}" for token in prompted_tokens]
        return [
            "mask_decoder.mask_tokens",
            "mask_decoder.output_upscaling",
            *tokens,
            "mask_decoder.iou_prediction_head",
        ]
    # SAM's token 0 gives the single mask, tokens 1 to 3 give its three candidate masks.
    first = 0 if num_classes == 1 else 1
    hypernetworks = [f"mask_decoder.output_hypernetworks_mlps.{first + i}" for i in range(num_classes)]
    return ["mask_decoder.mask_tokens", "mask_decoder.output_upscaling", *hypernetworks]


def whole_modules(
    spec: EncoderSpec,
    config: AdapterConfig,
    *,
    num_classes: int,
    num_mask_tokens: int,
    prompted_tokens: Sequence[int] = (),
) -> list[str]:
    """Return the modules that train whole in addition to the updates (peft's ``modules_to_save``)."""
    names = head_names(num_classes, prompted_tokens=prompted_tokens)
    if config.heads is Heads.RELEASED:
        names = _released_heads(spec, config, num_mask_tokens=num_mask_tokens)
    if config.scope is TuningScope.NECK_DECODER:
        names += ["image_encoder.neck", *DECODERS[spec.decoder].projections]
    return names


def _released_heads(spec: EncoderSpec, config: AdapterConfig, *, num_mask_tokens: int) -> list[str]:
    if not config.spec.trains_released_heads:
        return []
    names = [
        *(f"mask_decoder.{name}" for name in ("iou_token", "mask_tokens", "output_upscaling", "iou_prediction_head")),
        *(f"mask_decoder.output_hypernetworks_mlps.{index}" for index in range(num_mask_tokens)),
        "prompt_encoder",
    ]
    if config.scope is TuningScope.ENCODER_DECODER:
        names += [f"{ENCODER_PREFIX}{name}" for name in spec.convolution_stage()]
    return names


def _inside(blocks: Sequence[str], tail: str) -> list[str]:
    return [f"({'|'.join(re.escape(name) for name in blocks)})\\.{tail}"] if blocks else []


def _decoder_linear(decoder: Decoder) -> str:
    """Return the expression of all projections and MLP layers of a mask decoder's transformer."""
    mlp = rf"mask_decoder\.transformer\.layers\.\d+\.mlp\.{decoder.mlp}"
    return rf"({_DECODER_ATTENTION}\.([qkv]_proj|out_proj)|{mlp})"


def _in_encoder(pattern: str) -> str:
    return re.escape(ENCODER_PREFIX) + pattern


def _either(parts: Sequence[str]) -> str:
    return f"({'|'.join(parts)})" if len(parts) > 1 else parts[0]
