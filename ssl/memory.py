"""Memory that a run will need, from one measured step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from samgraft.shared.job_limits import granted_memory
from torch import Tensor, nn

GIB = 2**30


class SavedBytes:
    """Counts what the forward pass keeps for the backward pass; weights, which are there anyway, are left out."""

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count inside the block; storages that several tensors share are counted once."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def training_bytes(module: nn.Module, saved_bytes: int) -> int:
    """Return weights and buffers, gradients and AdamW's two moments of what trains, and activations."""
    held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return held + 3 * trained + saved_bytes


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on the device; None where nobody says."""
    if device.type == "cuda":
        # What torch's allocator keeps for later is free for the run.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    granted = granted_memory()
    left = [int(words[1]) * 1024 for words in found] + ([granted[1]] if granted else [])
    return min(left, default=None)


def describe_memory(needed: int, free: int | None, *, batch_size: int) -> tuple[str, bool]:
    """Return the line of the pre-flight, and whether it fits as far as one can tell.

    Temporary buffers of single operations come on top: a tenth of headroom is asked for.
    """
    line = f"about {needed / GIB:.1f} GiB for weights, gradients, AdamW and the activations of {batch_size} slices"
    if free is None:
        return line, True
    return f"{line}; {free / GIB:.1f} GiB free", 1.1 * needed < free
