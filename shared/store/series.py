"""Record of one series in the table of a store, written when the series is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from samgraft.shared.scans.intensity import IntensityStats
from samgraft.shared.scans.orientation import NativeGrid, Plane, voxel_sizes
from samgraft.shared.scans.volume import IGNORE_LABEL, Modality


@dataclass(frozen=True, kw_only=True)
class PlaneTable:
    """Grid and facts per slice of one stack of slices of a series."""

    shape_zyx: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    """Affine from voxels (x, y, z) of this stack to RAS+ mm, 4x4."""
    foreground_fraction: tuple[float, ...]
    """Share of non-air pixels of every slice, 0 to 1."""
    label_pixels: dict[int, tuple[int, ...]]
    """Number of pixels of each label id except 0, per slice, also of ``IGNORE_LABEL``. Empty without label."""

    @property
    def ignored_pixels(self) -> npt.NDArray[np.int64]:
        """Number of pixels that are not annotated, per slice (Z,)."""
        return np.asarray(self.label_pixels.get(IGNORE_LABEL, (0,) * self.shape_zyx[0]), dtype=np.int64)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns (z, row, col), in mm."""
        x, y, z = voxel_sizes(self.affine_matrix)
        return float(z), float(y), float(x)

    @property
    def affine_matrix(self) -> npt.NDArray[np.float64]:
        """Affine as an array."""
        return np.asarray(self.affine, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class SeriesRecord:
    """One series of a store.

    Ids are salted hashes. Nothing here identifies a patient, a file or a site.
    """

    series_id: str
    patient_id: str
    study_id: str
    modality: Modality
    plane: Plane
    """Plane of the main stack."""
    planes: dict[Plane, PlaneTable]
    has_label: bool
    source_sha256: str
    """sha256 over the bytes of the source files."""
    label_sha256: str | None = None
    """sha256 over the bytes of the label files."""
    content_sha256: str
    """sha256 over shape and voxel values of the main stack. Equal pixels have equal hashes in any file format."""
    stats: IntensityStats
    grid: NativeGrid
    """Grid of the source file."""
    dtype: str
    site_id: str | None = None
    """Salted hash of the site or scanner, for splits by site."""
    notes: tuple[str, ...] = ()
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and sha256 of every file of the series, by path relative to its folder."""

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Numbers of slices, rows and columns of the main stack."""
        return self.planes[self.plane].shape_zyx

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Spacing of the main stack (z, row, col), in mm."""
        return self.planes[self.plane].spacing_mm

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Affine from voxels (x, y, z) of the main stack to RAS+ mm."""
        return self.planes[self.plane].affine_matrix

    @property
    def label_voxels(self) -> dict[int, int]:
        """Number of voxels of every label id except 0 and ``IGNORE_LABEL``."""
        pixels = self.planes[self.plane].label_pixels
        return {label: sum(counts) for label, counts in pixels.items() if label != IGNORE_LABEL}

    @property
    def ignored_voxels(self) -> int:
        """Number of voxels that are not annotated."""
        return int(self.planes[self.plane].ignored_pixels.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SeriesRecord:
        """Create a record from the values of ``to_dict``.

        Raises:
            ValueError: If a value is missing or has another type.
        """
        return _adapter().validate_python(values)


@cache
def _adapter() -> TypeAdapter[SeriesRecord]:
    return TypeAdapter(SeriesRecord)


def image_name(plane: Plane, main: Plane) -> str:
    """Return the name of the image array of a plane inside a series group."""
    return "image" if plane is main else f"image_{plane.value}"


def label_name(plane: Plane, main: Plane) -> str:
    """Return the name of the label array of a plane inside a series group."""
    return "label" if plane is main else f"label_{plane.value}"
