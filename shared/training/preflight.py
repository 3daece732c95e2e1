"""Disk that a run will need, predicted before it starts: the one account of it, for both stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from samgraft.shared.errors import StorageError
from samgraft.shared.runs.training_state import finished_states, leftovers
from samgraft.shared.training.config import TrainerConfig
from torch import Tensor, nn

LOGS_BYTES = 2**26
"""Allowance for metrics, events, pictures and the report."""


def state_bytes(module: nn.Module) -> int:
    """Return the size of one training state: weights, buffers, and AdamW's two moments of what trains."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trainable = size(p for p in module.parameters() if p.requires_grad)
    return size(module.parameters()) + size(module.buffers()) + 2 * trainable


def check_disk(module: nn.Module, config: TrainerConfig, run_path: Path) -> str:
    """Say how much more disk the run will need, and refuse to start if it is not there.

    Args:
        module: What is trained, or whatever holds all its parameters.
        config: How long, and which states are kept.
        run_path: The run's folder; what an earlier session left there need not be written again.

    Returns:
        The need and what is free, for the pre-flight.

    Raises:
        StorageError: If less is free.
    """
    checkpoints = run_path / "checkpoints"
    states = finished_states(checkpoints) if checkpoints.is_dir() else []
    if states and not config.resume_from and _is_done(states[-1], config.max_steps):
        return f"nothing more to train after {states[-1].name}"
    need = _bytes_to_come(state_bytes(module), config, run_path, states)
    place = next(p for p in (run_path, *run_path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    more = "more " if states else ""
    if need > free:
        raise StorageError(
            f"the run needs {need / 1e9:.2f} GB {more}for its training states ({state_bytes(module) / 1e9:.2f} GB "
            f"each), but only {free / 1e9:.2f} GB are free.",
            where=run_path.name,
            kept=f"the training states up to {states[-1].name}" if states else "nothing was written yet",
            next_command="free space" + (", or unset trainer.keep_every_steps" if config.keep_every_steps else ""),
        )
    return f"up to {need / 1e9:.2f} GB {more}for training states, {free / 1e9:.1f} GB free"


def _bytes_to_come(one: int, config: TrainerConfig, run_path: Path, states: Sequence[Path]) -> int:
    milestones = config.max_steps // config.keep_every_steps if config.keep_every_steps else 0
    kept = one * (config.keep_last + 1 + milestones)  # the newest ones, the best, the milestones
    passing = 2 * one  # the one being written, and the weights that are handed on
    logs = _bytes_of([run_path / "metrics.jsonl", run_path / "tb"])
    # What killed saves left behind is deleted when the run goes on from a state.
    freed = _bytes_of(leftovers(run_path / "checkpoints")) if states else 0
    return max(0, max(0, kept - _bytes_of(states)) + passing + max(0, LOGS_BYTES - logs) - freed)


def _bytes_of(places: Iterable[Path]) -> int:
    files = (file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
    return sum(file.stat().st_size for file in files if file.is_file())


def _is_done(newest: Path, max_steps: int) -> bool:
    if int(newest.name.removeprefix("step-")) >= max_steps:
        return True
    try:
        return json.loads((newest / "state.json").read_bytes()).get("ended") is not None
    except (OSError, ValueError, AttributeError):
        return False  # damaged: it is set aside later, and training goes on
