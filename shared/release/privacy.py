"""The privacy gate, which searches a release for anything that could name a person, a place or a machine.

Two things are searched in names and contents of all files and of the members of archives:

- known identifiers of this run, in many spellings and encodings (:mod:`.identifiers`);
- patterns: e-mail addresses, long digit runs, DICOM UIDs, absolute paths, names in DICOM form.

A file that cannot be searched is refused, because it may contain anything.
"""

from __future__ import annotations

import getpass
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from samgraft.shared.errors import DataError
from samgraft.shared.files import file_sha256
from samgraft.shared.release.containers import (
    TEXT_NAMES,
    Kind,
    Region,
    external_files,
    number_regions,
    regions,
    zarr_values,
)
from samgraft.shared.release.identifiers import MIN_IN_NUMBERS, Identifier, IdentifierSearch, long_runs, unescape
from samgraft.shared.store.names import KIND as NAMES_KIND
from samgraft.shared.store.names import NAMES_WORD

log = logging.getLogger(__name__)

MIN_RUN = 7
"""Printable characters in unknown bytes that count as text."""
PROGRESS_S = 10.0
"""Seconds between two progress lines."""
NO_FILE_MAY_BE = {".pkl", ".pickle", ".npy", ".tfevents", ".dcm", ".nii", ".gz", ".log"}

_UNIX_PATH = (
    rb"(?:(?<![\w./])|(?<=file://))/(?:home|Users|root|data|mnt|media|scratch|tmp|work|workspace|srv|nas|gpfs|lustre"
    rb"|storage|projects|Volumes)/[\w.-]+"
)
# JSON doubles the backslashes. A slash after the drive counts only after a single letter, unlike in "https://".
_WINDOWS_PATH = rb"[A-Za-z]:\\{1,2}[\w.-]+|(?<![A-Za-z])[A-Za-z]:/[\w.-]+/[\w.-]+"
# Letters of UTF-8, with the accents of Latin, Greek and Cyrillic names.
_ACCENTED = rb"[\xc3-\xcb\xce-\xd4][\x80-\xbf]"
_CAPITAL, _LETTER = rb"(?:[A-Z]|%b)" % _ACCENTED, rb"(?:[A-Za-z'-]|%b)" % _ACCENTED
PATTERNS: dict[str, re.Pattern[bytes]] = {
    "table with the names of patients": re.compile(re.escape(NAMES_KIND.encode())),
    "e-mail address": re.compile(rb"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"),
    "DICOM UID": re.compile(rb"(?<!\d)(?<!\d\.)[12]\.\d{1,3}\.\d{2,}(?:\.\d+){3,}"),
    # Digits after "0." are a decimal, but digits after "scan." are not. Hashes are blanked before the search.
    "long digit run": re.compile(rb"(?<!\d)(?<!\d\.)\d{6,}"),
    "absolute path": re.compile(_UNIX_PATH + rb"|" + _WINDOWS_PATH),
    "person name in DICOM form": re.compile(rb"(?<![A-Za-z])%b%b+\^%b%b+" % (2 * (_CAPITAL, _LETTER))),
}
# In numbers, a pattern counts only inside a printable run of the length given here. The longer forms and the runs make
# the expected number of chance matches in the 5 GB of ViT-H's optimizer less than 0.01 per pattern: a byte of a random
# mantissa is a given character with probability 1/256, and printable with 0.37.
NUMBER_PATTERNS: dict[str, tuple[int, re.Pattern[bytes]]] = {
    "e-mail address": (12, re.compile(rb"[a-z0-9._%+-]{4,64}@[a-z0-9-]{4,63}(?:\.[a-z0-9-]{1,63})*\.[a-z]{2,63}")),
    "DICOM UID": (12, re.compile(rb"(?<![\d.])[12]\.\d{1,3}\.\d{2,}(?:\.\d+){3,}")),
    "long digit run": (12, re.compile(rb"(?<![\d.])\d{10,}|[A-Za-z]{3,}[ :=_-]?\d{8,}")),
    "absolute path": (16, re.compile(_UNIX_PATH + rb"|[A-Za-z]:\\[A-Za-z][\w.-]{2,}\\")),
    "person name in DICOM form": (
        18,
        re.compile(rb"\b(?:[A-Z]{4,}|[A-Z][a-z]{3,})\^(?:[A-Z]{3,}|[A-Z][a-z]{2,})"),
    ),
}
MONAI_SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
PUBLIC = (MONAI_SCHEMA_URL.encode(),)
"""Strings with a date that MONAI's metadata must contain. They are blanked before patterns are searched."""
_UTF8_RUN = re.compile(rb"(?:[\x20-\x7e]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}){%d,}" % MIN_RUN)
_CONTROL = re.compile(rb"[\x00-\x08]")
"""Bytes that no text in Latin-1 contains, unlike the text between the numbers of an ONNX file."""
_HASH = re.compile(rb"(?<![0-9A-Za-z])(?:[0-9a-f]{64}|[0-9a-f]{40})(?![0-9A-Za-z])")


@dataclass(frozen=True, kw_only=True)
class PrivacyFinding:
    """One place that must not be released."""

    file: str
    """File within the release, and member of an archive after a colon."""
    offset: int
    """Position in bytes."""
    kind: str
    """Description of the finding. The text itself is not repeated, because reports are shared too."""


def scan_folder(folder: Path, *, known: Collection[str] = ()) -> list[PrivacyFinding]:
    """Search every file of a folder.

    Args:
        folder: Folder that is to be released.
        known: Strings that identify, such as original patient ids and names of source folders.

    Returns:
        Every finding; an empty list means clean.

    Raises:
        DataError: If a file cannot be searched (a link, a device, an unknown kind of archive).
    """
    search = IdentifierSearch(_identifiers(known))
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            where = path.relative_to(folder).as_posix()
            raise DataError("a release must contain plain files only, but this is a link or a device.", where=where)
    files = [path for path in paths if path.is_file()]
    numbers = {place for path in files if path.suffix == ".onnx" for place in external_files(path)}
    progress = _Progress(sum(path.stat().st_size for path in files))
    findings: list[PrivacyFinding] = []
    for path in paths:
        findings += _scan_name(path.relative_to(folder).as_posix(), search)
    for path in _without_copies(files, numbers):
        name = path.relative_to(folder).as_posix()
        if {suffix.lower() for suffix in path.suffixes} & NO_FILE_MAY_BE or NAMES_WORD in path.name.lower():
            kind = f"file of a kind that is never released ({path.suffix})"
            findings.append(PrivacyFinding(file=name, offset=0, kind=kind))
        for region in _file_regions(path, name, are_numbers=path in numbers):
            findings += _scan_region(region, search, num_bytes=progress.total)
        progress.add(path.stat().st_size)
    return list(dict.fromkeys(findings))


def refuse_findings(findings: Sequence[PrivacyFinding]) -> None:
    """Stop a release that has findings.

    Raises:
        DataError: With the first places, by file and byte.
    """
    if not findings:
        return
    places = "; ".join(f"{f.file} at byte {f.offset}: {f.kind}" for f in findings[:5])
    more = f" and {len(findings) - 5} more" if len(findings) > 5 else ""
    raise DataError(
        f"the release contains {len(findings)} places that may identify a person or a machine: {places}{more}. Remove "
        "them at their source and release again.",
        kept="the run; nothing was released",
    )


class _Progress:
    """Lines with the share of the bytes that were searched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._done = 0
        self._next = time.monotonic() + PROGRESS_S

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() >= self._next:
            log.info("privacy gate: %.1f of %.1f GB searched", self._done / 1e9, self.total / 1e9)
            self._next = time.monotonic() + PROGRESS_S


def _identifiers(known: Collection[str]) -> list[Identifier]:
    machine = [
        Identifier("home folder", str(Path.home())),
        Identifier("host name", socket.gethostname()),
        Identifier("user name", _user()),
    ]
    return [*machine, *(Identifier("known identifier", text) for text in known)]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return ""


def _without_copies(files: Sequence[Path], numbers: Collection[Path]) -> Iterator[Path]:
    """Yield every content once, however often it is linked or copied."""
    sizes = Counter(path.stat().st_size for path in files)
    seen: set[object] = set()
    for path in files:
        status = path.stat()
        # Suffix and role belong to the identity, because they decide how the content is read.
        role = (path.suffix.lower(), path in numbers or _is_zarr_chunk(path), path.name in TEXT_NAMES)
        identity: object = (role, status.st_dev, status.st_ino)
        if sizes[status.st_size] > 1 and status.st_size and identity not in seen:
            seen.add(identity)
            identity = (role, file_sha256(path))
        if identity not in seen:
            seen.add(identity)
            yield path


def _file_regions(path: Path, name: str, *, are_numbers: bool) -> Iterator[Region]:
    with path.open("rb") as file:
        if are_numbers or _is_zarr_chunk(path):
            yield from number_regions(file, name)
            return
        yield from regions(file, name)
    if path.name == "zarr.json" and b'"array"' in path.read_bytes():
        yield from zarr_values(path.parent, name)


def _is_zarr_chunk(path: Path) -> bool:
    parents = list(path.parents)
    return any(parent.name == "c" and (parent.parent / "zarr.json").is_file() for parent in parents) or (
        path.name == "c" and (path.parent / "zarr.json").is_file()
    )


def _scan_name(name: str, search: IdentifierSearch) -> list[PrivacyFinding]:
    region = Region(name, 0, name.encode(), Kind.TEXT)
    return [
        PrivacyFinding(file=f.file, offset=0, kind=f"{f.kind} in the file name")
        for f in _scan_region(region, search, num_bytes=0)
    ]


def _scan_region(region: Region, search: IdentifierSearch, *, num_bytes: int) -> list[PrivacyFinding]:
    content = region.content
    found: list[tuple[int, str]] = []
    if region.kind is Kind.NUMBERS:
        runs = list(long_runs(content, MIN_IN_NUMBERS))
        found += search.in_numbers(content, runs, num_bytes=num_bytes)
        for start, width, run in runs:
            for kind, (length, pattern) in NUMBER_PATTERNS.items():
                if len(run) >= length:
                    found += [(start + width * match.start(), kind) for match in pattern.finditer(_blanked(run))]
    else:
        found += search.in_text(content)
        texts = _decoded(content) if region.kind is Kind.TEXT else _readable_runs(content)
        for start, width, text in texts:
            found += [(start + width * offset, kind) for offset, kind in search.in_readable(text)]
            found += [(start, kind) for _, kind in search.in_encoded(text)]
            # Escapes hide patterns as well, such as the at sign of "jane&#64;site.org".
            for variant in {text, unescape(text.decode("utf-8", "replace")).encode("utf-8", "replace")}:
                blanked = _blanked(variant)
                for kind, pattern in PATTERNS.items():
                    found += [(start + width * match.start(), kind) for match in pattern.finditer(blanked)]
    return [PrivacyFinding(file=region.name, offset=region.offset + offset, kind=kind) for offset, kind in found]


def _decoded(content: bytes) -> list[tuple[int, int, bytes]]:
    """Return start, bytes per character and UTF-8 text of a text, in every encoding that it may have."""
    texts = [(0, 1, content)]
    # Spreadsheets save tables in UTF-16, in which no pattern of ASCII bytes matches.
    if content.count(0) > len(content) // 8:
        encodings = (("utf-16-le", 2), ("utf-16-be", 2), ("utf-32-le", 4), ("utf-32-be", 4))
        texts += [(0, width, content.decode(name, "ignore").encode("utf-8", "ignore")) for name, width in encodings]
    elif not _CONTROL.search(content) and "\ufffd" in content.decode("utf-8", "replace"):
        texts.append((0, 1, content.decode("latin-1").encode()))
    return texts


def _readable_runs(content: bytes) -> list[tuple[int, int, bytes]]:
    """Return start, bytes per character and text of every run of UTF-8 or UTF-16 text in unknown bytes."""
    narrow = [(match.start(), 1, match.group()) for match in _UTF8_RUN.finditer(content)]
    return [*narrow, *(run for run in long_runs(content, MIN_RUN) if run[1] > 1)]


def _blanked(text: bytes) -> bytes:
    """Replace hashes and public strings by letters of the same length."""
    for public in PUBLIC:
        text = text.replace(public, b"x" * len(public))
    return _HASH.sub(lambda match: b"x" * len(match.group()), text)
