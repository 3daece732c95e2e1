"""Training states on disk: written whole or not at all, verified before use, never a pickle.

``checkpoints/step-000300.tmp/`` is filled, every file flushed, then ``manifest.json`` with sizes and sha256, then the
folder is renamed to ``step-000300/`` and its parent flushed. Only after that are older states pruned. A reader takes
the newest folder whose manifest verifies; what does not verify is set aside as ``.corrupt``, never deleted. A state
that is written again stays as ``.old`` until the new one has its name.

Nested training state as flat tensors plus JSON, and back, exactly and without pickle.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from samgraft.shared.errors import StorageError, WeightsError
from samgraft.shared.files import file_sha256, move, write_json, write_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

log = logging.getLogger(__name__)

FORMAT = "samgraft.training_state"
FORMAT_VERSION = 1
STATE_NAME = re.compile(r"^step-(\d{6,})$")
LEFTOVER_NAME = re.compile(r"^(?:nan-)?step-\d+\.(?:tmp|old)$")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A verified training state in memory."""

    step: int
    record: dict[str, Any]
    """Everything that is no tensor: positions, versions, settings, best value, nested structure."""
    tensors: dict[str, Tensor]
    path: Path

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Return the generators of one rank."""
        return load_file(self.path / _rng_name(rank))


def state_folder_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:06d}"


def write_state(
    parent: Path,
    name: str,
    *,
    step: int,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    rng_per_rank: Sequence[Mapping[str, Tensor]],
    attachments: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> Path:
    """Write a training state so that a kill, a full disk or a power cut at any moment leaves the older ones intact.

    Args:
        parent: Folder of the states.
        name: Of the new folder.
        step: Optimizer steps done.
        record: JSON values.
        tensors: Of model and optimizer.
        rng_per_rank: Generators, one entry per process.
        attachments: Further tensor files by stem, e.g. the batch that made the loss NaN.

    Returns:
        The finished folder.

    Raises:
        StorageError: Disk full, quota, permission; nothing of the new state is left behind.
    """
    draft, final = parent / f"{name}.tmp", parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
        digests = {"state.safetensors": write_tensors(draft / "state.safetensors", tensors)}
        digests["state.json"] = write_json(draft / "state.json", {**record, "step": step})
        for rank, rng in enumerate(rng_per_rank):
            digests[_rng_name(rank)] = write_tensors(draft / _rng_name(rank), rng)
        for stem, content in attachments.items():
            digests[f"{stem}.safetensors"] = write_tensors(draft / f"{stem}.safetensors", content)
        files = {file: {"bytes": d.num_bytes, "sha256": d.sha256} for file, d in digests.items()}
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}
        write_json(draft / "manifest.json", manifest)
        _give_name(draft, final)
    except OSError as err:
        _restore_replaced(parent)
        shutil.rmtree(draft, ignore_errors=True)
        raise _storage_error(err, parent=parent, name=name, tensors=tensors) from err
    return final


def find_newest_state(parent: Path, *, set_aside: bool = True) -> Path | None:
    """Return the newest folder that verifies, or None if none was ever finished.

    Args:
        parent: Folder of the states.
        set_aside: Rename folders that do not verify to ``.corrupt``, and delete what stopped saves left behind once
            there is a state that verifies; only the process that writes may.

    Raises:
        WeightsError: If there are states but not one of them verifies: starting from zero would waste a run silently.
    """
    if not parent.is_dir():
        return None
    if set_aside:
        _restore_replaced(parent)
    damaged = sum(1 for p in parent.iterdir() if ".corrupt" in p.suffix)
    for path in reversed(finished_states(parent)):
        problem = find_damage(path)
        if problem is None:
            if set_aside:
                delete_leftovers(parent)
            return path
        damaged += 1
        log.warning("%s: %s. Set aside as %s.corrupt, using an older state.", path.name, problem, path.name)
        if set_aside:
            _set_aside(path)
    if damaged:
        raise WeightsError(
            f"all {damaged} training states of the run are damaged; not starting from zero silently.",
            where=f"{parent.parent.name}/{parent.name}",
            kept="the damaged states, as step-*.corrupt",
            next_command="another NAME=... to start a new run, or move the folder away",
        )
    for draft in find_leftovers(parent):
        log.warning("%s is incomplete (stopped while being written): ignored.", draft.name)
    return None


def find_leftovers(parent: Path) -> list[Path]:
    """Return what stopped saves left behind: drafts, and states whose replacement is there."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if LEFTOVER_NAME.match(p.name) and p.is_dir()]
    return sorted(p for p in found if p.suffix == ".tmp" or p.with_suffix("").exists())


def delete_leftovers(parent: Path) -> None:
    """Delete the leftovers, each as large as a state, and say so; only the process that writes may."""
    _restore_replaced(parent)
    found = find_leftovers(parent)
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    gone = [path.name for path in found if not path.exists()]
    if gone:
        log.info("deleted what stopped saves left behind, %d of them: %s", len(gone), ", ".join(gone))


def finished_states(parent: Path) -> list[Path]:
    """Return the folders that were finished, oldest first, by step number and never by time."""
    found = [(int(match[1]), p) for p in parent.iterdir() if (match := STATE_NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def find_damage(path: Path) -> str | None:
    """Check every byte of a training state against its manifest; return what is wrong, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        step, known = manifest["step"], manifest["format"] == FORMAT
    except FileNotFoundError:
        return "no manifest.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    match = STATE_NAME.match(path.name)
    if not known or (match and step != int(match[1])) or not {"state.safetensors", "state.json"} <= set(files):
        return "manifest.json is damaged"
    if manifest.get("version") != FORMAT_VERSION:
        return f"written in format version {manifest.get('version')}, this program reads {FORMAT_VERSION}"
    for name, (num_bytes, sha256) in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} of {num_bytes} bytes"
        if file_sha256(file) != sha256:
            return f"{name}: sha256 mismatch"
    return None


def read_state(path: Path) -> TrainingState:
    """Read a training state after checking it.

    Raises:
        WeightsError: If it does not verify.
    """
    problem = find_damage(path)
    if problem is not None:
        raise WeightsError(f"the training state is damaged: {problem}.", where=f"{path.parent.name}/{path.name}")
    try:
        tensors = load_file(path / "state.safetensors")
    except SafetensorError as err:
        raise WeightsError("the training state is no safetensors file.", where=path.name) from err
    record = json.loads((path / "state.json").read_bytes())
    return TrainingState(step=int(record["step"]), record=record, tensors=tensors, path=path)


def load_module_state(module: nn.Module, path: Path) -> int:
    """Load the weights of a training state, strictly, into the module it was saved from; return its step."""
    state = read_state(path)
    module.load_state_dict(unflatten_state(state.record["model"], state.tensors), strict=True)
    return state.step


def rewrite_record(state: TrainingState, changes: Mapping[str, Any]) -> None:
    """Write a finished state again with other values in its record, e.g. after a validation that was made up for."""
    write_state(
        state.path.parent,
        state.path.name,
        step=state.step,
        record={**state.record, **changes},
        tensors=state.tensors,
        rng_per_rank=[state.rng(rank) for rank in range(int(state.record["world_size"]))],
    )


def newest_state_name(parent: Path) -> str | None:
    """Return the name of the newest finished state, for messages."""
    paths = finished_states(parent) if parent.is_dir() else []
    return paths[-1].name if paths else None


def prune_states(parent: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Delete older states; always keeps the newest two or more, and milestones."""
    paths = finished_states(parent)
    for path in paths[: -max(2, keep_last)]:
        step = int(path.name.removeprefix("step-"))
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first: a kill in the middle of deleting must not leave something that looks finished.
        doomed = path.with_name(f"{path.name}.tmp")
        move(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _rng_name(rank: int) -> str:
    return f"rng-{rank:04d}.safetensors"


def _give_name(draft: Path, final: Path) -> None:
    replaced = final.with_name(f"{final.name}.old")
    if final.exists():  # the same step again; it may be the only state there is, so it goes last
        if replaced.exists():
            shutil.rmtree(replaced)
        move(final, replaced)
    move(draft, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _restore_replaced(parent: Path) -> None:
    """Give a state its name back whose replacement was stopped before it had that name."""
    for path in parent.glob("*step-*.old"):
        if LEFTOVER_NAME.match(path.name) and not path.with_suffix("").exists():
            move(path, path.with_suffix(""))


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.corrupt")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt{number}")
    move(path, target)


def _storage_error(err: OSError, *, parent: Path, name: str, tensors: Mapping[str, Tensor]) -> StorageError:
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(parent).free if parent.exists() else 0
    run = parent.parent if parent.name == "checkpoints" else parent  # a nan-step-N lies beside the others' folder
    older = newest_state_name(parent) or newest_state_name(run / "checkpoints")
    return StorageError(
        f"the training state {name} could not be written: {err.strerror or type(err).__name__}. "
        f"It needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.",
        where=run.name,
        kept=f"the verified state {older}" if older else "nothing was saved yet",
        next_command="free space, then the same command",
    )


Json = Any


def flatten_state(value: Any, *, prefix: str, tensors: dict[str, Tensor]) -> Json:
    """Put every tensor of a nested state into ``tensors`` and return the rest as JSON.

    Dictionaries keep non-text keys (optimizers number their parameters), tuples stay tuples (betas), floats keep every
    bit, Inf and NaN included.

    Args:
        value: Dictionaries, lists, tuples, numbers, text, None and tensors, nested.
        prefix: Name of ``value``; names of tensors start with it.
        tensors: Filled.

    Raises:
        TypeError: For any other kind of object, naming where it lies.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach()
        return {"tensor": prefix}
    if value is None or isinstance(value, bool | int | str) or type(value) is float:
        return value
    if isinstance(value, Mapping):
        items = [[key, flatten_state(v, prefix=f"{prefix}.{key}", tensors=tensors)] for key, v in value.items()]
        for key, _ in items:
            if not isinstance(key, int | str):
                raise TypeError(f"{prefix} must have text or integer keys, got {type(key).__name__}.")
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten_state(v, prefix=f"{prefix}.{i}", tensors=tensors) for i, v in enumerate(value)]}
    raise TypeError(
        f"{prefix} must be a tensor, number, text, None or a container of them, got {type(value).__name__}. "
        "Store it as plain values: training states hold no Python objects."
    )


def unflatten_state(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    """Undo ``flatten_state``."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten_state(v, tensors) for key, v in content}
    if kind == "list":
        return [unflatten_state(v, tensors) for v in content]
    if kind == "tuple":
        return tuple(unflatten_state(v, tensors) for v in content)
    raise ValueError(f"unknown kind {kind!r} in a training state.")


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer state into fresh memory, with the memory layout of the parameters.

    ``load_state_dict`` keeps the file's contiguous layout. Next to channels-last parameters the update would then run
    other kernels than in the uninterrupted run, and differ in the last bits.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            elif isinstance(value, Tensor):
                like = parameter if value.shape == parameter.shape else value
                values[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
