"""Baseline networks without SAM, MONAI's U-Net and nnU-Net's network (DynUNet), for slices and for volumes.

They start from random weights and use the same split, store, augmentation, loss and evaluation as a fine-tuned SAM.
They show how much SAM contributes and are not released.

Shape letters: N = slices or patches, C = foreground classes, Z = slices, H, W = rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
import torch
from annotated_types import Ge
from samgraft.finetune.baselines import Baseline
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.config import PositiveInt, ShareBelowOne
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.intensity import IntensityPreset, IntensityStats, normalise
from samgraft.shared.weights.card import Card
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

Volume = npt.NDArray[Any]
MIN_SIDE = 4
"""Smallest side of a feature map in voxels, as in nnU-Net."""
FIRST_PROBABILITY = 0.01
"""Probability of each class before training, as in RetinaNet."""
MAX_LEVELS = 5
"""Largest number of downsampling steps, as in nnU-Net's 3D networks."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Size of the baseline networks. Read only with MODEL=unet2d, unet3d, dynunet2d or dynunet3d."""

    base_channels: Annotated[int, Ge(4)] = 32
    """Channels of the first level, doubled at every downsampling step (32 in nnU-Net)."""
    max_channels: PositiveInt = 320
    """Largest number of channels of a level (320 in nnU-Net 3D)."""
    patch_size: list[int] = field(default_factory=list)
    """Slices, rows and columns of a patch in 3D. Empty takes the median scan, cut to max_patch_voxels."""
    max_patch_voxels: Annotated[int, Ge(MIN_SIDE**3)] = 2**18
    """Largest number of voxels of a planned patch in 3D. 64^3 suits a CPU or a small GPU, 128^3 a large one."""
    overlap: ShareBelowOne = 0.5
    """Overlap of neighbouring patches in 3D inference, as a fraction in [0, 1) (0.5 in nnU-Net)."""

    def __post_init__(self) -> None:
        if self.max_channels < self.base_channels:
            raise ValueError(
                "baseline.max_channels must be at least base_channels, got "
                f"{self.max_channels} and {self.base_channels}."
            )
        if self.patch_size and (len(self.patch_size) != 3 or min(self.patch_size) < MIN_SIDE):
            raise ValueError(f"baseline.patch_size must be three sides of {MIN_SIDE} or more, got {self.patch_size}.")


@dataclass(frozen=True, kw_only=True)
class NoFile:
    """Placeholder for a weights file of a network with random weights."""

    name: str = "random weights"
    sha256: str = "none"
    card: Card | None = None


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """Random initial weights of a baseline, with the attributes of ``InitialWeights``."""

    plan: dict[str, Any]
    base: NoFile = field(default_factory=NoFile)
    encoder: NoFile = field(default_factory=NoFile)
    is_continued: bool = False

    @property
    def card(self) -> Card:
        """Card of the network before training."""
        return Card(arch=self.plan["name"], image_size=int(self.plan["sizes"][-1]), pixel_mean=[], pixel_std=[])


def as_baseline(arch: str | None) -> Baseline | None:
    """Return the baseline with the name MODEL, or None for SAM's architectures."""
    return Baseline(arch) if arch in {baseline.value for baseline in Baseline} else None


class SliceBaseline(Segmenter):
    """2D network that replaces SAM wherever only logits are needed."""

    def __init__(self, net: nn.Module, *, num_classes: int, image_size: int) -> None:
        nn.Module.__init__(self)
        self.net = net
        self.num_classes = num_classes
        self._image_size = image_size

    @property
    def network(self) -> nn.Module:
        """Network that is trained and saved."""
        return self.net

    @property
    def sam(self) -> Sam:
        """Refuse access to a SAM, which a baseline does not have."""
        raise UsageError(
            "this needs a SAM, and the model is a U-Net baseline. Baselines can be trained and evaluated only: they "
            "take no prompts and are not released."
        )

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return self._image_size

    def forward(self, images_NCSS: Tensor) -> Tensor:
        """Return logits (N, C, S, S) without the background, whose logit is 0."""
        logits: Tensor = self.net(images_NCSS)
        return logits


class VolumeBaseline(SliceBaseline):
    """3D network that is trained on patches and segments scans by overlapping patches."""

    def __init__(self, net: nn.Module, *, num_classes: int, patch_size: Sequence[int], overlap: float) -> None:
        super().__init__(net, num_classes=num_classes, image_size=max(patch_size))
        self.patch_size = tuple(patch_size)
        self.overlap = overlap

    def segment(
        self, volume_ZHW: Volume, stats: IntensityStats, classes: ClassTable, intensity: IntensityPreset
    ) -> npt.NDArray[np.int32]:
        """Return the label ids of a scan on its own grid. Call it in eval mode and without gradients."""
        logits_1CZHW = self.volume_logits(volume_ZHW, stats, intensity)
        labels: npt.NDArray[np.int32] = classes.from_logits(logits_1CZHW)[0].cpu().numpy().astype(np.int32)
        return labels

    def volume_logits(self, volume_ZHW: Volume, stats: IntensityStats, intensity: IntensityPreset) -> Tensor:
        """Return the logits (1, C, Z, H, W) of a scan. Call it in eval mode and without gradients."""
        from monai.inferers.utils import sliding_window_inference

        device = next(self.parameters()).device
        image = torch.from_numpy(np.stack([normalise(slice_HW, stats, intensity) for slice_HW in volume_ZHW]))
        # Gaussian weights give the middle of a patch more influence, because its border has less context (nnU-Net).
        logits = sliding_window_inference(
            image[None, None].to(device), self.patch_size, 1, self.net, overlap=self.overlap, mode="gaussian"
        )
        assert isinstance(logits, Tensor)
        return logits.float()


def plan_network(
    baseline: Baseline,
    config: BaselineConfig,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    median_shape_zyx: Sequence[int] = (),
    spacing_zyx: Sequence[float] = (),
) -> dict[str, Any]:
    """Choose a network's shape and return it as plain values for ``build_network``.

    Args:
        baseline: Kind of network.
        config: Sizes.
        num_classes: Foreground classes.
        in_channels: Channels of the input.
        image_size: Side of slices in pixels, for 2D.
        median_shape_zyx: Median shape of the training scans, for 3D.
        spacing_zyx: Median voxel spacing in mm, for 3D. Axes more than twice as coarse as the finest are pooled later.

    Raises:
        UsageError: If the input is too small to be halved.
    """
    if baseline.is_volume:
        sizes = list(config.patch_size) or plan_patch(median_shape_zyx, config.max_patch_voxels)
        kernels, strides = plan_levels(sizes, spacing_zyx)
    else:
        sizes = [image_size, image_size]
        # Slices are resized to a square, so their own spacing has no meaning for the network.
        kernels, strides = plan_levels(sizes, [1.0, 1.0])
    channels = [min(config.max_channels, config.base_channels * 2**level) for level in range(len(strides) + 1)]
    return {
        "name": baseline.value,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "sizes": sizes,
        "kernels": kernels,
        "strides": strides,
        "channels": channels,
        "overlap": config.overlap,
    }


def build_network(plan: dict[str, Any]) -> SliceBaseline:
    """Build a planned network with fresh weights."""
    baseline = Baseline(plan["name"])
    options = {
        "spatial_dims": 3 if baseline.is_volume else 2,
        "in_channels": plan["in_channels"],
        "out_channels": plan["num_classes"],
        "strides": [tuple(step) for step in plan["strides"]],
    }
    net: nn.Module
    if baseline in {Baseline.UNET_2D, Baseline.UNET_3D}:
        net = _unet(options, plan["channels"])
    else:
        from monai.networks.nets.dynunet import DynUNet

        # The first stride of DynUNet belongs to its input block and keeps the resolution.
        first = (1,) * options["spatial_dims"]
        kernels = [tuple(kernel) for kernel in [*plan["kernels"], plan["kernels"][-1]]]
        net = DynUNet(
            **{**options, "strides": [first, *options["strides"]]},
            kernel_size=kernels,
            upsample_kernel_size=options["strides"],
            filters=plan["channels"],
            norm_name=("INSTANCE", {"affine": True}),
        )
    _expect_background(net, num_classes=plan["num_classes"])
    if baseline.is_volume:
        return VolumeBaseline(net, num_classes=plan["num_classes"], patch_size=plan["sizes"], overlap=plan["overlap"])
    return SliceBaseline(net, num_classes=plan["num_classes"], image_size=plan["sizes"][0])


def _expect_background(net: nn.Module, *, num_classes: int) -> None:
    """Let an untrained network find the background everywhere.

    The background's logit is 0, so that every other logit would have to fall by its own steps first. With AdamW at a
    rate of 1e-3 that takes hundreds of steps, in which little else is learned.

    Source:
        Lin et al., Focal loss for dense object detection, ICCV 2017 (section 4.1).
    """
    heads = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.out_channels == num_classes]
    bias = heads[-1].bias
    assert bias is not None
    nn.init.constant_(bias, -math.log((1 - FIRST_PROBABILITY) / FIRST_PROBABILITY))


def _unet(options: dict[str, Any], channels: list[int]) -> nn.Module:
    """Return MONAI's residual U-Net with another head.

    MONAI's head ends in layers with as many channels as there are classes, normalised per slice. Two classes pass
    almost no information, and no slice can be empty. On 170 subjects of the hippocampus set it predicted only
    background after 600 steps.
    """
    from monai.networks.nets.unet import UNet

    width = channels[0]
    features = UNet(
        **{**options, "out_channels": width}, channels=channels, num_res_units=2, norm=("INSTANCE", {"affine": True})
    )
    head = (nn.Conv3d if options["spatial_dims"] == 3 else nn.Conv2d)(width, options["out_channels"], 1)
    return nn.Sequential(features, nn.PReLU(), head)


def plan_patch(median_shape_zyx: Sequence[int], max_voxels: int) -> list[int]:
    """Return the size of a patch, which is the median scan with its largest axes cut to ``max_voxels``.

    Sides become multiples of the downsampling that they allow, which is 8 above 16 voxels and 4 below.
    """
    sizes = [_rounded_up(size) for size in median_shape_zyx]
    # The largest axis is cut first, so that a patch stays as close to a cube as the scan allows.
    while math.prod(sizes) > max_voxels:
        axis = sizes.index(max(sizes))
        sizes[axis] -= 8 if sizes[axis] > 24 else 4
        if sizes[axis] < MIN_SIDE:
            raise UsageError(
                f"baseline.max_patch_voxels is too small for a patch of these scans (got {max_voxels}). Use "
                "a larger value.",
                where="baseline",
            )
    return sizes


def plan_levels(sizes: Sequence[int], spacing: Sequence[float]) -> tuple[list[list[int]], list[list[int]]]:
    """Return kernel sizes and strides of every level by the rules of nnU-Net.

    An axis is halved while both halves keep ``MIN_SIDE`` voxels and its spacing is at most twice the finest. Coarse
    axes get kernels of 1 until the other axes have the same spacing.

    Source:
        Isensee et al., Nature Methods 18:203 (2021), supplementary note 4.
    """
    left, distance = [float(s) for s in sizes], list(spacing)
    kernels: list[list[int]] = []
    strides: list[list[int]] = []
    while len(strides) < MAX_LEVELS:
        finest = min(distance)
        # An axis takes part in pooling and in 3-wide kernels only while its spacing is close to the finest one.
        near = [d <= 2 * finest for d in distance]
        step = [
            2 if is_near and side >= 2 * MIN_SIDE and side % 2 == 0 else 1
            for is_near, side in zip(near, left, strict=True)
        ]
        if max(step) == 1:
            break
        kernels.append([3 if is_near else 1 for is_near in near])
        strides.append(step)
        left = [side / s for side, s in zip(left, step, strict=True)]
        distance = [d * s for d, s in zip(distance, step, strict=True)]
    if not strides:
        raise UsageError(
            f"the input is too small for a U-Net (got sides {list(sizes)}, which it cannot halve). Use a larger size.",
            where="model.image_size or baseline.patch_size",
        )
    return kernels, strides


def _rounded_up(size: int) -> int:
    unit = 8 if size > 16 else 4
    return max(MIN_SIDE, math.ceil(size / unit) * unit)
