"""Downloaded weights, official ones by name and those on the Hugging Face Hub.

Weights on the Hub are given as ``hf://OWNER/NAME[/FILE][@REVISION]``. A file is kept in the cache folder under the
commit that it came from, and that copy is used without a network.

Source:
    The addresses of segment_anything's, SAM 2's, MobileSAM's and MedSAM's own pages. Each hash was found equal in
    several independent public projects.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from samgraft.shared.encoders.base import MEDSAM_SHA256
from samgraft.shared.errors import StorageError, UsageError, WeightsError
from samgraft.shared.fetch import OFFLINE_VARIABLE, PinnedFile, cache_folder, fetch_file, is_offline
from samgraft.shared.files import file_sha256
from samgraft.shared.weights.run_files import CARD_FILE, FOLDER_FILES

log = logging.getLogger(__name__)

FORMER_CACHE = Path("data") / "weights"
"""Folder in which earlier versions kept these files. They are used from there."""


def _pin(name: str, url: str, num_bytes: int, sha256: str) -> PinnedFile:
    file_name = url.rsplit("/", 1)[-1]
    return PinnedFile(name=name, file_name=file_name, url=url, num_bytes=num_bytes, sha256=sha256, licence="Apache-2.0")


_META = "https://dl.fbaipublicfiles.com/segment_anything"
_MOBILE_SAM = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2"
_SAM_2 = (
    ("sam2.1", "092824", "tiny", 156_008_466, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    ("sam2.1", "092824", "small", 184_416_285, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    ("sam2.1", "092824", "base_plus", 323_606_802, "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
    ("sam2.1", "092824", "large", 898_083_611, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
    ("sam2", "072824", "tiny", 155_906_050, "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125"),
    ("sam2", "072824", "small", 184_309_650, "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"),
    ("sam2", "072824", "base_plus", 323_493_298, "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"),
    ("sam2", "072824", "large", 897_952_466, "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"),
)
OFFICIAL: dict[str, PinnedFile] = {
    file.name: file
    for file in (
        _pin(
            "sam_vit_b",
            f"{_META}/sam_vit_b_01ec64.pth",
            375_042_383,
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        _pin(
            "sam_vit_l",
            f"{_META}/sam_vit_l_0b3195.pth",
            1_249_524_607,
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        _pin(
            "sam_vit_h",
            f"{_META}/sam_vit_h_4b8939.pth",
            2_564_550_879,
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        _pin(
            "mobile_sam",
            f"{_MOBILE_SAM}/weights/mobile_sam.pt",
            40_728_226,
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        ),
        _pin(
            "medsam_vit_b",
            "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
            375_049_145,
            MEDSAM_SHA256,
        ),
        *(
            _pin(f"{version}_hiera_{size}", f"{_META}_2/{date}/{version}_hiera_{size}.pt", num_bytes, sha256)
            for version, date, size, num_bytes, sha256 in _SAM_2
        ),
    )
}
"""Published weights files by name."""
_SAM_2_NAMES = {
    "sam2_t": "sam2.1_hiera_tiny",
    "sam2_s": "sam2.1_hiera_small",
    "sam2_bp": "sam2.1_hiera_base_plus",
    "sam2_l": "sam2.1_hiera_large",
}
"""Newest official weights of SAM 2's architectures."""


def official_weights(name: str, *, cache: Path | None = None, address: str | None = None) -> Path:
    """Return the verified local file of official weights, downloading it if needed.

    Args:
        name: A key of ``OFFICIAL``.
        cache: Folder of downloads, by default ``cache_folder()``.
        address: Address of a mirror of the same file. Size and hash stay pinned.

    Raises:
        UsageError: If the name is unknown.
        StorageError: If the file is neither cached nor reachable.
        WeightsError: If the download has another sha256. It is deleted.
    """
    if name not in OFFICIAL:
        raise UsageError(f"{name!r} is no official weights file (known are {', '.join(OFFICIAL)}).")
    file = OFFICIAL[name] if address is None else replace(OFFICIAL[name], url=address)
    # Runs of earlier versions name their weights like this, and may be resumed on a machine without network.
    former = FORMER_CACHE / file.file_name
    if former.is_file() and file_sha256(former) == file.sha256:
        return former
    return fetch_file(file, cache=cache or cache_folder(), error_class=WeightsError)


def official_name(arch: str) -> str:
    """Return the name of the official weights of an architecture, or FILE if there are none under a name."""
    name = _SAM_2_NAMES.get(arch, f"sam_{arch}")
    return name if name in OFFICIAL else "FILE"


# ---- weights on the Hub

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
