"""Foreign families of weights, recognised by tensor names, each with the reason and the way to usable weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from samgraft.shared.errors import WeightsError

_USABLE = "Use weights of SAM or SAM 2, e.g. BASE=sam_vit_b, BASE=medsam_vit_b or BASE=sam2.1_hiera_tiny"
_MERGE = "Merge the factors into the complete model in that program, and save the state_dict of the result"


@dataclass(frozen=True, kw_only=True)
class ForeignFamily:
    """Kind of weights that cannot be loaded as a SAM."""

    name: str
    pattern: re.Pattern[str]
    """Regular expression that matches a part of one or more of the family's tensor names."""
    reason: str
    """Sentence that explains why the weights do not fit."""
    way_in: str
    """Sentence that gives a way to usable weights."""


def _family(name: str, pattern: str, reason: str, way_in: str) -> ForeignFamily:
    return ForeignFamily(name=name, pattern=re.compile(pattern), reason=reason, way_in=way_in)


# The first match counts: SAM 3 contains a tracker with the tensor names of SAM 2.
OTHER_ENCODERS = (
    _family(
        "SAM 3",
        r"(language_backbone|vision_backbone|geometry_encoder|detector_model)\.",
        "Its encoder has another structure than those of SAM and SAM 2.",
        f"{_USABLE}.",
    ),
    _family(
        "DINOv3",
        r"(^|\.)(rope_embed|rope_embeddings|storage_tokens)(\.|$)",
        "It has rotary positions instead of the position table that SAM's encoder needs.",
        "Use a DINO, DINOv2 or MAE encoder with patches of 16 px, or a SAM.",
    ),
    _family(
        "transformers' ViT",
        r"(embeddings\.patch_embeddings|encoder\.layer\.\d+\.attention)\.",
        "Its queries, keys and values are separate layers, under names that are not read here.",
        "Use the original file of the same model, or the model of timm.",
    ),
    _family(
        "Swin transformer",
        r"attn\.relative_position_(bias_table|index)$",
        "Its shifted windows have another structure than SAM's ViT.",
        f"{_USABLE}.",
    ),
)
"""Families whose encoder is not SAM's."""

ADAPTERS_ALONE = (
    _family(
        "LoRA factors of SAMed",
        r"(^|\.)w_[ab]_\d{3}$",
        "The file contains factors and the mask decoder, but not the encoder that they change.",
        f"{_MERGE}.",
    ),
    _family(
        "LoRA factors of finetune-SAM",
        r"\.linear_[ab]_[qv]\.weight$",
        "The file contains factors, but not the layers that they change.",
        f"{_MERGE}.",
    ),
    _family(
        "an adapter alone",
        r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|vera_lambda_[bd])(\.|$)",
        "It needs the base weights that it was trained on.",
        "Give the run or release folder, or merge it with peft's merge_and_unload().",
    ),
)
"""Files without the layers that their adapters belong to."""

EXTRA_TENSORS = (
    _family(
        "SAM-HQ",
        r"^mask_decoder\.(hf_|hq_|compress_vit_feat|embedding_encoder|embedding_maskfeature)",
        "Its decoder has layers that SAM has no place for.",
        "Its encoder is that of SAM: give this file as CKPT=, and SAM's own file of the same size as BASE=.",
    ),
    _family(
        "SAM-Med2D",
        r"\.Adapter\.(channel|spatial|norm)\.",
        "Its adapter layers change every encoder block, and SAM has no place for them.",
        f"{_USABLE}.",
    ),
    _family(
        "a SAM with bottleneck adapters (Medical SAM Adapter, finetune-SAM)",
        r"Adapter\.D_fc",
        "Adapter layers cannot be merged into the layers of SAM.",
        f"{_USABLE}, or train the adapted model there with LoRA.",
    ),
    _family(
        "a SAM with LoRA factors beside its layers",
        r"(\.lora_[AB]\.|\.linear_[ab]_[qv]\.)",
        "Factors that are not merged would be lost.",
        f"{_MERGE} (peft: merge_and_unload()).",
    ),
)
"""Families whose encoder or decoder has tensors that SAM lacks. What fits can still be loaded."""


def find_family(names: Iterable[str], families: Collection[ForeignFamily]) -> ForeignFamily | None:
    """Return the first family that a tensor name matches, or None."""
    listed = list(names)
    return next((f for f in families if any(f.pattern.search(name) for name in listed)), None)


def describe_family(family: ForeignFamily) -> str:
    """Return what a file of a foreign family is, why SAM cannot take it as it is, and the way in."""
    return f"weights are {family.name}. {family.reason} {family.way_in}"


def family_error(family: ForeignFamily, *, name: str, next_command: str | None = None) -> WeightsError:
    """Return the refusal of a file of a foreign family."""
    return WeightsError(describe_family(family), where=name, next_command=next_command)
