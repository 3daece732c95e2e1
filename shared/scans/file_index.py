"""Files below a folder, with scans sorted by format and everything else counted by reason.

Nothing is opened that could block (pipes, sockets, devices), and no symbolic link is followed in a circle.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.scans.readers.registry import READERS, format_by_content, format_by_suffix, name_packed_scan

_UNREAD_KINDS = {
    "NRRD with detached data": ".nhdr",
    "NIfTI or Analyze pair": ".hdr .img",
    "MetaImage": ".mha .mhd",
    "NumPy archive": ".npz",
    "archive": ".zip .tar .tgz .tar.gz .7z .rar .bz2 .xz .tar.bz2 .tar.xz",
    "FreeSurfer or MINC volume": ".mgz .mgh .mnc",
    "matrix or HDF5 file": ".mat .h5 .hdf5",
    "picture of another kind": ".bmp .gif .webp .jp2 .svs .ndpi",
}
NAMED_BUT_NOT_READ = {suffix: kind for kind, suffixes in _UNREAD_KINDS.items() for suffix in suffixes.split()}
DESCRIPTIONS = frozenset(
    f".{suffix}"
    for suffix in ("json", "csv", "tsv", "txt", "md", "bval", "bvec", "html", "pdf", "xml", "yaml", "yml", "py", "log")
) | {".xlsx", ".docx", ".rtf"}
ZARR = "zarr (not read, because its axes are not named; export NIfTI, or NumPy with a spacing file)"
ZARR_MARKS = {"zarr.json", ".zgroup", ".zarray"}
HIDDEN = "hidden file or folder"
BROKEN_LINK = "broken link"
_SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "lost+found"}
_COPIES = (
    "~",
    ".bak",
    ".backup",
    ".orig",
    ".old",
    ".tmp",
    ".temp",
    ".part",
    ".partial",
    ".crdownload",
    ".download",
    ".swp",
)
# First bytes of the text files that git-lfs and git-annex leave in place of contents that were not downloaded.
_POINTER_MARKS = (b"version https://git-lfs", b"/annex/objects/")
_MAX_POINTER_BYTES = 1024


@dataclass(kw_only=True)
class FileIndex:
    """Files below one folder, sorted by path."""

    root: Path
    files: dict[Path, str] = field(default_factory=dict)
    """Path -> name of its reader."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files."""
    notes: list[str] = field(default_factory=list)

    def of(self, *formats: str) -> list[Path]:
        """Return the files of some formats."""
        return [path for path, name in self.files.items() if name in formats]

    def single_files(self) -> list[Path]:
        """Return the files that are a scan or a label each."""
        return [path for path, name in self.files.items() if READERS[name].one_file_per_scan]


def index_files(root: Path) -> FileIndex:
    """List the scans below a folder.

    Raises:
        DataError: If the folder does not exist.
        StorageError: If a folder cannot be listed.
    """
    if not root.exists():
        raise DataError("the folder of scans does not exist.", where=str(root))
    index = FileIndex(root=root)
    for path, size in _walk(root, index):
        _sort_in(path, size, index)
    index.files = dict(sorted(index.files.items(), key=lambda item: str(item[0])))
    _note_case_twins(index)
    return index


def reason_to_leave_out(path: Path, size: int) -> str | None:
    """Return why a file cannot be a scan whatever its name is, or None."""
    if path.name.startswith(".") or path.name.lower() in _SYSTEM_NAMES:
        return HIDDEN
    if path.name.lower().endswith(_COPIES):
        return "backup or unfinished copy"
    if 0 < size <= _MAX_POINTER_BYTES and path.read_bytes().lstrip().startswith(_POINTER_MARKS):
        return "git-lfs or git-annex pointer without content (download it)"
    return None


def _walk(root: Path, index: FileIndex) -> Iterator[tuple[Path, int]]:
    """Yield regular files with their size. Follow links to folders once, by identity of the folder."""
    inside = root.resolve()
    # Device and inode identify a folder, whatever path or link leads to it.
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
            raise StorageError(f"the folder cannot be listed ({err.strerror}).", where=str(folder)) from err
        # A zarr array is a folder of thousands of chunk files, which would all be counted as unknown.
        if not ZARR_MARKS.isdisjoint(entry.name for entry in entries):
            index.left_out[ZARR] += 1
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:
                index.left_out[HIDDEN] += 1
                continue
            try:
                info = entry.stat()
            except OSError:
                index.left_out[BROKEN_LINK] += 1
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                index.left_out["note: link that leaves the folder, followed for reading"] += 1
            if stat.S_ISDIR(info.st_mode):
                stack.append(Path(entry.path))
            elif stat.S_ISREG(info.st_mode):
                yield Path(entry.path), info.st_size
            else:
                index.left_out["pipe, socket or device (not opened)"] += 1


def _sort_in(path: Path, size: int, index: FileIndex) -> None:
    name = path.name.lower()
    unread = next((s for s in sorted(NAMED_BUT_NOT_READ, key=len, reverse=True) if name.endswith(s)), None)
    if (reason := reason_to_leave_out(path, size)) is not None:
        index.left_out[reason] += 1
    elif (known := format_by_suffix(path)) is not None:
        index.files[path] = known
    elif unread is not None:
        index.left_out[f"{NAMED_BUT_NOT_READ[unread]} ({unread}) is not read: convert it"] += 1
    elif path.suffix.lower() in DESCRIPTIONS:
        index.left_out["text or description (not a scan)"] += 1
    elif name == "dicomdir":
        index.left_out["DICOMDIR (files are found without it)"] += 1
    elif (found := format_by_content(path)) is not None:  # DICOM exports often have no suffix
        index.files[path] = found
    elif _is_bare_dicom(path):
        index.left_out["DICOM without its first 132 bytes, an old form (dcmconv of DCMTK adds them)"] += 1
    elif (packed := name_packed_scan(path)) is not None:
        index.left_out[packed] += 1
    else:
        index.left_out["not a scan"] += 1


def _is_bare_dicom(path: Path) -> bool:
    """Return whether a file begins with an element of DICOM's group 2 or 8 that names its type of value."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00" and head[4:6] in (b"UL", b"UI", b"CS", b"DA")


def _note_case_twins(index: FileIndex) -> None:
    counts = Counter(str(path).casefold() for path in index.files)
    if num := sum(1 for count in counts.values() if count > 1):
        index.notes.append(f"{num} file names differ only in upper and lower case: other systems would merge them")
