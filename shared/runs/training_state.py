"""Training states on disk.

A state is written atomically. First ``checkpoints/step-000300.tmp/`` is filled and every file flushed, then
``manifest.json`` with sizes and sha256 is written, then the folder is renamed to ``step-000300/`` and its parent is
flushed. Older states are deleted only after that. A reader uses the newest folder whose manifest verifies. Any other
folder is renamed to ``.corrupt`` and never deleted. A state that is written again remains as ``.old`` until the new one
has its name.

The nested state of model and optimizer is stored as flat tensors plus JSON, exactly and without pickle.
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
    """All values that are not tensors, such as counters, versions and nested structure."""
    tensors: dict[str, Tensor]
    path: Path

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Return the random state of one process."""
        return load_file(self.path / _rng_name(rank))


def state_folder_name(step: int) -> str:
    """Return the folder name of a step's state."""
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
    """Write a training state atomically.

    A kill, a full disk or a power cut at any moment leaves the older states intact.

    Args:
        parent: Folder of the states.
        name: Name of the new folder.
        step: Number of finished optimizer steps.
        record: JSON values.
        tensors: Tensors of model and optimizer.
        rng_per_rank: Random state of each process.
        attachments: Further tensor files by stem, e.g. the batch that made the loss NaN.

    Returns:
        The finished folder.

    Raises:
        StorageError: If the disk or quota is full or a permission is missing. Nothing of the new state remains.
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
        # The manifest is written last, so that a folder without one is incomplete.
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}
        write_json(draft / "manifest.json", manifest)
        _give_name(draft, final)
    except OSError as err:
        _restore_replaced(parent)
        shutil.rmtree(draft, ignore_errors=True)
        raise _storage_error(err, parent=parent, name=name, tensors=tensors) from err
    return final


def find_newest_state(parent: Path, *, set_aside: bool = True) -> Path | None:
    """Return the newest folder that verifies, or None if no state was ever finished.

    Args:
        parent: Folder of the states.
        set_aside: True to rename folders that do not verify to ``.corrupt``, and to delete leftovers of interrupted
            saves once a state verifies. Only the writing process may do so.

    Raises:
        WeightsError: If there are states but none of them verifies.
    """
    if not parent.is_dir():
        return None
    if set_aside:
        _restore_replaced(parent)
    # States that an earlier session has renamed count as well, or the second attempt would start from step 0.
    damaged = sum(1 for p in parent.iterdir() if ".corrupt" in p.suffix)
    for path in reversed(finished_states(parent)):
        problem = find_damage(path)
        if problem is None:
            if set_aside:
                delete_leftovers(parent)
            return path
        damaged += 1
        log.warning("%s: %s. Renamed to %s.corrupt, using an older state.", path.name, problem, path.name)
        if set_aside:
            _set_aside(path)
    if damaged:
        # Starting from step 0 without an error would waste the whole run.
        raise WeightsError(
            f"all {damaged} training states of the run are damaged.",
            where=f"{parent.parent.name}/{parent.name}",
            kept="the damaged states, as step-*.corrupt",
            next_command="another NAME=... to start a new run, or move the folder away",
        )
    for draft in find_leftovers(parent):
        log.warning("%s is incomplete (interrupted while it was written) and is ignored.", draft.name)
    return None


def find_leftovers(parent: Path) -> list[Path]:
    """Return leftovers of interrupted saves, which are drafts and already replaced states."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if LEFTOVER_NAME.match(p.name) and p.is_dir()]
    return sorted(p for p in found if p.suffix == ".tmp" or p.with_suffix("").exists())


def delete_leftovers(parent: Path) -> None:
    """Delete leftovers of interrupted saves, each as large as a state.

    Only the writing process may call it.
    """
    _restore_replaced(parent)
    found = find_leftovers(parent)
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    gone = [path.name for path in found if not path.exists()]
    if gone:
        log.info("deleted %d leftovers of interrupted saves: %s", len(gone), ", ".join(gone))


def finished_states(parent: Path) -> list[Path]:
    """Return the folders of finished states in the order of their steps."""
    found = [(int(match[1]), p) for p in parent.iterdir() if (match := STATE_NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def find_damage(path: Path) -> str | None:
    """Check every byte of a training state and return what is wrong, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        step, known = manifest["step"], manifest["format"] == FORMAT
    except FileNotFoundError:
        return "no manifest.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    match = STATE_NAME.match(path.name)
    # The step is part of the manifest, because a copied or renamed folder must not replace another state.
    if not known or (match and step != int(match[1])) or not {"state.safetensors", "state.json"} <= set(files):
        return "manifest.json is damaged"
    if manifest.get("version") != FORMAT_VERSION:
        return f"unknown format version (got {manifest.get('version')}, expected {FORMAT_VERSION})"
    for name, (num_bytes, sha256) in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        # The size is compared first, because a hash reads the whole file.
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
    """Load the weights of a training state strictly and return its step."""
    state = read_state(path)
    module.load_state_dict(unflatten_state(state.record["model"], state.tensors), strict=True)
    return state.step


def rewrite_record(state: TrainingState, changes: Mapping[str, Any]) -> None:
    """Write a finished state again with changed values in its record."""
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
    """Delete older states except the newest ones, at least two, and multiples of ``keep_every``."""
    paths = finished_states(parent)
    for path in paths[: -max(2, keep_last)]:
        step = int(path.name.removeprefix("step-"))
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first, so that a kill during the deletion cannot leave a folder that appears to be finished.
        doomed = path.with_name(f"{path.name}.tmp")
        move(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _rng_name(rank: int) -> str:
    return f"rng-{rank:04d}.safetensors"


def _give_name(draft: Path, final: Path) -> None:
    replaced = final.with_name(f"{final.name}.old")
    # The same step is written again. It may be the only state, so it is deleted last.
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        move(final, replaced)
    move(draft, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _restore_replaced(parent: Path) -> None:
    """Rename a replaced state back if its replacement was interrupted."""
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
    # A nan-step-N is not in checkpoints/ but next to it.
    run = parent.parent if parent.name == "checkpoints" else parent
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
    """Move every tensor of a nested state to ``tensors`` and return the rest as JSON.

    Integer keys of dictionaries are kept (optimizers number their parameters), as are tuples (betas). Floats keep every
    bit, Inf and NaN included.

    Args:
        value: Nested dictionaries, lists, tuples, numbers, strings, None and tensors.
        prefix: Name of ``value``, with which the names of its tensors begin.
        tensors: Dictionary that receives the tensors.

    Raises:
        TypeError: For any other kind of object, with its place.
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
    """Return the nested state that ``flatten_state`` has flattened."""
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
    """Load an optimizer state into new memory with the memory layout of the parameters."""
    # Brings sympy, which takes a second that readers of runs and models do not have to wait.
    from torch.distributed.tensor import DTensor, distribute_tensor

    # load_state_dict keeps the contiguous layout of the file. With channels-last parameters the update would then use
    # other kernels than in the uninterrupted run and differ in the last bits.
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            elif isinstance(value, Tensor):
                # A scalar such as the step count keeps its own layout.
                like = parameter if value.shape == parameter.shape else value
                values[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
