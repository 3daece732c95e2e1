"""Augmentation of slices by crops, affine motion, anatomically valid flips and changes of intensity.

Everything is drawn from the generator of the sample, so it is equal in any worker and after any resume. A part that is
switched off draws nothing. The label is moved by nearest neighbour, so that no new id can appear.

Shape letters: C = channels (1, or the neighbours of a 2.5D sample), H, W = rows and columns of a slice.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegative, Positive, PositiveShare, Share
from samgraft.shared.scans.orientation import Plane, has_mirror_image
from torch import Tensor

LogFactor = Annotated[float, Ge(0), Le(10)]
"""Logarithm of a factor. Beyond exp(10), which is 22,000, a slice is only black or white."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths and probabilities of the augmentation.

    Each stage has its own defaults, and the preset of the modality overrides them.
    """

    min_crop_fraction: PositiveShare = 1.0
    """Shortest side of a random crop, as a fraction of the slice's side. 1 takes whole slices."""
    affine_probability: Share = 1.0
    """Probability of rotation, scale, shear and shift together."""
    max_rotation_deg: NonNegative = 0.0
    """Largest rotation in degrees, uniform in both directions."""
    min_scale: Positive = 1.0
    """Smallest magnification, log-uniform up to ``max_scale``."""
    max_scale: Positive = 1.0
    """Largest magnification."""
    max_shear: LogFactor = 0.0
    """Largest logarithm of the ratio of both axes' magnifications."""
    max_shift: NonNegative = 0.0
    """Largest shift along both axes, as a share of the slice's side."""
    flip_columns_probability: Share = 0.5
    """Probability of a left-right flip of axial and coronal slices. Use 0 where the sides differ (chest, abdomen).
    Sagittal slices, whose columns run from front to back, are never flipped."""
    flip_rows_probability: Share = 0.0
    """Probability of a top-bottom flip. No patient is upside down, but the appearance of a lesion may be."""
    gamma_probability: Share = 1.0
    """Probability of a gamma change."""
    max_log_gamma: LogFactor = 0.0
    """Largest logarithm x of the exponent of the grey values, exp(uniform(-x, x))."""
    max_log_contrast: LogFactor = 0.0
    """Largest logarithm x of the factor of the grey values, exp(uniform(-x, x))."""
    bias_field_probability: Share = 0.0
    """Probability of a smooth gain, as it comes from surface coils (MR) and depth (ultrasound)."""
    bias_field: NonNegative = 0.3
    """Largest coefficient of the polynomial of degree 3 whose exponential is the gain."""
    blur_probability: Share = 0.0
    """Probability of a 3x3 mean."""
    low_resolution_probability: Share = 0.0
    """Probability of down- and upsampling, which imitates the resolution of old or fast scans."""
    min_zoom: PositiveShare = 0.5
    """Smallest factor of that downsampling."""
    noise_probability: Share = 1.0
    """Probability of Gaussian noise."""
    noise_std: NonNegative = 0.0
    """Largest standard deviation of the noise, uniform from 0, in units of the normalised image."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ValueError(f"augment.min_scale must be at most max_scale, got {self.min_scale} and {self.max_scale}.")

    @property
    def has_affine(self) -> bool:
        """True if slices are moved at all."""
        still = self.max_rotation_deg == self.max_shear == self.max_shift == 0 and self.min_scale == self.max_scale == 1
        return self.affine_probability > 0 and not still


class SliceAugmentation:
    """Augmentation of the samples of a ``SliceDataset``. It is picklable and has no random state."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __call__(
        self,
        image_CHW: Tensor,
        label_HW: Tensor | None,
        generator: np.random.Generator,
        plane: Plane = Plane.AXIAL,
    ) -> tuple[Tensor, Tensor | None]:
        """Augment one sample.

        Args:
            image_CHW: Float in [0, 1].
            label_HW: Label ids, or None.
            generator: Generator of this sample, the only source of randomness.
            plane: Plane of the slice. It decides which flips are anatomically valid.

        Returns:
            The image, again in [0, 1] and smaller if it was cropped, and the label with a subset of its ids.
        """
        config = self.config
        if config.min_crop_fraction < 1:
            image_CHW, label_HW = _crop(image_CHW, label_HW, config.min_crop_fraction, generator)
        # Motion and flips are drawn before either is applied, because they are one resampling.
        moves = config.has_affine and _happens(config.affine_probability, generator)
        motion = _draw_motion(config, generator) if moves else None
        flip_columns = _flips(config.flip_columns_probability, generator) and has_mirror_image(plane)
        flip_rows = _flips(config.flip_rows_probability, generator)
        if motion is None:
            axes = [axis for axis, flip in ((-1, flip_columns), (-2, flip_rows)) if flip]
            image_CHW = image_CHW.flip(axes)
            label_HW = None if label_HW is None else label_HW.flip(axes)
        else:
            image_CHW, label_HW = _move(image_CHW, label_HW, motion, flip_columns=flip_columns, flip_rows=flip_rows)
        image_CHW = self.change_intensity(image_CHW, generator)
        return image_CHW.contiguous(), None if label_HW is None else label_HW.contiguous()

    def change_intensity(self, image_CHW: Tensor, generator: np.random.Generator) -> Tensor:
        """Return an image (C, H, W) in [0, 1] with changed grey values and unchanged geometry."""
        config = self.config
        # Interpolation may leave [0, 1] by rounding, and a negative value to a broken power is NaN.
        image_CHW = image_CHW.clamp(0, 1)
        if config.max_log_gamma > 0 and _happens(config.gamma_probability, generator):
            image_CHW = image_CHW ** math.exp(generator.uniform(-config.max_log_gamma, config.max_log_gamma))
        if config.max_log_contrast > 0:
            image_CHW = image_CHW * math.exp(generator.uniform(-config.max_log_contrast, config.max_log_contrast))
        if config.bias_field_probability > 0 and _happens(config.bias_field_probability, generator):
            image_CHW = _seeded(self._bias_field, image_CHW, generator)
        if config.blur_probability > 0 and generator.random() < config.blur_probability:
            image_CHW = F.avg_pool2d(image_CHW[None], 3, stride=1, padding=1, count_include_pad=False)[0]
        if config.low_resolution_probability > 0 and _happens(config.low_resolution_probability, generator):
            image_CHW = _seeded(self._low_resolution, image_CHW, generator)
        if config.noise_std > 0 and _happens(config.noise_probability, generator):
            noise_std = generator.uniform(0, config.noise_std)
            image_CHW = image_CHW + noise_std * torch.from_numpy(generator.standard_normal(image_CHW.shape, np.float32))
        return image_CHW.clamp(0, 1).to(torch.float32)

    # MONAI is imported where it is used, because that takes seconds and most runs do not need these two parts.
    @cached_property
    def _bias_field(self) -> Any:
        from monai.transforms.intensity.array import RandBiasField

        return RandBiasField(prob=1.0, degree=3, coeff_range=(0.0, self.config.bias_field))

    @cached_property
    def _low_resolution(self) -> Any:
        from monai.transforms.spatial.array import RandSimulateLowResolution

        # MONAI's default modes are for volumes.
        modes: dict[str, Any] = {"downsample_mode": "nearest", "upsample_mode": "bilinear"}
        return RandSimulateLowResolution(prob=1.0, zoom_range=(self.config.min_zoom, 1.0), **modes)


@dataclass(frozen=True)
class _Motion:
    angle_rad: float
    scale: float
    shear: float
    shift_x: float
    """Shift in the units of ``affine_grid``, in which the side of the slice is 2."""
    shift_y: float


def _happens(probability: float, generator: np.random.Generator) -> bool:
    # Probability 1 draws nothing. So runs from before a part had a probability keep their random numbers.
    return probability >= 1 or bool(generator.random() < probability)


def _flips(probability: float, generator: np.random.Generator) -> bool:
    return probability > 0 and bool(generator.random() < probability)


def _seeded(transform: Any, image_CHW: Tensor, generator: np.random.Generator) -> Tensor:
    # MONAI's transforms hold a random state of their own, which is set anew for every sample.
    transform.set_random_state(seed=int(generator.integers(2**31)))
    return torch.as_tensor(transform(image_CHW))


def _crop(
    image_CHW: Tensor, label_HW: Tensor | None, min_fraction: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Cut a random part at the slice's own resolution. It is resized later, on the training device."""
    height, width = image_CHW.shape[-2:]
    fraction = float(generator.uniform(min_fraction, 1.0))
    rows, columns = max(1, round(height * fraction)), max(1, round(width * fraction))
    top = int(generator.integers(0, height - rows + 1))
    left = int(generator.integers(0, width - columns + 1))
    crop = (..., slice(top, top + rows), slice(left, left + columns))
    return image_CHW[crop], None if label_HW is None else label_HW[crop]


def _draw_motion(config: AugmentConfig, generator: np.random.Generator) -> _Motion:
    # Scale and shear are drawn as logarithms, so that a factor and its inverse are equally likely.
    angle = math.radians(generator.uniform(-config.max_rotation_deg, config.max_rotation_deg))
    scale = math.exp(generator.uniform(math.log(config.min_scale), math.log(config.max_scale)))
    shear = math.exp(generator.uniform(-config.max_shear, config.max_shear) / 2)
    shift_x, shift_y = generator.uniform(-2 * config.max_shift, 2 * config.max_shift, size=2)
    return _Motion(angle, scale, shear, float(shift_x), float(shift_y))


def _move(
    image_CHW: Tensor, label_HW: Tensor | None, motion: _Motion, *, flip_columns: bool, flip_rows: bool
) -> tuple[Tensor, Tensor | None]:
    """Resample image and label once."""
    height, width = image_CHW.shape[-2:]
    cosine, sine = math.cos(motion.angle_rad) / motion.scale, math.sin(motion.angle_rad) / motion.scale
    flip_x, flip_y = (-1.0 if flip else 1.0 for flip in (flip_columns, flip_rows))
    # affine_grid works in units of half a side. The aspect ratio converts rows to columns, so that a rotation stays a
    # rotation on slices that are not square.
    aspect = height / width
    rows = [
        [flip_x * motion.shear * cosine, -flip_x * motion.shear * sine * aspect, motion.shift_x],
        [flip_y * sine / motion.shear / aspect, flip_y * cosine / motion.shear, motion.shift_y],
    ]
    theta_123 = torch.tensor([rows], dtype=torch.float32)
    grid = F.affine_grid(theta_123, [1, 1, height, width], align_corners=False)
    image_CHW = F.grid_sample(image_CHW[None], grid, mode="bilinear", align_corners=False)[0]
    if label_HW is not None:
        # float32 represents every label id up to 2^24 exactly.
        moved = F.grid_sample(label_HW[None, None].float(), grid, mode="nearest", align_corners=False)
        label_HW = moved[0, 0].to(label_HW.dtype)
    return image_CHW, label_HW
