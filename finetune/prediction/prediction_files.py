"""Mask files in a scan's own geometry, for NIfTI readers, 3D Slicer and ITK-SNAP.

Headers are new. They contain nothing of the scan's header except its grid.

Letters: i, j, k = voxel axes of the scan's file.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.shared.errors import StorageError
from scipy import ndimage

Labels = npt.NDArray[Any]

LABEL_LIST = "labels.txt"
COLORS = (
    (230, 97, 1), (26, 133, 255), (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233), (213, 94, 0),
    (148, 103, 189), (140, 86, 75), (127, 127, 127),
)  # fmt: skip
"""Colours of classes, distinct for any colour vision (Wong, then Tableau), repeated for more classes."""


@dataclass(frozen=True, kw_only=True)
class NativeMasks:
    """Segmentation on the grid of the scan's file."""

    labels_ijk: Labels
    """Label ids, or bits of overlapping classes."""
    affine: npt.NDArray[np.float64]
    """Voxel (i, j, k) to RAS+ mm."""
    classes: ClassTable
    form_codes: tuple[int, int] = (1, 1)
    """NIfTI (qform_code, sform_code) of the scan's file, (1, 1) for other formats."""

    def count_voxels(self) -> dict[str, int]:
        """Return the number of voxels of every class."""
        return {name: int(self.mask(channel).sum()) for channel, name in enumerate(self.classes.names)}

    def mask(self, channel: int) -> npt.NDArray[np.bool_]:
        """Return the mask of the class with this index."""
        return self.classes.predicted_mask(self.labels_ijk, channel)

    def single(self, channel: int) -> NativeMasks:
        """Return a segmentation with one class only, as label 1."""
        only = ClassTable(ids=(1,), names=(self.classes.names[channel],))
        return replace(self, labels_ijk=self.mask(channel).astype(np.uint8), classes=only)

    @property
    def viewer_affine(self) -> npt.NDArray[np.float64]:
        """Map from voxel to RAS+ mm as ITK viewers place the scan."""
        # ITK puts a NIfTI file without codes at the origin, with its axes along LPS.
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        return np.diag([-sizes[0], -sizes[1], sizes[2], 1.0]) if self.form_codes == (0, 0) else self.affine


def write_nifti(path: Path, masks: NativeMasks) -> None:
    """Write a label map and verify it by reading.

    Raises:
        StorageError: If the file does not have the labels and the grid that were written.
    """
    labels = masks.labels_ijk.astype(np.min_scalar_type(max(masks.classes.ids)))
    # Every program has its own rule for files without codes, so only equal codes put the mask on its scan everywhere.
    qform_code, sform_code = masks.form_codes
    if masks.form_codes == (0, 0):
        image = nib.Nifti1Image(labels, None)
        image.header.set_zooms(np.linalg.norm(masks.affine[:3, :3], axis=0))
        image = nib.Nifti1Image(labels, None, image.header)
    else:
        image = nib.Nifti1Image(labels, masks.affine)
        image.set_sform(masks.affine, code=sform_code)
        image.set_qform(masks.affine, code=qform_code)
    image.header.set_xyzt_units("mm")
    # With a fixed time in the gzip header equal masks give equal files.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    back: Any = nib.load(path)
    if not np.array_equal(np.asanyarray(back.dataobj), labels) or not np.allclose(back.affine, masks.affine, atol=1e-4):
        raise StorageError(
            "the mask on disk differs from the one that was written. Check the disk and run the command again.",
            where=path.name,
        )


def write_seg_nrrd(path: Path, masks: NativeMasks) -> None:
    """Write a segmentation that 3D Slicer opens with names and colours.

    Source:
        3D Slicer developer guide, "Segmentations: segmentation file format (.seg.nrrd)".
    """
    # NRRD files of Slicer count along left, posterior, superior; NIfTI along right, anterior, superior.
    to_lps = np.diag([-1.0, -1.0, 1.0])
    classes = masks.classes
    affine = masks.viewer_affine
    directions = (to_lps @ affine[:3, :3]).T
    labels = masks.labels_ijk.astype(np.min_scalar_type(max(classes.ids)))
    if classes.is_overlapping:  # one layer per class along the first axis
        labels = np.stack([masks.mask(channel) for channel in range(classes.num_classes)]).astype(np.uint8)
        directions = np.vstack([np.full(3, np.nan), directions])
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": directions,
        "space origin": to_lps @ affine[:3, 3],
        "kinds": [*(["list"] if classes.is_overlapping else []), "domain", "domain", "domain"],
        "encoding": "gzip",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, (label_id, name) in enumerate(zip(classes.ids, classes.names, strict=True)):
        prefix = f"Segment{number}"
        red, green, blue = COLORS[number % len(COLORS)]
        header |= {
            f"{prefix}_ID": f"Segment_{label_id}",
            f"{prefix}_Name": name,
            f"{prefix}_NameAutoGenerated": "0",
            f"{prefix}_Color": f"{red / 255:.6f} {green / 255:.6f} {blue / 255:.6f}",
            f"{prefix}_ColorAutoGenerated": "0",
            f"{prefix}_LabelValue": "1" if classes.is_overlapping else str(label_id),
            f"{prefix}_Layer": str(number) if classes.is_overlapping else "0",
            f"{prefix}_Extent": _extent(masks.mask(number)),
            f"{prefix}_Tags": "Segmentation.Status:inprogress|",
        }
    nrrd.write(str(path), labels, header, index_order="F", compression_level=6)


def write_label_list(path: Path, classes: ClassTable) -> None:
    """Write label descriptions that ITK-SNAP loads together with a label map."""
    lines = [
        "################################################",
        "# ITK-SnAP Label Description File",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        "################################################",
        _label_line(0, (0, 0, 0), 0, "Clear Label"),
    ]
    lines += [
        _label_line(label_id, COLORS[number % len(COLORS)], 1, name)
        for number, (label_id, name) in enumerate(zip(classes.ids, classes.names, strict=True))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _label_line(label_id: int, color: Sequence[int], shown: int, name: str) -> str:
    red, green, blue = color
    text = name.replace('"', "'")  # ITK-SNAP has no escape for quotes
    return f'{label_id:5d} {red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}    "{text}"'


def _extent(mask: npt.NDArray[np.bool_]) -> str:
    """Return the bounding box in Slicer's format."""
    if not mask.any():
        return "0 -1 0 -1 0 -1"  # Slicer's own value for an empty segment
    [box] = ndimage.find_objects(mask.view(np.uint8))
    return " ".join(f"{axis.start} {axis.stop - 1}" for axis in box)
