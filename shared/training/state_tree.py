"""Nested training state as flat tensors plus JSON, and back, exactly and without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

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
