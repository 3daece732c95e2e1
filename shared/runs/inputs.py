"""What a run was made from: a path may hold another file tomorrow, so a run holds on to hashes and to its split."""

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
    """Refuse to go on with something else than a run began with; writes nothing, so a pre-flight may ask.

    Args:
        run_path: A run that may exist; its ``run.json`` has the hashes of earlier sessions.
        inputs: Hash by what it is of, e.g. ``split_sha256``; None where there is none.

    Raises:
        UsageError: If an earlier session of the run had another one.
    """
    before = read_run_json(run_path)
    for name, now in inputs.items():
        then = before.get(name, now)
        if then != now:
            kind = name.removesuffix("_sha256").removesuffix("_fingerprint").replace("_", " ")
            has_copy = name == "split_sha256" and (run_path / SPLIT_FILE).is_file()
            copy = f" The run's own copy is {run_path.name}/{SPLIT_FILE}." if has_copy else ""
            raise UsageError(
                f"the run began with another {kind} ({_short(then)} before, {_short(now)} now). Give the old one, or "
                f"choose another NAME=.{copy}",
                where=run_path.name,
                kept="the old run, untouched",
            )


def record_run_inputs(run: RunFolder, inputs: Mapping[str, str | None]) -> None:
    """Record what a run begins with, or refuse to go on with something else (``check_run_inputs``)."""
    check_run_inputs(run.path, inputs)
    run.write_run_json(**inputs)


def save_run_split(run: RunFolder, split: Split) -> None:
    """Write the run's split beside its configuration, once."""
    if run.is_writer and not (run.path / SPLIT_FILE).exists():
        split.save(run.path / SPLIT_FILE)


def load_run_split(run_path: Path, store: SliceStore) -> Split | None:
    """Return the split that an earlier session of the run kept; None for a new run.

    A drawn split, or the one beside the store, may have changed since: the patients that were trained on did not.

    Raises:
        DataError: If the store is not the one the run began with, or the file is damaged.
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
            "the training data must be those the run began with, but their fingerprint differs. "
            "Choose another NAME= for a run on other data.",
            where=run_path.name,
            kept="the run, untouched",
        )
    return load_split(path, store)


def _short(value: str | None) -> str:
    return f"{value[:12]}..." if value else "none"
