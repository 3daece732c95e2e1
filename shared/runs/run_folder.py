"""Folder of a run.

The same command creates and resumes it. Another configuration and a second process are refused.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from samgraft.shared.config import (
    config_sha256,
    config_to_dict,
    config_to_yaml,
    default_settings,
    flatten_settings,
    keys_that_may_change,
    translate_renamed_keys,
)
from samgraft.shared.errors import FULL_DISK, SamgraftError, StorageError, UsageError
from samgraft.shared.files import write_text
from samgraft.shared.invocation import repeat_command
from samgraft.shared.runs.environment import (
    code_revision,
    process_rank,
    processes_expected,
    software_versions,
    thread_count,
)
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.runs.result import checked_run_path
from samgraft.shared.runs.training_state import delete_leftovers, find_newest_state, newest_state_name

log = logging.getLogger(__name__)


class RunFolder:
    """Configuration, states, logs and results of one training run."""

    def __init__(self, path: Path, *, stage: str, config: object, continue_command: str, lock: FileLock | None) -> None:
        self.path = path
        self.stage = stage
        self.config = config
        self.continue_command = continue_command
        """Command that resumes this run, ready to paste."""
        self.is_writer = process_rank() == 0
        """True in the first process of a distributed run, which is the only one that writes."""
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self._lock = lock

    @classmethod
    def open(
        cls, root: Path, name: str, *, config: object, stage: str, continue_command: str | None = None
    ) -> RunFolder:
        """Create the folder or open the run in it.

        Args:
            root: Folder of all runs.
            name: Plain folder name of this run.
            config: Resolved configuration dataclass. Fields with ``metadata=MAY_CHANGE`` may differ on resume.
            stage: ``pretrain`` or ``finetune``.
            continue_command: Command that resumes the run, or None for the current command line.

        Raises:
            UsageError: If the folder contains a run of another configuration or stage, contains something else than a
                run, or is in use by another process.
            StorageError: If it cannot be written.
        """
        path = checked_run_path(root, name)
        command = continue_command or repeat_command()
        # The other processes share the folder that the first one locks and writes.
        if process_rank() != 0:
            return cls(path, stage=stage, config=config, continue_command=command, lock=None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
            _check_same_run(path, config=config, stage=stage)
            # That of the first session stays. Later ones may differ in settings without effect on the results.
            if not (path / "config.yaml").exists():
                header = f"# Resolved configuration of this run. stage: {stage}\n"
                write_text(path / "config.yaml", header + config_to_yaml(config))
        except OSError as err:
            if isinstance(err, StorageError | UsageError):
                raise
            raise StorageError(
                f"the run folder cannot be written: {err.strerror}.", where=f"{root.name}/{name}"
            ) from err
        return cls(path, stage=stage, config=config, continue_command=command, lock=lock)

    @property
    def tb(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tb"

    @property
    def checkpoints(self) -> Path:
        """Folder of verified training states."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Path of the single-file report."""
        return self.path / "report.html"

    @property
    def is_complete(self) -> bool:
        """True if the run has written its results in this or an earlier session."""
        return bool(self.read_run_json().get("complete"))

    def latest_training_state(self) -> Path | None:
        """Return the newest training state that verifies, or None.

        The writing process also renames damaged states and deletes leftovers of interrupted saves.
        """
        newest = find_newest_state(self.checkpoints, set_aside=self.is_writer)
        if newest is not None and self.is_writer:
            delete_leftovers(self.path)  # Those of a nan-step-N are not in checkpoints/.
        return newest

    def read_run_json(self) -> dict[str, Any]:
        """Return the content of ``run.json``, or an empty dictionary if it does not exist."""
        return read_run_json(self.path)

    def write_run_json(self, **facts: Any) -> None:
        """Add facts such as fingerprints and hashes to ``run.json``.

        Versions and code revision are always recorded. Never pass host names, user names or absolute paths, because the
        file is published with the results.
        """
        if not self.is_writer:
            return
        content = {
            "schema": "samgraft.run/1",
            "name": self.path.name,
            "stage": self.stage,
            "created": _now(),
            **self.read_run_json(),
            "config_sha256": config_sha256(self.config),
            "versions": software_versions(),
            "code_revision": code_revision(),
            "num_threads": thread_count(),
            "world_size": processes_expected(),
            **facts,
        }
        write_text(self.path / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def mark_complete(self, **facts: Any) -> None:
        """Record that the run has written its results."""
        self.write_run_json(complete=True, completed=_now(), **facts)

    def close(self) -> None:
        """Release the lock. The end of the process releases it as well."""
        if self._lock is not None and self._lock.is_locked:
            (self.path / ".lock-holder.json").unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close the folder, and explain an error of a full disk."""
        self.close()
        if not isinstance(error, OSError) or isinstance(error, SamgraftError) or error.errno not in FULL_DISK:
            return
        newest = newest_state_name(self.checkpoints)
        raise StorageError(
            f"the disk is full: {error.strerror}.",
            where=f"{self.path.name}/{Path(str(error.filename)).name}" if error.filename else self.path.name,
            kept=f"the verified state {newest}" if newest else "nothing was saved yet",
            next_command=f"free space, then: {self.continue_command}",
        ) from error


def read_run_json(run_path: Path) -> dict[str, Any]:
    """Return the content of a run's ``run.json``, or an empty dictionary if it does not exist."""
    try:
        content = json.loads((run_path / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_run_folder(root: Path, name: str, *, config: object, stage: str) -> None:
    """Check whether ``RunFolder.open`` would accept the folder, for a pre-flight.

    Nothing is locked or written, so that a run in use by another process is not detected. The arguments are those of
    ``RunFolder.open``.

    Raises:
        UsageError: If the folder contains a run of another configuration or stage, or something else than a run.
    """
    path = checked_run_path(root, name)
    # Only the first process checks, because others could see the folder while the first one is filling it.
    if process_rank() == 0 and path.exists():
        _check_same_run(path, config=config, stage=stage)


def _take_lock(path: Path) -> FileLock:
    lock = FileLock(path / ".lock")
    holder = path / ".lock-holder.json"
    try:
        lock.acquire(timeout=0)
    except Timeout as err:
        try:
            who = json.loads(holder.read_text())
            by = f"process {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError):
            by = "another process"
        raise UsageError(
            f"the run folder is in use by {by}. Wait for it, stop it, or choose another NAME=.", where=path.name
        ) from err
    except NotImplementedError:
        log.warning("The file system of %s has no locks: make sure that no other process uses this run.", path.name)
    # This file is used in messages only. The kernel releases the lock itself when the process dies.
    write_text(holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}))
    atexit.register(_forget_holder, holder, os.getpid())
    return lock


def _forget_holder(holder: Path, pid: int) -> None:
    if os.getpid() == pid:
        holder.unlink(missing_ok=True)


def _check_same_run(path: Path, *, config: object, stage: str) -> None:
    stored = path / "config.yaml"
    if not stored.exists():
        unexpected = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        if unexpected:
            raise UsageError(
                f"the folder exists but contains no run (no config.yaml, but {', '.join(unexpected[:3])}). "
                "Choose another NAME=.",
                where=path.name,
            )
        return
    try:
        text = stored.read_text(encoding="utf-8")
        before = translate_renamed_keys(flatten_settings(yaml.safe_load(text)))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as err:
        raise UsageError("config.yaml of the run is damaged.", where=path.name) from err
    if f"stage: {stage}\n" not in text.split("\n", 1)[0] + "\n":
        raise UsageError(
            f"the folder contains a run of another stage than {stage}. Choose another NAME=.", where=path.name
        )
    now = flatten_settings(config_to_dict(config))
    # A run of an older version lacks newer settings. Their defaults reproduce what that version did.
    before = {**{k: v for k, v in flatten_settings(default_settings(type(config))).items() if k in now}, **before}
    free = tuple(keys_that_may_change(type(config)))
    different = [
        f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in [*now, *(k for k in before if k not in now)]
        if before.get(key, "not set") != now.get(key, "not set")
        and not any(key == f or key.startswith(f"{f}.") for f in free)
    ]
    if different:
        raise UsageError(
            f"the run exists with another configuration, {len(different)} "
            f"difference{'s' * (len(different) > 1)}: {'; '.join(different[:6])}"
            f"{' ...' if len(different) > 6 else ''}. Use the earlier values, or choose another NAME=.",
            where=path.name,
            kept="the earlier run, unchanged",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
