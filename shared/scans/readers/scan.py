"""One way in: a scan on disk, whatever its format, to a :class:`RawScan`; the format is told by content."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from samgraft.shared.errors import DataError
from samgraft.shared.scans.readers.verified import GZIP_MAGIC
from samgraft.shared.scans.volume import RawScan


class ScanFormat(Enum):
    """File formats with a reader."""

    NIFTI = "nifti"
    NRRD = "nrrd"
    DICOM = "dicom"
    DICOM_SEG = "dicom-seg"
    IMAGES = "images"
    NUMPY = "numpy"


@dataclass(frozen=True, kw_only=True)
class ScanFiles:
    """The file or files that make up one scan."""

    format: ScanFormat
    paths: tuple[Path, ...]
    name: str
    """Name for messages, e.g. the file name."""
    frame: int | None = None
    """Which volume of a 4D file."""
    allow_gaps: bool = False
    """Accept missing DICOM slices."""


def read_scan(files: ScanFiles, *, as_label: bool = False, like: RawScan | None = None) -> RawScan:
    """Read a scan with the reader of its format.

    Args:
        files: What to read.
        as_label: The values are label ids; pictures are then read without any conversion.
        like: The scan that a label belongs to; DICOM-SEG needs its grid.
    """
    # Imported here: a store of NIfTI files needs neither pydicom nor Pillow in its workers.
    if files.format is ScanFormat.NIFTI:
        from samgraft.shared.scans.readers.nifti import read_nifti

        return read_nifti(files.paths[0], where=files.name, frame=files.frame)
    if files.format is ScanFormat.NRRD:
        from samgraft.shared.scans.readers.nrrd_file import read_nrrd

        return read_nrrd(files.paths[0], where=files.name)
    if files.format is ScanFormat.IMAGES:
        from samgraft.shared.scans.readers.images import read_image_stack

        return read_image_stack(files.paths, where=files.name, as_label=as_label)
    if files.format is ScanFormat.NUMPY:
        from samgraft.shared.scans.readers.numpy_file import read_numpy

        return read_numpy(files.paths[0], where=files.name)
    if files.format is ScanFormat.DICOM_SEG:
        from samgraft.shared.scans.readers.dicom_seg import read_dicom_seg

        if like is None:
            raise DataError("a DICOM segmentation is a label, not a scan.", where=files.name)
        return read_dicom_seg(files.paths[0], like=like, where=files.name)
    from samgraft.shared.scans.readers.dicom import read_dicom_series

    return read_dicom_series(files.paths, where=files.name, allow_gaps=files.allow_gaps)


def sniff_format(path: Path) -> ScanFormat | None:
    """Tell the format of a file by its first bytes; None for what is not a scan."""
    try:
        with path.open("rb") as file:
            head = file.read(552)
    except OSError as err:
        raise DataError(f"the file cannot be read: {err.strerror}.", where=path.name) from err
    if head[:2] == GZIP_MAGIC:
        return ScanFormat.NIFTI
    if head[:7] == b"NRRD000":
        return ScanFormat.NRRD
    if head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] == b"n+2\x00":
        return ScanFormat.NIFTI
    if head[128:132] == b"DICM":
        return ScanFormat.DICOM
    return None
