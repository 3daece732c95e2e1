"""A segmentation as DICOM-SEG, in the study of the series that it belongs to.

The standard makes a segmentation repeat the patient and study of its source: such a file identifies the patient exactly
as its source does, and belongs where the source belongs.

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
"""Of a segment's label, value representation LO."""


def is_available() -> bool:
    """Tell whether highdicom is installed."""
    from importlib.util import find_spec

    return find_spec("highdicom") is not None


def write_dicom_seg(
    path: Path, masks: NativeMasks, sources: Sequence[Path], *, model_name: str, weights_sha256: str, prompted: bool
) -> None:
    """Write a binary segmentation, one segment per class, that refers to every source image.

    Args:
        path: File to write.
        masks: On the grid of the series.
        sources: Files of the series, in any order.
        model_name: Recorded as algorithm.
        weights_sha256: Its beginning is the device's serial number: it tells models apart.
        prompted: Whether a person prompted it: semi-automatic.

    Raises:
        UsageError: If highdicom is not installed.
        DataError: If the series lacks what a segmentation must repeat, or no voxel was segmented.
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
            warnings.simplefilter("ignore")  # odd values in tags of the source that are repeated as they are
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
                omit_empty_frames=True,
            )
            segmentation.save_as(path)
    except (AttributeError, KeyError, ValueError, TypeError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0].rstrip(".")
        raise DataError(
            f"the series lacks what a DICOM-SEG must repeat from it: {first}. Use --formats nifti,nrrd.",
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
            # What a class means anatomically only its name says: the most general code is not wrong.
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
    """Return the source images, and which slice of the stack every one of their frames is."""
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in sources]
    places = [_frame_places(image) for image in images]
    positions = [position for image in places for position in image]
    if len(positions) != num_slices or any(position is None for position in positions):
        raise DataError(
            f"every slice must have its position in the source series, got {len(positions)} for "
            f"{num_slices} slices. Use --formats nifti,nrrd.",
            where=where,
        )
    # The reader stacks frames along their common normal: slice k is the k-th frame in that order.
    order = np.argsort(np.asarray(positions, dtype=np.float64), kind="stable")
    slice_of_frame = np.empty(len(order), dtype=np.intp)
    slice_of_frame[order] = np.arange(len(order))
    return images, slice_of_frame


def _frame_places(image: pydicom.Dataset) -> list[float | None]:
    """Return where the frames of a file lie along their normal, mm."""
    shared = list(image.get("SharedFunctionalGroupsSequence", []))[:1]
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
