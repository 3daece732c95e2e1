"""Patches of labelled volumes as training samples for 3D networks.

Shape letters: Z, H, W = slices, rows and columns of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from samgraft.finetune.classes import ClassTable
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.samples.sampler import sample_generator
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.scans.orientation import Plane, has_mirror_image
from samgraft.shared.store.store import SliceStore
from torch import Tensor
from torch.utils.data import Dataset

Array = npt.NDArray[Any]


class VolumePatches(Dataset[dict[str, Any]]):
    """One random, augmented patch per item.

    An item is ``(index, sample_counter)``, see ``StepBatchSampler``. The counter seeds the patch, so that a resumed run
    trains on the same voxels.
    """

    def __init__(
        self,
        store: SliceStore,
        series_ids: Sequence[str],
        *,
        patch_size: Sequence[int],
        classes: ClassTable,
        intensity: IntensityPreset,
        foreground_fraction: float,
        augment: AugmentConfig,
        seed: int,
        labels: SliceStore | None = None,
    ) -> None:
        """Store the settings. Nothing is read.

        Args:
            store: Store of the scans.
            series_ids: Series of each index.
            patch_size: Slices, rows and columns.
            classes: Foreground classes.
            intensity: Mapping from native units to [0, 1].
            foreground_fraction: Share of patches around a voxel of a class; other patches are anywhere in the scan.
            augment: Settings of ``data.augment``; geometry changes within the plane of a slice only.
            seed: Seed of the run.
            labels: Store that labels are read from, which has the same series. None reads those of ``store``.
        """
        self.store = store
        self.labels = labels or store
        self.series_ids = tuple(series_ids)
        self.patch_size = tuple(patch_size)
        self.classes = classes
        self.intensity = intensity
        self.foreground_fraction = foreground_fraction
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.series_ids)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, sample_counter = item
        series_id = self.series_ids[index]
        rng = sample_generator(self.seed, sample_counter)
        volume_ZHW, label_ZHW = self.store.read_volume(series_id), self.labels.read_label_volume(series_id)
        start = self._place(label_ZHW, rng)
        record = self.store.record(series_id)
        patch_ZHW = cut(volume_ZHW, start, self.patch_size, padding=volume_ZHW.min())
        image = np.stack([normalise(slice_HW, record.stats, self.intensity) for slice_HW in patch_ZHW])
        label = cut(label_ZHW, start, self.patch_size, padding=0).astype(np.int64)
        moved, label_moved = augment_patch(
            torch.from_numpy(image), torch.from_numpy(label), self.augment, rng, plane=record.plane
        )
        return {"volume": moved[None], "label": label_moved, "sample_counter": sample_counter}

    def _place(self, label_ZHW: Array, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the first corner of a patch, around a voxel of a random class or anywhere in the scan."""
        around = rng.random() < self.foreground_fraction
        channel = int(rng.integers(self.classes.num_classes))
        # A class that the scan does not show gives no places, and the patch is then anywhere.
        places = np.argwhere(self.classes.true_mask(label_ZHW, channel)) if around else np.empty((0, 3))
        center = places[int(rng.integers(len(places)))] if len(places) else None
        start = []
        for axis, (size, side) in enumerate(zip(label_ZHW.shape, self.patch_size, strict=True)):
            last = max(0, size - side)
            wanted = int(rng.integers(last + 1)) if center is None else int(center[axis]) - side // 2
            # A scan smaller than the patch is in its middle, because sliding-window inference pads it so.
            start.append(min(max(wanted, 0), last) if size >= side else -((side - size) // 2))
        return tuple(start)


def cut(volume_ZHW: Array, start: Sequence[int], patch_size: Sequence[int], *, padding: Any) -> Array:
    """Cut a patch, padded with a value outside the volume."""
    before = [max(0, -s) for s in start]
    after = [max(0, s + side - size) for s, side, size in zip(start, patch_size, volume_ZHW.shape, strict=True)]
    # A start below 0 means padding before the scan; slicing with a negative number would count from the end.
    inside = tuple(slice(max(0, s), s + side) for s, side in zip(start, patch_size, strict=True))
    return np.pad(volume_ZHW[inside], list(zip(before, after, strict=True)), constant_values=padding)


def augment_patch(
    image_ZHW: Tensor, label_ZHW: Tensor, config: AugmentConfig, rng: np.random.Generator, *, plane: Plane
) -> tuple[Tensor, Tensor]:
    """Apply one random affine map to all slices of a patch and its label, then change the intensity."""
    height, width = image_ZHW.shape[-2:]
    angle = math.radians(rng.uniform(-config.max_rotation_deg, config.max_rotation_deg))
    scale = math.exp(rng.uniform(math.log(config.min_scale), math.log(config.max_scale)))
    shift_x, shift_y = rng.uniform(-2 * config.max_shift, 2 * config.max_shift, size=2)
    flip = -1.0 if rng.random() < config.flip_columns_probability and has_mirror_image(plane) else 1.0
    cosine, sine, aspect = math.cos(angle) / scale, math.sin(angle) / scale, height / width
    # affine_grid works in normalised coordinates, where a rotation of a non-square slice needs the aspect ratio.
    theta = torch.tensor([[[flip * cosine, -flip * sine * aspect, shift_x], [sine / aspect, cosine, shift_y]]])
    grid = F.affine_grid(theta.float(), [1, 1, height, width], align_corners=False)
    image = F.grid_sample(image_ZHW[None], grid, mode="bilinear", align_corners=False)[0]
    label = F.grid_sample(label_ZHW[None].float(), grid, mode="nearest", align_corners=False)[0]
    gamma = math.exp(rng.uniform(-config.max_log_gamma, config.max_log_gamma))
    contrast = math.exp(rng.uniform(-config.max_log_contrast, config.max_log_contrast))
    image = image.clamp(0, 1) ** gamma * contrast
    noise_std = rng.uniform(0, config.noise_std)
    if noise_std > 0:
        image = image + noise_std * torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    return image.clamp(0, 1), label.to(label_ZHW.dtype)
