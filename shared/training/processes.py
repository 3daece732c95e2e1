"""Communication between the processes of a run, and fully sharded training.

With one process nothing is exchanged. FSDP2 keeps weights, gradients and optimizer in parts, one per process. A module
that is sharded on its own (a block, the neck, the rest of encoder and objective) is gathered when its forward pass
begins and released when it ends. Training states and results have the same files with and without sharding.

Source:
    Zhao et al., PyTorch FSDP (VLDB 2023), and ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def any_across_processes(*flags: bool, device: torch.device | None = None) -> tuple[bool, ...]:
    """Return each flag as True if it is True in any process."""
    if not is_distributed():
        return flags
    values = torch.tensor(flags, dtype=torch.int32, device=device or communication_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return tuple(bool(v) for v in values.tolist())


def broadcast_first(value: Value) -> Value:
    """Return the first process's value in all processes."""
    if not is_distributed():
        return value
    # Only processes of this run exchange pickles. None is ever read from a file.
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=communication_device())
    result: Value = box[0]
    return result


def gather_from_processes(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks."""
    if not is_distributed():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def communication_device() -> torch.device:
    """Return the device on which the communication backend expects its tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def shard_module(module: nn.Module, mesh: DeviceMesh, *, methods: Iterable[str] = ()) -> None:
    """Shard the parameters of a module that are not sharded yet.

    Args:
        module: Module to shard. Its parts must be sharded before it.
        mesh: Processes that share the parameters.
        methods: Names of further methods that are called from outside and need the complete parameters.
    """
    # Parameters are released after the forward pass and gathered again for the backward pass, to save memory.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in methods:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def mark_fsdp_root(module: nn.Module) -> None:
    """Make a sharded module the root of its parts."""
    # FSDP2 chooses the module whose forward pass runs first, which may be a part here. It has no public call for this.
    state = module._get_fsdp_state()  # type: ignore[operator]
    state._lazy_init()


def is_sharded(module: nn.Module) -> bool:
    """Return True if any parameter is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full_state(value: Any) -> Any:
    """Return a nested state with complete tensors on the CPU.

    It is a collective call that every process must make.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: full_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full_state(item) for item in value)
    return value


def load_full_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load complete tensors strictly into a module whose parameters may be sharded."""
    # Each process cuts its own part from the complete tensor, so that a state fits any number of processes.
    own = module.state_dict()
    parts = {
        name: distribute_tensor(tensor.to(own[name].device), own[name].device_mesh, own[name].placements)
        if name in own and isinstance(own[name], DTensor)
        else tensor
        for name, tensor in state.items()
    }
    module.load_state_dict(parts, strict=True)
