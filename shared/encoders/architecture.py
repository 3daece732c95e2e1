"""The four image encoders by their shapes, and the shapes read back from a file's tensors.

Everything that differs between vit_t, vit_b, vit_l and vit_h (or a small copy of one in a test) is a number in an
``ArchSpec``. Weights files are recognised by these numbers, never by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from samgraft.shared.errors import UsageError, WeightsError

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
MEDSAM_SHA256 = "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74"
"""MedSAM has the shape of SAM ViT-B and other pixel statistics: only its hash tells them apart."""


class Arch(Enum):
    """Image encoder by the field's name."""

    vit_t = "vit_t"
    vit_b = "vit_b"
    vit_l = "vit_l"
    vit_h = "vit_h"


class Stem(Enum):
    """How vit_t turns pixels into its first feature map."""

    conv1x1 = "conv1x1"
    """LiteMedSAM: two 1x1 convolutions of stride 1; 256 px become a 64x64 embedding (total stride 4)."""
    conv3x3 = "conv3x3"
    """MobileSAM: two 3x3 convolutions of stride 2; 1024 px become a 64x64 embedding (total stride 16)."""


@dataclass(frozen=True, kw_only=True)
class PlainShape:
    """Shape of segment_anything's windowed ViT."""

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    patch_size: int = 16
    attn_window_size: int = 14


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Shape of TinyViT as MobileSAM and LiteMedSAM use it."""

    stem: Stem
    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    attn_window_sizes: tuple[int, ...] = (7, 7, 14, 7)


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """One image encoder: exactly one of ``plain`` and ``tiny`` is given."""

    arch: Arch
    native_image_size: int
    """Size in pixels at which the published weights were trained."""
    plain: PlainShape | None = None
    tiny: TinyShape | None = None
    neck_dim: int = 256
    """Channels of the image embeddings; also the width of prompt encoder and mask decoder."""
    pixel_mean: tuple[float, float, float] = SAM_PIXEL_MEAN
    """Subtracted from pixels on the 0..255 scale."""
    pixel_std: tuple[float, float, float] = SAM_PIXEL_STD

    def __post_init__(self) -> None:
        if (self.plain is None) == (self.tiny is None):
            raise ValueError("ArchSpec must have exactly one of plain and tiny.")

    @property
    def stride(self) -> int:
        """Pixels per position of the image embedding."""
        if self.plain is not None:
            return self.plain.patch_size
        return 4 if self.stem is Stem.conv1x1 else 16

    @property
    def stem(self) -> Stem | None:
        """Stem of vit_t; None for the plain ViTs."""
        return self.tiny.stem if self.tiny else None

    @property
    def feature_dim(self) -> int:
        """Channels before the neck."""
        if self.plain is not None:
            return self.plain.embed_dim
        return self._tiny.embed_dims[-1]

    @property
    def mask_token_dim(self) -> int:
        """Channels where a mask token stands in for a hidden token (the stem's output)."""
        if self.plain is not None:
            return self.plain.embed_dim
        return self._tiny.embed_dims[0]

    @property
    def is_standard(self) -> bool:
        """True for the published shapes, False for small or foreign ones."""
        known = SPECS[(self.arch, self.stem)]
        return (self.plain, self.tiny, self.neck_dim) == (known.plain, known.tiny, known.neck_dim)

    @property
    def title(self) -> str:
        """Name for messages, e.g. ``ViT-B (768x12)``."""
        if self.plain is not None:
            name = f"ViT-{self.arch.value[-1].upper()}" if self.is_standard else "ViT of unpublished shape"
            return f"{name} ({self.plain.embed_dim}x{self.plain.depth})"
        name = "ViT-T" if self.is_standard else "TinyViT of unpublished shape"
        return f"{name} ({'LiteMedSAM' if self.stem is Stem.conv1x1 else 'MobileSAM'} stem)"

    @property
    def _tiny(self) -> TinyShape:
        assert self.tiny is not None
        return self.tiny

    def check_image_size(self, image_size: int) -> None:
        """Refuse a size that the grid does not divide.

        Raises:
            UsageError: If ``image_size`` is not a positive multiple of the stride.
        """
        step = self.stride
        if image_size < step or image_size % step:
            near = max(step, round(image_size / step) * step)
            raise UsageError(
                f"image_size must be a positive multiple of {step} for {self.arch.value}, got {image_size}. Use {near}."
            )


def _plain(arch: Arch, embed_dim: int, depth: int, num_heads: int, global_blocks: tuple[int, ...]) -> ArchSpec:
    shape = PlainShape(embed_dim=embed_dim, depth=depth, num_heads=num_heads, global_blocks=global_blocks)
    return ArchSpec(arch=arch, native_image_size=1024, plain=shape)


# Source: segment_anything/build_sam.py; mobile_sam/build_sam.py; LiteMedSAM's published weights.
SPECS: dict[tuple[Arch, Stem | None], ArchSpec] = {
    (Arch.vit_b, None): _plain(Arch.vit_b, 768, 12, 12, (2, 5, 8, 11)),
    (Arch.vit_l, None): _plain(Arch.vit_l, 1024, 24, 16, (5, 11, 17, 23)),
    (Arch.vit_h, None): _plain(Arch.vit_h, 1280, 32, 16, (7, 15, 23, 31)),
    (Arch.vit_t, Stem.conv3x3): ArchSpec(arch=Arch.vit_t, native_image_size=1024, tiny=TinyShape(stem=Stem.conv3x3)),
    # LiteMedSAM sees images scaled to [0, 1]: mean 0, standard deviation 255 on the 0..255 scale.
    (Arch.vit_t, Stem.conv1x1): ArchSpec(
        arch=Arch.vit_t,
        native_image_size=256,
        tiny=TinyShape(stem=Stem.conv1x1),
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(255.0, 255.0, 255.0),
    ),
}


def arch_spec(arch: Arch | ArchSpec | str, stem: Stem | None = None) -> ArchSpec:
    """Return the published shape of an architecture; an ``ArchSpec`` passes through.

    Args:
        arch: Architecture, its name, or a shape of one's own.
        stem: For vit_t only; default LiteMedSAM's.

    Raises:
        UsageError: If the name is unknown, or a stem is given for a plain ViT.
    """
    if isinstance(arch, ArchSpec):
        return arch
    try:
        arch = Arch(arch) if isinstance(arch, str) else arch
    except ValueError:
        known = ", ".join(a.value for a in Arch)
        raise UsageError(f"model must be one of {known}, got {arch!r}.") from None
    if arch is Arch.vit_t:
        return SPECS[(arch, stem or Stem.conv1x1)]
    if stem is not None:
        raise UsageError(f"stem must be left out for {arch.value}, got {stem.value}. Only vit_t has a choice of stem.")
    return SPECS[(arch, None)]


def spec_from_tensors(tensors: Mapping[str, torch.Tensor]) -> ArchSpec:
    """Read the encoder's shape from tensors under segment_anything's names (``image_encoder.*``).

    Raises:
        WeightsError: If there is no encoder among them or its shapes contradict each other.
    """
    encoder = {k.removeprefix("image_encoder."): v for k, v in tensors.items() if k.startswith("image_encoder.")}
    if "pos_embed" in encoder:
        return _plain_from_tensors(encoder)
    if "patch_embed.seq.0.c.weight" in encoder:
        return _tiny_from_tensors(encoder)
    raise WeightsError("weights must hold an image encoder (image_encoder.pos_embed or image_encoder.patch_embed).")


def image_size_from_tensors(tensors: Mapping[str, torch.Tensor], spec: ArchSpec) -> int:
    """Return the size a plain ViT's positions were made for; the native size for vit_t, which has none."""
    if spec.plain is None:
        return spec.native_image_size
    return int(tensors["image_encoder.pos_embed"].shape[1]) * spec.plain.patch_size


def _num_blocks(encoder: Mapping[str, torch.Tensor], prefix: str) -> int:
    indexes = {k[len(prefix) :].split(".", 1)[0] for k in encoder if k.startswith(prefix)}
    return 1 + max((int(i) for i in indexes if i.isdigit()), default=-1)


def _plain_from_tensors(encoder: Mapping[str, torch.Tensor]) -> ArchSpec:
    embed_dim, depth = int(encoder["pos_embed"].shape[-1]), _num_blocks(encoder, "blocks.")
    if not any("rel_pos" in key for key in encoder):
        return _partial_spec(embed_dim, depth, grid=int(encoder["pos_embed"].shape[1]))
    try:
        patch_size = int(encoder["patch_embed.proj.weight"].shape[-1])
        rows = [int(encoder[f"blocks.{i}.attn.rel_pos_h"].shape[0]) for i in range(depth)]
        head_dim = int(encoder["blocks.0.attn.rel_pos_h"].shape[1])
        neck_dim = int(encoder["neck.0.weight"].shape[0])
    except (KeyError, IndexError) as err:
        raise WeightsError(f"image encoder must be complete, image_encoder.{err.args[0]} is missing.") from err
    for spec in SPECS.values():
        known = spec.plain
        if known and (known.embed_dim, known.depth, embed_dim // head_dim) == (embed_dim, depth, known.num_heads):
            return spec
    # Positions of a global block cover the grid, those of a windowed block the window (27 rows at 14). Where both are
    # equal, one window is the grid and the two kinds are the same.
    grid = int(encoder["pos_embed"].shape[1])
    global_blocks = tuple(i for i, n in enumerate(rows) if n == 2 * grid - 1)
    global_blocks = () if len(global_blocks) == depth else global_blocks
    window = (next(n for i, n in enumerate(rows) if i not in global_blocks) + 1) // 2
    shape = PlainShape(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        global_blocks=global_blocks,
        patch_size=patch_size,
        attn_window_size=window,
    )
    native = grid * patch_size
    return ArchSpec(arch=Arch.vit_b, native_image_size=native, plain=shape, neck_dim=neck_dim)


def _partial_spec(embed_dim: int, depth: int, *, grid: int) -> ArchSpec:
    """Guess the shape of a plain ViT, whose heads and windows cannot be seen, from its width and depth."""
    for spec in SPECS.values():
        if spec.plain and (spec.plain.embed_dim, spec.plain.depth) == (embed_dim, depth):
            return spec
    shape = PlainShape(embed_dim=embed_dim, depth=depth, num_heads=max(1, embed_dim // 64), global_blocks=())
    return ArchSpec(arch=Arch.vit_b, native_image_size=16 * grid, plain=shape)


def _tiny_from_tensors(encoder: Mapping[str, torch.Tensor]) -> ArchSpec:
    kernel = int(encoder["patch_embed.seq.0.c.weight"].shape[-1])
    stem = Stem.conv1x1 if kernel == 1 else Stem.conv3x3
    known = SPECS[(Arch.vit_t, stem)]
    try:
        num_layers = _num_blocks(encoder, "layers.")
        embed_dims = [int(encoder["layers.0.blocks.0.conv1.c.weight"].shape[1])]
        depths = [_num_blocks(encoder, "layers.0.blocks.")]
        num_heads, windows = [known._tiny.num_heads[0]], [known._tiny.attn_window_sizes[0]]
        for i in range(1, num_layers):
            biases = encoder[f"layers.{i}.blocks.0.attn.attention_biases"]
            embed_dims.append(int(encoder[f"layers.{i}.blocks.0.attn.norm.weight"].shape[0]))
            depths.append(_num_blocks(encoder, f"layers.{i}.blocks."))
            num_heads.append(int(biases.shape[0]))
            windows.append(round(int(biases.shape[1]) ** 0.5))
        neck_dim = int(encoder["neck.0.weight"].shape[0])
    except (KeyError, IndexError) as err:
        raise WeightsError(f"image encoder must be complete, image_encoder.{err.args[0]} is missing.") from err
    shape = TinyShape(
        stem=stem,
        embed_dims=tuple(embed_dims),
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        attn_window_sizes=tuple(windows),
    )
    return ArchSpec(
        arch=Arch.vit_t,
        native_image_size=known.native_image_size,
        tiny=shape,
        neck_dim=neck_dim,
        pixel_mean=known.pixel_mean,
        pixel_std=known.pixel_std,
    )
