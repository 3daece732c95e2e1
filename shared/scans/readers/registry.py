"""All readers by name, and the functions that read a scan or inspect its headers."""

from __future__ import annotations

import zlib
from pathlib import Path

from samgraft.shared.errors import DataError, SamgraftError
from samgraft.shared.scans.readers.dicom import DICOM
from samgraft.shared.scans.readers.dicom_seg import DICOM_SEG
from samgraft.shared.scans.readers.images import PICTURES
from samgraft.shared.scans.readers.nifti import NIFTI
from samgraft.shared.scans.readers.nrrd_file import NRRD
from samgraft.shared.scans.readers.numpy_file import NUMPY
from samgraft.shared.scans.readers.scan import ScanFiles, ScanReader
from samgraft.shared.scans.readers.verified import GZIP_MAGIC
from samgraft.shared.scans.volume import RawScan, check_real_numbers

READERS: dict[str, ScanReader] = {r.name: r for r in (NIFTI, NRRD, NUMPY, PICTURES, DICOM, DICOM_SEG)}
"""Reader records by name. A new format needs its record here and nothing anywhere else."""
HEAD_BYTES = 552
"""Length of the file start that ``ScanReader.matches`` sees, enough for a NIfTI-2 header with its extension flag."""


def read_scan(files: ScanFiles, *, as_label: bool = False, like: RawScan | None = None) -> RawScan:
    """Read a scan with the reader of its format.

    Args:
        files: Files of the scan.
        as_label: True if the values are label ids; pictures are then read without any conversion.
        like: Scan that a label belongs to; DICOM-SEG needs its grid.

    Raises:
        DataError: If the files are damaged, or hold anything that their reader cannot interpret.
        StorageError: If the drive fails.
    """
    try:
        scan = READERS[files.format].read(files, as_label=as_label, like=like)
        check_real_numbers(scan.array_ijk, where=files.name)
    except (SamgraftError, OSError, MemoryError):
        raise
    except Exception as err:  # a header value that no reader expects must refuse this scan and not end the build
        raise unreadable_file(err, where=files.name) from err
    return scan


def inspect_scan(files: ScanFiles) -> tuple[str, ...]:
    """Return the kinds of identifying content in a scan's headers, without reading its voxels.

    Raises:
        DataError: If the headers alone show that the scan cannot be read.
    """
    try:
        return READERS[files.format].inspect(files)
    except (SamgraftError, OSError, MemoryError):
        raise
    except Exception as err:  # as in read_scan
        raise unreadable_file(err, where=files.name) from err


def unreadable_file(err: Exception, *, where: str) -> DataError:
    """Return the refusal for an unexpected error of a decoder or header parser."""
    line = (str(err).splitlines() or [""])[0].rstrip(".")
    return DataError(f"the file holds a value that cannot be read ({type(err).__name__}: {line}).", where=where)


def scan_suffix(path: Path | str) -> str:
    """Return the file name ending that decides the format, in lower case. ``.nii.gz`` is one ending."""
    name = Path(path).name.lower()
    known = [suffix for reader in READERS.values() for suffix in reader.suffixes if name.endswith(suffix)]
    return max(known, key=len) if known else Path(name).suffix


def scan_stem(path: Path | str) -> str:
    """Return the file name without the ending of ``scan_suffix``."""
    name, suffix = Path(path).name, scan_suffix(path)
    return name[: len(name) - len(suffix)] if suffix else name


def format_by_suffix(path: Path) -> str | None:
    """Return the name of the reader for a file name, or None."""
    suffix = scan_suffix(path)
    return next((reader.name for reader in READERS.values() if suffix in reader.suffixes), None)


def format_by_content(path: Path) -> str | None:
    """Return the name of the reader for a file's first bytes, or None if it is not a scan.

    Raises:
        DataError: If the file cannot be opened.
    """
    found, is_packed = _match_content(path)
    return found.name if found is not None and (not is_packed or _reads_gzip(found)) else None


def name_packed_scan(path: Path) -> str | None:
    """Return a description of a gzip file whose content is a scan that is read uncompressed only, or None.

    Raises:
        DataError: If the file cannot be opened.
    """
    found, is_packed = _match_content(path)
    if found is None or not is_packed or _reads_gzip(found):
        return None
    return f"{found.name.upper()} inside gzip (decompress it, for example with gunzip)"


def _reads_gzip(reader: ScanReader) -> bool:
    return any(suffix.endswith(".gz") for suffix in reader.suffixes)


def _match_content(path: Path) -> tuple[ScanReader | None, bool]:
    """Return the reader whose mark the file begins with, and True if the file is compressed by gzip."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as err:
        raise DataError(f"the file cannot be read ({err.strerror}).", where=path.name) from err
    is_packed = head[:2] == GZIP_MAGIC
    if is_packed:  # logs, tables and archives are gzip files too: only the content decides
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return None, True
    return next((one for one in READERS.values() if one.matches(head[:HEAD_BYTES])), None), is_packed
