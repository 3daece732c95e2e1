"""Views: the random crop, flip and contrast that one slice gets before it enters the encoder.

Everything is drawn from the generator of the sample, so a resumed run sees the same views. Crops are cut at the
slice's own resolution; resizing to the encoder's input happens later, on the training device.

Shape letters: C = channels, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How much a slice is varied."""

    min_crop_fraction: float = 0.6
    """Shortest side of the random crop, as a fraction of the slice's side; 1 takes whole slices."""
    flip_probability: float = 0.5
    """Probability of a left-right flip. Up-down flips are left out: heads do not stand on their crown."""
    max_gamma: float = 1.3
    """Contrast: grey values are raised to a power drawn from [1 / max_gamma, max_gamma]; 1 switches it off."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop_fraction <= 1:
            raise ValueError(f"min_crop_fraction must lie in (0, 1], got {self.min_crop_fraction}.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], got {self.flip_probability}.")
        if self.max_gamma < 1:
            raise ValueError(f"max_gamma must be at least 1, got {self.max_gamma}.")


class RandomView:
    """Callable for ``SliceDataset(augment=...)``."""

    def __init__(self, config: ViewConfig) -> None:
        self.config = config

    def __call__(
        self, image_CHW: torch.Tensor, label_HW: torch.Tensor | None, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the image and label cropped and flipped alike, and the image's contrast changed."""
        height, width = image_CHW.shape[-2:]
        fraction = float(generator.uniform(self.config.min_crop_fraction, 1.0))
        rows, columns = max(1, round(height * fraction)), max(1, round(width * fraction))
        top = int(generator.integers(0, height - rows + 1))
        left = int(generator.integers(0, width - columns + 1))
        crop = (slice(top, top + rows), slice(left, left + columns))
        image_CHW = image_CHW[:, crop[0], crop[1]]
        label_HW = label_HW[crop] if label_HW is not None else None
        if generator.random() < self.config.flip_probability:
            image_CHW = image_CHW.flip(-1)
            label_HW = label_HW.flip(-1) if label_HW is not None else None
        spread = float(np.log(self.config.max_gamma))
        image_CHW = image_CHW.clamp_min(0) ** float(np.exp(generator.uniform(-spread, spread)))
        return image_CHW.contiguous(), label_HW.contiguous() if label_HW is not None else None
