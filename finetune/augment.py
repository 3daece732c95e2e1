"""Augmentation of one labelled slice: one affine for image and label, then intensity of the image alone.

Everything is drawn from the generator of the sample, so that a resumed run sees the same pixels. The label is sampled
by nearest neighbour: no class can appear that was not there.

Shape letters: C = channels, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges; 0 (or 1 for the scales) switches a part off."""

    max_rotation_deg: float = 30.0
    """Uniform in both directions."""
    min_scale: float = 0.7
    """Smallest magnification, log-uniform up to ``max_scale``."""
    max_scale: float = 1.4
    """Largest magnification."""
    max_shear: float = 0.1
    """Log ratio of the two axes' magnifications."""
    max_shift: float = 0.1
    """Share of the slice's side, both axes."""
    flip_rows: bool = False
    """Top and bottom: anatomy is not symmetric that way, lesions may be."""
    flip_columns: bool = True
    """Left and right."""
    max_log_gamma: float = 0.3
    """Gamma is exp(uniform(-x, x))."""
    max_log_contrast: float = 0.25
    """Factor on the image is exp(uniform(-x, x))."""
    blur_probability: float = 0.2
    """3x3 mean."""
    noise_std: float = 0.03
    """Largest standard deviation of Gaussian noise, uniform from 0."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"scales must satisfy 0 < min_scale <= max_scale, got {self.min_scale} and {self.max_scale} (augment)."
            )
        if not 0 <= self.blur_probability <= 1:
            raise ValueError(f"augment.blur_probability must lie in [0, 1], got {self.blur_probability}.")
        for name in ("max_rotation_deg", "max_shear", "max_shift", "max_log_gamma", "max_log_contrast", "noise_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True)
class SliceAugment:
    """Callable that ``SliceDataset`` applies to every training sample."""

    config: AugmentConfig

    def __call__(
        self, image_CHW: Tensor, label_HW: Tensor | None, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return image and label, changed alike in space; the image stays in [0, 1]."""
        height, width = image_CHW.shape[-2:]
        theta_123 = _draw_affine(self.config, generator, height=height, width=width)
        grid = F.affine_grid(theta_123, [1, 1, height, width], align_corners=False)
        image_CHW = F.grid_sample(image_CHW[None], grid, mode="bilinear", align_corners=False)[0]
        if label_HW is not None:
            # float32 holds every label id exactly up to 2^24.
            moved = F.grid_sample(label_HW[None, None].float(), grid, mode="nearest", align_corners=False)
            label_HW = moved[0, 0].to(label_HW.dtype)
        return _change_intensity(image_CHW, self.config, generator), label_HW


def _draw_affine(config: AugmentConfig, generator: np.random.Generator, *, height: int, width: int) -> Tensor:
    """Draw output-to-input coordinates, (1, 2, 3), in ``affine_grid``'s [-1, 1]; rotation keeps pixels square."""
    angle = math.radians(generator.uniform(-config.max_rotation_deg, config.max_rotation_deg))
    scale = math.exp(generator.uniform(math.log(config.min_scale), math.log(config.max_scale)))
    shear = math.exp(generator.uniform(-config.max_shear, config.max_shear) / 2)
    shift_x, shift_y = generator.uniform(-2 * config.max_shift, 2 * config.max_shift, size=2)
    flip_x = -1.0 if config.flip_columns and generator.random() < 0.5 else 1.0
    flip_y = -1.0 if config.flip_rows and generator.random() < 0.5 else 1.0
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    aspect = height / width
    rows = [
        [flip_x * shear * cosine, -flip_x * shear * sine * aspect, shift_x],
        [flip_y * sine / shear / aspect, flip_y * cosine / shear, shift_y],
    ]
    return torch.tensor([rows], dtype=torch.float32)


def _change_intensity(image_CHW: Tensor, config: AugmentConfig, generator: np.random.Generator) -> Tensor:
    gamma = math.exp(generator.uniform(-config.max_log_gamma, config.max_log_gamma))
    contrast = math.exp(generator.uniform(-config.max_log_contrast, config.max_log_contrast))
    image_CHW = image_CHW.clamp(0, 1) ** gamma * contrast
    if generator.random() < config.blur_probability:
        image_CHW = F.avg_pool2d(image_CHW[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    noise_std = generator.uniform(0, config.noise_std)
    if noise_std > 0:
        image_CHW = image_CHW + noise_std * torch.from_numpy(generator.standard_normal(image_CHW.shape, np.float32))
    return image_CHW.clamp(0, 1)
