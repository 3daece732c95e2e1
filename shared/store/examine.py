"""Examination of one case, which is read, checked and cut into slices.

Nothing is written here, so a dry run and a build refuse the same cases.

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from samgraft.shared.errors import DataError
from samgraft.shared.scans.case import SourceCase, label_on_plane, read_case, read_label, to_small_dtype
from samgraft.shared.scans.intensity import IntensityStats, foreground_fractions, measure_intensity
from samgraft.shared.scans.orientation import Plane, is_near_isotropic, to_native
from samgraft.shared.scans.privacy import BURNED_IN, path_findings, pseudonym
from samgraft.shared.scans.volume import (
    IGNORE_LABEL,
    Array,
    Modality,
    RawScan,
    Volume,
    content_sha256,
    volume_from_scan,
)
from samgraft.shared.store.series import PlaneTable, SeriesRecord

MIN_SIDE_PX = 8
"""Shortest side of a slice. Half a ViT token is not a picture, and 3 x 3 means swapped axes."""
MAX_SIDE_PX = 16384
MODALITY_TAGS = {
    Modality.MRI: {"MR"},
    Modality.CT: {"CT"},
    Modality.XRAY: {"CR", "DX", "MG", "XA", "RF", "PX", "IO", "RG"},
    Modality.ULTRASOUND: {"US", "IVUS"},
}
"""Values of DICOM (0008,0060) that fit each modality."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings that decide the bytes of a store, together with its sources."""

    modality: Modality
    salt: str
    planes: tuple[Plane, ...] = ()
    """Planes to store, the main one first. Empty means the acquired plane only."""
    label_ids: tuple[int, ...] | None = None
    """Label ids with a name. Others are refused. None accepts all."""
    zero_non_finite: bool = False
    """Replace NaN and Inf by 0 instead of refusing them."""
    accept_burned_in: bool = False
    """Accept scans whose header declares text burned into the pixels."""
    ignore_empty_slices: bool = False
    """Treat slices without any label as not annotated instead of as background."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A case that passed, with its record without file hashes and its arrays."""

    record: SeriesRecord
    images: dict[Plane, Array]
    labels: dict[Plane, Array]
    privacy: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """Result of one case for the report."""

    name: str
    refused: str | None = None
    """Reason of the refusal, or None for a case that passed."""
    privacy: tuple[str, ...] = ()
    """Kinds of identifying content in the source."""
    record: SeriesRecord | None = None
    kept: bool = False
    """True for a series that an earlier build finished."""


def examine_case(case: SourceCase, settings: BuildSettings) -> Examined:
    """Read and check one case.

    Raises:
        DataError: For everything that would corrupt a training run.
    """
    return examine_scan(read_case(case), case, settings)


def examine_scan(scan: RawScan, case: SourceCase, settings: BuildSettings) -> Examined:
    """Check a scan that was read, and cut it into slices. The case supplies its name, keys and labels.

    Raises:
        DataError: As ``examine_case``.
    """
    where = case.name
    privacy = _check_privacy(case, scan, settings)
    _check_modality(scan, settings, where=where)
    scan, notes = _replace_non_finite(scan, settings, where=where)
    main = settings.planes[0] if settings.planes else None
    volume = volume_from_scan(scan, modality=settings.modality, plane=main, where=where)
    if main is not None and volume.plane is main and not is_near_isotropic(volume.affine):
        # Thick slices are never resliced, whatever planes were requested.
        volume = volume_from_scan(scan, modality=settings.modality, where=where)
    _check_slice_size(volume, where=where)
    stats = measure_intensity(volume.array_zyx, modality=settings.modality)
    fill = [v for v in (volume.array_zyx.min(), volume.array_zyx.max()) if not stats.minimum <= v <= stats.maximum]
    notes += tuple(f"voxels with the fill value {value:g} are left out of the statistics" for value in fill)
    if stats.maximum <= stats.minimum:
        raise DataError(f"a scan must have contrast, every voxel is {stats.minimum:g}.", where=where)
    label_ijk, label_digest = read_label(case, scan) if case.labels else (None, None)
    if label_ijk is not None:
        _check_label_ids(label_ijk, settings, where=where)
        if settings.ignore_empty_slices:
            label_ijk, num_ignored = _ignore_empty_slices(label_ijk, volume)
            notes += (f"{num_ignored} of {len(volume.array_zyx)} slices have no label and are not counted",)
    images, labels, tables = _cut_planes(scan, volume, label_ijk, stats, settings, where=where)
    record = SeriesRecord(
        series_id=series_id_of(case, settings),
        patient_id=pseudonym("p", case.patient_key, salt=settings.salt),
        study_id=pseudonym("t", f"{case.patient_key}/{case.study_key}", salt=settings.salt),
        site_id=pseudonym("c", case.site_key, salt=settings.salt) if case.site_key else None,
        modality=settings.modality,
        plane=volume.plane,
        planes=tables,
        has_label=label_ijk is not None,
        source_sha256=volume.source_sha256,
        label_sha256=label_digest,
        content_sha256=content_sha256(volume.array_zyx),
        stats=stats,
        grid=volume.grid,
        dtype=volume.array_zyx.dtype.name,
        notes=(*volume.notes, *notes),
    )
    return Examined(record=record, images=images, labels=labels, privacy=privacy)


def series_id_of(case: SourceCase, settings: BuildSettings) -> str:
    """Return the pseudonymous id of a case's series."""
    return pseudonym("s", f"{case.patient_key}/{case.study_key}/{case.name}", salt=settings.salt)


def _cut_planes(
    scan: RawScan,
    volume: Volume,
    label_ijk: Array | None,
    stats: IntensityStats,
    settings: BuildSettings,
    *,
    where: str,
) -> tuple[dict[Plane, Array], dict[Plane, Array], dict[Plane, PlaneTable]]:
    images: dict[Plane, Array] = {}
    labels: dict[Plane, Array] = {}
    tables: dict[Plane, PlaneTable] = {}
    # Other planes show the same voxels in another order. Unless voxels are near-isotropic, they would be stretched
    # images that no scanner produces.
    others = [plane for plane in settings.planes if plane is not volume.plane]
    for plane in (volume.plane, *(others if is_near_isotropic(volume.affine) else ())):
        same = plane is volume.plane
        cut = volume if same else volume_from_scan(scan, modality=settings.modality, plane=plane, where=where)
        images[plane] = cut.array_zyx
        if label_ijk is not None:
            labels[plane] = label_on_plane(label_ijk, cut)
        tables[plane] = _slice_table(cut, labels.get(plane), stats)
    return images, labels, tables


def _slice_table(volume: Volume, label_ZHW: Array | None, stats: IntensityStats) -> PlaneTable:
    z, y, x = volume.array_zyx.shape
    label_pixels: dict[int, tuple[int, ...]] = {}
    if label_ZHW is not None:
        for label in (int(v) for v in np.unique(label_ZHW) if v != 0):
            label_pixels[label] = tuple(int(n) for n in np.count_nonzero(label_ZHW == label, axis=(1, 2)))
    return PlaneTable(
        shape_zyx=(z, y, x),
        affine=tuple(tuple(float(v) for v in row) for row in volume.affine),
        foreground_fraction=tuple(round(float(v), 4) for v in foreground_fractions(volume.array_zyx, stats)),
        label_pixels=label_pixels,
    )


def _check_privacy(case: SourceCase, scan: RawScan, settings: BuildSettings) -> tuple[str, ...]:
    if BURNED_IN in scan.privacy and not settings.accept_burned_in:
        raise DataError(
            "the header declares text burned into the pixels. Remove it, or pass --accept-burned-in.",
            where=case.name,
        )
    return (*scan.privacy, *path_findings(case.name))


def _check_modality(scan: RawScan, settings: BuildSettings, *, where: str) -> None:
    # OT is DICOM's "other". Many converters write it, so it contradicts no modality.
    tag = (scan.modality_tag or "").upper()
    if tag and tag != "OT" and tag not in MODALITY_TAGS[settings.modality]:
        raise DataError(f"the modality must be {settings.modality.value}, got {tag} in the DICOM header.", where=where)


def _replace_non_finite(scan: RawScan, settings: BuildSettings, *, where: str) -> tuple[RawScan, tuple[str, ...]]:
    array = scan.array_ijk
    if array.dtype.kind != "f":
        return scan, ()
    bad = ~np.isfinite(array)
    num_bad = int(bad.sum())
    if num_bad == 0:
        return scan, ()
    share = f"{num_bad} of {array.size} voxels ({100 * num_bad / array.size:.2g} %)"
    if not settings.zero_non_finite:
        raise DataError(
            f"voxels must be finite, {share} are NaN or Inf. Repair the file, or pass --nan-policy zero.", where=where
        )
    if num_bad == array.size:
        raise DataError("every voxel is NaN or Inf.", where=where)
    cleaned = np.where(bad, array.dtype.type(0), array)
    return dataclasses.replace(scan, array_ijk=cleaned), (f"{share} were NaN or Inf and are 0",)


def _check_slice_size(volume: Volume, *, where: str) -> None:
    height, width = volume.array_zyx.shape[1:]
    if min(height, width) < MIN_SIDE_PX or max(height, width) > MAX_SIDE_PX:
        raise DataError(
            f"slices must have sides of {MIN_SIDE_PX} to {MAX_SIDE_PX} px, got {height} x {width}.", where=where
        )


def _ignore_empty_slices(label_ijk: Array, volume: Volume) -> tuple[Array, int]:
    """Mark the slices without any label as not annotated, and return their number."""
    # On the main plane, because annotators work slice by slice there. A slice of another plane crosses annotated and
    # other slices, so the mark goes back to the voxels before these planes are cut.
    label_ZHW = label_on_plane(label_ijk, volume).astype(np.int32)
    empty_Z = ~(label_ZHW > 0).any(axis=(1, 2))
    label_ZHW[empty_Z] = IGNORE_LABEL
    return to_small_dtype(to_native(label_ZHW, volume.grid, volume.plane)), int(empty_Z.sum())


def _check_label_ids(label_ijk: Array, settings: BuildSettings, *, where: str) -> None:
    if settings.label_ids is None:
        return
    found = [int(value) for value in np.unique(label_ijk) if value not in (0, IGNORE_LABEL)]
    if unknown := [value for value in found if value not in settings.label_ids]:
        suggestion = ",".join(f"{value}={value if value in settings.label_ids else 0}" for value in found)
        raise DataError(
            f"label ids must be among {list(settings.label_ids)}, got {unknown} too. Try --label-map {suggestion}",
            where=where,
        )
