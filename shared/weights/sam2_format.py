"""Tensor names of SAM 2 in the package ``sam2`` and in transformers' ``Sam2Model``.

Here a SAM 2 has the names of the first SAM: ``image_encoder.*``, ``prompt_encoder.*`` and ``mask_decoder.*``. The
embedding of an empty memory is added to every image, so it belongs to the mask decoder. All other tensors belong to the
memory of videos, which images do not use. They are kept aside under their own names and returned on release, so that a
released file is complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.tensor_report import shorten

Tensors = Mapping[str, torch.Tensor]

NO_MEMORY = "mask_decoder.no_mem_embed"
_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
_POINTS = [f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]
_STACKED_POINTS = "prompt_encoder.point_embed.weight"

MEMORY = (
    *("memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "mask_downsample."),
    *("no_obj_embed_spatial", "obj_ptr_proj.", "obj_ptr_tpos_proj."),
    *("memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer"),
    *("object_pointer_proj.", "occlusion_spatial_embedding_parameter"),
    "temporal_positional_encoding_projection_layer.",
)
"""Beginnings of the names of tensors that belong to the memory of videos, in sam2 and then in transformers."""


def split_memory(tensors: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of images, and those of the memory of videos."""
    memory = {name: tensor for name, tensor in tensors.items() if name.startswith(MEMORY)}
    return {name: tensor for name, tensor in tensors.items() if name not in memory}, memory


class NameMap:
    """Map between two sets of names, from pairs of templates.

    Args:
        templates: Pairs (ours, theirs), where {n} is a number and {rest} any ending. The first match counts.
    """

    # Whole names are matched and each template is used in both directions, which keeps the map bijective.
    # transformers' own converters replace substrings one after another, so that their result depends on the order.
    def __init__(self, templates: Iterable[tuple[str, str]]) -> None:
        pairs = list(templates)
        self._to = [_compile(ours, theirs) for ours, theirs in pairs]
        self._back = [_compile(theirs, ours) for ours, theirs in pairs]

    def translate(self, name: str) -> str | None:
        """Return the other program's name of one of ours, or None if it has none."""
        return _translate(name, self._to)

    def translate_back(self, name: str) -> str | None:
        """Return our name of one of the other program's, or None if it has none."""
        return _translate(name, self._back)


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    replacement = target.replace("{n}", r"\g<n>").replace("{rest}", r"\g<rest>")
    return re.compile(pattern), replacement


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


# ---- the package sam2


def _package_templates() -> Iterator[tuple[str, str]]:
    yield NO_MEMORY, "no_mem_embed"
    yield "prompt_encoder.{rest}", "sam_prompt_encoder.{rest}"
    yield "mask_decoder.{rest}", "sam_mask_decoder.{rest}"


_PACKAGE = NameMap(_package_templates())


def from_sam2(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Rename the tensors of a file of the package ``sam2``. Names without a counterpart stay."""
    return {(_PACKAGE.translate_back(name) or name): tensor for name, tensor in tensors.items()}


def to_sam2(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Rename the tensors of a SAM 2 for the package ``sam2``. Names without a counterpart stay."""
    return {(_PACKAGE.translate(name) or name): tensor for name, tensor in tensors.items()}


# ---- transformers


def _transformers_templates() -> Iterator[tuple[str, str]]:
    yield NO_MEMORY, "no_memory_embedding"
    trunk, backbone = "image_encoder.trunk.", "vision_encoder.backbone."
    yield f"{trunk}patch_embed.proj.{{rest}}", f"{backbone}patch_embed.projection.{{rest}}"
    for number in (1, 2):
        yield f"{trunk}blocks.{{n}}.norm{number}.{{rest}}", f"{backbone}blocks.{{n}}.layer_norm{number}.{{rest}}"
    for index, name in enumerate(("proj_in", "proj_out")):
        yield f"{trunk}blocks.{{n}}.mlp.layers.{index}.{{rest}}", f"{backbone}blocks.{{n}}.mlp.{name}.{{rest}}"
    # The rest of the trunk has equal names. This template must come after those of renamed layers.
    yield f"{trunk}{{rest}}", f"{backbone}{{rest}}"
    yield "image_encoder.neck.convs.{n}.conv.{rest}", "vision_encoder.neck.convs.{n}.{rest}"
    yield _GAUSSIAN, "prompt_encoder.shared_embedding.positional_embedding"
    for index, name in {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}.items():
        yield f"prompt_encoder.mask_downscaling.{index}.{{rest}}", f"prompt_encoder.mask_embed.{name}.{{rest}}"
    yield "prompt_encoder.{rest}", "prompt_encoder.{rest}"
    yield from _transformers_decoder_templates()


def _transformers_decoder_templates() -> Iterator[tuple[str, str]]:
    transformer = "mask_decoder.transformer."
    for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
        attention = f"{transformer}layers.{{n}}.{name}."
        yield f"{attention}out_proj.{{rest}}", f"{attention}o_proj.{{rest}}"
    final = f"{transformer}final_attn_token_to_image."
    yield f"{final}out_proj.{{rest}}", f"{final}o_proj.{{rest}}"
    for number in (1, 2, 3, 4):
        layer = f"{transformer}layers.{{n}}."
        yield f"{layer}norm{number}.{{rest}}", f"{layer}layer_norm{number}.{{rest}}"
    for index, name in enumerate(("proj_in", "proj_out")):
        yield f"{transformer}layers.{{n}}.mlp.layers.{index}.{{rest}}", f"{transformer}layers.{{n}}.mlp.{name}.{{rest}}"
    yield f"{transformer}norm_final_attn.{{rest}}", f"{transformer}layer_norm_final_attn.{{rest}}"
    for index, name in {0: "upscale_conv1", 1: "upscale_layer_norm", 3: "upscale_conv2"}.items():
        yield f"mask_decoder.output_upscaling.{index}.{{rest}}", f"mask_decoder.{name}.{{rest}}"
    for mlp in ("output_hypernetworks_mlps.{n}", "iou_prediction_head", "pred_obj_score_head"):
        for index, name in enumerate(("proj_in", "layers.0", "proj_out")):
            yield f"mask_decoder.{mlp}.layers.{index}.{{rest}}", f"mask_decoder.{mlp}.{name}.{{rest}}"
    yield "mask_decoder.{rest}", "mask_decoder.{rest}"


_TRANSFORMERS = NameMap(_transformers_templates())


def from_sam2_transformers(tensors: Tensors, notes: list[str]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a ``Sam2Model``. Names without a counterpart stay, so that loading reports them.

    Raises:
        WeightsError: If the two copies of the positional matrix differ.
    """
    out = {(_TRANSFORMERS.translate_back(name) or name): tensor for name, tensor in tensors.items()}
    shared = out.pop(_SHARED_POSITIONS, None)
    # Both copies are saved. A file with two different ones was changed by hand, and either could be the right one.
    if shared is not None and not torch.equal(shared, out.setdefault(_GAUSSIAN, shared)):
        raise WeightsError(
            f"the two positional matrices of a Sam2Model file differ ({_SHARED_POSITIONS}), expected equal ones. Save "
            "the model again with save_pretrained()."
        )
    if (stacked := out.pop(_STACKED_POINTS, None)) is not None:
        out |= {name: row[None].clone() for name, row in zip(_POINTS, stacked, strict=False)}
    notes.append("renamed from transformers' Sam2Model")
    return out


def to_sam2_transformers(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Rename the tensors of a SAM 2, or of its image encoder alone, for transformers.

    Raises:
        WeightsError: If a name has no counterpart.
    """
    # transformers has one table for the four kinds of points, so these tensors have no name of their own there.
    plain = {name: tensor for name, tensor in tensors.items() if name not in _POINTS}
    renamed = {name: _TRANSFORMERS.translate(name) for name in plain}
    if unknown := [name for name, new in renamed.items() if new is None]:
        raise WeightsError(f"transformers' Sam2Model has no place for {len(unknown)} tensors ({shorten(unknown)}).")
    out = {str(new): plain[name] for name, new in renamed.items()}
    if _GAUSSIAN in tensors:
        out[_SHARED_POSITIONS] = tensors[_GAUSSIAN].clone()
        out[_STACKED_POINTS] = torch.cat([tensors[name] for name in _POINTS])
    return out


def sam2_config(spec: HieraSpec, *, image_size: int, num_multimask_outputs: int) -> dict[str, Any]:
    """Return the ``config.json`` of a ``Sam2Model`` of this shape."""
    grid = image_size // spec.stride
    heads = [spec.num_heads * 2**stage for stage in range(len(spec.widths))]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": spec.embed_dim,
        "num_attention_heads": spec.num_heads,
        "image_size": [image_size, image_size],
        "window_positional_embedding_background_size": [spec.background_size] * 2,
        "blocks_per_stage": list(spec.depths),
        "embed_dim_per_stage": list(spec.widths),
        "num_attention_heads_per_stage": heads,
        "window_size_per_stage": list(spec.attn_window_sizes),
        "global_attention_blocks": list(spec.global_blocks),
    }
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": list(reversed(spec.widths)),
            "backbone_feature_sizes": [[factor * grid] * 2 for factor in (4, 2, 1)],
            "fpn_hidden_size": spec.neck_dim,
        },
        "prompt_encoder_config": {"hidden_size": spec.neck_dim, "image_size": image_size, "patch_size": spec.stride},
        "mask_decoder_config": {
            "hidden_size": spec.neck_dim,
            "mlp_dim": 8 * spec.neck_dim,
            "num_multimask_outputs": num_multimask_outputs,
            "iou_head_hidden_dim": spec.neck_dim,
            # The released model chooses no other mask than the requested one.
            "dynamic_multimask_via_stability": False,
        },
    }
