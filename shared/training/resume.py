"""Random state of one process as a tensor, and the bookkeeping of where in the data a run stands.

May this run go on from that training state, and with the same bits?

Where a run stands, in plain numbers; saved with every training state.
"""

from __future__ import annotations

import json
import logging
import random
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.runs.environment import BITWISE_PACKAGES, software_versions, thread_count
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import DeviceChoice
from torch import Tensor

log = logging.getLogger(__name__)


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


def check_resumable(
    record: Mapping[str, Any],
    *,
    config: TrainerConfig,
    device: DeviceChoice,
    books: Bookkeeping,
    continue_command: str,
) -> bool:
    """Refuse what would silently change the run; warn about what changes the last bits.

    Returns:
        Whether the processes are as before, so that generators can be restored.

    Raises:
        UsageError: For another number of processes without ``allow_resize``.
        DataError: If the data are not those the run began with.
    """
    world_size = device.devices * device.num_nodes
    if books.data_fingerprint != record["data_fingerprint"]:
        raise DataError(
            "the training data must be those the run began with, but their fingerprint differs. "
            "Choose another NAME= for a run on other data.",
            kept="the run, untouched",
        )
    before = int(record["world_size"])
    if world_size != before and not config.allow_resize:
        raise UsageError(
            f"the run was started with {before} process{'es' * (before > 1)} and must go on with as many, got "
            f"{world_size}. trainer.allow_resize=true goes on anyway: same order of samples, not the same bits.",
            where="trainer.devices",
            next_command=f"torchrun --no-python --nproc-per-node {before} {shlex.join(['samgraft', *sys.argv[1:]])}"
            if before > 1
            else continue_command,
        )
    if world_size != before:
        log.warning("%d -> %d processes: not bit-exact from here; the order of samples is kept.", before, world_size)
    for name, old, new in (
        ("threads", record["num_threads"], thread_count()),
        ("precision", record["precision"], device.precision),
        ("batch size", record["batch_size"], books.batch_size),
        ("accumulation", record["accumulate"], books.accumulate),
    ):
        if old != new:
            log.warning("%s %s -> %s: not bit-exact from here.", name, old, new)
    versions, stored = software_versions(), record["versions"]
    for name in BITWISE_PACKAGES:
        if stored.get(name) != versions[name]:
            log.warning("%s %s -> %s: may not be bit-exact from here.", name, stored.get(name), versions[name])
    return world_size == before


@dataclass(kw_only=True)
class Bookkeeping:
    """Position and history of a run."""

    seed: int
    batch_size: int
    accumulate: int
    samples_seen: int = 0
    best: dict[str, float] | None = None
    """``{"step": ..., "value": ...}`` of the monitored value."""
    pending: list[str] = field(default_factory=list)
    """Periodic tasks of this step that a stop dropped; they run first after the resume."""
    data_fingerprint: str | None = None
    ended: str | None = None
    """Why training ended before its last step; None while it goes on."""

    def take_up(self, record: Mapping[str, Any]) -> None:
        """Go on from a training state's record."""
        self.samples_seen = int(record["samples_seen"])
        self.best = record["best"]
        self.pending = list(record["pending"])
        self.ended = record.get("ended")
