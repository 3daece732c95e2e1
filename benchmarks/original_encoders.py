"""Original encoders of segment_anything, SAM 2 and timm with the weights of ours, as a reference.

The speed benchmarks and the parity tests use them. Names are mapped here, independently of the code under test.
"""

from __future__ import annotations

from functools import partial

import torch
from samgraft.shared.encoders.hiera import HieraEncoder, HieraSpec
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTEncoder, TinyViTSpec
from samgraft.shared.encoders.vit import ViTEncoder, ViTSpec
from segment_anything.modeling import ImageEncoderViT
from timm.models.tiny_vit import TinyVit
from torch import nn


def plain_original(spec: ViTSpec, image_size: int) -> ImageEncoderViT:
    """Build segment_anything's encoder of any size."""
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        out_chans=spec.neck_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=spec.attn_window_size,
        global_attn_indexes=spec.global_blocks,
    )


def plain_twin(ours: ViTEncoder) -> ImageEncoderViT:
    """Return segment_anything's encoder with the weights of ours."""
    twin = plain_original(ours.spec, ours.image_size).to(next(ours.parameters()).dtype)
    twin.load_state_dict(ours.state_dict(), strict=True)
    return twin


def hiera_original(spec: HieraSpec) -> nn.Module:
    """Build SAM 2's own encoder.

    It needs the package ``sam2``, which the extra ``sam2`` installs (see pyproject.toml).
    """
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    trunk = Hiera(
        embed_dim=spec.embed_dim,
        num_heads=spec.num_heads,
        stages=spec.depths,
        global_att_blocks=spec.global_blocks,
        window_pos_embed_bkg_spatial_size=(spec.background_size, spec.background_size),
        window_spec=spec.attn_window_sizes,
    )
    neck = FpnNeck(
        PositionEmbeddingSine(num_pos_feats=spec.neck_dim),
        d_model=spec.neck_dim,
        backbone_channel_list=list(reversed(spec.widths)),
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk, neck, scalp=1)


class HieraTwin(nn.Module):
    """SAM 2's own encoder with the weights of ours, which returns the image embeddings alone."""

    def __init__(self, ours: HieraEncoder) -> None:
        super().__init__()
        self.encoder = hiera_original(ours.spec).to(next(ours.parameters()).dtype)
        self.encoder.load_state_dict(ours.state_dict(), strict=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings."""
        return self.encoder(images)["vision_features"]


def tiny_original(spec: TinyViTSpec) -> nn.Module:
    """Build timm's own TinyVit, which has no neck, with the two changes of the published vit_t."""
    model = TinyVit(
        num_classes=0,
        embed_dims=spec.embed_dims,
        depths=spec.depths,
        num_heads=spec.num_heads,
        window_sizes=spec.attn_window_sizes,
        drop_path_rate=0.0,
    )
    if spec.stem == Stem.conv1x1:
        half = spec.embed_dims[0] // 2
        model.patch_embed.conv1.conv = nn.Conv2d(3, half, 1, bias=False)
        model.patch_embed.conv2.conv = nn.Conv2d(half, spec.embed_dims[0], 1, bias=False)
    model.stages[3].downsample.conv2.conv.stride = (1, 1)
    return model


def tiny_twin(ours: TinyViTEncoder) -> nn.Module:
    """Return timm's TinyVit with all weights of ours but the neck's."""
    twin = tiny_original(ours.spec).to(next(ours.parameters()).dtype)
    tensors = {k: v for k, v in ours.state_dict().items() if not k.startswith("neck.")}
    head = {k: v for k, v in twin.state_dict().items() if k.startswith("head.")}
    twin.load_state_dict(head | to_timm_names(tensors), strict=True)
    return twin


def to_timm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the published vit_t's tensors to timm's."""
    out = {}
    for key, value in tensors.items():
        name = key.replace(".c.weight", ".conv.weight")
        name = name.replace("patch_embed.seq.0", "patch_embed.conv1").replace("patch_embed.seq.2", "patch_embed.conv2")
        words = name.split(".")
        if words[0] == "layers":
            words[0] = "stages"
            if words[2] == "downsample":
                words[1] = str(int(words[1]) + 1)
        out[".".join(words)] = value
    return out
