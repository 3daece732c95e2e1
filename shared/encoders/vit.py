"""Windowed vision transformers of segment_anything (vit_b, vit_l, vit_h) at any image size.

Shape letters: B = images; S = image side (pixels); g = S / patch size, tokens per side; N = g g tokens, or those kept;
h, w = grid of ``token_mask``; C = channels; P = numbers per patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.attention import Plan, plan_all, plan_visible
from samgraft.shared.encoders.base import (
    EncoderSpec,
    FixedGridEncoder,
    LayerNames,
    build_neck,
    count_blocks,
    cut_patches,
    upsample_token_mask,
)
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ViTSpec(EncoderSpec):
    """Shape of segment_anything's windowed ViT."""

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    """Blocks with global attention, counted from 0. All others attend within windows."""
    patch_size: int = 16
    attn_window_size: int = 14

    family: ClassVar[str] = "plain"
    anchors: ClassVar[tuple[str, ...]] = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight")
    layers: ClassVar[LayerNames] = LayerNames(linear=r"(attn\.(qkv|proj)|mlp\.lin[12])", norms=r"norm[12]")
    default_objective: ClassVar[str] = "mae"
    release_formats: ClassVar[frozenset[str]] = frozenset({"sam", "transformers", "onnx"})

    @classmethod
    def published(cls) -> tuple[ViTSpec, ...]:
        """Return the shapes of SAM's encoders.

        Source:
            segment_anything/build_sam.py.
        """
        numbers = {
            "vit_b": (768, 12, 12, (2, 5, 8, 11)),
            "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
            "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
        }
        return tuple(
            cls(
                arch=arch,
                native_image_size=1024,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
                global_blocks=global_blocks,
            )
            for arch, (embed_dim, depth, num_heads, global_blocks) in numbers.items()
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ViTSpec:
        """Read the shape from tensors.

        Without relative positions (MAE, DINO) it is guessed from width and depth.
        """
        embed_dim, depth = int(tensors["pos_embed"].shape[-1]), count_blocks(tensors, "blocks.")
        grid = int(tensors["pos_embed"].shape[1])
        has_relative_positions = any("rel_pos" in key for key in tensors)
        # Heads and windows leave no trace in the tensors without relative positions.
        head_dim = int(tensors["blocks.0.attn.rel_pos_h"].shape[1]) if has_relative_positions else None
        for spec in cls.published():
            if (spec.embed_dim, spec.depth) == (embed_dim, depth) and head_dim in (None, embed_dim // spec.num_heads):
                return spec
        guess = cls(
            arch="vit_b",
            native_image_size=16 * grid,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=max(1, embed_dim // (head_dim or 64)),
            global_blocks=(),
        )
        if not has_relative_positions:
            return guess
        # The relative positions of a global block cover the grid (2 g - 1 rows), those of a windowed block the window
        # (27 rows at 14). Where both are equal one window is the grid, and the two kinds of block are the same.
        rows = [int(tensors[f"blocks.{i}.attn.rel_pos_h"].shape[0]) for i in range(depth)]
        global_blocks = tuple(i for i, n in enumerate(rows) if n == 2 * grid - 1)
        global_blocks = () if len(global_blocks) == depth else global_blocks
        patch_size = int(tensors["patch_embed.proj.weight"].shape[-1])
        return replace(
            guess,
            native_image_size=grid * patch_size,
            global_blocks=global_blocks,
            patch_size=patch_size,
            attn_window_size=(next(n for i, n in enumerate(rows) if i not in global_blocks) + 1) // 2,
            neck_dim=int(tensors["neck.0.weight"].shape[0]),
        )

    def find_missing_end(self) -> str | None:
        """Return what shows that the last blocks of a file are missing, or None."""
        for known in self.published():
            if (known.embed_dim, known.num_heads) == (self.embed_dim, self.num_heads) and self.depth < known.depth:
                return f"{self.depth} blocks, expected {known.depth} at a width of {self.embed_dim}"
        if self.global_blocks and self.global_blocks[-1] != self.depth - 1:
            return f"the last of {self.depth} blocks attends within windows, expected a global block at the end"
        return None

    def image_size_of(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the input side in pixels that the absolute positions were made for."""
        return int(tensors["pos_embed"].shape[1]) * self.patch_size

    def build(self, *, image_size: int) -> ViTEncoder:
        """Build the encoder with fresh weights for a square input of ``image_size`` pixels."""
        return ViTEncoder(self, image_size=image_size)

    @property
    def stride(self) -> int:
        """Pixels per token along a side."""
        return self.patch_size

    @property
    def feature_dim(self) -> int:
        """Channels before the neck."""
        return self.embed_dim

    @property
    def mask_token_dim(self) -> int:
        """Channels of a token."""
        return self.embed_dim

    @property
    def crop_unit(self) -> int:
        """Tokens along a side of an attention window."""
        return self.attn_window_size

    @property
    def natural_mask_unit_px(self) -> int:
        """Side of one token in pixels."""
        return self.patch_size

    @property
    def title(self) -> str:
        """Name for messages, with width and depth."""
        name = f"ViT-{self.arch[-1].upper()}" if self.is_standard else "ViT of unpublished shape"
        return f"{name} ({self.embed_dim}x{self.depth})"

    @property
    def registry_name(self) -> str | None:
        """Name in ``sam_model_registry``, which builds the published shapes."""
        return self.arch if self.is_standard else None

    def block_names(self) -> list[str]:
        """Return the transformer blocks by module name."""
        return [f"blocks.{index}" for index in range(self.depth)]

    def has_tensors_of(self, other: EncoderSpec) -> bool:
        """Return True if weights have the same names and shapes, position tables aside."""
        numbers = ("embed_dim", "depth", "num_heads", "patch_size")
        return isinstance(other, ViTSpec) and all(getattr(self, n) == getattr(other, n) for n in numbers)


class ViTEncoder(FixedGridEncoder):
    """Image encoder vit_b, vit_l or vit_h.

    It has segment_anything's parameters and names, at any image size that is a multiple of the patch. ``forward``
    equals segment_anything's encoder; ``forward_visible`` encodes kept tokens only.
    """

    def __init__(self, spec: ViTSpec, *, image_size: int) -> None:
        from samgraft.shared.encoders.vit_layers import PatchEmbed, PlannedBlock

        super().__init__(spec, image_size=image_size)
        self.grid, self.unit_px, self.unit_dim = image_size // spec.patch_size, spec.patch_size, spec.embed_dim
        self.attn_window_size = spec.attn_window_size
        self._last_plan: tuple[int, torch.device, Plan] | None = None
        patch = (spec.patch_size, spec.patch_size)
        self.patch_embed = PatchEmbed(kernel_size=patch, stride=patch, embed_dim=spec.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid, self.grid, spec.embed_dim))
        self.blocks = nn.ModuleList()
        for index in range(spec.depth):
            windowed = index not in spec.global_blocks
            side = spec.attn_window_size if windowed else self.grid
            self.blocks.append(PlannedBlock(spec.embed_dim, num_heads=spec.num_heads, side=side, windowed=windowed))
        self.neck = build_neck(spec.embed_dim, spec.neck_dim)

    def forward_features(
        self, images_B3SS: Tensor, *, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Return features before the neck (B, C, g, g), with hidden tokens replaced by a mask token.

        Positions are added to the mask token as to any other token.
        """
        self._check_images(images_B3SS)
        tokens_BggC: Tensor = self.patch_embed(images_B3SS)
        if token_mask_Bhw is not None:
            token = tokens_BggC.new_zeros(self.mask_token_dim) if mask_token is None else mask_token.to(tokens_BggC)
            hidden_Bgg = upsample_token_mask(token_mask_Bhw, side=self.grid, name="token grid")
            tokens_BggC = torch.where(hidden_Bgg[..., None], token, tokens_BggC)
        tokens_BNC = (tokens_BggC + self.pos_embed).flatten(1, 2)
        plan = self._dense_plan(len(images_B3SS), images_B3SS.device)
        if plan.order is None:
            tokens_BNC = self._run_blocks(tokens_BNC, plan)
        else:
            # Tokens are kept window by window through all blocks and brought back to raster order once.
            tokens_BNC = self._run_blocks(tokens_BNC.index_select(1, plan.order), plan)
            tokens_BNC = tokens_BNC.index_select(1, plan.order.argsort())
        return tokens_BNC.transpose(1, 2).reshape(len(images_B3SS), -1, self.grid, self.grid)

    def forward_visible(self, images_B3SS: Tensor, ids_keep_BN: Tensor, *, relative_positions: bool = True) -> Tensor:
        """Encode the kept tokens only, so that hidden ones cost nothing and influence nothing.

        Equal to the dense encoder with hidden tokens removed from every softmax, and to the encoder itself if all
        tokens are kept. Arguments and result as in :class:`TokenDroppingEncoder`.

        Without relative positions the blocks run as in the official MAE code. Published continuations of SAM by
        masked modelling were most likely trained like that; SAM itself and stage 2 use windows and relative positions.

        Raises:
            ValueError: If images have another size, or ``ids_keep_BN`` is empty or out of range.
        """
        self.check_kept(images_B3SS, ids_keep_BN)
        patches_BNP = cut_patches(images_B3SS, self.stride)
        places_BNP = ids_keep_BN.clamp(min=0)[..., None].expand(-1, -1, patches_BNP.shape[-1])
        patches_BNP = patches_BNP.gather(1, places_BNP)
        if not relative_positions:
            return self._run_blocks(self._embed_patches(patches_BNP, ids_keep_BN), None)
        return self.forward_patches(patches_BNP, ids_keep_BN)

    def forward_patches(self, patches_BNP: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Encode patches as if they were at these places of the grid and no other token existed."""
        tokens_BNC = self._embed_patches(patches_BNP, ids_keep_BN)
        return self._run_blocks(tokens_BNC, plan_visible(ids_keep_BN, grid=self.grid, side=self.attn_window_size))

    def units_to_features(self, units_BNC: Tensor) -> Tensor:
        """Put tokens in raster order together to features, shape (B, C, g, g)."""
        features_BCgg: Tensor = units_BNC.mT.unflatten(2, (self.grid, self.grid))
        return features_BCgg

    def features_to_units(self, features_BCgg: Tensor) -> Tensor:
        """Return the tokens of features in raster order, shape (B, N, C)."""
        return features_BCgg.flatten(2).mT

    def relative_position_tables(self) -> list[nn.Parameter]:
        """Return the parameters that ``relative_positions=False`` does not use."""
        return [p for name, p in self.named_parameters() if name.endswith(("rel_pos_h", "rel_pos_w"))]

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth, parameters) from the patch embedding (0) to the neck."""
        yield 0, [self.pos_embed, *self.patch_embed.parameters()]
        for index, block in enumerate(self.blocks):
            yield index + 1, list(block.parameters())
        yield len(self.blocks) + 1, list(self.neck.parameters())

    def units(self) -> Iterator[nn.Module]:
        """Yield the blocks."""
        yield from self.blocks

    def for_export(self) -> nn.Module:
        """Return segment_anything's own encoder with these weights, which has no custom autograd function."""
        from segment_anything.modeling import ImageEncoderViT

        spec = self.spec
        assert isinstance(spec, ViTSpec)
        stock: nn.Module = ImageEncoderViT(
            img_size=self.image_size,
            patch_size=spec.patch_size,
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=4,
            out_chans=spec.neck_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec.attn_window_size,
            global_attn_indexes=spec.global_blocks,
        )
        stock.load_state_dict(self.state_dict(), strict=True)
        return stock.eval()

    def _embed_patches(self, patches_BNP: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Return the tokens (B, N, C) of patches, with the positions of their places added."""
        proj = self.patch_embed.proj
        positions_BNC = self.pos_embed.flatten(0, 2)[ids_keep_BN.clamp(min=0)]
        return F.linear(patches_BNP, proj.weight.flatten(1), proj.bias) + positions_BNC

    def _dense_plan(self, num_images: int, device: torch.device) -> Plan:
        if torch.compiler.is_compiling():
            return plan_all(self.grid, self.attn_window_size, num_images, device)
        # The batch shape is the same at every step, so the plan of the last one is kept.
        if self._last_plan is None or self._last_plan[:2] != (num_images, device):
            plan = plan_all(self.grid, self.attn_window_size, num_images, device)
            self._last_plan = (num_images, device, plan)
        return self._last_plan[2]

    def _check_images(self, images_B3SS: Tensor) -> None:
        if images_B3SS.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images_B3SS.shape)}.")

    def _run_blocks(self, tokens_BNC: Tensor, plan: Plan | None) -> Tensor:
        for block in self.blocks:
            tokens_BNC = self.run_unit(block, tokens_BNC, plan)
        return tokens_BNC
