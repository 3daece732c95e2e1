"""Random state of one process as a tensor, and the bookkeeping of where in the data a run stands."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoaderPosition:
    """What a loader factory needs to go on exactly where a run stopped."""

    start_micro_step: int
    """First micro-step to load; 0 in a fresh run."""
    num_micro_steps: int
    """How many to load."""
    rank: int
    world_size: int


def seed_process(seed: int, *, rank: int = 0) -> None:
    """Seed the global generators; initial weights depend on it, data order and masks do not (they have their own)."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def capture_rng() -> dict[str, Tensor]:
    """Return the state of the global generators of this process as tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    rng = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([float(position), float(has_gauss), float(cached)], dtype=torch.float64),
        "python": _bytes_tensor(json.dumps(random.getstate()).encode()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def restore_rng(rng: dict[str, Tensor]) -> None:
    """Put the global generators back to a captured state."""
    torch.set_rng_state(rng["torch"])
    position, has_gauss, cached = rng["numpy_rest"].tolist()
    keys = rng["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, internal, gauss = json.loads(bytes(rng["python"].numpy().tobytes()))
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Leave the global generators as they were, whatever happens inside: evaluation must not change training."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
