"""Weights in repositories of the Hugging Face Hub, given as ``hf://OWNER/NAME[/FILE][@REVISION]``.

A file is kept in the cache folder under the commit that it came from. Without a network that copy is used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from samgraft.shared.errors import StorageError, WeightsError
from samgraft.shared.fetch import OFFLINE_VARIABLE, cache_folder, is_offline
from samgraft.shared.weights.run_files import CARD_FILE, FOLDER_FILES

log = logging.getLogger(__name__)

# A path that was made of an address has one slash where the address has two.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_EXPECTED = "hf://OWNER/NAME, hf://OWNER/NAME/FILE, and @REVISION after either"
_SHARD_FILES = "*-of-*.safetensors"
_STATE_FILES = "ssl_state/*"


@dataclass(frozen=True, kw_only=True)
class HubCopy:
    """Local copy of weights on the Hub."""

    path: Path
    """File, or the folder of the commit if the address names no file."""
    address: str
    """Address with the commit that the copy is of."""


def is_hub_address(path: Path | str) -> bool:
    """Return whether weights are given as an address of the Hub."""
    return str(path).startswith("hf:/")


def fetch_from_hub(address: Path | str, *, cache: Path | None = None) -> HubCopy:
    """Return the local copy of weights on the Hub, downloading what is missing of it.

    Args:
        address: Repository, file in it, or either with a commit, tag or branch after ``@``. Without a file it is the
            first that a folder of weights would be read from, with the card beside it.
        cache: Folder of downloads, by default ``cache_folder()``.

    Raises:
        WeightsError: If the address is not understood, or the repository has no such weights.
        StorageError: If the Hub cannot be reached or refuses, or the network is disallowed and there is no copy.
    """
    match = _ADDRESS.fullmatch(str(address))
    if match is None:
        raise WeightsError(
            f"the address of weights on the Hub is not understood (got {address}, expected {_EXPECTED})."
        )
    repository, file, revision = match["repository"], match["file"], match["revision"]
    folder = (cache or cache_folder()) / "hub"
    found = None
    # The files of a commit never change, so that a copy of them needs no network.
    if is_offline() or (revision is not None and _COMMIT.fullmatch(revision)):
        found = _find_copy(repository, file, revision, folder)
    if found is None:
        _refuse_offline(repository)
        found = _download(repository, file, revision, folder)
    pinned = f"hf://{repository}{f'/{file}' if file else ''}@{found.name}"
    if revision != found.name:
        log.info("the weights are those of %s. This address keeps them when the repository changes.", pinned)
    return HubCopy(path=found / file if file else found, address=pinned)


def _find_copy(repository: str, file: str | None, revision: str | None, folder: Path) -> Path | None:
    """Return the folder of a commit in the cache that has the weights, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in [file] if file else FOLDER_FILES:
        found = try_to_load_from_cache(repository, name, cache_dir=folder, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def _refuse_offline(repository: str) -> None:
    if is_offline():
        raise StorageError(
            f"the weights are not in the cache folder, and {OFFLINE_VARIABLE} disallows downloads.",
            where=f"hf://{repository}",
            next_command=f"the same command without {OFFLINE_VARIABLE}, once",
        )


def _download(repository: str, file: str | None, revision: str | None, folder: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        listed = HfApi().model_info(repository, revision=revision).siblings or []
        wanted = _choose_files({one.rfilename for one in listed}, file, repository=repository)
        return Path(snapshot_download(repository, revision=revision, cache_dir=folder, allow_patterns=wanted))
    except WeightsError:
        raise
    # The library and its HTTP client raise classes without a common parent.
    except Exception as err:
        status = getattr(getattr(err, "response", None), "status_code", None)
        reason = f"status {status}" if status else type(err).__name__
        is_hidden = status in {401, 403, 404}
        raise StorageError(
            f"the weights could not be downloaded ({reason}).",
            where=f"hf://{repository}",
            next_command="hf auth login, if the repository exists and is private" if is_hidden else None,
        ) from err


def _choose_files(names: Collection[str], file: str | None, *, repository: str) -> list[str]:
    """Return the patterns of the files to download.

    Raises:
        WeightsError: If the repository lacks the file, or has no weights under a known name.
    """
    chosen = next((name for name in ([file] if file else FOLDER_FILES) if name in names), None)
    if chosen is None:
        missing = file or f"none of {', '.join(FOLDER_FILES)}"
        known = ", ".join(sorted(names)[:8]) or "no files"
        raise WeightsError(
            f"the repository has {'no ' if file else ''}{missing} (found {known}). Give hf://{repository}/FILE.",
            where=f"hf://{repository}",
        )
    parent, is_top = chosen.rpartition("/")[0], "/" not in chosen
    beside = [CARD_FILE if is_top else f"{parent}/{CARD_FILE}"]
    if chosen.endswith(".index.json"):
        beside.append(_SHARD_FILES if is_top else f"{parent}/{_SHARD_FILES}")
    return [chosen, *beside, _STATE_FILES]
