"""What lies in a folder: regular files by format, and everything that was not taken, counted by reason.

Nothing is opened that could wait for ever (pipes, sockets, devices), no symbolic link is followed in a circle.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.scans.readers.scan import ScanFormat, sniff_format

SCAN_SUFFIXES = {
    ".nii": ScanFormat.NIFTI,
    ".nii.gz": ScanFormat.NIFTI,
    ".nrrd": ScanFormat.NRRD,
    ".dcm": ScanFormat.DICOM,
    ".dicom": ScanFormat.DICOM,
    ".ima": ScanFormat.DICOM,
    ".png": ScanFormat.IMAGES,
    ".tif": ScanFormat.IMAGES,
    ".tiff": ScanFormat.IMAGES,
    ".jpg": ScanFormat.IMAGES,
    ".jpeg": ScanFormat.IMAGES,
    ".npy": ScanFormat.NUMPY,
}
NAMED_BUT_NOT_READ = {
    ".nhdr": "NRRD with detached data",
    ".hdr": "NIfTI or Analyze pair",
    ".img": "NIfTI or Analyze pair",
    ".mha": "MetaImage",
    ".mhd": "MetaImage",
    ".npz": "NumPy archive",
    ".zip": "archive",
    ".tar": "archive",
    ".tgz": "archive",
    ".7z": "archive",
}
DESCRIPTIONS = {
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".md",
    ".bval",
    ".bvec",
    ".html",
    ".pdf",
    ".xml",
    ".yaml",
    ".yml",
    ".py",
}


ZARR = "zarr (not read: it does not say for certain which axis is which; export NIfTI, or NumPy with a spacing file)"
ZARR_MARKS = {"zarr.json", ".zgroup", ".zarray"}


@dataclass(kw_only=True)
class FileIndex:
    """Files below one folder, sorted by path."""

    root: Path
    files: dict[Path, ScanFormat] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files."""
    notes: list[str] = field(default_factory=list)

    def of(self, *formats: ScanFormat) -> list[Path]:
        """Return the files of some formats."""
        return [path for path, kind in self.files.items() if kind in formats]


def index_files(root: Path) -> FileIndex:
    """List the scans below a folder.

    Raises:
        DataError: If the folder does not exist or holds an ambiguous pair ``A.nii`` and ``A.nii.gz``.
        StorageError: If a folder cannot be listed.
    """
    if not root.exists():
        raise DataError("the folder of scans does not exist.", where=str(root))
    index = FileIndex(root=root)
    for path in _walk(root, index):
        _take(path, index)
    index.files = dict(sorted(index.files.items(), key=lambda item: str(item[0])))
    _refuse_ambiguous_pairs(index)
    _note_case_twins(index)
    return index


def scan_suffix(path: Path | str) -> str:
    """Return the suffix that tells the format, ``.nii.gz`` as a whole, in lower case."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def scan_stem(path: Path | str) -> str:
    """Return the file name without that suffix."""
    name = Path(path).name
    return name[: len(name) - len(scan_suffix(path))] if scan_suffix(path) else name


def _walk(root: Path, index: FileIndex) -> Iterator[Path]:
    """Yield regular files; follow links to folders once, by identity of the folder."""
    inside = root.resolve()
    seen: set[tuple[int, int]] = set()
    stack = [root]
    while stack:
        folder = stack.pop()
        info = folder.stat()
        if (info.st_dev, info.st_ino) in seen:
            index.left_out["folder reached twice through a link (a loop or a copy)"] += 1
            continue
        seen.add((info.st_dev, info.st_ino))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as err:
            raise StorageError(f"the folder cannot be listed: {err.strerror}.", where=str(folder)) from err
        if not ZARR_MARKS.isdisjoint(entry.name for entry in entries):
            index.left_out[ZARR] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                index.left_out["hidden file or folder"] += 1
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                index.left_out["broken link"] += 1
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                index.left_out["note: link that leaves the folder, followed for reading"] += 1
            if stat.S_ISDIR(mode):
                stack.append(Path(entry.path))
            elif stat.S_ISREG(mode):
                yield Path(entry.path)
            else:
                index.left_out["pipe, socket or device (not opened)"] += 1


def _take(path: Path, index: FileIndex) -> None:
    suffix = scan_suffix(path)
    kind = SCAN_SUFFIXES.get(suffix)
    if kind is not None:
        index.files[path] = kind
    elif suffix in NAMED_BUT_NOT_READ:
        index.left_out[f"{NAMED_BUT_NOT_READ[suffix]} ({suffix}) is not read: convert it"] += 1
    elif suffix in DESCRIPTIONS:
        index.left_out["text or description"] += 1
    elif path.name.upper() == "DICOMDIR":
        index.left_out["DICOMDIR (files are found without it)"] += 1
    elif (sniffed := sniff_format(path)) is not None:  # DICOM exports often have no suffix
        index.files[path] = sniffed
    else:
        index.left_out["not a scan"] += 1


def _refuse_ambiguous_pairs(index: FileIndex) -> None:
    files = index.files
    pairs = sorted(path for path in files if scan_suffix(path) == ".nii" and path.with_name(f"{path.name}.gz") in files)
    if pairs:
        raise DataError(
            f"{len(pairs)} scans lie there both plain and compressed, e.g. {pairs[0].name} and {pairs[0].name}.gz: "
            "ambiguous. Remove one of each.",
            where=str(index.root),
        )


def _note_case_twins(index: FileIndex) -> None:
    counts = Counter(str(path).casefold() for path in index.files)
    if num := sum(1 for count in counts.values() if count > 1):
        index.notes.append(f"{num} file names differ only in upper and lower case: other systems would merge them")
