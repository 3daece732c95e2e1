"""Base classes of image encoders and of their shapes.

An encoder family is one file in this folder and one line in ``registry.FAMILIES``. The file contains a subclass of
:class:`EncoderSpec`, which declares every fact about the family that other code uses, and a subclass of
:class:`ImageEncoder`, which it builds. No code outside ``encoders/`` and ``weights/`` tests for a family.

An encoder of several scales (Hiera of SAM 2) fits in as follows. ``forward_features`` returns its maps at ``stride``
and coarser, upsampled to ``stride`` and concatenated along the channels, which its neck reduces to the image
embeddings: with nearest upsampling this equals a feature pyramid. ``forward_with_high_res`` adds finer maps, which
SAM 2's mask decoder reads beside the embeddings.

Shape letters: B = images; S = image side (pixels); h, w = grid of ``token_mask``; C = channels; N = kept tokens;
P = numbers per patch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from samgraft.shared.errors import UsageError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)
MEDSAM_SHA256 = "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74"
"""Hash of MedSAM's file. It has the tensors of SAM ViT-B but other pixel statistics, so only the hash identifies it."""


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Names of the layers that adapters change, as regular expressions.

    All but ``convolutions`` are relative to one transformer block.
    """

    linear: str
    """Linear layers of attention and MLP."""
    norms: str
    """Norm layers."""
    qkv: str = r"attn\.qkv"
    """Linear layer that computes queries, keys and values at once."""
    attention: str = "attn"
    """Attention module."""
    mlp: str = "mlp"
    """MLP module."""
    convolutions: str | None = None
    """Convolutions outside the transformer blocks that LoRA can be merged into, relative to the encoder."""
    neck_convolutions: str = r"neck\.[02]"
    """Convolutions of the neck, relative to the encoder."""
    neck_norms: str | None = r"neck\.[13]"
    """Norm layers of the neck, relative to the encoder. None if it has none."""


class ImageFeatures(NamedTuple):
    """Image embeddings, and the finer maps that some mask decoders read beside them."""

    embeddings: Tensor
    """Shape (B, C, h, w)."""
    high_res: tuple[Tensor, ...] = ()
    """Maps (B, C_i, h_i, w_i) of the same images, from fine to coarse. Empty for decoders of the first SAM."""

    def of_images(self, images: Tensor | slice) -> ImageFeatures:
        """Return the features of chosen images, in this order."""
        return self.map(lambda one: one[images])

    def map(self, change: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """Return the features with a function applied to every map."""
        return ImageFeatures(change(self.embeddings), tuple(change(one) for one in self.high_res))


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(ABC):
    """Shape of an image encoder and the facts about its family.

    A subclass adds the numbers that differ between its encoders as fields. Weights files are recognised by these
    numbers, never by their names.
    """

    arch: str
    """Name of the architecture in commands, configurations and cards, such as ``vit_b``."""
    native_image_size: int
    """Side of the input in pixels at which the published weights were trained."""
    neck_dim: int = 256
    """Channels of the image embeddings and width of prompt encoder and mask decoder."""
    pixel_mean: tuple[float, float, float] = SAM_PIXEL_MEAN
    """Mean that is subtracted from pixels on the 0..255 scale."""
    pixel_std: tuple[float, float, float] = SAM_PIXEL_STD
    """Standard deviation that divides pixels on the 0..255 scale."""

    family: ClassVar[str]
    """Key of the family's shape in stored dictionaries."""
    anchors: ClassVar[tuple[str, ...]]
    """Tensors (without ``image_encoder.``) by which an encoder is found in a file. They are several, so that a damaged
    file without one of them is still recognised and refused by name."""
    layers: ClassVar[LayerNames]
    """Layers that adapters change."""
    default_objective: ClassVar[str]
    """Objective of stage 1 when none is given."""
    decoder: ClassVar[str] = "sam"
    """Prompt encoder and mask decoder that belong to this family, a key of ``sam.DECODERS``."""
    release_formats: ClassVar[frozenset[str]] = frozenset({"sam", "onnx"})
    """Release formats that this family supports, among ``sam``, ``transformers`` and ``onnx``."""

    # ---- the published shapes and the shape of a file

    @classmethod
    @abstractmethod
    def published(cls) -> tuple[Self, ...]:
        """Return the shapes of published weights, the default variant of each architecture first."""

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if tensors, named without ``image_encoder.``, belong to this family."""
        return any(name in tensors for name in cls.anchors)

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read the shape from tensors named without ``image_encoder.``.

        Raises:
            KeyError: If a tensor that the shape is read from is missing.
            IndexError: If such a tensor has too few dimensions.
        """

    def image_size_of(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the input side in pixels of tensors, by default the native one."""
        return self.native_image_size

    @abstractmethod
    def build(self, *, image_size: int) -> ImageEncoder:
        """Build the encoder with fresh weights for a square input of ``image_size`` pixels."""

    def find_missing_end(self) -> str | None:
        """Return what shows that the last blocks of a file are missing, or None."""
        return None

    @property
    def assumptions(self) -> str | None:
        """Numbers of this shape that its tensors do not contain and that were assumed, for a warning."""
        return None

    # ---- numbers that both stages read

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels per position of the image embeddings."""

    @property
    def size_step(self) -> int:
        """Pixels that the side of every image is a multiple of, by default the stride."""
        return self.stride

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Channels before the neck."""

    @property
    @abstractmethod
    def mask_token_dim(self) -> int:
        """Channels at the place where a mask token replaces a hidden token."""

    @property
    @abstractmethod
    def crop_unit(self) -> int:
        """Steps of ``size_step`` that small crops are a multiple of, so that no attention window is padded."""

    @property
    def natural_mask_unit_px(self) -> int | None:
        """Side in pixels of the natural hidden square, or None if every multiple of the stride is equal."""
        return None

    @property
    @abstractmethod
    def title(self) -> str:
        """Name for messages, such as ``ViT-B (768x12)``."""

    @property
    def variant(self) -> str | None:
        """Variant within the architecture, such as the stem of vit_t. None if there is only one."""
        return None

    # ---- where adapters go

    @abstractmethod
    def block_names(self) -> list[str]:
        """Return the transformer blocks by module name, from the input to the neck."""

    def linear_pattern(self) -> str:
        """Return a regular expression of the linear layers in all transformer blocks."""
        blocks = "|".join(re.escape(name) for name in self.block_names())
        return rf"({blocks})\.{self.layers.linear}"

    def convolution_stage(self) -> list[str]:
        """Return the modules of the convolutional stage before the transformer blocks, if the family has one."""
        return []

    def qkv_rows(self, part: int, *, out_features: int, num_heads: int) -> Tensor:
        """Return the output rows of a fused qkv layer that are queries (part 0), keys (1) or values (2).

        Most families stack all queries, then all keys, then all values.
        """
        size = out_features // 3
        return torch.arange(part * size, (part + 1) * size)

    # ---- comparison and storage

    @property
    def shape(self) -> dict[str, Any]:
        """Numbers that the family adds, by field name."""
        shared = {f.name for f in fields(EncoderSpec)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}

    def has_shape_of(self, other: EncoderSpec) -> bool:
        """Return True if the family and all its numbers are equal."""
        return type(self) is type(other) and self.shape == other.shape

    def has_tensors_of(self, other: EncoderSpec) -> bool:
        """Return True if weights of ``other`` have the same names and shapes, position tables aside."""
        return self.has_shape_of(other)

    @property
    def is_standard(self) -> bool:
        """True for a published shape, False for a small or foreign one."""
        known = [s for s in self.published() if (s.arch, s.variant) == (self.arch, self.variant)]
        return any(self.has_shape_of(s) and self.neck_dim == s.neck_dim for s in known)

    @property
    def registry_name(self) -> str | None:
        """Name of this shape in segment_anything's ``sam_model_registry``, or None if it is not there."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which ``registry.spec_from_dict`` reads."""
        # The two oldest families are always listed: released bundles have contained both keys from the beginning.
        shapes: dict[str, Any] = {"plain": None, "tiny": None}
        shapes[self.family] = {name: str(v) if isinstance(v, str) else v for name, v in self.shape.items()}
        return {
            "arch": self.arch,
            "native_image_size": self.native_image_size,
            **shapes,
            "neck_dim": self.neck_dim,
            "pixel_mean": self.pixel_mean,
            "pixel_std": self.pixel_std,
        }

    def check_image_size(self, image_size: int) -> None:
        """Refuse an input size that is not a multiple of ``size_step``.

        Raises:
            UsageError: If ``image_size`` is not a positive multiple of ``size_step``.
        """
        step = self.size_step
        if image_size < step or image_size % step:
            near = max(step, round(image_size / step) * step)
            raise UsageError(
                f"image_size must be a positive multiple of {step} for {self.arch}, got {image_size}. Use {near}."
            )


class ImageEncoder(nn.Module, ABC):
    """Image encoder that both stages train, whatever its family.

    Args:
        spec: Shape.
        image_size: Side of the square input in pixels, a multiple of ``spec.size_step``.

    BatchNorm keeps its running statistics by default (``batch_norm_frozen``): few, partly hidden or few-shot images
    would move them away from the published ones, and an adapter file does not contain them. Stage 1 from random weights
    updates them, because there is nothing to keep.
    """

    neck: nn.Module
    """Layers from the features to the image embeddings."""
    entry_points: ClassVar[tuple[str, ...]] = ("forward_features",)
    """Methods besides ``forward`` that callers use. Sharded parameters are gathered for them."""
    neck_entry_points: ClassVar[tuple[str, ...]] = ()
    """Methods of the neck besides ``forward`` that the encoder uses, for the same reason."""

    def __init__(self, spec: EncoderSpec, *, image_size: int) -> None:
        super().__init__()
        spec.check_image_size(image_size)
        self.spec = spec
        self.arch, self.stride = spec.arch, spec.stride
        self.feature_dim, self.mask_token_dim = spec.feature_dim, spec.mask_token_dim
        self.image_size = image_size
        self.img_size = image_size  # segment_anything's name, which Sam.preprocess and postprocess_masks read
        self.activation_checkpointing = False
        self.batch_norm_frozen = True

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Return image embeddings of shape (B, neck_dim, S/stride, S/stride)."""
        out: Tensor = self.neck(self.forward_features(images_B3SS))
        return out

    def forward_with_high_res(self, images_B3SS: Tensor) -> ImageFeatures:
        """Return the image embeddings, and finer maps of ``neck_dim`` channels if the family has them."""
        return ImageFeatures(self(images_B3SS))

    @abstractmethod
    def forward_features(
        self, images_B3SS: Tensor, *, token_mask_Bhw: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Return features before the neck, with hidden tokens replaced by a mask token.

        Args:
            images_B3SS: Images after ``to_pixels``.
            token_mask_Bhw: Hidden tokens (True), on any square grid that divides the encoder's own. No output depends
                on a hidden pixel.
            mask_token: Shape (mask_token_dim,); zeros if None.

        Returns:
            Shape (B, feature_dim, S/stride, S/stride).
        """

    def high_res_layers(self) -> list[nn.Module]:
        """Return the layers of the neck that only the finer maps of ``forward_with_high_res`` use."""
        return []

    @abstractmethod
    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth, parameters) from the stem (depth 0) to the neck, every parameter once.

        Learning-rate decay by layer and freezing of the lowest depths use it.
        """

    @abstractmethod
    def units(self) -> Iterator[nn.Module]:
        """Yield the repeated parts (blocks or stages) that are sharded and recomputed one at a time."""

    def run_unit(self, unit: nn.Module, *inputs: Any) -> Tensor:
        """Run one unit, keeping only its inputs for the backward pass if activations are checkpointed."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(unit, *inputs, use_reentrant=False, context_fn=partial(_recompute_contexts, unit))
        else:
            out = unit(*inputs)
        return out

    def for_export(self) -> nn.Module:
        """Return a module with the same outputs that ONNX export can trace."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except that frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class TokenDroppingEncoder(ImageEncoder):
    """Image encoder that can leave out hidden units, so that they cost nothing.

    Units are squares of ``unit_px`` pixels on a grid of ``grid`` x ``grid``, which are the tokens of a plain ViT or the
    mask units of a multi-scale one.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_features", "forward_visible")
    unit_px: int
    """Side of a unit in pixels."""
    unit_dim: int
    """Channels of an encoded unit."""
    grid: int
    """Units along a side."""
    attn_window_size: int
    """Units along a side of an attention window."""

    @abstractmethod
    def forward_visible(self, images_B3SS: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Encode the kept units only.

        Args:
            images_B3SS: Images after ``to_pixels``.
            ids_keep_BN: Raster numbers of the kept units of each image, int64, in any order and without repeats; -1
                fills up images that keep fewer units than others.

        Returns:
            Features before the neck in the order of ``ids_keep_BN``, shape (B, N, unit_dim); undefined where it is -1.
        """

    @abstractmethod
    def units_to_features(self, units_BNC: Tensor) -> Tensor:
        """Put all units of a grid, in raster order, together to features as those of ``forward_features``."""

    @abstractmethod
    def features_to_units(self, features_BChw: Tensor) -> Tensor:
        """Return the units (B, grid grid, unit_dim) of features, which undoes ``units_to_features``."""

    def check_kept(self, images_B3SS: Tensor, ids_keep_BN: Tensor) -> None:
        """Refuse images of another size, and kept units that are not on the grid.

        Raises:
            ValueError: If images have another size, or ``ids_keep_BN`` is empty or out of range.
        """
        size, num_units = self.image_size, self.grid**2
        if images_B3SS.shape[1:] != (3, size, size):
            raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images_B3SS.shape)}.")
        is_table = ids_keep_BN.ndim == 2 and ids_keep_BN.shape[1] > 0
        if not is_table or bool((ids_keep_BN < -1).any() | (ids_keep_BN >= num_units).any()):
            raise ValueError(
                f"ids_keep must be (B, N) token numbers below {num_units}, at least one, got {ids_keep_BN}."
            )


class FixedGridEncoder(TokenDroppingEncoder):
    """Image encoder with one absolute position per token, so that smaller views take a part of its grid.

    Its units are tokens of ``stride`` pixels.
    """

    entry_points = ("forward_features", "forward_visible", "forward_patches")

    @abstractmethod
    def forward_visible(self, images_B3SS: Tensor, ids_keep_BN: Tensor, *, relative_positions: bool = True) -> Tensor:
        """Encode the kept tokens only.

        Arguments and result are those of :class:`TokenDroppingEncoder`. ``relative_positions=False`` runs the blocks as
        those of a plain ViT, with global attention and absolute positions only.
        """

    @abstractmethod
    def forward_patches(self, patches_BNP: Tensor, ids_keep_BN: Tensor) -> Tensor:
        """Encode patches as if they were at these places of the grid and no other token existed.

        Args:
            patches_BNP: Patches from :func:`cut_patches`, of images after ``to_pixels``.
            ids_keep_BN: Raster numbers as for ``forward_visible``; not checked again.

        Returns:
            Features before the neck, shape (B, N, C).
        """

    @abstractmethod
    def relative_position_tables(self) -> list[nn.Parameter]:
        """Return the parameters that ``relative_positions=False`` does not use."""


def cut_patches(images_B3SS: Tensor, patch_size: int) -> Tensor:
    """Cut images into flattened patches (B, g g, 3 p p), channel first as in the convolution's weight."""
    side = images_B3SS.shape[-1] // patch_size
    cut = images_B3SS.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))
    patches: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches


def build_neck(feature_dim: int, neck_dim: int) -> nn.Sequential:
    """Build segment_anything's neck, which turns features into image embeddings."""
    from segment_anything.modeling.common import LayerNorm2d

    return nn.Sequential(
        nn.Conv2d(feature_dim, neck_dim, kernel_size=1, bias=False),
        LayerNorm2d(neck_dim),
        nn.Conv2d(neck_dim, neck_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(neck_dim),
    )


def upsample_token_mask(token_mask_Bhw: Tensor, *, side: int, name: str) -> Tensor:
    """Repeat a token mask to a finer square grid, shape (B, side, side).

    Args:
        token_mask_Bhw: Hidden tokens (True).
        side: Rows and columns of the finer grid.
        name: What the finer grid belongs to, for messages.

    Raises:
        ValueError: If the mask is not bool, not square, or does not divide ``side``.
    """
    height, width = token_mask_Bhw.shape[-2:]
    if token_mask_Bhw.dtype != torch.bool:
        raise ValueError(f"token_mask must be bool (True = hidden), got {token_mask_Bhw.dtype}.")
    if height != width or side % height:
        raise ValueError(f"token_mask grid must be square and divide the {name} side {side}, got {height}x{width}.")
    if height == side:
        return token_mask_Bhw
    scaled = F.interpolate(token_mask_Bhw[:, None].to(torch.uint8), scale_factor=side // height, mode="nearest")
    return scaled[:, 0].bool()


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return one more than the largest number that follows ``prefix`` in tensor names."""
    indexes = {name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)}
    return 1 + max((int(i) for i in indexes if i.isdigit()), default=-1)


def freeze_batch_norm(module: nn.Module, *, frozen: bool = True) -> None:
    """Keep (or stop keeping) the BatchNorm statistics of all image encoders inside ``module``."""
    for child in module.modules():
        if isinstance(child, ImageEncoder):
            child.batch_norm_frozen = frozen
            child.train(child.training)


def has_batch_norm(module: nn.Module) -> bool:
    """Return True if some layer keeps running statistics."""
    return any(isinstance(child, nn.BatchNorm2d) for child in module.modules())


def _recompute_contexts(unit: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a forward pass and of its repetition in the backward pass, for ``checkpoint``."""
    return nullcontext(), _without_statistics(unit)


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Keep training BatchNorm layers from counting a batch a second time."""
    # The repeated forward pass must normalise by the same batch statistics, so the layers stay in training mode. With
    # momentum 0 the running statistics do not move, and the batch counter is restored.
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
