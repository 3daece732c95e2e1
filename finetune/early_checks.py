"""Checks of a fine-tuning that need neither networks nor settings, before both are imported.

A refusal should not wait for the seconds in which torch and its libraries load. Every check is repeated later on the
complete settings, so that a case that is not certain here is left to that.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from samgraft.shared.config import read_stored_config
from samgraft.shared.runs.result import ENCODER_FILE
from samgraft.shared.samples.leaks import find_leaks, refuse_leaks
from samgraft.shared.samples.split import load_split, load_split_beside
from samgraft.shared.store.files import is_address, is_scans
from samgraft.shared.store.store import SliceStore

CHANGES_THE_CHECK = ("data.allow_transductive", "data.fold")
"""Settings with which the same patients may be allowed, or be in another part."""


def refuse_known_leak(given: Mapping[str, str]) -> None:
    """Refuse an encoder whose card lists validation or test patients of the split beside the store.

    Args:
        given: Settings that the user gave, by dotted key.

    Raises:
        DataError: With the text of the later check.
    """
    data, ckpt, file = given.get("data.store"), given.get("model.ckpt"), given.get("data.split")
    if not data or not ckpt or is_address(data) or is_scans(data) or any(key in given for key in CHANGES_THE_CHECK):
        return
    # Read first, because it is the cheapest file and published weights have none.
    manifest = _read_manifest(Path(ckpt))
    if not manifest:
        return
    store = SliceStore.open(data)
    # Without a file beside the store the split is drawn later, after the check of the labels.
    split = load_split(Path(file), store) if file else load_split_beside(store)
    if split is None or split.folds:
        return
    if leaks := find_leaks(manifest, split, store):
        refuse_leaks({store.path.name: leaks}, way_out=pretrain_again(ckpt, data))


def _read_manifest(weights: Path) -> Mapping[str, object]:
    """Return the scans that an encoder was trained on by its card, or nothing if there is none that can be read."""
    # The card is beside the weights file, which is in a folder of its own in a run.
    files = [weights / ENCODER_FILE, weights / "any"] if weights.is_dir() else [weights]
    cards = [path for file in files if (path := file.with_name("card.json")).is_file()]
    try:
        manifest = json.loads(cards[0].read_text(encoding="utf-8"))["data_manifest"] if cards else {}
    # A damaged card is refused with its reason when the weights are read.
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def pretrain_again(ckpt: str | None, labelled: str) -> str:
    """Return the command that pretrains without the validation and test patients of a labelled store."""
    file = Path(ckpt or "") / "config.yaml"
    given = {"DATA": "STORE.zarr", "LABELLED": labelled, "NAME": f"{Path(ckpt).name}-without" if ckpt else "NEW"}
    if ckpt and file.is_file():
        stored = read_stored_config(file)
        model = stored["model"]
        weights = {"CKPT": model["ckpt"], "BASE": model["base"]}
        given |= {"DATA": stored["data"]["store"], "MODEL": model["arch"], "METHOD": stored["objective"]["name"]}
        given |= {variable: value for variable, value in weights.items() if value}
    return f"make pretrain {' '.join(f'{variable}={shlex.quote(value)}' for variable, value in given.items())}"
