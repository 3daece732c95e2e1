"""Official SAM weights by name, with pinned addresses, sizes and hashes.

Source:
    The addresses of segment_anything's, MobileSAM's and MedSAM's own pages. Each hash was found equal in several
    independent public projects.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from samgraft.shared.encoders.base import MEDSAM_SHA256
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.fetch import PinnedFile, cache_folder, fetch_file
from samgraft.shared.files import file_sha256

FORMER_CACHE = Path("data") / "weights"
"""Folder in which earlier versions kept these files. They are used from there."""


def _pin(name: str, url: str, num_bytes: int, sha256: str) -> PinnedFile:
    file_name = url.rsplit("/", 1)[-1]
    return PinnedFile(name=name, file_name=file_name, url=url, num_bytes=num_bytes, sha256=sha256, licence="Apache-2.0")


_META = "https://dl.fbaipublicfiles.com/segment_anything"
_MOBILE_SAM = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2"
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
    )
}
"""Published weights files by name."""


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
