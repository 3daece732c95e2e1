"""Bijective map of tensor names between segment_anything's SAM and transformers' ``SamModel``, and its folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.vit import ViTSpec
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_json, write_tensors
from samgraft.shared.weights.sam2_format import NameMap, sam2_config, to_sam2_transformers
from samgraft.shared.weights.tensor_report import shorten

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
"""Second copy of the positional matrix, which transformers stores twice."""


def _templates() -> Iterator[tuple[str, str]]:
    """Yield pairs of names (segment_anything, transformers), where {n} is a number and {rest} any ending."""
    encoder, theirs = "image_encoder.", "vision_encoder."
    yield f"{encoder}pos_embed", f"{theirs}pos_embed"
    yield f"{encoder}patch_embed.proj.{{rest}}", f"{theirs}patch_embed.projection.{{rest}}"
    for name in ("attn", "mlp"):
        yield f"{encoder}blocks.{{n}}.{name}.{{rest}}", f"{theirs}layers.{{n}}.{name}.{{rest}}"
    for number in (1, 2):
        yield f"{encoder}blocks.{{n}}.norm{number}.{{rest}}", f"{theirs}layers.{{n}}.layer_norm{number}.{{rest}}"
    for index, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
        yield f"{encoder}neck.{index}.{{rest}}", f"{theirs}neck.{name}.{{rest}}"
    yield _GAUSSIAN, "prompt_encoder.shared_embedding.positional_embedding"
    yield "prompt_encoder.point_embeddings.{n}.weight", "prompt_encoder.point_embed.{n}.weight"
    for name in ("no_mask_embed", "not_a_point_embed"):
        yield f"prompt_encoder.{name}.weight", f"prompt_encoder.{name}.weight"
    downscaling = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
    for index, name in downscaling.items():
        yield f"prompt_encoder.mask_downscaling.{index}.{{rest}}", f"prompt_encoder.mask_embed.{name}.{{rest}}"
    yield from _decoder_templates()


def _decoder_templates() -> Iterator[tuple[str, str]]:
    layer = "mask_decoder.transformer.layers.{n}."
    for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token", "mlp"):
        yield f"{layer}{name}.{{rest}}", f"{layer}{name}.{{rest}}"
    for number in (1, 2, 3, 4):
        yield f"{layer}norm{number}.{{rest}}", f"{layer}layer_norm{number}.{{rest}}"
    transformer = "mask_decoder.transformer."
    yield f"{transformer}final_attn_token_to_image.{{rest}}", f"{transformer}final_attn_token_to_image.{{rest}}"
    yield f"{transformer}norm_final_attn.{{rest}}", f"{transformer}layer_norm_final_attn.{{rest}}"
    for index, name in {0: "upscale_conv1", 1: "upscale_layer_norm", 3: "upscale_conv2"}.items():
        yield f"mask_decoder.output_upscaling.{index}.{{rest}}", f"mask_decoder.{name}.{{rest}}"
    for mlp in ("output_hypernetworks_mlps.{n}", "iou_prediction_head"):
        for index, name in enumerate(("proj_in", "layers.0", "proj_out")):
            yield f"mask_decoder.{mlp}.layers.{index}.{{rest}}", f"mask_decoder.{mlp}.{name}.{{rest}}"
    for name in ("iou_token", "mask_tokens"):
        yield f"mask_decoder.{name}.weight", f"mask_decoder.{name}.weight"


_NAMES = NameMap(_templates())


def to_transformers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename SAM tensors for ``SamModel``.

    Raises:
        WeightsError: If a name has no counterpart, e.g. in vit_t, for which ``SamModel`` has no layers.
    """
    out = _rename(tensors)
    out[SHARED_POSITIONS] = tensors[_GAUSSIAN].clone()
    return out


def _rename(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {name: _NAMES.translate(name) for name in tensors}
    if unknown := [name for name, new in renamed.items() if new is None]:
        raise WeightsError(
            f"transformers' SamModel has no place for {len(unknown)} tensors ({shorten(unknown)}). Only SAMs "
            "with a plain ViT can be converted."
        )
    return {str(new): tensors[name] for name, new in renamed.items()}


def from_transformers(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Rename ``SamModel`` tensors for SAM. Names without a counterpart stay, so that loading reports them.

    Raises:
        WeightsError: If the two copies of the positional matrix differ.
    """
    out = {(_NAMES.translate_back(name) or name): tensor for name, tensor in tensors.items()}
    shared = out.pop(SHARED_POSITIONS, None)
    if shared is not None and _GAUSSIAN not in out:
        out[_GAUSSIAN] = shared
    elif shared is not None and (shared.dtype != out[_GAUSSIAN].dtype or not torch.equal(shared, out[_GAUSSIAN])):
        raise WeightsError(
            f"the two positional matrices of a SamModel file differ ({SHARED_POSITIONS}), expected equal ones. Save "
            "the model again with save_pretrained()."
        )
    notes.append("renamed from transformers' SamModel")
    return out


def transformers_config(spec: EncoderSpec, *, image_size: int, num_multimask_outputs: int) -> dict[str, Any]:
    """Return the ``config.json`` of a ``SamModel`` of this shape."""
    if not isinstance(spec, ViTSpec):
        raise WeightsError(f"transformers' SamModel has a plain ViT only, got {spec.title}. Release the .pth instead.")
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": spec.embed_dim,
            "output_channels": spec.neck_dim,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": spec.num_heads,
            "image_size": image_size,
            "patch_size": spec.patch_size,
            # segment_anything's value, which is not the default of torch.
            "layer_norm_eps": 1e-6,
            "window_size": spec.attn_window_size,
            "global_attn_indexes": list(spec.global_blocks),
            "mlp_dim": 4 * spec.embed_dim,
            "num_pos_feats": spec.neck_dim // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": spec.neck_dim,
            "image_size": image_size,
            "patch_size": spec.patch_size,
            "image_embedding_size": image_size // spec.patch_size,
        },
        "mask_decoder_config": {
            "hidden_size": spec.neck_dim,
            "mlp_dim": 8 * spec.neck_dim,
            "num_multimask_outputs": num_multimask_outputs,
            "iou_head_hidden_dim": spec.neck_dim,
        },
    }


def save_transformers(tensors: Mapping[str, torch.Tensor], folder: Path, spec: EncoderSpec, *, image_size: int) -> Path:
    """Write a whole SAM as a folder for ``from_pretrained`` of ``SamModel`` or ``Sam2Model``, and return the folder."""
    outputs = int(tensors["mask_decoder.mask_tokens.weight"].shape[0]) - 1
    config = _config(spec, image_size=image_size, num_multimask_outputs=outputs)
    renamed = to_sam2_transformers(tensors) if isinstance(spec, HieraSpec) else to_transformers(tensors)
    return _write_folder(renamed, folder, config, _processor(spec, image_size))


def save_transformers_encoder(
    tensors: Mapping[str, torch.Tensor], folder: Path, spec: EncoderSpec, *, image_size: int
) -> Path:
    """Write an image encoder as a folder for ``SamVisionModel`` or ``Sam2VisionModel``, and return the folder."""
    whole = _config(spec, image_size=image_size, num_multimask_outputs=3)
    kind = "sam2" if isinstance(spec, HieraSpec) else "sam"
    config = {
        "architectures": [f"{kind.title()}VisionModel"],
        "model_type": f"{kind}_vision_model",
        **whole["vision_config"],
    }
    if unknown := [name for name in tensors if not name.startswith("image_encoder.")]:
        raise WeightsError(f"weights must be those of an image encoder alone, got {shorten(unknown)}.")
    if isinstance(spec, HieraSpec):
        # Sam2VisionModel is the encoder itself, whereas SamVisionModel contains one.
        renamed = {k.removeprefix("vision_encoder."): v for k, v in to_sam2_transformers(tensors).items()}
    else:
        renamed = _rename(tensors)
    return _write_folder(renamed, folder, config, _processor(spec, image_size))


def _config(spec: EncoderSpec, *, image_size: int, num_multimask_outputs: int) -> dict[str, Any]:
    if isinstance(spec, HieraSpec):
        return sam2_config(spec, image_size=image_size, num_multimask_outputs=num_multimask_outputs)
    return transformers_config(spec, image_size=image_size, num_multimask_outputs=num_multimask_outputs)


def _processor(spec: EncoderSpec, image_size: int) -> dict[str, Any]:
    statistics = {
        "image_mean": [value / 255 for value in spec.pixel_mean],
        "image_std": [value / 255 for value in spec.pixel_std],
    }
    square, mask_square = ({"height": side, "width": side} for side in (image_size, image_size // 4))
    if isinstance(spec, HieraSpec):
        # SAM 2 resizes to a square without padding.
        return {"image_processor_type": "Sam2ImageProcessor", **statistics, "size": square, "mask_size": mask_square}
    return {
        "image_processor_type": "SamImageProcessor",
        **statistics,
        "size": {"longest_edge": image_size},
        "pad_size": square,
        "mask_size": {"longest_edge": image_size // 4},
        "mask_pad_size": mask_square,
    }


def _write_folder(
    tensors: Mapping[str, torch.Tensor], folder: Path, config: dict[str, Any], processor: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    for name, values in (("config.json", config), ("preprocessor_config.json", processor)):
        write_json(folder / name, values, indent=2, sort_keys=False)
    return folder
