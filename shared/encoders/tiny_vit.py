"""TinyViT (vit_t) as an image encoder for SAM at any image size.

The encoder consists of timm's TinyViT blocks, arranged and named as in the published weights of LiteMedSAM and
MobileSAM, so that their files load strictly without translation.

Shape letters: B = images; S = image side (pixels); h, w = grid of ``token_mask``; C = channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from samgraft.shared.encoders.base import (
    EncoderSpec,
    ImageEncoder,
    LayerNames,
    build_neck,
    count_blocks,
    upsample_token_mask,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from samgraft.shared.encoders.tiny_vit_layers import TinyStage


class Stem(StrEnum):
    """Convolutions by which vit_t turns pixels into its first feature map."""

    conv1x1 = "conv1x1"
    """Two 1x1 convolutions of stride 1 (LiteMedSAM). 256 px become a 64x64 embedding, a total stride of 4."""
    conv3x3 = "conv3x3"
    """Two 3x3 convolutions of stride 2 (MobileSAM). 1024 px become a 64x64 embedding, a total stride of 16."""


@dataclass(frozen=True, kw_only=True)
class TinyViTSpec(EncoderSpec):
    """Shape of TinyViT as MobileSAM and LiteMedSAM use it, with one number per stage."""

    stem: str
    """Value of ``Stem``."""
    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    attn_window_sizes: tuple[int, ...] = (7, 7, 14, 7)

    family: ClassVar[str] = "tiny"
    anchors: ClassVar[tuple[str, ...]] = ("patch_embed.seq.0.c.weight", "layers.0.blocks.0.conv1.c.weight")
    layers: ClassVar[LayerNames] = LayerNames(
        linear=r"(attn\.(qkv|proj)|mlp\.fc[12])",
        norms=r"(attn|mlp)\.norm",
        # Pointwise ones only: peft cannot merge an update into a depthwise convolution.
        convolutions=r"layers\.(0\.blocks\.\d+|\d+\.downsample)\.conv[13]\.c",
    )
    default_objective: ClassVar[str] = "masked_image"

    @classmethod
    def published(cls) -> tuple[TinyViTSpec, ...]:
        """Return the shapes of LiteMedSAM and MobileSAM.

        Source:
            mobile_sam/build_sam.py; LiteMedSAM's published weights.
        """
        return (
            # LiteMedSAM was trained on images scaled to [0, 1]: mean 0, standard deviation 255 on the 0..255 scale.
            cls(
                arch="vit_t",
                native_image_size=256,
                stem=Stem.conv1x1,
                pixel_mean=(0.0, 0.0, 0.0),
                pixel_std=(255.0, 255.0, 255.0),
            ),
            cls(arch="vit_t", native_image_size=1024, stem=Stem.conv3x3),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TinyViTSpec:
        """Read the shape from tensors, and input size and pixel statistics from the published stem."""
        kernel = int(tensors["patch_embed.seq.0.c.weight"].shape[-1])
        stem = Stem.conv1x1 if kernel == 1 else Stem.conv3x3
        known = next(spec for spec in cls.published() if spec.stem == stem)
        embed_dims = [int(tensors["layers.0.blocks.0.conv1.c.weight"].shape[1])]
        depths = [count_blocks(tensors, "layers.0.blocks.")]
        num_heads, windows = [known.num_heads[0]], [known.attn_window_sizes[0]]
        for i in range(1, count_blocks(tensors, "layers.")):
            biases = tensors[f"layers.{i}.blocks.0.attn.attention_biases"]
            embed_dims.append(int(tensors[f"layers.{i}.blocks.0.attn.norm.weight"].shape[0]))
            depths.append(count_blocks(tensors, f"layers.{i}.blocks."))
            num_heads.append(int(biases.shape[0]))
            windows.append(round(int(biases.shape[1]) ** 0.5))
        return replace(
            known,
            neck_dim=int(tensors["neck.0.weight"].shape[0]),
            embed_dims=tuple(embed_dims),
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            attn_window_sizes=tuple(windows),
        )

    def find_missing_end(self) -> str | None:
        """Return what shows that the last blocks of a file are missing, or None."""
        known = self.published()[0]
        num_stages = len(self.embed_dims)
        if num_stages < len(known.embed_dims):
            return f"{num_stages} stages, expected {len(known.embed_dims)}"
        if self.embed_dims == known.embed_dims and any(map(int.__lt__, self.depths, known.depths)):
            return f"stages of {self.depths} blocks, expected {known.depths}"
        return None

    def build(self, *, image_size: int) -> TinyViTEncoder:
        """Build the encoder with fresh weights for a square input of ``image_size`` pixels."""
        return TinyViTEncoder(self, image_size=image_size)

    @property
    def stride(self) -> int:
        """Pixels per position of the image embeddings."""
        return 4 if self.stem == Stem.conv1x1 else 16

    @property
    def feature_dim(self) -> int:
        """Channels of the last stage."""
        return self.embed_dims[-1]

    @property
    def mask_token_dim(self) -> int:
        """Channels of the stem's output."""
        return self.embed_dims[0]

    @property
    def crop_unit(self) -> int:
        """Tokens along a side of the smallest attention window."""
        return min(self.attn_window_sizes)

    @property
    def title(self) -> str:
        """Name for messages, with the stem."""
        name = "ViT-T" if self.is_standard else "TinyViT of unpublished shape"
        return f"{name} ({'LiteMedSAM' if self.stem == Stem.conv1x1 else 'MobileSAM'} stem)"

    @property
    def variant(self) -> str:
        """Name of the stem."""
        return str(self.stem)

    def block_names(self) -> list[str]:
        """Return the transformer blocks by module name, all but those of the convolutional first stage."""
        return [f"layers.{i}.blocks.{j}" for i, depth in enumerate(self.depths) if i for j in range(depth)]

    def convolution_stage(self) -> list[str]:
        """Return the blocks and the downsampling of the first stage."""
        return [*(f"layers.0.blocks.{index}" for index in range(self.depths[0])), "layers.0.downsample"]

    def qkv_rows(self, part: int, *, out_features: int, num_heads: int) -> Tensor:
        """Return the output rows of a fused qkv layer that are queries (part 0), keys (1) or values (2).

        timm's TinyViT stacks query, key and value head by head.
        """
        rows, head_dim = torch.arange(out_features), out_features // num_heads // 3
        return rows[(rows % (3 * head_dim)) // head_dim == part]


class TinyViTEncoder(ImageEncoder):
    """Image encoder vit_t.

    Args:
        spec: Shape.
        image_size: Side of the square input in pixels, a multiple of the stride.
    """

    def __init__(self, spec: TinyViTSpec, *, image_size: int) -> None:
        from samgraft.shared.encoders.tiny_vit_layers import TinyPatchEmbed, publish_names

        super().__init__(spec, image_size=image_size)
        kernel, stride = (1, 1) if spec.stem == Stem.conv1x1 else (3, 2)
        self.patch_embed = TinyPatchEmbed(spec.embed_dims[0], kernel=kernel, stride=stride)
        self.layers = nn.ModuleList(_build_stage(spec, index) for index in range(len(spec.depths)))
        self.neck = build_neck(spec.feature_dim, spec.neck_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        publish_names(self)

    def forward_features(
        self, images_B3SS: Tensor, *, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Return features before the neck (B, feature_dim, S/stride, S/stride), with hidden tokens replaced.

        The convolutional stem cannot leave tokens out. Hidden pixels are set to zero before it, and its output there is
        replaced by the mask token, so that no output depends on a hidden pixel. The grid of the mask must divide both
        the image and the stem's output.
        """
        # channels_last throughout: 1.4x faster training on a CPU, and the blocks' BHWC views then copy nothing.
        images = images_B3SS.contiguous(memory_format=torch.channels_last)
        if token_mask_Bhw is None:
            features: Tensor = self.patch_embed(images)
        else:
            hidden = upsample_token_mask(token_mask_Bhw, side=images.shape[-1], name="image")[:, None]
            features = self.patch_embed(images.masked_fill(hidden, 0.0))
            hidden = upsample_token_mask(token_mask_Bhw, side=features.shape[-1], name="stem output")[:, None]
            token = features.new_zeros(self.mask_token_dim) if mask_token is None else mask_token
            features = torch.where(hidden, token.to(features.dtype).view(1, -1, 1, 1), features)
            features = features.contiguous(memory_format=torch.channels_last)  # torch.where returns NCHW
        for stage in self.layers:
            features = self.run_unit(stage, features)
        return features

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth, parameters) from the stem (0) to the neck.

        A downsampling has the depth of the block before it.
        """
        yield 0, list(self.patch_embed.parameters())
        depth = 0
        for stage in cast("Iterator[TinyStage]", iter(self.layers)):
            for block in stage.blocks:
                depth += 1
                yield depth, list(block.parameters())
            if stage.downsample is not None:
                yield depth, list(stage.downsample.parameters())
        yield depth + 1, list(self.neck.parameters())

    def units(self) -> Iterator[nn.Module]:
        """Yield the stages."""
        yield from self.layers


def _build_stage(spec: TinyViTSpec, index: int) -> TinyStage:
    from samgraft.shared.encoders.tiny_vit_layers import GridBlock, MBConv, PatchMerging, TinyStage

    dim, last = spec.embed_dims[index], len(spec.depths) - 1
    blocks: list[nn.Module]
    if index == 0:
        blocks = [MBConv(dim, dim, 4.0, nn.GELU, 0.0) for _ in range(spec.depths[0])]
    else:
        window, heads = spec.attn_window_sizes[index], spec.num_heads[index]
        blocks = [GridBlock(dim, heads, window_size=window) for _ in range(spec.depths[index])]
    downsample = None
    if index < last:
        downsample = PatchMerging(dim, spec.embed_dims[index + 1], nn.GELU)
        if index + 1 == last:
            # MobileSAM keeps the resolution at its last downsampling, where TinyViT halves it.
            downsample.conv2.conv.stride = (1, 1)
    return TinyStage(nn.Sequential(*blocks), downsample, is_conv=index == 0)
