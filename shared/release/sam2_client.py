"""Loading of a released SAM 2 with the package ``sam2``.

The package builds the model from a configuration of its own. Numbers that differ from it, such as the image size, are
given as overrides, which the model card shows to users.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from samgraft.shared.encoders.base import SAM_PIXEL_MEAN, SAM_PIXEL_STD
from samgraft.shared.release.subject import STOCK_MASK_TOKENS, Subject
from torch import Tensor

_CONFIGS = {"sam2_t": "hiera_t", "sam2_s": "hiera_s", "sam2_bp": "hiera_b+", "sam2_l": "hiera_l"}
_MEMORY_TENSORS = {"sam2": 157, "sam2.1": 160}
"""Number of tensors outside of the image model, equal for all four architectures."""
_ONLY_IN_2_1 = "no_obj_embed_spatial"
_ENCODER = "image_encoder"
_FEATURE_STRIDES = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Sam2Build:
    """Arguments with which ``build_sam2`` builds the architecture of released weights."""

    config: str
    """Configuration inside the package."""
    overrides: tuple[str, ...]
    """Numbers that differ from the configuration."""
    feature_sizes: tuple[tuple[int, int], ...]
    """Sizes of the three maps, which ``SAM2ImagePredictor`` assumes to be those of 1024 px."""


def why_not_sam2(subject: Subject) -> str | None:
    """Return the reason why the package ``sam2`` cannot load these weights strictly, or None if it can."""
    if subject.num_mask_tokens != STOCK_MASK_TOKENS:
        return f"it builds {STOCK_MASK_TOKENS} mask tokens and these weights have {subject.num_mask_tokens}"
    generation = _generation(subject)
    if "maskmem_tpos_enc" not in subject.memory or len(subject.memory) != _MEMORY_TENSORS[generation]:
        return (
            f"it also loads the {_MEMORY_TENSORS[generation]} tensors of the memory of videos, of which the base "
            f"weights contain {len(subject.memory)}"
        )
    if (subject.spec.pixel_mean, subject.spec.pixel_std) != (SAM_PIXEL_MEAN, SAM_PIXEL_STD):
        return "its predictor normalises by other pixel statistics"
    return None


def sam2_build(subject: Subject) -> Sam2Build:
    """Return how the package ``sam2`` builds the architecture of these weights."""
    spec: Any = subject.spec
    generation = _generation(subject)
    # Shapes that the package does not publish, such as those of a smaller trunk, are written out as a whole.
    overrides: list[str] = []
    if subject.image_size != spec.native_image_size:
        overrides.append(f"++model.image_size={subject.image_size}")
    if not spec.is_standard:
        numbers = {
            "trunk.embed_dim": spec.embed_dim,
            "trunk.num_heads": spec.num_heads,
            "trunk.stages": list(spec.depths),
            "trunk.global_att_blocks": list(spec.global_blocks),
            "trunk.window_spec": list(spec.attn_window_sizes),
            "trunk.window_pos_embed_bkg_spatial_size": [spec.background_size] * 2,
            "neck.backbone_channel_list": list(reversed(spec.widths)),
        }
        overrides += [f"++model.{_ENCODER}.{key}={value}" for key, value in numbers.items()]
    return Sam2Build(
        config=f"configs/{generation}/{generation}_{_CONFIGS[spec.arch]}.yaml",
        overrides=tuple(item.replace(" ", "") for item in overrides),
        feature_sizes=tuple((subject.image_size // stride,) * 2 for stride in _FEATURE_STRIDES),
    )


def _generation(subject: Subject) -> str:
    return "sam2.1" if _ONLY_IN_2_1 in subject.memory else "sam2"


def has_sam2() -> bool:
    """Return True if the package ``sam2`` is installed."""
    return importlib.util.find_spec("sam2") is not None


@torch.inference_mode()
def predictor_outputs(path: Path, subject: Subject, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load a ``.pt`` file with ``build_sam2`` and decode the probe as ``SAM2ImagePredictor`` does."""
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    build = sam2_build(subject)
    model = build_sam2(
        build.config, str(path), device="cpu", hydra_overrides_extra=list(build.overrides), apply_postprocessing=False
    )
    predictor = SAM2ImagePredictor(model)
    # The predictor assumes 1024 px. Its own option for another size does not exist.
    predictor._bb_feat_sizes = list(build.feature_sizes)
    embeddings, automatic, boxes = [], [], []
    for image_SS3, box_4 in zip(probe["images_NSS3"], probe["boxes_N4"], strict=True):
        predictor.set_image(image_SS3.numpy())
        # The predictor adds the embedding of an empty memory, which belongs to the mask decoder here.
        embeddings.append(predictor.get_image_embedding() - model.no_mem_embed.view(1, -1, 1, 1))
        automatic += [torch.cat([_decode(predictor, None, multimask=multimask) for multimask in (False, True)], dim=1)]
        boxes.append(_decode(predictor, box_4, multimask=True))
    return {"embeddings": torch.cat(embeddings), "automatic": torch.cat(automatic), "boxes": torch.cat(boxes)}


def _decode(predictor: Any, box_4: Tensor | None, *, multimask: bool) -> Tensor:
    """Decode as ``SAM2ImagePredictor._predict``, which limits its logits to 32 afterwards."""
    model, features = predictor.model, predictor._features
    points = None if box_4 is None else (box_4.view(1, 2, 2), torch.tensor([[2, 3]], dtype=torch.int32))
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    logits: Tensor = model.sam_mask_decoder(
        image_embeddings=features["image_embed"],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=False,
        high_res_features=features["high_res_feats"],
    )[0]
    return logits
