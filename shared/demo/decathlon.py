"""Labelled data sets of the Medical Segmentation Decathlon, fetched through MONAI.

Source: Antonelli et al., The Medical Segmentation Decathlon (Nature Communications 2022). Addresses and MD5 sums are
those of ``monai.apps.DecathlonDataset``.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.fetch import OFFLINE_VARIABLE, is_offline
from samgraft.shared.files import move
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.from_data import ScanRequest, build_from_scans

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecathlonTask:
    """One data set of the Decathlon."""

    folder: str
    """Name of the archive and of the folder inside it."""
    modality: Modality
    description: str
    licence: str


TASKS = {
    "hippocampus": DecathlonTask(
        folder="Task04_Hippocampus",
        modality=Modality.MRI,
        description="T1 crops of 260 people with anterior and posterior hippocampus, 27 MB",
        licence="CC-BY-SA-4.0",
    ),
}
"""Data sets by the name that the user types."""


def decathlon_data(name: str, *, root: Path = Path("data"), cache: Path) -> Path:
    """Fetch a data set by its MD5 sum and build a labelled store from it, unless it is there.

    Args:
        name: Key of ``TASKS``.
        root: Folder of the store. The scans are unpacked to ``root/decathlon``.
        cache: Folder of downloads.

    Raises:
        StorageError: If the archive is missing and cannot be fetched.
        DataError: If the archive has another MD5 sum, or scans are refused.
    """
    task = TASKS[name]
    scans = _unpack(_fetch(task, cache=cache), root / "decathlon" / task.folder)
    out = root / f"{name}.zarr"
    build_from_scans(ScanRequest(source=scans, modality=task.modality.value), out)
    return out


def _fetch(task: DecathlonTask, *, cache: Path) -> Path:
    # Imported here, because MONAI takes seconds.
    from monai.apps.datasets import DecathlonDataset
    from monai.apps.utils import HashCheckError, download_url

    path = cache / f"{task.folder}.tar"
    address = DecathlonDataset.resource[task.folder]
    if is_offline() and not path.is_file():
        raise StorageError(
            f"{path.name} is not in the cache folder, and {OFFLINE_VARIABLE} disallows downloads. Put the archive from "
            f"{address} there.",
            where=str(cache),
        )
    if not path.is_file():
        log.info("fetching %s", path.name)
    try:
        download_url(address, path, hash_val=DecathlonDataset.md5[task.folder], hash_type="md5", progress=False)
    except HashCheckError as err:
        path.unlink(missing_ok=True)
        raise DataError(
            f"the archive {path.name} is damaged or was replaced (another MD5 sum than MONAI's). It is deleted.",
            where=address,
            next_command="run the same command again",
        ) from err
    except (URLError, OSError, RuntimeError) as err:
        raise StorageError(
            f"{path.name} could not be downloaded ({type(err).__name__}). Is this machine online? If not, put the "
            "archive into the cache folder.",
            where=address,
            next_command="connect to the network, then run the same command again",
        ) from err
    return path


def _unpack(archive: Path, target: Path) -> Path:
    from monai.apps.utils import extractall

    if target.is_dir():
        return target
    # MONAI takes a folder with any file for complete, so a folder appears under its name when everything is in it.
    draft = target.parent / ".unpacked"
    shutil.rmtree(draft, ignore_errors=True)
    extractall(archive, draft, has_base=False)
    move(draft / target.name, target)
    shutil.rmtree(draft)
    return target
