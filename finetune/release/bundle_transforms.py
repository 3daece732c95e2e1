"""MONAI transforms of a released bundle, which prepare a scan exactly as in training.

Axis letters: X, Y, Z = columns, rows, slices of the canonical grid.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Orientation
from monai.transforms.transform import MapTransform
from samgraft.shared.scans.intensity import IntensityPreset, measure_intensity, normalise
from samgraft.shared.scans.orientation import DISPLAY_AXES, slice_plane
from samgraft.shared.scans.volume import Modality


class DisplayOrientationd(MapTransform):
    """Reorientation to the slice axis last and to slices in radiological display orientation."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Reorient a ``MetaTensor`` (1, i, j, k) to (1, X, Y, Z)."""
        out = dict(data)
        for key in self.key_iterator(out):
            plane = slice_plane(np.asarray(out[key].affine, dtype=np.float64), tuple(out[key].shape[1:]))
            out[key] = Orientation(axcodes="".join(DISPLAY_AXES[plane]))(out[key])
        return out


class FileOrientationd(MapTransform):
    """Reorientation of masks back to the axes of the scan's file, without resampling."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Reorient a ``MetaTensor`` (1, X, Y, Z) to (1, i, j, k)."""
        out = dict(data)
        for key in self.key_iterator(out):
            codes = nib.aff2axcodes(np.asarray(out[key].meta["original_affine"], dtype=np.float64))
            out[key] = Orientation(axcodes="".join(str(code) for code in codes))(out[key])
        return out


class NormaliseIntensityd(MapTransform):
    """Intensity normalisation to [0, 1] by statistics of the non-air voxels, with the preset of training."""

    def __init__(self, keys: KeysCollection, *, preset: Mapping[str, Any], modality: str) -> None:
        super().__init__(keys)
        self.preset = IntensityPreset.from_dict(preset)
        self.modality = Modality(modality)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise volumes (1, X, Y, Z) and keep their metadata."""
        out = dict(data)
        for key in self.key_iterator(out):
            # The statistics are those of the whole volume, as in training, so that slices stay comparable.
            volume_ZYX = np.ascontiguousarray(out[key].numpy()[0].transpose(2, 1, 0))
            stats = measure_intensity(volume_ZYX, modality=self.modality)
            scaled = np.stack([normalise(slice_YX, stats, self.preset) for slice_YX in volume_ZYX])
            values = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 1, 0)))[None]
            out[key] = MetaTensor(values, affine=out[key].affine, meta=out[key].meta)
        return out
