"""A run's curves for Weights & Biases and MLflow, as local files that leave this machine only by the user's command.

They are written when a session of a run ends, from ``metrics.jsonl``, so that a resumed run has no step twice. They
contain the run's name, its numbers per step, and the numbers among its settings. Texts of settings are left out,
because paths and names of stores may identify people. Pictures are left out too.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from samgraft.shared.errors import UsageError
from samgraft.shared.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

PROJECT = "samgraft"
"""Project in W&B and experiment in MLflow."""
BATCH = 1000
"""Values that MLflow accepts in one call."""


class Tracker(Enum):
    """Program that shows and compares the curves of runs."""

    WANDB = "wandb"
    """Weights & Biases, as an offline run for ``wandb sync``."""
    MLFLOW = "mlflow"
    """MLflow, as a folder for ``mlflow ui``."""


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Refuse trackers whose package is not installed, before the training.

    Raises:
        UsageError: With the command that installs it.
    """
    for tracker in trackers:
        if find_spec(tracker.value) is None:
            raise UsageError(
                f"trainer.trackers has {tracker.value}, which is not installed.",
                next_command=f"pip install 'samgraft[{tracker.value}]'",
            )


def write_trackers(trackers: Sequence[Tracker], run: RunFolder) -> None:
    """Write the curves of a run for every tracker, replacing those of earlier sessions."""
    for tracker in trackers if run.is_writer else ():
        folder = run.path / tracker.value
        # The folder itself and MLflow's .trash stay, because MLflow checks only once per process that they exist.
        for path in folder.glob("[!.]*"):
            shutil.rmtree(path, ignore_errors=True)
        lines = [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in run.metrics.read()]
        if not lines:
            continue
        try:
            shown = _WRITERS[tracker](folder, run.path.name, lines, read_numbers(run.path / "config.yaml"))
        # Curves are no reason to lose a training, and the libraries' errors have no common class.
        except Exception as err:
            log.warning("the curves for %s could not be written (%s)", tracker.value, type(err).__name__)
            continue
        log.info("curves for %s: %s", tracker.value, shown)


def read_numbers(config_file: Path) -> dict[str, float]:
    """Return the numbers and switches among the settings of a run, by dotted key."""

    def leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{prefix}{key}.")
            elif isinstance(value, bool | int | float):
                yield f"{prefix}{key}", value

    return dict(leaves(yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}, ""))


def _write_wandb(folder: Path, name: str, lines: list[dict[str, float]], settings: dict[str, float]) -> str:
    """Write an offline run and return the command that uploads it."""
    import wandb

    private = wandb.Settings(
        mode="offline", root_dir=str(folder.parent), console="off", silent=True, save_code=False, disable_code=True,
        disable_git=True, disable_job_creation=True, x_disable_meta=True, x_disable_stats=True,
        x_disable_machine_info=True, x_save_requirements=False, host=PROJECT, username=PROJECT, program=PROJECT,
        program_relpath=PROJECT, program_abspath=PROJECT,
    )  # fmt: skip
    tracked = wandb.init(project=PROJECT, name=name, config=settings, settings=private)
    for line in lines:
        tracked.log({key: value for key, value in line.items() if key != "step"}, step=int(line["step"]))
    tracked.finish()
    # The library's own log files contain paths of this machine.
    for path in folder.iterdir():
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path / "logs", ignore_errors=True)
    return f"wandb sync {shlex.quote(str(folder))}/offline-run-*"


def _write_mlflow(folder: Path, name: str, lines: list[dict[str, float]], settings: dict[str, float]) -> str:
    """Write a folder of MLflow and return the command that shows it."""
    with _allow_folders():
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=folder.absolute().as_uri())
        # Without an address of its own MLflow would store the path of this folder. No file is kept there.
        experiment = client.create_experiment(PROJECT, artifact_location=f"mlflow-artifacts:/{PROJECT}")
        run_id = client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in settings.items()]
        values = [
            Metric(key, value, int(line["step"]), int(line["step"]))
            for line in lines
            for key, value in line.items()
            if key != "step"
        ]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        for start in range(0, len(values), BATCH):
            client.log_batch(run_id, metrics=values[start : start + BATCH])
        client.set_terminated(run_id)
    shutil.rmtree(folder / "0", ignore_errors=True)  # an empty experiment, with the path of this folder
    return f"{_FOLDERS_VARIABLE}=true mlflow ui --backend-store-uri {shlex.quote(str(folder))}"


_FOLDERS_VARIABLE = "MLFLOW_ALLOW_FILE_STORE"


@contextmanager
def _allow_folders() -> Iterator[None]:
    """Allow MLflow to write a folder, which needs no database."""
    before = os.environ.get(_FOLDERS_VARIABLE)
    os.environ[_FOLDERS_VARIABLE] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FOLDERS_VARIABLE]
        else:
            os.environ[_FOLDERS_VARIABLE] = before


_WRITERS = {Tracker.WANDB: _write_wandb, Tracker.MLFLOW: _write_mlflow}
