"""Hashes and split of a run's inputs.

A path may contain another file at the next session. A run therefore records the hashes of its inputs and keeps a
copy of its split, and it refuses to resume when one of them has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.run_folder import RunFolder, read_run_json
from samgraft.shared.samples.split import Split, load_split
from samgraft.shared.store.store import SliceStore

SPLIT_FILE = "split.json"


def check_run_inputs(run_path: Path, inputs: Mapping[str, str | None]) -> None:
    """Check the inputs against those of the run's earlier sessions.

    Nothing is written, so that a pre-flight can use it.

    Args:
        run_path: Folder of a run that may not exist yet. Its ``run.json`` has the hashes of earlier sessions.
        inputs: Hash by name, e.g. ``split_sha256``, or None if there is no such input.

    Raises:
        UsageError: If an earlier session had another input.
    """
    before = read_run_json(run_path)
    for name, now in inputs.items():
        # An input that earlier sessions did not record (an older version of this program) is accepted.
        then = before.get(name, now)
        if then != now:
            kind = name.removesuffix("_sha256").removesuffix("_fingerprint").replace("_", " ")
            has_copy = name == "split_sha256" and (run_path / SPLIT_FILE).is_file()
            copy = f" The run's own copy is {run_path.name}/{SPLIT_FILE}." if has_copy else ""
            raise UsageError(
                f"the {kind} is not the one that the run was started with (got {_short(now)}, expected "
                f"{_short(then)}). Use the earlier one, or choose another NAME=.{copy}",
                where=run_path.name,
                kept="the earlier run, unchanged",
            )


def record_run_inputs(run: RunFolder, inputs: Mapping[str, str | None]) -> None:
    """Check the inputs against the run and record their hashes."""
    check_run_inputs(run.path, inputs)
    run.write_run_json(**inputs)


def save_run_split(run: RunFolder, split: Split) -> None:
    """Write the run's split next to its configuration, if it is not there."""
    # Never replaced, because the patients of the first session decide what is training data.
    if run.is_writer and not (run.path / SPLIT_FILE).exists():
        split.save(run.path / SPLIT_FILE)


def load_run_split(run_path: Path, store: SliceStore) -> Split | None:
    """Return the split of the run's earlier sessions, or None for a new run.

    It comes before a newly drawn split and before the one next to the store, which may have changed since then.

    Raises:
        DataError: If the store is another one than in the earlier sessions, or the file is damaged.
    """
    path = run_path / SPLIT_FILE
    if not path.is_file():
        return None
    try:
        fingerprint = json.loads(path.read_text(encoding="utf-8"))["store_fingerprint"]
    except (ValueError, KeyError, TypeError) as err:
        raise DataError("the split file is damaged.", where=f"{run_path.name}/{SPLIT_FILE}") from err
    if fingerprint != store.fingerprint:
        raise DataError(
            "the training data are not those that the run was started with (their fingerprint differs). "
            "Choose another NAME= for a run on other data.",
            where=run_path.name,
            kept="the run, unchanged",
        )
    return load_split(path, store)


def _short(value: str | None) -> str:
    return f"{value[:12]}..." if value else "none"
