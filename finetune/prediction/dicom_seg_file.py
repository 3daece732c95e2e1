"""Segmentation as DICOM-SEG, in the study of its source series.

The standard requires that a segmentation repeats the patient and study of its source. Such a file identifies the
patient exactly as the source does and needs the same protection.

Letters: i, j, k = columns, rows, slices of the scan as its reader stacked it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from samgraft.finetune.prediction.prediction_files import NativeMasks
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.readers.dicom import find_tag

MAX_LABEL_LETTERS = 64
"""Largest length of a segment's label, value representation LO."""


def is_available() -> bool:
    """Return True if highdicom is installed."""
    from importlib.util import find_spec

    return find_spec("highdicom") is not None


def write_dicom_seg(
    path: Path, masks: NativeMasks, sources: Sequence[Path], *, model_name: str, weights_sha256: str, prompted: bool
) -> None:
    """Write a binary segmentation with one segment per class that refers to every source image.

    Args:
        path: File to write.
        masks: Segmentation on the grid of the series.
        sources: Files of the series, in any order.
        model_name: Name of the algorithm.
        weights_sha256: Hash of the model. Its beginning becomes the device's serial number, which identifies the model.
        prompted: True records the algorithm as semi-automatic.

    Raises:
        UsageError: If highdicom is not installed.
        DataError: If the series lacks attributes that a segmentation must repeat, or no voxel was segmented.
    """
    if not is_available():
        raise UsageError("DICOM-SEG needs highdicom.", next_command="pip install 'samgraft[dicom]'")
    import highdicom as hd

    images, slice_of_frame = _in_order_of_images(sources, masks.labels_ijk.shape[2], where=path.name)
    # (frames, rows, columns, segments): segments of overlapping classes share voxels.
    segments = np.stack(
        [masks.mask(channel)[:, :, slice_of_frame].transpose(2, 1, 0) for channel in range(masks.classes.num_classes)],
        axis=-1,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual values of the source, which are repeated unchanged
            segmentation = hd.seg.Segmentation(
                source_images=images,
                pixel_array=segments.astype(np.uint8),
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_descriptions(masks, model_name, prompted=prompted),
                series_instance_uid=hd.UID(),
                series_number=1000,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="samgraft",
                manufacturer_model_name=model_name[:MAX_LABEL_LETTERS],
                software_versions=version("samgraft"),
                device_serial_number=weights_sha256[:16] or "0",
                series_description=f"Segmentation: {', '.join(masks.classes.names)}"[:MAX_LABEL_LETTERS],
                omit_empty_frames=True,  # a lesion is in a few slices of hundreds
            )
            segmentation.save_as(path)
    except (AttributeError, KeyError, ValueError, TypeError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")
        raise DataError(
            f"the series lacks attributes that a DICOM-SEG must repeat from it ({first}). Use --formats nifti,nrrd.",
            where=path.name,
        ) from err


def _descriptions(masks: NativeMasks, model_name: str, *, prompted: bool) -> list[Any]:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    kind = hd.seg.SegmentAlgorithmTypeValues
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model_name[:MAX_LABEL_LETTERS],
        family=codes.DCM.ArtificialIntelligence,
        version=version("samgraft"),
        source="samgraft",
    )
    return [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:MAX_LABEL_LETTERS],
            # The anatomy of a class is only in its name, so the most general code is used.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=kind.SEMIAUTOMATIC if prompted else kind.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=hd.UID(),
            tracking_id=f"{name[:MAX_LABEL_LETTERS]}",
        )
        for number, name in enumerate(masks.classes.names, start=1)
    ]


def _in_order_of_images(
    sources: Sequence[Path], num_slices: int, *, where: str
) -> tuple[list[Any], npt.NDArray[np.intp]]:
    """Return the source images and the slice number of each of their frames."""
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in sources]
    positions = [position for image in images for position in _frame_positions(image)]
    if len(positions) != num_slices or any(position is None for position in positions):
        raise DataError(
            f"every slice must have its position in the source series, got {len(positions)} for "
            f"{num_slices} slices. Use --formats nifti,nrrd.",
            where=where,
        )
    # The reader stacks frames along their common normal, so slice k is the k-th frame in that order.
    order = np.argsort(np.asarray(positions, dtype=np.float64), kind="stable")
    slice_of_frame = np.empty(len(order), dtype=np.intp)
    slice_of_frame[order] = np.arange(len(order))
    return images, slice_of_frame


def _frame_positions(image: pydicom.Dataset) -> list[float | None]:
    """Return the position of every frame of a file along its normal, mm, or None without geometry."""
    shared = list(image.get("SharedFunctionalGroupsSequence", []))[:1]
    # An enhanced file has many frames, whose geometry is in a group per frame or in the shared one.
    groups = image.get("PerFrameFunctionalGroupsSequence")
    frames = [[image]] if groups is None else [[group, *shared, image] for group in groups]
    found: list[float | None] = []
    for places in frames:
        position, orientation = find_tag("ImagePositionPatient", places), find_tag("ImageOrientationPatient", places)
        if position is None or orientation is None:
            found.append(None)
            continue
        directions = np.asarray(orientation, dtype=np.float64)
        normal = np.cross(directions[:3], directions[3:])
        found.append(float(np.asarray(position, dtype=np.float64) @ normal))
    return found
