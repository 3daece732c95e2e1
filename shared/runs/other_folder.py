"""Refusal of a path where a finished run or a release is expected, by what the path is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from samgraft.shared.errors import WeightsError
from samgraft.shared.runs.result import ENCODER_FILE, MODEL_FOLDER

MODEL_RESULT = f"{MODEL_FOLDER}/task.json"
"""File that a finished run of stage 2 has."""
RESUME = "the command that started it; it resumes"
MAX_LISTED = 3
_PARTS_OF_A_RUN = {MODEL_FOLDER, "encoder", "ssl_state", "checkpoints", "best", "evaluation", "tb"}


def refuse_other_folder(path: Path, *, expected: str) -> WeightsError:
    """Return the error for a path that is not what a command needs.

    Args:
        path: Path as the user gave it.
        expected: What the command needs, for the message.
    """
    if not path.exists():
        return WeightsError(
            "the run or release does not exist.", where=path.name, next_command="make finetune CKPT=runs/NAME"
        )
    what, advice = next(_descriptions(path))
    return WeightsError(f"{what} (expected {expected}).", where=path.resolve().name, next_command=advice)


def _descriptions(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield what a path is and a next step, the first that applies before the others."""
    given = shlex.quote(str(path))
    if path.is_file():
        yield "the path is a file", "the same command with the folder of the run or release"
    if (path / "complete.json").is_file() and (path / "zarr.json").is_file():
        yield "the folder is a slice store", f"samgraft store info {given}"
    if (path / "study.yaml").is_file():
        runs = _runs_below(path / "runs")
        yield f"the folder is a study with {_count(runs)}", _with_first(runs)
    if (path / ENCODER_FILE).is_file():
        yield "the folder is a run of stage 1, which has an encoder and no classes", f"make finetune CKPT={given}"
    if (path / "encoder.safetensors").is_file():
        yield "the folder has an encoder alone and no classes", f"make finetune CKPT={given}"
    if (path / "round-1").is_dir() and not (path / MODEL_RESULT).is_file():
        yield "the folder is a self-training that is not finished", RESUME
    if (path / "config.yaml").is_file() and not (path / MODEL_RESULT).is_file():
        yield "the folder is a run that is not finished", RESUME
    if path.resolve().name in _PARTS_OF_A_RUN and (path.resolve().parent / "config.yaml").is_file():
        yield "the folder is a part of a run", f"the same command with {shlex.quote(str(path.parent))}"
    if (path / "task.json").is_file():
        yield "the folder is a release already", f"samgraft inspect {given}"
    if runs := _runs_below(path):
        yield f"the folder has {_count(runs)} below it", _with_first(runs)
    yield "the folder is neither a run nor a release", "make finetune CKPT=runs/NAME"


def _runs_below(path: Path) -> list[Path]:
    return sorted(file.parent.parent for file in path.glob(f"*/{MODEL_RESULT}"))


def _count(runs: list[Path]) -> str:
    names = ", ".join(run.name for run in runs[:MAX_LISTED]) + (", ..." if len(runs) > MAX_LISTED else "")
    return f"{len(runs)} finished runs ({names})" if runs else "no finished run"


def _with_first(runs: list[Path]) -> str | None:
    return f"the same command with one of them, such as {shlex.quote(str(runs[0]))}" if runs else None
