"""Multi-crop, the large and small views of one slice for joint-embedding objectives.

Every view is a pure function of the slice, the run's seed and the sample's counter, so that a resumed run has the same
views. They are cut on the training device.

Shape letters: B = slices, C = channels, S = side of the encoder's input, s = side of a small view, H, W = rows and
columns of a crop before it is resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pydantic.dataclasses
import torch
import torch.nn.functional as F
from annotated_types import Ge
from samgraft.shared.config import AtLeastOne, NonNegative, NonNegativeInt, PositiveInt, PositiveShare, Share
from samgraft.shared.encoders.base import EncoderSpec
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.orientation import Plane, has_mirror_image

CROP_STREAM = 0x63726F70
"""Random stream of crops, separate from those of masks and augmentation, which use the same seed and counter."""
NUM_GLOBAL = 2
"""Number of large views per slice, which have the size of the encoder's input."""
LOCAL_SHARE = 0.44
"""Side of a small view over the side of a large one, from DINOv2's 98 of 224 px."""
CONTENT_LEVEL = 0.02
"""Grey value in [0, 1] above which a pixel is content and not air or padding."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Settings of the views of one slice."""

    num_local_crops: NonNegativeInt = 4
    """Number of small views per slice (DINO uses 8). Each costs about a fifth of a large one."""
    local_size_px: PositiveInt | None = None
    """Side of a small view in pixels, a multiple of the encoder's stride (32 px for sam2_*). null takes about 0.44 of
    the input, in whole attention windows where one fits."""
    min_global_area: PositiveShare = 0.4
    """Smallest share of the slice's content in a large view (DINOv2 uses 0.32). The largest share is 1."""
    min_local_area: PositiveShare = 0.08
    """Smallest share of the content in a small view (DINOv2 uses 0.05, but photographs contain more)."""
    max_local_area: PositiveShare = 0.4
    """Largest share of the content in a small view."""
    max_aspect: AtLeastOne = 1.33
    """Bound of height over width of a view, drawn from [1 / max_aspect, max_aspect]."""
    flip_probability: Share | None = None
    """Probability of flipping a view left to right. Sagittal slices are never flipped. null takes
    ``data.augment.flip_columns_probability``, which depends on the modality, because CT and X-ray show organs that have
    a side."""
    max_gamma: AtLeastOne = 1.4
    """Bound of the gamma correction, an exponent drawn from [1 / max_gamma, max_gamma]. 1 switches it off."""
    max_contrast: AtLeastOne = 1.3
    """Bound of the contrast factor around the view's mean, drawn from [1 / max_contrast, max_contrast]."""
    max_shift: NonNegative = 0.1
    """Largest shift of the brightness, grey values from 0 to 1."""
    blur_probability: Share = 0.3
    """Probability of a Gaussian blur."""
    max_blur_sigma_px: Annotated[float, Ge(0.3)] = 1.5
    """Largest standard deviation of the blur, in pixels of the view. The smallest is 0.3."""

    def __post_init__(self) -> None:
        if self.min_local_area > self.max_local_area:
            raise ValueError(
                f"min_local_area must be at most max_local_area, got {self.min_local_area} and {self.max_local_area}."
            )

    def plane_flip_probability(self, plane: Plane | None) -> float:
        """Return the probability of flipping a view of a slice of this plane, 0 for an unknown plane.

        Raises:
            ValueError: If the setting was left open, which a run's configuration fills in.
        """
        if plane is None or not has_mirror_image(plane):
            return 0.0
        if self.flip_probability is None:
            raise ValueError(
                "crops.flip_probability must be a number, got None. Set it, or use that of a PretrainConfig."
            )
        return self.flip_probability


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Views of a batch, all first views before all second ones."""

    global_BCSS: torch.Tensor
    """Large views of shape (2 B, C, S, S)."""
    local_BCss: torch.Tensor | None
    """Small views of shape (num_local_crops B, C, s, s), or None without any."""


def local_size(spec: EncoderSpec, image_size: int, config: CropConfig) -> int:
    """Return the side of a small view in pixels.

    Raises:
        UsageError: If the configured side does not match the encoder's grid or its input.
    """
    wanted, step = config.local_size_px, spec.size_step
    if wanted is None:
        steps = max(1, round(LOCAL_SHARE * image_size / step))
        # Whole attention windows: part of one would be padded to a whole one, and cost as much.
        unit = spec.crop_unit
        steps = unit * max(1, round(steps / unit)) if steps >= unit else steps
        return min(steps * step, image_size)
    if wanted < step or wanted % step or wanted > image_size:
        raise UsageError(
            f"local_size_px must be a multiple of {step} px for {spec.arch} up to image_size {image_size}, got "
            f"{wanted}.",
            where="objective.*.crops.local_size_px",
        )
    return wanted


def multi_crop(
    images_BCSS: torch.Tensor,
    *,
    sample_counters: Sequence[int],
    seed: int,
    config: CropConfig,
    local_size_px: int,
    planes: Sequence[Plane] | None = None,
) -> Crops:
    """Cut two large and some small views of every slice.

    Args:
        images_BCSS: Slices in [0, 1] at the size of the encoder's input.
        sample_counters: Position of each sample in the run.
        seed: Seed of the run.
        config: Settings of the views.
        local_size_px: Side of a small view, from :func:`local_size`.
        planes: Plane of each slice. It decides which flips are anatomically valid; None flips nothing.
    """
    # Views are cut slice by slice, because each slice has its own content box and its own random numbers.
    sizes = [images_BCSS.shape[-1]] * NUM_GLOBAL + [local_size_px] * config.num_local_crops
    views: list[list[torch.Tensor]] = [[] for _ in sizes]
    known: Sequence[Plane | None] = planes or [None] * len(images_BCSS)
    flips = [config.plane_flip_probability(plane) for plane in known]
    boxes = content_boxes(images_BCSS)
    for image_CSS, counter, box, flip in zip(images_BCSS, sample_counters, boxes, flips, strict=True):
        generator = np.random.default_rng([seed, CROP_STREAM, int(counter)])
        for index, size in enumerate(sizes):
            areas = (
                (config.min_global_area, 1.0) if index < NUM_GLOBAL else (config.min_local_area, config.max_local_area)
            )
            crop_CHW = _cut(image_CSS, box, areas, generator, max_aspect=config.max_aspect)
            views[index].append(_augment(crop_CHW, size, config, generator, flip_probability=flip))
    together = [torch.stack(view) for view in views]
    small = together[NUM_GLOBAL:]
    return Crops(global_BCSS=torch.cat(together[:NUM_GLOBAL]), local_BCss=torch.cat(small) if small else None)


def content_boxes(images_BCSS: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """Return (top, left, rows, columns) of the content of each slice, or of the whole slice if it has none."""
    side = images_BCSS.shape[-1]
    content_BSS = (images_BCSS > CONTENT_LEVEL).any(1)
    place_S = torch.arange(side, device=images_BCSS.device)
    edges = []
    for axis in (2, 1):
        has_BS = content_BSS.any(axis)
        edges += [torch.where(has_BS, place_S, side).amin(1), torch.where(has_BS, place_S, -1).amax(1)]
    boxes = []
    # All edges at once, because every transfer from the device makes it wait.
    for top, bottom, left, right in torch.stack(edges, 1).tolist():
        # A slice of air only has no content; its views come from the whole slice.
        if bottom < top:
            top, bottom, left, right = 0, side - 1, 0, side - 1
        boxes.append((top, left, bottom - top + 1, right - left + 1))
    return boxes


def _cut(
    image_CSS: torch.Tensor,
    box: tuple[int, int, int, int],
    areas: tuple[float, float],
    generator: np.random.Generator,
    *,
    max_aspect: float,
) -> torch.Tensor:
    """Cut a random rectangle out of the content."""
    # As in torchvision's RandomResizedCrop, but clipped instead of retried, so that every view draws the same number
    # of random numbers and later views do not depend on the size of the content.
    top, left, height, width = box
    # Area and aspect are drawn on a linear and on a logarithmic scale, as in torchvision.
    area = float(generator.uniform(*areas)) * height * width
    aspect = float(np.exp(generator.uniform(-np.log(max_aspect), np.log(max_aspect))))
    rows = int(np.clip(round(float(np.sqrt(area * aspect))), 1, height))
    columns = int(np.clip(round(float(np.sqrt(area / aspect))), 1, width))
    top += int(generator.integers(0, height - rows + 1))
    left += int(generator.integers(0, width - columns + 1))
    return image_CSS[:, top : top + rows, left : left + columns]


def _augment(
    crop_CHW: torch.Tensor, size: int, config: CropConfig, generator: np.random.Generator, *, flip_probability: float
) -> torch.Tensor:
    """Resize a crop, flip it and change its grey values."""
    # All numbers are drawn first and always, so that switching one change off does not change the others.
    flip, blur = generator.random(2)
    gamma, contrast = (
        float(np.exp(generator.uniform(-np.log(most), np.log(most))))
        for most in (config.max_gamma, config.max_contrast)
    )
    shift = float(generator.uniform(-config.max_shift, config.max_shift))
    sigma = float(generator.uniform(0.3, config.max_blur_sigma_px))
    view_CSS = F.interpolate(crop_CHW[None], size=(size, size), mode="bilinear", antialias=True)[0]
    if flip < flip_probability:
        view_CSS = view_CSS.flip(-1)
    view_CSS = view_CSS.clamp(0, 1) ** gamma
    mean = view_CSS.mean()
    view_CSS = (view_CSS - mean) * contrast + mean + shift
    if blur < config.blur_probability:
        view_CSS = _blur(view_CSS, sigma)
    return view_CSS.clamp(0, 1)


def _blur(view_CSS: torch.Tensor, sigma_px: float) -> torch.Tensor:
    """Convolve with a Gaussian, with repeated edges."""
    # lightly's blur needs 8-bit pictures, and torchvision's costs more than the rest of the view.
    reach = max(1, round(3 * sigma_px))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=view_CSS.device) / sigma_px) ** 2)
    weights = (weights / weights.sum()).to(view_CSS.dtype)
    padded = F.pad(view_CSS[:, None], (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]
