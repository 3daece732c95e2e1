"""Hiera, the image encoder of SAM 2 and SAM 2.1 (sam2_t, sam2_s, sam2_bp, sam2_l), at any image size.

Tokens are kept in mask units of 32 x 32 pixels, which have 64 tokens in the first stage and one in the last. Within a
unit, tokens are in Z order, so that four consecutive tokens are a square that the next stage pools. Windows of the
first two stages are single units, and those of the others are squares of units. Leaving units out is therefore the same
computation with fewer units, as in Hiera's own masked autoencoder.

Shape letters: B = images; S = image side (pixels); g = S / 32, units per side; N = g g units, or those kept; T = tokens
per unit; C = channels; h, w = grid of ``token_mask``; U = channels of a unit over all its tokens.

Source: Ryali et al., Hiera (ICML 2023). Bolya et al., Window Attention is Bugged (ICLR 2024): the positions. Ravi et
al., SAM 2 (2024): shapes, global blocks and neck.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.base import (
    EncoderSpec,
    ImageFeatures,
    LayerNames,
    TokenDroppingEncoder,
    count_blocks,
    upsample_token_mask,
)
from samgraft.shared.encoders.unit_attention import (
    UnitPlan,
    UnitWindows,
    attend_within,
    plan_all_units,
    plan_kept_units,
)
from samgraft.shared.errors import WeightsError
from torch import Tensor, nn

TOKEN_PX = 4
"""Pixels per token of the first stage along a side."""
KERNEL_PX = 7
"""Side of the patch embedding's kernel in pixels. It reaches 3 px beyond a token's own 4 px to the left and the top."""
NUM_STAGES = 4
"""Stages. Each begins with half the resolution and twice the channels of the one before."""
UNIT_PX: int = TOKEN_PX * 2 ** (NUM_STAGES - 1)
"""Side of a mask unit in pixels, which is one token of the last stage."""


@dataclass(frozen=True, kw_only=True)
class HieraSpec(EncoderSpec):
    """Shape of Hiera in SAM 2, with one number per stage in tuples."""

    embed_dim: int
    """Channels of the first stage. Each further stage has twice as many."""
    depths: tuple[int, ...]
    num_heads: int
    """Attention heads of the first stage. Each further stage has twice as many."""
    global_blocks: tuple[int, ...]
    """Blocks with global attention, counted from 0. All others attend within windows."""
    attn_window_sizes: tuple[int, ...] = (8, 4, 14, 7)
    """Tokens along a side of an attention window. The first block of a stage has the window of the stage before."""
    background_size: int = 7
    """Side of the table of positions that is interpolated to the whole grid."""

    family: ClassVar[str] = "hiera"
    anchors: ClassVar[tuple[str, ...]] = (
        "trunk.patch_embed.proj.weight",
        "trunk.pos_embed_window",
        "trunk.blocks.0.norm1.weight",
    )
    layers: ClassVar[LayerNames] = LayerNames(
        linear=r"(attn\.(qkv|proj)|mlp\.layers\.[01])",
        norms=r"norm[12]",
        neck_convolutions=r"neck\.convs\.\d+\.conv",
        neck_norms=None,
    )
    default_objective: ClassVar[str] = "mae"
    decoder: ClassVar[str] = "sam2"
    release_formats: ClassVar[frozenset[str]] = frozenset({"sam", "transformers", "onnx"})

    @classmethod
    def published(cls) -> tuple[HieraSpec, ...]:
        """Return the shapes of SAM 2's encoders, which are those of SAM 2.1 too.

        Source:
            sam2/configs/sam2.1/*.yaml.
        """
        return (
            cls._of("sam2_t", embed_dim=96, depths=(1, 2, 7, 2), num_heads=1, global_blocks=(5, 7, 9)),
            cls._of("sam2_s", embed_dim=96, depths=(1, 2, 11, 2), num_heads=1, global_blocks=(7, 10, 13)),
            replace(
                cls._of("sam2_bp", embed_dim=112, depths=(2, 3, 16, 3), num_heads=2, global_blocks=(12, 16, 20)),
                background_size=14,
            ),
            replace(
                cls._of("sam2_l", embed_dim=144, depths=(2, 6, 36, 4), num_heads=2, global_blocks=(23, 33, 43)),
                attn_window_sizes=(8, 4, 16, 8),
            ),
        )

    @classmethod
    def _of(
        cls, arch: str, *, embed_dim: int, depths: tuple[int, ...], num_heads: int, global_blocks: tuple[int, ...]
    ) -> HieraSpec:
        return cls(
            arch=arch,
            native_image_size=1024,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            global_blocks=global_blocks,
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> HieraSpec:
        """Read the shape from tensors.

        Heads, global blocks and most windows leave no trace in the tensors. Those of an unpublished shape follow the
        published ones in their proportions, and ``assumptions`` reports it.
        """
        num_blocks = count_blocks(tensors, "trunk.blocks.")
        widths = [int(tensors[f"trunk.blocks.{i}.attn.proj.weight"].shape[0]) for i in range(num_blocks)]
        depths = tuple(len(list(blocks)) for _, blocks in groupby(widths))
        embed_dim = int(tensors["trunk.patch_embed.proj.weight"].shape[0])
        if len(depths) != NUM_STAGES:
            raise WeightsError(
                f"the image encoder has {len(depths)} stages in {num_blocks} blocks, expected {NUM_STAGES}. Save all "
                "of its tensors."
            )
        window = int(tensors["trunk.pos_embed_window"].shape[-1])
        background_size = int(tensors["trunk.pos_embed"].shape[-1])
        neck_dim = int(tensors["neck.convs.0.conv.weight"].shape[0])
        for spec in cls.published():
            if (spec.embed_dim, spec.depths, spec.attn_window_sizes[0]) == (embed_dim, depths, window):
                return replace(spec, background_size=background_size, neck_dim=neck_dim)
        last_of_third, spacing = sum(depths[:3]) - 1, max(1, round(depths[2] / 3.6))
        global_blocks = [last_of_third - i * spacing for i in (2, 1, 0)]
        return cls(
            arch="sam2_t",
            native_image_size=1024,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=max(1, embed_dim // 56),
            global_blocks=tuple(i for i in global_blocks if i >= sum(depths[:2])),
            attn_window_sizes=(window, 4, 16, 8) if embed_dim >= 144 else (window, 4, 14, 7),
            background_size=background_size,
            neck_dim=neck_dim,
        )

    def find_missing_end(self) -> str | None:
        """Return what shows that the last blocks of a file are missing, or None."""
        same = [spec for spec in self.published() if spec.embed_dim == self.embed_dim]
        if same and all(self.depths[-1] < spec.depths[-1] for spec in same):
            return f"{self.depths[-1]} blocks in the last stage, expected {same[0].depths[-1]}"
        return None

    @property
    def assumptions(self) -> str | None:
        """Numbers that the tensors of an unpublished shape do not contain, for a warning."""
        if self.is_standard:
            return None
        return (
            f"the encoder has no published shape ({self.title}); its tensors do not contain the number of heads "
            f"({self.num_heads}), the global blocks {list(self.global_blocks)} and the windows "
            f"{list(self.attn_window_sizes)}, which follow the published shapes"
        )

    def build(self, *, image_size: int) -> HieraEncoder:
        """Build the encoder with fresh weights for a square input of ``image_size`` pixels."""
        return HieraEncoder(self, image_size=image_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(int(self.embed_dim * 2**stage) for stage in range(NUM_STAGES))

    @property
    def stride(self) -> int:
        """Pixels per position of the image embeddings, which have the resolution of the third stage."""
        return UNIT_PX // 2

    @property
    def size_step(self) -> int:
        """Side of a mask unit in pixels."""
        return UNIT_PX

    @property
    def feature_dim(self) -> int:
        """Channels of the third and the fourth stage together, which the neck reads."""
        return self.widths[2] + self.widths[3]

    @property
    def mask_token_dim(self) -> int:
        """Channels of a token of the first stage."""
        return self.embed_dim

    @property
    def crop_unit(self) -> int:
        """Units along a side of an attention window of the last stage."""
        return self.attn_window_sizes[-1]

    @property
    def natural_mask_unit_px(self) -> int:
        """Side of a mask unit in pixels."""
        return UNIT_PX

    @property
    def title(self) -> str:
        """Name for messages, with width and blocks per stage."""
        names = {"sam2_t": "Hiera-T", "sam2_s": "Hiera-S", "sam2_bp": "Hiera-B+", "sam2_l": "Hiera-L"}
        name = names[self.arch] if self.is_standard else "Hiera of unpublished shape"
        return f"{name} ({self.embed_dim}x{'+'.join(map(str, self.depths))})"

    def block_names(self) -> list[str]:
        """Return the transformer blocks by module name."""
        return [f"trunk.blocks.{index}" for index in range(sum(self.depths))]

    def stage_of_block(self) -> list[int]:
        """Return the stage of each block, counted from 0."""
        return [stage for stage, depth in enumerate(self.depths) for _ in range(depth)]


class UnitAttention(nn.Module):
    """Attention of Hiera, whose queries are pooled where a stage begins."""

    def __init__(self, dim: int, dim_out: int, *, num_heads: int, pools: bool) -> None:
        super().__init__()
        self.num_heads, self.pools = num_heads, pools
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, tokens_BNTC: Tensor, windows: UnitWindows) -> Tensor:
        """Mix tokens within windows of units."""
        # Padding consists of zero tokens. A layer with an adapter may add to the bias, so it is run on one.
        is_linear = type(self.qkv) is nn.Linear
        padding_D = self.qkv.bias if is_linear else self.qkv(tokens_BNTC.new_zeros(tokens_BNTC.shape[-1]))
        qkv_BNTD = self.qkv(tokens_BNTC)
        mixed_BNTC = attend_within(qkv_BNTD, padding_D, windows, num_heads=self.num_heads, pools=self.pools)
        out: Tensor = self.proj(mixed_BNTC)
        return out


class UnitMLP(nn.Module):
    """MLP with the layer names of SAM 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)])

    def forward(self, tokens_BNTC: Tensor) -> Tensor:
        """Run both layers with a GELU between them."""
        out: Tensor = self.layers[1](F.gelu(self.layers[0](tokens_BNTC)))
        return out


class UnitBlock(nn.Module):
    """Transformer block of Hiera with SAM 2's parameters, for tokens in units."""

    def __init__(self, dim: int, dim_out: int, *, num_heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        pools = dim != dim_out
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = UnitAttention(dim, dim_out, num_heads=num_heads, pools=pools)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = UnitMLP(dim_out)
        self.proj = nn.Linear(dim, dim_out) if pools else None

    def forward(self, tokens_BNTC: Tensor, plan: UnitPlan) -> Tensor:
        """Run attention and MLP with their residuals, on a quarter of the tokens where a stage begins."""
        normed_BNTC = self.norm1(tokens_BNTC)
        if self.proj is not None:
            tokens_BNTC = self.proj(normed_BNTC).unflatten(2, (-1, 4)).amax(3)
        tokens_BNTC = tokens_BNTC + self.attn(normed_BNTC, plan.windows[self.side])
        out: Tensor = tokens_BNTC + self.mlp(self.norm2(tokens_BNTC))
        return out


class HieraTrunk(nn.Module):
    """Hiera with SAM 2's parameters and names, from pixels to the tokens of each stage."""

    def __init__(self, spec: HieraSpec) -> None:
        super().__init__()
        proj = nn.Conv2d(3, spec.embed_dim, kernel_size=KERNEL_PX, stride=TOKEN_PX, padding=KERNEL_PX // 2)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        background, window = spec.background_size, spec.attn_window_sizes[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.embed_dim, background, background))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, spec.embed_dim, window, window))
        self.blocks = nn.ModuleList()
        before = 0
        for index, stage in enumerate(spec.stage_of_block()):
            # The first block of a stage has the tokens and the windows of the stage before.
            tokens_per_side = UNIT_PX // TOKEN_PX // 2**before
            side, rest = divmod(spec.attn_window_sizes[before], tokens_per_side)
            if rest or not side:
                raise ValueError(f"attention windows must be whole units of {tokens_per_side} tokens.")
            self.blocks.append(
                UnitBlock(
                    spec.widths[before],
                    spec.widths[stage],
                    num_heads=spec.num_heads * 2**stage,
                    side=0 if index in spec.global_blocks else side,
                )
            )
            before = stage


class HieraNeck(nn.Module):
    """Feature pyramid of SAM 2 with one convolution per stage, the coarsest first.

    Only the image embeddings have a top-down part. It is nearest upsampling, which a 1 x 1 convolution can follow as
    well as precede, so that the last stage is upsampled before the neck.
    """

    def __init__(self, spec: HieraSpec) -> None:
        super().__init__()
        self.split = (spec.widths[2], spec.widths[3])
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, spec.neck_dim, kernel_size=1)))
            for width in reversed(spec.widths)
        )

    def forward(self, features_BChw: Tensor) -> Tensor:
        """Return the image embeddings of the third and the fourth stage's features."""
        third, fourth = features_BChw.split(self.split, dim=1)
        out: Tensor = self.convs[1](third) + self.convs[0](fourth)
        return out

    def forward_high_res(self, first_BCHW: Tensor, second_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of the first and the second stage with the channels of the embeddings."""
        return self.convs[3](first_BCHW), self.convs[2](second_BCHW)


class HieraEncoder(TokenDroppingEncoder):
    """Image encoder sam2_t, sam2_s, sam2_bp or sam2_l.

    It has SAM 2's parameters and names. ``forward`` equals SAM 2's ``vision_features`` at any image size that is a
    multiple of 32, and ``forward_visible`` encodes kept mask units only.
    """

    neck: HieraNeck
    entry_points = (*TokenDroppingEncoder.entry_points, "forward_with_high_res")
    neck_entry_points = ("forward_high_res",)

    def __init__(self, spec: HieraSpec, *, image_size: int) -> None:
        super().__init__(spec, image_size=image_size)
        self.unit_px = UNIT_PX
        self.unit_dim = 4 * spec.widths[2] + spec.widths[3]
        self.grid = image_size // UNIT_PX
        self.attn_window_size = spec.attn_window_sizes[-1]
        self.widths, self.stages = spec.widths, spec.stage_of_block()
        self.trunk = HieraTrunk(spec)
        self.neck = HieraNeck(spec)
        self._sides = {block.side for block in self.trunk.blocks if isinstance(block, UnitBlock)}
        self._last_plan: tuple[int, int, torch.device, UnitPlan] | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(
        self, images_B3SS: Tensor, *, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Return the third stage and the upsampled fourth one, shape (B, feature_dim, S / 16, S / 16).

        The patch embedding overlaps, so hidden pixels are set to zero before it. Its hidden tokens are then replaced by
        the mask token, to which positions are added as to any other token.
        """
        *_, third_BNTC, fourth_BNTC = self._run_all(images_B3SS, token_mask_Bhw, mask_token)
        return _join(third_BNTC, fourth_BNTC, grid=int(images_B3SS.shape[-1]) // UNIT_PX)

    def forward_with_high_res(self, images_B3SS: Tensor) -> ImageFeatures:
        """Return the image embeddings and the maps at strides 4 and 8, each of ``neck_dim`` channels."""
        grid = int(images_B3SS.shape[-1]) // UNIT_PX
        first_BNTC, second_BNTC, third_BNTC, fourth_BNTC = self._run_all(images_B3SS)
        embeddings_BChw = self.neck(_join(third_BNTC, fourth_BNTC, grid=grid))
        finer = (units_to_map(part_BNTC, grid=grid) for part_BNTC in (first_BNTC, second_BNTC))
        return ImageFeatures(embeddings_BChw, self.neck.forward_high_res(*finer))

    def forward_visible(self, images_B3SS: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Encode the kept units only, so that hidden ones cost nothing and influence nothing.

        Equal to the dense encoder with hidden tokens removed from every softmax and hidden pixels set to zero, and to
        the encoder itself if all units are kept. Arguments as in :class:`TokenDroppingEncoder`.

        Returns:
            The four tokens of the third stage and the token of the fourth one, joined, shape (B, N, U).
        """
        self.check_kept(images_B3SS, ids_keep_BN)
        ids_BN = ids_keep_BN.clamp(min=0)
        tokens_BNTC = self._embed_units(images_B3SS, ids_keep_BN)
        positions_NTC = self._positions(self.grid)
        tokens_BNTC = tokens_BNTC + positions_NTC[ids_BN]
        # Positions are those of the places in the whole grid.
        plan = plan_kept_units(ids_keep_BN, self.grid, self._sides, positions_NTC.dtype)
        *_, third_BNTC, fourth_BNTC = self._run_blocks(tokens_BNTC, plan)
        return torch.cat([third_BNTC.flatten(2), fourth_BNTC.flatten(2)], dim=-1)

    def units_to_features(self, units_BNU: Tensor) -> Tensor:
        """Put units in raster order together to features, shape (B, feature_dim, S / 16, S / 16)."""
        third, fourth = units_BNU.split([4 * self.widths[2], self.widths[3]], dim=-1)
        return _join(third.unflatten(-1, (4, -1)), fourth.unflatten(-1, (1, -1)), grid=self.grid)

    def features_to_units(self, features_BChw: Tensor) -> Tensor:
        """Return the tokens of features unit by unit, shape (B, N, U)."""
        tokens_BNTC = map_to_units(features_BChw, grid=features_BChw.shape[-1] // 2)
        third, fourth = tokens_BNTC.split([self.widths[2], self.widths[3]], dim=-1)
        return torch.cat([third.flatten(2), fourth[:, :, 0]], dim=-1)

    def high_res_layers(self) -> list[nn.Module]:
        """Return the neck's convolutions of the first two stages."""
        return [self.neck.convs[2], self.neck.convs[3]]

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth, parameters) from the patch embedding (0) to the neck."""
        trunk = self.trunk
        yield 0, [trunk.pos_embed, trunk.pos_embed_window, *trunk.patch_embed.parameters()]
        for index, block in enumerate(trunk.blocks):
            yield index + 1, list(block.parameters())
        yield len(trunk.blocks) + 1, list(self.neck.parameters())

    def units(self) -> Iterator[nn.Module]:
        """Yield the blocks."""
        yield from self.trunk.blocks

    def _run_all(
        self, images_B3SS: Tensor, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> list[Tensor]:
        """Return the tokens (B, N, T, C) of all four stages."""
        # Views of other sizes are encoded too, because positions are interpolated to any grid.
        side = int(images_B3SS.shape[-1])  # a tensor while ONNX export traces
        if images_B3SS.shape[1:] != (3, side, side) or side % UNIT_PX:
            raise ValueError(
                f"images must have shape (B, 3, S, S) with a multiple of {UNIT_PX} as S, got "
                f"{tuple(images_B3SS.shape)}."
            )
        grid = side // UNIT_PX
        if token_mask_Bhw is not None:
            hidden = upsample_token_mask(token_mask_Bhw, side=side, name="image")[:, None]
            images_B3SS = images_B3SS.masked_fill(hidden, 0.0)
        # channels_last keeps the channels of a token together, which the units need.
        images_B3SS = images_B3SS.contiguous(memory_format=torch.channels_last)
        map_BCHW = self.trunk.patch_embed(images_B3SS)
        if token_mask_Bhw is not None:
            hidden = upsample_token_mask(token_mask_Bhw, side=map_BCHW.shape[-1], name="token grid")[:, None]
            token = map_BCHW.new_zeros(self.mask_token_dim) if mask_token is None else mask_token.to(map_BCHW)
            map_BCHW = torch.where(hidden, token.view(1, -1, 1, 1), map_BCHW)
        tokens_BNTC = map_to_units(map_BCHW, grid=grid) + self._positions(grid)
        return self._run_blocks(tokens_BNTC, self._dense_plan(len(images_B3SS), grid, images_B3SS.device))

    def _run_blocks(self, tokens_BNTC: Tensor, plan: UnitPlan) -> list[Tensor]:
        """Return the tokens after the last block of each stage."""
        outputs = []
        for index, block in enumerate(self.trunk.blocks):
            tokens_BNTC = self.run_unit(block, tokens_BNTC, plan)
            if self.stages[index + 1 : index + 2] != [self.stages[index]]:
                outputs.append(tokens_BNTC)
        return outputs

    def _embed_units(self, images_B3SS: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Return the tokens (B, N, T, C) of kept units, without positions, from their own pixels only."""
        images, places = torch.arange(len(ids_keep_BN), device=ids_keep_BN.device)[:, None], ids_keep_BN.clamp(min=0)
        # A token sees 3 px to its left and top. Where they belong to a hidden unit they are zero.
        seen = images_B3SS.new_zeros(len(ids_keep_BN), self.grid**2)
        seen = seen.scatter_reduce(1, places, (ids_keep_BN >= 0).to(seen), reduce="amax")
        seen = seen.view(-1, 1, self.grid, self.grid).repeat_interleave(UNIT_PX, 2).repeat_interleave(UNIT_PX, 3)
        reach = KERNEL_PX // 2
        padded = F.pad(images_B3SS * seen, (reach, 0, reach, 0))
        # The last token of a unit ends with the unit, so its pixels and those before them are enough.
        cut = padded.unfold(2, UNIT_PX + reach, UNIT_PX).unfold(3, UNIT_PX + reach, UNIT_PX)
        units_BN3SS = cut[images, :, places // self.grid, places % self.grid]
        proj = self.trunk.patch_embed[0]
        assert isinstance(proj, nn.Conv2d)
        maps = F.conv2d(units_BN3SS.flatten(0, 1), proj.weight, proj.bias, stride=TOKEN_PX)
        return map_to_units(maps, grid=1).view(*ids_keep_BN.shape, -1, self.mask_token_dim)

    def _positions(self, grid: int) -> Tensor:
        """Return the positions of all units, shape (N, T, C)."""
        side = grid * UNIT_PX // TOKEN_PX
        background = F.interpolate(self.trunk.pos_embed, size=(side, side), mode="bicubic")
        repeats = side // self.trunk.pos_embed_window.shape[-1]
        return map_to_units(background + self.trunk.pos_embed_window.tile(1, 1, repeats, repeats), grid=grid)[0]

    def _dense_plan(self, num_images: int, grid: int, device: torch.device) -> UnitPlan:
        if torch.compiler.is_compiling():
            return plan_all_units(grid, self._sides, num_images, device)
        # The batch shape is the same at every step, so the plan of the last one is kept.
        if self._last_plan is None or self._last_plan[:3] != (num_images, grid, device):
            self._last_plan = (num_images, grid, device, plan_all_units(grid, self._sides, num_images, device))
        return self._last_plan[3]


def map_to_units(map_BCHW: Tensor, *, grid: int) -> Tensor:
    """Return the tokens of a map unit by unit, each unit in Z order, shape (B, N, T, C)."""
    # A side of 2^n tokens is cut into n halvings. Row and column bits alternate in Z order, the coarsest first.
    levels = (int(map_BCHW.shape[-1]) // grid).bit_length() - 1
    cut = map_BCHW.unflatten(3, (grid, *(2,) * levels)).unflatten(2, (grid, *(2,) * levels))
    rows, columns = range(2, 3 + levels), range(3 + levels, 4 + 2 * levels)
    order = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    units: Tensor = cut.permute(0, *order, 1).reshape(len(map_BCHW), grid * grid, 4**levels, map_BCHW.shape[1])
    return units


def units_to_map(units_BNTC: Tensor, *, grid: int) -> Tensor:
    """Return the map (B, C, H, W) of tokens in units, which undoes ``map_to_units``."""
    levels = (int(units_BNTC.shape[2]).bit_length() - 1) // 2
    count, channels, side = len(units_BNTC), units_BNTC.shape[-1], grid * 2**levels
    cut = units_BNTC.reshape(count, grid, grid, *(2,) * (2 * levels), channels)
    rows, columns = range(1, 3 + 2 * levels, 2), range(2, 3 + 2 * levels, 2)
    joined: Tensor = cut.permute(0, 3 + 2 * levels, *rows, *columns).reshape(count, channels, side, side)
    return joined


def _join(third_BNTC: Tensor, fourth_BNTC: Tensor, *, grid: int) -> Tensor:
    """Return the map of the third stage and the upsampled map of the fourth one, joined along the channels."""
    # Nearest upsampling of a unit's single token gives the same value to its four positions.
    fourth_BNTC = fourth_BNTC.expand(-1, -1, third_BNTC.shape[2], -1)
    return units_to_map(torch.cat([third_BNTC, fourth_BNTC], dim=-1), grid=grid)
