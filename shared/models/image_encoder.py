"""vit_b, vit_l and vit_h: segment_anything's image encoder at any size, for masked training too.

Shape letters: B = images; S = image side (pixels); g = S / 16 tokens per side; h, w = grid of ``token_mask``;
C = channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from samgraft.shared.errors import UsageError
from samgraft.shared.models.architecture import Arch, ArchSpec
from samgraft.shared.models.tiny_vit import TinyViTEncoder
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch.utils.checkpoint import checkpoint


class MaskableEncoder(Protocol):
    """What both stages may rely on, whatever the architecture."""

    spec: ArchSpec
    arch: Arch
    image_size: int
    feature_dim: int
    stride: int
    mask_token_dim: int
    activation_checkpointing: bool
    neck: nn.Sequential

    def forward_features(
        self,
        images_B3SS: torch.Tensor,
        *,
        token_mask_Bhw: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return features before the neck (B, feature_dim, S/stride, S/stride)."""
        ...

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth index, parameters) from stem to neck."""
        ...


class ImageEncoder(ImageEncoderViT):
    """segment_anything's parameters and names at any image size that is a multiple of the patch."""

    def __init__(self, spec: ArchSpec, *, image_size: int) -> None:
        if spec.plain is None:
            raise UsageError(f"ImageEncoder must get a plain ViT shape, got {spec.title}.")
        spec.check_image_size(image_size)
        plain = spec.plain
        super().__init__(
            img_size=image_size,
            patch_size=plain.patch_size,
            embed_dim=plain.embed_dim,
            depth=plain.depth,
            num_heads=plain.num_heads,
            out_chans=spec.neck_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=plain.attn_window_size,
            global_attn_indexes=plain.global_blocks,
        )
        self.spec = spec
        self.arch = spec.arch
        self.image_size = image_size
        self.feature_dim = spec.feature_dim
        self.stride = spec.stride
        self.mask_token_dim = spec.mask_token_dim
        self.activation_checkpointing = False

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Return image embeddings (B, 256, g, g)."""
        out: torch.Tensor = self.neck(self.forward_features(images_B3SS))
        return out

    def forward_features(
        self,
        images_B3SS: torch.Tensor,
        *,
        token_mask_Bhw: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return features before the neck, with hidden tokens replaced by ``mask_token`` in place.

        Args:
            images_B3SS: Images after ``to_pixels``.
            token_mask_Bhw: True = hidden, on any grid that divides the token grid.
            mask_token: Shape (C,); zeros if None. Positions are added to it as to any token.

        Returns:
            Shape (B, C, g, g).
        """
        tokens = self.patch_embed(images_B3SS)
        if token_mask_Bhw is not None:
            token = tokens.new_zeros(self.mask_token_dim) if mask_token is None else mask_token.to(tokens.dtype)
            hidden = _to_token_grid(token_mask_Bhw, side=tokens.shape[1])
            tokens = torch.where(hidden[..., None], token, tokens)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        out: torch.Tensor = tokens.permute(0, 3, 1, 2)
        return out

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth index, parameters) from the patch embedding (0) to the neck."""
        yield 0, [self.pos_embed, *self.patch_embed.parameters()]
        for index, block in enumerate(self.blocks):
            yield index + 1, list(block.parameters())
        yield len(self.blocks) + 1, list(self.neck.parameters())


def build_image_encoder(spec: ArchSpec, *, image_size: int) -> ImageEncoder | TinyViTEncoder:
    """Build the encoder of a shape with fresh weights."""
    if spec.plain is None:
        return TinyViTEncoder(spec, image_size=image_size)
    return ImageEncoder(spec, image_size=image_size)


def _to_token_grid(token_mask_Bhw: torch.Tensor, *, side: int) -> torch.Tensor:
    height, width = token_mask_Bhw.shape[-2:]
    if token_mask_Bhw.dtype != torch.bool:
        raise ValueError(f"token_mask must be bool (True = hidden), got {token_mask_Bhw.dtype}.")
    if height != width or side % height:
        raise ValueError(f"token_mask grid must be square and divide the token grid {side}, got {height}x{width}.")
    if height == side:
        return token_mask_Bhw
    scaled = F.interpolate(token_mask_Bhw[:, None].to(torch.uint8), scale_factor=side // height, mode="nearest")
    return scaled[:, 0].bool()
