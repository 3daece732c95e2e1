"""Conversion of native scanner units to the [0, 1] range of the encoders, by statistics of each volume.

Shape letters: Z = slices, H, W = rows and columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import DataError
from samgraft.shared.scans.volume import Modality

Array = npt.NDArray[Any]
Slice = npt.NDArray[np.float32]

STORED_PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
AIR_FRACTION = 0.08
"""Upper end of air in MR, X-ray and ultrasound, as a share of the range from the darkest to the 99th percentile voxel.
Background noise of the demo scans ends at 0.05. The darkest tissue (cortical bone) counts as air too, which shifts the
percentiles little."""
AIR_HU = -500.0
"""Upper end of air on the Hounsfield scale. Air is -1000. Lung is about -700 but always next to soft tissue."""
MAX_SAMPLES = 2_000_000
"""Number of voxels above which percentiles use every n-th voxel. The error is under 0.1 percentile."""

MIN_FILL_SHARE = 0.001
"""Smallest share of the voxels that a fill value has. Single defect pixels are not one."""
FILL_DISTANCE = 4.0
"""Smallest distance of a fill value from all other values, in multiples of their range."""


class IntensityKind(Enum):
    """Rule by which native values become [0, 1]."""

    PERCENTILE = "percentile"
    """Range between two percentiles of the non-air voxels of the volume."""
    ZSCORE = "zscore"
    """Range of ``clip_std`` standard deviations around the mean of the non-air voxels."""
    WINDOW = "window"
    """Fixed window in native units, for CT in Hounsfield units."""
    MINMAX = "minmax"
    """Range from the darkest to the brightest voxel of the volume."""


@dataclass(frozen=True, kw_only=True)
class IntensityPreset:
    """Normalisation of a store's slices, recorded in the store and in every card."""

    name: str = "mr-percentile"
    """Name for cards and reports."""
    kind: IntensityKind = IntensityKind.PERCENTILE
    """Rule that decides which of the fields below are used."""
    lower_percentile: float = 0.5
    """Percentile that becomes 0 (kind percentile). 0.5 and 99.5 are nnU-Net's clipping points."""
    upper_percentile: float = 99.5
    """Percentile that becomes 1 (kind percentile)."""
    clip_std: float = 3.0
    """Half width of the range in standard deviations (kind zscore)."""
    window_center: float = 40.0
    """Middle of the window in native units, HU for CT (kind window)."""
    window_width: float = 400.0
    """Full width of the window in native units (kind window)."""

    def __post_init__(self) -> None:
        if not 0 <= self.lower_percentile < self.upper_percentile <= 100:
            raise ValueError(
                "percentiles must satisfy 0 <= lower_percentile < upper_percentile <= 100, "
                f"got {self.lower_percentile} and {self.upper_percentile}."
            )
        if not self.window_width > 0:
            raise ValueError(f"window_width must be positive, got {self.window_width}.")
        if not self.clip_std > 0:
            raise ValueError(f"clip_std must be positive, got {self.clip_std}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IntensityPreset:
        """Build a preset from the values of ``to_dict``.

        Raises:
            DataError: For unknown keys.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise DataError(f"unknown keys in an intensity preset: {', '.join(unknown)}.")
        return cls(**{**values, "kind": IntensityKind(values.get("kind", "percentile"))})


@dataclass(frozen=True, kw_only=True)
class IntensityStats:
    """Statistics of one volume in native units, taken over its non-air voxels."""

    minimum: float
    maximum: float
    mean: float
    std: float
    air_threshold: float
    """Value at or below which a voxel counts as air."""
    percentiles: tuple[float, ...]
    """Values at ``STORED_PERCENTILES``."""

    def percentile(self, percent: float) -> float:
        """Return a percentile, interpolated between the stored ones."""
        return float(np.interp(percent, STORED_PERCENTILES, self.percentiles))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "percentiles": list(self.percentiles)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IntensityStats:
        """Build statistics from the values of ``to_dict``."""
        return cls(**{**values, "percentiles": tuple(float(v) for v in values["percentiles"])})


def find_fill_values(array_zyx: Array) -> tuple[float, ...]:
    """Find extreme values that mark voxels without a measurement, as -32768 or 65535 outside the field of view.

    Such a value is frequent and far from all others. 0 is never one, because it is the background of many scans, and
    neither is any value of 8-bit pictures.
    """
    fill: list[float] = []
    if array_zyx.dtype.itemsize == 1:
        return ()
    rest_zyx = np.ones(array_zyx.shape, dtype=bool)
    for pick in (np.min, np.max):
        value = pick(array_zyx)
        others_zyx = rest_zyx & (array_zyx != value)
        num_fill = np.count_nonzero(rest_zyx) - np.count_nonzero(others_zyx)
        if value == 0 or num_fill < MIN_FILL_SHARE * array_zyx.size or not others_zyx.any():
            continue
        others = array_zyx[others_zyx]
        low, high = float(others.min()), float(others.max())
        if high > low and max(low - float(value), float(value) - high) > FILL_DISTANCE * (high - low):
            fill.append(float(value))
            rest_zyx = others_zyx
    return tuple(fill)


def measure_intensity(array_zyx: Array, *, modality: Modality) -> IntensityStats:
    """Measure the intensities of a volume, once when its store is built. Fill values are left out.

    Raises:
        DataError: If a voxel is not finite.
    """
    if not (np.isfinite(array_zyx.min()) and np.isfinite(array_zyx.max())):
        num_bad = int((~np.isfinite(array_zyx)).sum())
        raise DataError(f"voxels must be finite, got {num_bad} of {array_zyx.size} that are not.")
    if fill := find_fill_values(array_zyx):
        array_zyx = array_zyx[~np.isin(array_zyx, fill)]
    # An odd stride visits all columns; a stride of 256 would only visit the left edge of slices 256 pixels wide.
    stride = (array_zyx.size // MAX_SAMPLES) | 1
    sample = array_zyx.reshape(-1)[::stride]
    if sample.dtype.kind == "f":  # integers are sorted several times faster without conversion
        sample = sample.astype(np.float64)
    low, high = float(array_zyx.min()), float(array_zyx.max())
    air = air_threshold(sample, modality=modality)
    tissue = sample[sample > air]
    if tissue.size == 0:  # a constant volume: statistics of all voxels
        tissue = sample
    values = np.percentile(tissue, STORED_PERCENTILES)
    tissue = tissue.astype(np.float64)
    return IntensityStats(
        minimum=low,
        maximum=high,
        mean=float(tissue.mean()),
        std=float(tissue.std()),
        air_threshold=air,
        percentiles=tuple(float(v) for v in values),
    )


def air_threshold(sample: Array, *, modality: Modality) -> float:
    """Return the value at or below which a voxel counts as air."""
    if modality is Modality.CT:
        return AIR_HU
    dark, bright = np.percentile(sample, (0.5, 99.0))
    if bright <= dark:
        bright = sample.max()
    return float(dark + AIR_FRACTION * (bright - dark))


def foreground_fractions(array_zyx: Array, stats: IntensityStats) -> npt.NDArray[np.float64]:
    """Return the share of non-air pixels of every slice, shape (Z,). Fill values above the maximum do not count."""
    air, top = stats.air_threshold, stats.maximum
    return np.array([np.count_nonzero((slice_HW > air) & (slice_HW <= top)) / slice_HW.size for slice_HW in array_zyx])


def intensity_range(stats: IntensityStats, preset: IntensityPreset) -> tuple[float, float]:
    """Return the native values that become 0 and 1."""
    if preset.kind is IntensityKind.PERCENTILE:
        return stats.percentile(preset.lower_percentile), stats.percentile(preset.upper_percentile)
    if preset.kind is IntensityKind.ZSCORE:
        half = preset.clip_std * stats.std
        return stats.mean - half, stats.mean + half
    if preset.kind is IntensityKind.WINDOW:
        # DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT: LINEAR's half-unit shifts are for integer display values.
        return preset.window_center - preset.window_width / 2, preset.window_center + preset.window_width / 2
    return stats.minimum, stats.maximum


def normalise(slice_HW: Array, stats: IntensityStats, preset: IntensityPreset) -> Slice:
    """Map one slice of native values linearly onto [0, 1]. Values outside the range saturate.

    Args:
        slice_HW: Shape (H, W), native units.
        stats: Statistics of the whole volume, so that slices of one scan stay comparable.
        preset: Rule for the range that becomes [0, 1].

    Returns:
        Shape (H, W), float32. All zeros for a volume without contrast.

    Raises:
        DataError: If a pixel is not finite.
    """
    low, high = intensity_range(stats, preset)
    scaled_HW = slice_HW.astype(np.float32)
    if slice_HW.dtype.kind == "f" and not np.isfinite(scaled_HW).all():
        num_bad = int((~np.isfinite(scaled_HW)).sum())
        raise DataError(f"slice_HW has {num_bad} non-finite of {scaled_HW.size} pixels; rebuild the store.")
    # Equal ends come from constant volumes and from percentiles of almost constant ones.
    if not high > low:
        return np.zeros_like(scaled_HW)
    scaled_HW -= np.float32(low)
    scaled_HW *= np.float32(1.0 / (high - low))
    return np.clip(scaled_HW, 0.0, 1.0, out=scaled_HW)
