"""Official SAM weights by name: address, size and sha256 are pinned; downloads resume, are verified and cached.

Sources: the addresses of segment_anything's, MobileSAM's and MedSAM's own pages; each hash was found equal in several
independent public projects.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import requests
from samgraft.shared.encoders.architecture import MEDSAM_SHA256
from samgraft.shared.errors import StorageError, UsageError, WeightsError
from samgraft.shared.files import file_sha256, move

log = logging.getLogger(__name__)

CACHE_VARIABLE = "SAMGRAFT_CACHE"
OFFLINE_VARIABLE = "SAMGRAFT_OFFLINE"
CHUNK_BYTES = 1 << 16
TIMEOUT_S = (15.0, 60.0)
"""To connect, and between two packets."""
NUM_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class OfficialWeights:
    """One published file."""

    name: str
    url: str
    num_bytes: int
    sha256: str
    license: str = "Apache-2.0"

    @property
    def file_name(self) -> str:
        """Name in the cache."""
        return self.url.rsplit("/", 1)[-1]


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {
    weights.name: weights
    for weights in (
        OfficialWeights(
            name="sam_vit_b",
            url=f"{_META}sam_vit_b_01ec64.pth",
            num_bytes=375_042_383,
            sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        OfficialWeights(
            name="sam_vit_l",
            url=f"{_META}sam_vit_l_0b3195.pth",
            num_bytes=1_249_524_607,
            sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        OfficialWeights(
            name="sam_vit_h",
            url=f"{_META}sam_vit_h_4b8939.pth",
            num_bytes=2_564_550_879,
            sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        OfficialWeights(
            name="mobile_sam",
            url="https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/"
            "f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
            num_bytes=40_728_226,
            sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        ),
        OfficialWeights(
            name="medsam_vit_b",
            url="https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
            num_bytes=375_049_145,
            sha256=MEDSAM_SHA256,
        ),
    )
}


def official_weights(
    name: str, *, cache: Path | None = None, offline: bool | None = None, address: str | None = None
) -> Path:
    """Return the verified local file of official weights, downloading it if needed.

    Args:
        name: A key of ``OFFICIAL``.
        cache: Folder of downloads; default ``$SAMGRAFT_CACHE`` or ``data/weights``.
        offline: Never connect; default whether ``$SAMGRAFT_OFFLINE`` is set.
        address: A mirror's address for the same file; size and hash stay pinned.

    Raises:
        UsageError: If the name is unknown.
        StorageError: If the file is neither cached nor reachable.
        WeightsError: If what arrived has another sha256; it is removed.
    """
    if name not in OFFICIAL:
        raise UsageError(f"official weights must be one of {', '.join(OFFICIAL)}, got {name!r}.")
    wanted = OFFICIAL[name] if address is None else replace(OFFICIAL[name], url=address)
    folder = cache or Path(os.environ.get(CACHE_VARIABLE) or Path("data") / "weights")
    path = folder / OFFICIAL[name].file_name
    if path.is_file():
        if file_sha256(path) == wanted.sha256:
            return path
        log.info("%s: the cached file is damaged, fetching it again", path.name)
    if bool(os.environ.get(OFFLINE_VARIABLE)) if offline is None else offline:
        raise StorageError(
            f"{name} must be in the cache when offline, and is not. Put {path.name} (sha256 {wanted.sha256}) there.",
            where=str(folder),
        )
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _fetch(wanted, part)
    found = file_sha256(part)
    if found != wanted.sha256:
        part.unlink()
        raise WeightsError(
            f"{name} must have sha256 {wanted.sha256[:12]}..., got {found[:12]}...: damaged on the way or replaced. It "
            "is removed.",
            where=wanted.url,
            next_command="run the same command again",
        )
    move(part, path)
    return path


def _fetch(wanted: OfficialWeights, part: Path) -> None:
    log.info("fetching %s, %.0f MB", wanted.url, wanted.num_bytes / 1e6)
    for attempt in range(NUM_ATTEMPTS):
        try:
            _stream(wanted, part)
        except requests.RequestException as err:
            if attempt == NUM_ATTEMPTS - 1 or isinstance(err, requests.HTTPError):
                raise StorageError(
                    f"{wanted.name} could not be fetched ({type(err).__name__}): is this machine online? Otherwise "
                    f"bring {wanted.file_name} (sha256 {wanted.sha256[:12]}...) and give its path.",
                    where=wanted.url,
                    kept=f"{part.stat().st_size / 1e6 if part.exists() else 0:.1f} MB; the next try goes on from there",
                    next_command="run the same command again",
                ) from err
            time.sleep(2.0**attempt)
        else:
            return


def _stream(wanted: OfficialWeights, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    if start >= wanted.num_bytes:
        return  # complete or too long: the hash decides
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(wanted.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        received = start if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                received += len(chunk)
                if received > wanted.num_bytes:
                    file.write(chunk[: len(chunk) - (received - wanted.num_bytes) + 1])
                    return  # a server that never ends must not fill the disk
                file.write(chunk)
    if received < wanted.num_bytes:
        raise requests.ConnectionError(f"connection closed after {received} of {wanted.num_bytes} bytes")
