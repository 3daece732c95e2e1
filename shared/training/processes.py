"""Agreement between the processes of a run; with one process nothing is exchanged."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def in_group() -> bool:
    """Tell whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def any_process(*flags: bool, device: torch.device | None = None) -> tuple[bool, ...]:
    """Return each flag as true if it is true in any process: all must act at the same step."""
    if not in_group():
        return flags
    values = torch.tensor(flags, dtype=torch.int32, device=device or group_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return tuple(bool(v) for v in values.tolist())


def from_first(value: Value) -> Value:
    """Return the first process's value in all of them."""
    if not in_group():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=group_device())
    result: Value = box[0]
    return result


def gather(value: Value) -> list[Value]:
    """Return every process's value, in the order of their ranks."""
    if not in_group():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def group_device() -> torch.device:
    """Return where the group's backend wants its tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
