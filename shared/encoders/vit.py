"""vit_b, vit_l and vit_h: segment_anything's image encoder at any size, for masked training too.

Shape letters: B = images; S = image side (pixels); g = S / 16 tokens per side; N = g g tokens, or
those kept; h, w = grid of ``token_mask``; C = channels; P = numbers per patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.architecture import Arch, ArchSpec
from samgraft.shared.encoders.relpos_attention import attend, plan_all, plan_visible
from samgraft.shared.encoders.tiny_vit import TinyViTEncoder, build_neck
from samgraft.shared.encoders.windows import Plan
from samgraft.shared.errors import UsageError
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Attention, PatchEmbed
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


class RelPosAttention(Attention):
    """segment_anything's attention, same parameters; who attends to whom comes from a plan."""

    def __init__(self, dim: int, *, num_heads: int, side: int, windowed: bool) -> None:
        super().__init__(dim, num_heads=num_heads, use_rel_pos=True, input_size=(side, side))
        self.windowed = windowed

    def forward(self, tokens_BNC: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Attend within the plan's windows, or globally."""
        windows = plan.windowed if self.windowed else plan.everyone
        # What a zero-padded position contributes; a layer that carries an adapter is asked itself.
        is_plain = type(self.qkv) is nn.Linear
        padding_D = self.qkv.bias if is_plain else self.qkv(tokens_BNC.new_zeros(tokens_BNC.shape[-1]))
        mixed = attend(
            self.qkv(tokens_BNC), padding_D, self.rel_pos_h, self.rel_pos_w, windows, num_heads=self.num_heads
        )
        out: torch.Tensor = self.proj(mixed)
        return out


class PlannedBlock(nn.Module):
    """segment_anything's transformer block, same parameters, on tokens in any order."""

    def __init__(self, dim: int, *, num_heads: int, side: int, windowed: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelPosAttention(dim, num_heads=num_heads, side=side, windowed=windowed)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(embedding_dim=dim, mlp_dim=4 * dim)

    def forward(self, tokens_BNC: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Attention and MLP with their residuals."""
        tokens_BNC = tokens_BNC + self.attn(self.norm1(tokens_BNC), plan)
        out: torch.Tensor = tokens_BNC + self.mlp(self.norm2(tokens_BNC))
        return out


class ImageEncoder(nn.Module):
    """segment_anything's parameters and names at any image size that is a multiple of the patch; same outputs, faster.

    ``forward`` and ``forward_features`` equal segment_anything's encoder. ``forward_visible`` runs kept tokens only.
    """

    def __init__(self, spec: ArchSpec, *, image_size: int) -> None:
        super().__init__()
        if spec.plain is None:
            raise UsageError(f"ImageEncoder must get a plain ViT shape, got {spec.title}.")
        spec.check_image_size(image_size)
        plain = spec.plain
        self.spec = spec
        self.arch = spec.arch
        self.img_size = image_size  # segment_anything's name: Sam.preprocess and postprocess_masks read it
        self.image_size = image_size
        self.grid = image_size // plain.patch_size
        self.attn_window_size = plain.attn_window_size
        self.feature_dim = spec.feature_dim
        self.stride = spec.stride
        self.mask_token_dim = spec.mask_token_dim
        self.activation_checkpointing = False
        self._last_plan: tuple[int, torch.device, Plan] | None = None
        patch = (plain.patch_size, plain.patch_size)
        self.patch_embed = PatchEmbed(kernel_size=patch, stride=patch, embed_dim=plain.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid, self.grid, plain.embed_dim))
        self.blocks = nn.ModuleList()
        for index in range(plain.depth):
            windowed = index not in plain.global_blocks
            side = plain.attn_window_size if windowed else self.grid
            self.blocks.append(PlannedBlock(plain.embed_dim, num_heads=plain.num_heads, side=side, windowed=windowed))
        self.neck = build_neck(plain.embed_dim, spec.neck_dim)

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
        tokens_BggC = self._embed(images_B3SS)
        if token_mask_Bhw is not None:
            token = tokens_BggC.new_zeros(self.mask_token_dim) if mask_token is None else mask_token.to(tokens_BggC)
            hidden = _to_token_grid(token_mask_Bhw, side=self.grid)
            tokens_BggC = torch.where(hidden[..., None], token, tokens_BggC)
        tokens_BNC = (tokens_BggC + self.pos_embed).flatten(1, 2)
        plan = self._dense_plan(len(images_B3SS), images_B3SS.device)
        if plan.order is None:
            raster_BNC = self._run_blocks(tokens_BNC, plan)
        else:
            tokens_BNC = self._run_blocks(tokens_BNC.index_select(1, plan.order), plan)
            raster_BNC = tokens_BNC.index_select(1, plan.order.argsort())
        return raster_BNC.transpose(1, 2).reshape(len(images_B3SS), -1, self.grid, self.grid)

    def forward_visible(self, images_B3SS: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
        """Encode kept tokens only: hidden ones cost nothing and influence nothing.

        Equal to the dense encoder in which hidden tokens are removed from every softmax; with all tokens kept, to the
        encoder itself.

        Args:
            images_B3SS: Images after ``to_pixels``.
            ids_keep_BN: Raster numbers of the kept tokens of each image, int64, any order, no repeats; -1 fills up
                images that keep fewer than others.

        Returns:
            Features before the neck in the order of ``ids_keep_BN``, shape (B, N, C); undefined where it is -1.
        """
        self._check_images(images_B3SS)
        side = self.grid * self.grid
        if (
            ids_keep_BN.ndim != 2
            or not ids_keep_BN.shape[1]
            or bool((ids_keep_BN < -1).any() | (ids_keep_BN >= side).any())
        ):
            raise ValueError(f"ids_keep must be (B, N) token numbers below {side}, at least one, got {ids_keep_BN}.")
        patches_BNP = cut_patches(images_B3SS, self.stride)
        ids = ids_keep_BN.clamp(min=0)
        return self._encode_patches(
            patches_BNP.gather(1, ids[..., None].expand(-1, -1, patches_BNP.shape[-1])), ids_keep_BN
        )

    def forward_patches(self, patches_BNP: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
        """Encode patches as if they stood at these places of the grid and nothing else existed.

        Args:
            patches_BNP: From ``cut_patches``, of images after ``to_pixels``.
            ids_keep_BN: As for ``forward_visible``; not checked again.

        Returns:
            As ``forward_visible``.
        """
        return self._encode_patches(patches_BNP, ids_keep_BN)

    def _encode_patches(self, patches_BNP: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
        tokens_BNC = self.embed_patches(patches_BNP, ids_keep_BN)
        plan = plan_visible(ids_keep_BN, grid=self.grid, side=self.attn_window_size)
        return self._run_blocks(tokens_BNC, plan)

    def embed_patches(self, patches_BNP: torch.Tensor, ids_keep_BN: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, N, C) of patches with the positions of their places added."""
        proj = self.patch_embed.proj
        positions_BNC = self.pos_embed.flatten(0, 2)[ids_keep_BN.clamp(min=0)]
        return F.linear(patches_BNP, proj.weight.flatten(1), proj.bias) + positions_BNC

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth index, parameters) from the patch embedding (0) to the neck."""
        yield 0, [self.pos_embed, *self.patch_embed.parameters()]
        for index, block in enumerate(self.blocks):
            yield index + 1, list(block.parameters())
        yield len(self.blocks) + 1, list(self.neck.parameters())

    def _dense_plan(self, num_images: int, device: torch.device) -> Plan:
        """Plan of the last batch shape, kept because it is the same at every step."""
        if torch.compiler.is_compiling():
            return plan_all(self.grid, self.attn_window_size, num_images, device)
        if self._last_plan is None or self._last_plan[:2] != (num_images, device):
            plan = plan_all(self.grid, self.attn_window_size, num_images, device)
            self._last_plan = (num_images, device, plan)
        return self._last_plan[2]

    def _embed(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        self._check_images(images_B3SS)
        tokens: torch.Tensor = self.patch_embed(images_B3SS)
        return tokens

    def _check_images(self, images_B3SS: torch.Tensor) -> None:
        if images_B3SS.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images_B3SS.shape)}.")

    def _run_blocks(self, tokens_BNC: torch.Tensor, plan: Plan) -> torch.Tensor:
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens_BNC = checkpoint(block, tokens_BNC, plan, use_reentrant=False)
            else:
                tokens_BNC = block(tokens_BNC, plan)
        return tokens_BNC


def cut_patches(images_B3SS: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into flattened patches (B, g g, 3 p p), channel first as in the convolution's weight."""
    side = images_B3SS.shape[-1] // patch_size
    cut = images_B3SS.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))
    patches: torch.Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches


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
