"""The gate before a release: every byte is searched for what could name a person, a place or a machine; fails closed.

Three kinds of search:

- literal strings that are known to identify (home folder, host, user, original ids): in every byte, also UTF-16;
- patterns (e-mail, long digit runs, DICOM UIDs, absolute paths, names in DICOM form): in text files whole, in
  binary files in every run of printable characters, as ``strings`` shows them;
- names of files and of the members of archives, by both.

What is packed (zip and npz, gzip, bzip2, xz, also one in another) is unpacked and searched again; a container that
cannot be unpacked here (zstd, 7z, rar) or is packed too deeply or too tightly is refused: unknown is not clean.

Tensors are numbers: in their bytes, and nowhere else, an address (in small letters), a drive path, a run of digits or
a name (letters only, each part in capitals or with one in front) must be longer. The shortest ones turn up by chance:
``31@Em.Un`` in Adam's moments of 5 MB, ``X-^Ya`` in 4 MB, six digits in 80 MB, the start of a drive path in 400 MB;
ViT-H's moments are 5 GB.
"""

from __future__ import annotations

import bz2
import getpass
import gzip
import io
import json
import lzma
import re
import socket
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from samgraft.shared.errors import DataError

MIN_PRINTABLE = 12
MIN_LITERAL = 4
"""Shorter user or host names (``root`` has 4) occur by chance; they are searched with word boundaries in text."""
CHUNK = 16 * 1024 * 1024
OVERLAP = 4096
TEXT_SUFFIXES = {".json", ".md", ".txt", ".csv", ".yaml", ".yml", ".html", ".cfg"}
MAX_DEPTH = 4
"""Archives in archives."""
MAX_UNPACKED = 8 << 30
"""Bytes of one member; a release holds nothing larger that is packed."""
NO_FILE_MAY_BE = {".pkl", ".pickle", ".npy", ".tfevents", ".dcm", ".nii", ".gz", ".log"}

_UNIX_PATH = rb"(?<![\w./])/(?:home|Users|root|data|mnt|scratch|tmp|work|srv)/[\w.-]+"
PATTERNS: dict[str, re.Pattern[bytes]] = {
    "e-mail address": re.compile(rb"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"),
    "DICOM UID": re.compile(rb"(?<![\d.])[12]\.\d{1,3}\.\d{2,}(?:\.\d+){3,}"),
    # Decimals (0.123456) are numbers; whole hashes are blanked before the search.
    "long digit run": re.compile(rb"(?<![\d.])\d{6,}"),
    "absolute path": re.compile(_UNIX_PATH + rb"|[A-Za-z]:\\[\w.-]+"),
    "person name in DICOM form": re.compile(rb"\b[A-Z][A-Za-z'-]+\^[A-Z][A-Za-z'-]+"),
}
NUMBER_PATTERNS = PATTERNS | {
    "e-mail address": re.compile(rb"[a-z0-9._%+-]{3,64}@[a-z0-9-]{3,63}(?:\.[a-z0-9-]{1,63})*\.[a-z]{2,63}"),
    "long digit run": re.compile(rb"(?<![\d.])\d{10,}|[A-Za-z]{3,}[ :=_-]?\d{8,}"),
    "absolute path": re.compile(_UNIX_PATH + rb"|[A-Za-z]:\\[A-Za-z][\w.-]{2,}\\"),
    "person name in DICOM form": re.compile(rb"\b(?:[A-Z]{3,}|[A-Z][a-z]{2,})\^(?:[A-Z]{3,}|[A-Z][a-z]{2,})"),
}
"""What is searched in printable runs of tensors."""
_TENSOR = re.compile(r"/data/\d+$")
"""Members of torch's .pth that are tensors."""
MONAI_SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
PUBLIC = (MONAI_SCHEMA_URL.encode(),)
"""Exact strings with a date in them that MONAI's metadata must hold; blanked before patterns are searched."""
_HASH = re.compile(rb"(?<![0-9A-Za-z])(?:[0-9a-f]{64}|[0-9a-f]{40})(?![0-9A-Za-z])")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place that must not be released."""

    file: str
    offset: int
    kind: str
    """What was found; the text itself is not repeated, reports travel too."""


def scan_folder(folder: Path, *, known: Collection[str] = ()) -> list[Finding]:
    """Search every byte of every file of a folder.

    Args:
        folder: What is to be released.
        known: Strings that identify: original patient ids, names of source folders. Short ones are searched as words.

    Returns:
        Every finding; empty means clean.

    Raises:
        DataError: If a file cannot be searched (a link, an unknown kind of archive): unknown is not clean.
    """
    literals = _literals(known)
    findings: list[Finding] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DataError("a release must hold plain files only, this is a link or a device.", where=name)
        findings += _scan_bytes(name.encode(), name=name, literals=literals, is_text=True, what="file name")
        if path.is_dir():
            continue
        if set(path.suffixes) & NO_FILE_MAY_BE:
            findings.append(Finding(file=name, offset=0, kind=f"file of a kind that is never released ({path.suffix})"))
        findings += _scan_file(path, name=name, literals=literals)
    return findings


def refuse_findings(findings: Sequence[Finding]) -> None:
    """Stop a release that has findings.

    Raises:
        DataError: With the first places, by file and byte.
    """
    if not findings:
        return
    places = "; ".join(f"{f.file} at byte {f.offset}: {f.kind}" for f in findings[:5])
    more = f" and {len(findings) - 5} more" if len(findings) > 5 else ""
    raise DataError(
        f"a release must hold nothing that identifies a person or a machine, found {len(findings)} places: "
        f"{places}{more}. Remove them at their source and release again.",
        kept="the run; nothing was released",
    )


def _literals(known: Collection[str]) -> dict[str, bytes]:
    """Return what to search everywhere, by kind."""
    found: dict[str, bytes] = {}
    candidates = [("home folder", str(Path.home())), ("host name", socket.gethostname()), ("user name", _user())]
    candidates += [("known identifier", text) for text in known]
    for index, (kind, text) in enumerate(candidates):
        if text.strip("/"):
            found[f"{kind}#{index}"] = text.encode()
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return ""


def _scan_file(path: Path, *, name: str, literals: dict[str, bytes]) -> list[Finding]:
    if zipfile.is_zipfile(path):
        with path.open("rb") as file:
            findings = _scan_zip(file, name=name, literals=literals)
        for offset, chunk in _chunks(path):
            findings += _find_literals(chunk, name=name, literals=literals, is_text=False, base=offset)
        return _once(findings)
    if path.suffix == ".safetensors":
        return _scan_safetensors(path, name=name, literals=literals)
    with path.open("rb") as file:
        if _packing(file.read(8)):
            return _once(_scan_packed(path.read_bytes(), name=name, literals=literals, depth=1))
    is_text = path.suffix in TEXT_SUFFIXES or path.name in {"SHA256SUMS", "LICENSE"}
    findings = []
    for offset, chunk in _chunks(path):
        findings += _scan_bytes(chunk, name=name, literals=literals, is_text=is_text, base=offset)
    return _once(findings)


def _scan_zip(file: IO[bytes], *, name: str, literals: dict[str, bytes], depth: int = 1) -> list[Finding]:
    """Search a zip (torch's .pth, numpy's .npz) member by member, with comments and extra fields."""
    findings: list[Finding] = []
    try:
        with zipfile.ZipFile(file) as archive:
            findings += _scan_bytes(archive.comment, name=name, literals=literals, is_text=True, what="(zip comment)")
            for info in archive.infolist():
                member = f"{name}:{info.filename}"
                about = b"\n".join([info.filename.encode(), info.comment, info.extra])
                findings += _scan_bytes(about, name=member, literals=literals, is_text=True)
                if info.filename.endswith(".data/serialization_id"):
                    continue  # torch's own hash of the names, all digits; raw bytes are searched for literals too
                _refuse_large(info.file_size, member)
                findings += _scan_content(archive.read(info), name=member, literals=literals, depth=depth)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as err:
        raise DataError("an archive in a release must be readable, this one is damaged or locked.", where=name) from err
    return findings


def _scan_content(content: bytes, *, name: str, literals: dict[str, bytes], depth: int) -> list[Finding]:
    """Search the bytes of an archive's member, and what is packed in them."""
    if depth > MAX_DEPTH:
        raise DataError(f"a release must not hold archives packed more than {MAX_DEPTH} deep.", where=name)
    is_text, are_numbers = Path(name).suffix in TEXT_SUFFIXES, bool(_TENSOR.search(name))
    findings = _scan_bytes(content, name=name, literals=literals, is_text=is_text, are_numbers=are_numbers)
    if content[:4] == b"PK\x03\x04":
        findings += _scan_zip(io.BytesIO(content), name=name, literals=literals, depth=depth + 1)
    elif _packing(content[:8]):
        findings += _scan_packed(content, name=name, literals=literals, depth=depth + 1)
    return findings


_PACKINGS: dict[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}


def _packing(head: bytes) -> str | None:
    return next((kind for magic, kind in _PACKINGS.items() if head.startswith(magic)), None)


def _scan_packed(content: bytes, *, name: str, literals: dict[str, bytes], depth: int) -> list[Finding]:
    kind = _packing(content[:8])
    readers: dict[str | None, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    if kind not in readers:
        raise DataError(f"a release must hold nothing that cannot be searched, this is {kind}.", where=name)
    try:
        with readers[kind](io.BytesIO(content)) as stream:
            inside = stream.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as err:
        raise DataError(f"an archive in a release must be readable, this {kind} is damaged.", where=name) from err
    _refuse_large(len(inside), name)
    # The header of gzip names the original file.
    findings = _scan_bytes(content[:1024], name=name, literals=literals, is_text=False)
    return findings + _scan_content(inside, name=f"{name} ({kind})", literals=literals, depth=depth)


def _refuse_large(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_UNPACKED:
        raise DataError(f"a packed file in a release must unpack to at most {MAX_UNPACKED} bytes.", where=name)


def _scan_safetensors(path: Path, *, name: str, literals: dict[str, bytes]) -> list[Finding]:
    """Search names and metadata as text, offsets not at all (numbers by format), tensors as binary."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise DataError("a released file must be readable, this header is damaged.", where=name)
        header = json.loads(file.read(length))
    texts = [*header, *(f"{k} {v}" for k, v in header.get("__metadata__", {}).items())]
    findings = _scan_bytes("\n".join(texts).encode(), name=name, literals=literals, is_text=True, what="(header)")
    for offset, chunk in _chunks(path, start=8 + length):
        findings += _scan_bytes(chunk, name=name, literals=literals, is_text=False, are_numbers=True, base=offset)
    return _once(findings)


def _chunks(path: Path, *, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield overlapping pieces, so that nothing hides on a border."""
    with path.open("rb") as file:
        file.seek(start)
        offset, tail = start, b""
        while piece := file.read(CHUNK):
            yield offset - len(tail), tail + piece
            offset += len(piece)
            tail = piece[-OVERLAP:]


def _scan_bytes(
    content: bytes,
    *,
    name: str,
    literals: dict[str, bytes],
    is_text: bool,
    are_numbers: bool = False,
    base: int = 0,
    what: str = "",
) -> list[Finding]:
    findings = _find_literals(content, name=name, literals=literals, is_text=is_text, base=base)
    for public in PUBLIC:
        content = content.replace(public, b"x" * len(public))
    content = _HASH.sub(lambda m: b"x" * len(m.group()), content)
    pieces = [(0, content)] if is_text else _printable_runs(content)
    patterns = NUMBER_PATTERNS if are_numbers else PATTERNS
    for start, piece in pieces:
        for kind, pattern in patterns.items():
            findings += [
                Finding(file=name, offset=base + start + m.start(), kind=f"{kind} {what}".strip())
                for m in pattern.finditer(piece)
            ]
    return findings


def _find_literals(
    content: bytes, *, name: str, literals: dict[str, bytes], is_text: bool, base: int = 0
) -> list[Finding]:
    findings = []
    for key, literal in literals.items():
        kind = key.split("#")[0]
        wide = literal.decode()
        for encoded in (literal, wide.encode("utf-16-le"), wide.encode("utf-16-be"), wide.encode("utf-32-le")):
            # Short names occur by chance in numbers and inside words: whole words, and in text only.
            if len(literal) <= MIN_LITERAL + 1:
                if not is_text or encoded is not literal:
                    continue
                pattern = re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(encoded) + rb"(?![A-Za-z0-9_])", re.IGNORECASE)
            else:
                pattern = re.compile(re.escape(encoded), re.IGNORECASE)
            findings += [Finding(file=name, offset=base + m.start(), kind=kind) for m in pattern.finditer(content)]
    return findings


def _printable_runs(content: bytes) -> list[tuple[int, bytes]]:
    pattern = re.compile(rb"[\x20-\x7e]{%d,}" % MIN_PRINTABLE)
    return [(m.start(), m.group()) for m in pattern.finditer(content)]


def _once(findings: list[Finding]) -> list[Finding]:
    """Overlapping pieces find one place twice."""
    return list(dict.fromkeys(findings))
