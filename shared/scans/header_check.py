"""Who could be recognised in a folder of scans: headers and names only, no pixels; kinds and counts, never a value.

The rules are those of a build (:mod:`privacy`), so ``samgraft doctor`` says beforehand what ``store build`` will say.
"""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samgraft.shared.scans.privacy import dicom_findings, nifti_findings, path_findings
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.sources import discover

UNREADABLE = "header that cannot be read"


@dataclass(frozen=True, kw_only=True)
class HeaderReport:
    """What the headers and names of a source say about people."""

    layout: str
    num_scans: int
    num_files: int
    kinds: Counter[str]
    """Kind of identifying content -> number of scans that have it."""
    left_out: Counter[str]
    """Files that are no scans, by reason."""


def check_headers(source: Path) -> HeaderReport:
    """Look at the header of every file and at every name of a source.

    Args:
        source: A folder in any known layout, or a CSV list.

    Raises:
        DataError: If it holds no scan or contradicts itself.
    """
    found = discover(source)
    kinds: Counter[str] = Counter()
    for case in found.cases:
        kinds.update({*_header_findings(case.scan), *path_findings(case.name)})
    return HeaderReport(
        layout=found.layout,
        num_scans=len(found.cases),
        num_files=sum(len(case.scan.paths) for case in found.cases),
        kinds=kinds,
        left_out=found.left_out,
    )


def _header_findings(scan: ScanFiles) -> Iterable[str]:
    if scan.format is ScanFormat.DICOM:
        return _dicom(scan.paths)
    if scan.format is ScanFormat.NIFTI:
        return _nifti(scan.paths[0])
    return ()


def _dicom(paths: Sequence[Path]) -> set[str]:
    # Imported here and below: folders without DICOM need no pydicom.
    import pydicom
    from pydicom.errors import InvalidDicomError

    kinds: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values of tags that are not looked at
        for path in paths:
            try:
                kinds.update(dicom_findings(pydicom.dcmread(path, stop_before_pixels=True)))
            except (InvalidDicomError, EOFError, ValueError, KeyError, OSError):
                kinds.add(UNREADABLE)
    return kinds


def _nifti(path: Path) -> tuple[str, ...]:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        header: Any = nib.load(path).header
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error):
        return (UNREADABLE,)
    return nifti_findings(header, num_extensions=len(header.extensions))
