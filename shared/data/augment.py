"""Augmentation of slices: flips that anatomy allows, affine, intensity, bias field, noise, low resolution.

MONAI's transforms on float tensors, seeded per sample by the generator of the sample: the same in any worker, after
any resume. The label follows geometry by nearest neighbour, so no id can appear that was not there.

Shape letters: C = channels, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AugmentPreset:
    """Strengths and probabilities; 0 switches a part off."""

    flip_columns_probability: float = 0.5
    """Left-right mirror of axial and coronal slices; 0 where sides differ (chest, abdomen) or slices are sagittal."""
    flip_rows_probability: float = 0.0
    """Top-bottom mirror: no patient is upside down."""
    affine_probability: float = 0.8
    """Of rotation, scale and shift together."""
    max_rotation_deg: float = 15.0
    """Heads tilt by about this much."""
    max_scale: float = 0.2
    """Largest relative change of size."""
    max_shift: float = 0.1
    """Largest shift, as a share of the slice's sides."""
    gamma_probability: float = 0.3
    """Of a change of contrast."""
    max_log_gamma: float = 0.3
    """Gamma is exp(uniform(-x, x))."""
    bias_field_probability: float = 0.2
    """Of a smooth gain, as surface coils make; only MR has it."""
    bias_field: float = 0.3
    """Largest coefficient of the polynomial of degree 3 whose exponential is the gain."""
    noise_probability: float = 0.2
    """Of Gaussian noise."""
    max_noise_std: float = 0.05
    """Largest standard deviation, in units of the normalised image."""
    low_resolution_probability: float = 0.1
    """Of down- and upsampling, as thick or old scans have it."""
    min_zoom: float = 0.5
    """Smallest factor of the downsampling."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value < 0 or (name.endswith("probability") and value > 1):
                raise ValueError(
                    f"augment.{name} must lie in [0, 1] for probabilities and not be negative, got {value}."
                )
        if not 0 < self.min_zoom <= 1:
            raise ValueError(f"augment.min_zoom must lie in (0, 1], got {self.min_zoom}.")
        if self.max_scale >= 1:
            raise ValueError(f"augment.max_scale must be below 1, got {self.max_scale}.")


class SliceAugmentation:
    """Callable for :class:`~samgraft.shared.data.dataset.SliceDataset`; picklable, holds no random state."""

    def __init__(self, preset: AugmentPreset) -> None:
        self.preset = preset

    def __getstate__(self) -> dict[str, Any]:
        return {"preset": self.preset}

    def __call__(
        self, image_CHW: Tensor, label_HW: Tensor | None, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Augment one sample.

        Args:
            image_CHW: Float in [0, 1].
            label_HW: Label ids, or None.
            generator: Of this sample; the only source of randomness.

        Returns:
            The image, again in [0, 1], and the label with a subset of its ids.
        """
        image_CHW, label_HW = self._geometry(image_CHW, label_HW, generator)
        for transform in self._intensity:
            transform.set_random_state(seed=int(generator.integers(2**31)))
            image_CHW = torch.as_tensor(transform(image_CHW))
        return image_CHW.clamp(0.0, 1.0).to(torch.float32), label_HW

    def _geometry(
        self, image_CHW: Tensor, label_HW: Tensor | None, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        p = self.preset
        for axis, probability in ((-1, p.flip_columns_probability), (-2, p.flip_rows_probability)):
            if generator.random() < probability:
                image_CHW = image_CHW.flip(axis)
                label_HW = None if label_HW is None else label_HW.flip(axis)
        apply = generator.random() < p.affine_probability
        angle, scale, shift_row, shift_column = generator.uniform(-1, 1, size=4)
        if not apply:
            return image_CHW, label_HW
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = image_CHW.shape[-2:]
        options: dict[str, Any] = {
            "angle": float(angle * p.max_rotation_deg),
            "translate": [round(shift_column * p.max_shift * width), round(shift_row * p.max_shift * height)],
            "scale": float(1 + scale * p.max_scale),
            "shear": [0.0, 0.0],
        }
        image_CHW = F.affine(image_CHW, interpolation=InterpolationMode.BILINEAR, **options)
        if label_HW is not None:
            # float32 holds every id up to 2^24: nearest neighbour gives them back exactly.
            moved = F.affine(label_HW[None].to(torch.float32), interpolation=InterpolationMode.NEAREST, **options)
            label_HW = moved[0].to(label_HW.dtype)
        return image_CHW, label_HW

    @cached_property
    def _intensity(self) -> tuple[Any, ...]:
        # Imported here: MONAI takes seconds, and stores are read without augmentation too.
        from monai.transforms.intensity.array import RandAdjustContrast, RandBiasField, RandGaussianNoise
        from monai.transforms.spatial.array import RandSimulateLowResolution

        p = self.preset

        def low_resolution(probability: float) -> Any:
            # MONAI's default modes are for volumes.
            return RandSimulateLowResolution(
                prob=probability, zoom_range=(p.min_zoom, 1.0), downsample_mode="nearest", upsample_mode="bilinear"
            )

        gamma = (float(np.exp(-p.max_log_gamma)), float(np.exp(p.max_log_gamma)))
        candidates = (
            (p.gamma_probability, lambda x: RandAdjustContrast(prob=x, gamma=gamma)),
            (p.bias_field_probability, lambda x: RandBiasField(prob=x, degree=3, coeff_range=(0.0, p.bias_field))),
            (p.low_resolution_probability, low_resolution),
            (p.noise_probability, lambda x: RandGaussianNoise(prob=x, std=p.max_noise_std)),
        )
        return tuple(make(probability) for probability, make in candidates if probability > 0)
