"""Which base weights an adapter belongs to: a small file beside peft's own two, which peft does not read."""

from __future__ import annotations

import json
from pathlib import Path

from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_text

ADAPTER_BASE_FILE = "adapter_base.json"
_KEY = "base_tensors_sha256"


def write_adapter_base(folder: Path, sha256: str) -> None:
    """Record the base of the adapter in ``folder``; ``sha256`` as of ``tensors_sha256``."""
    write_text(folder / ADAPTER_BASE_FILE, json.dumps({_KEY: sha256}) + "\n")


def read_adapter_base(folder: Path) -> str | None:
    """Return what was recorded; None for an adapter of other programs, which record nothing.

    Raises:
        WeightsError: If the file is damaged.
    """
    path = folder / ADAPTER_BASE_FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[_KEY]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise WeightsError(f"{ADAPTER_BASE_FILE} must say {_KEY}, it is damaged.", where=folder.name) from err
    return str(value)


def refuse_lone_adapter(folder: Path) -> None:
    """Refuse a folder that holds peft's files only, and say which base they are for.

    Raises:
        WeightsError: If ``folder`` is an adapter's.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    sha256 = read_adapter_base(folder)
    base = f"the base whose tensors have sha256 {sha256[:16]}..." if sha256 else "a base that it does not name"
    raise WeightsError(
        f"weights folder holds an adapter alone, for {base}. Give the whole run or release folder.",
        where=folder.name,
    )
