"""Files of one scan, and the record of a file format's reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from samgraft.shared.scans.volume import RawScan


class ScanFormat(StrEnum):
    """Names of the built-in readers. A further reader has its own name."""

    NIFTI = "nifti"
    NRRD = "nrrd"
    DICOM = "dicom"
    DICOM_SEG = "dicom-seg"
    IMAGES = "images"
    NUMPY = "numpy"


@dataclass(frozen=True, kw_only=True)
class ScanFiles:
    """File or files that make up one scan."""

    format: str
    """Name of the reader, a key of ``registry.READERS``."""
    paths: tuple[Path, ...]
    name: str
    """Name for messages, e.g. the file name."""
    frame: int | None = None
    """Index of the volume to read from a 4D file."""
    allow_gaps: bool = False
    """Acceptance of missing DICOM slices."""


class ReadScan(Protocol):
    """Signature of the function that reads voxels."""

    def __call__(self, files: ScanFiles, *, as_label: bool, like: RawScan | None) -> RawScan:
        """Read the files to their last byte. ``like`` is the scan that a label belongs to."""


class InspectScan(Protocol):
    """Signature of the function that reads headers only."""

    def __call__(self, files: ScanFiles) -> tuple[str, ...]:
        """Return kinds of identifying content. Raise DataError for what the headers alone make unreadable."""


def inspect_nothing(files: ScanFiles) -> tuple[str, ...]:
    """Return no findings, for formats whose headers hold nothing to check."""
    del files
    return ()


@dataclass(frozen=True, kw_only=True)
class ScanReader:
    """Functions that recognise, read and inspect the files of one format."""

    name: str
    """Name in ``ScanFiles.format``."""
    suffixes: tuple[str, ...]
    """File name endings in lower case, with the dot. Empty for formats that are found by content only."""
    matches: Callable[[bytes], bool] = lambda head: False
    """Test of the first ``registry.HEAD_BYTES`` bytes, decompressed, for files without a known suffix."""
    read: ReadScan
    """Function that reads voxels and geometry."""
    inspect: InspectScan = inspect_nothing
    """Function that checks the headers for ``samgraft doctor``."""
    one_file_per_scan: bool = True
    """False for formats whose files are first grouped into series or stacks."""
    has_volumes: bool = False
    """True for formats whose files may have several volumes, of which ``ScanFiles.frame`` chooses one."""
    has_native_geometry: bool = True
    """False for formats without any header for spacing and orientation."""
