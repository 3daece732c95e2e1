"""State of a training besides its weights, and the check before a resume.

It is the random state, the modes of the modules and the counters of the run.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.invocation import repeat_command
from samgraft.shared.runs.environment import BITWISE_PACKAGES, software_versions, thread_count
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import DeviceChoice
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunCounters:
    """Position and history of a run, saved with every training state."""

    seed: int
    batch_size: int
    """Slices per process and micro-step."""
    accumulate: int
    """Micro-steps per step."""
    samples_seen: int = 0
    """Number of slices seen by all processes in all sessions."""
    pending: list[str] = field(default_factory=list)
    """Names of the periodic tasks of this step that a stop interrupted. They run first after the resume."""
    data_fingerprint: str | None = None
    ended: str | None = None
    """Reason why training ended before its last step, or None."""

    def restore(self, record: Mapping[str, Any]) -> None:
        """Load the counters from the record of a training state."""
        self.samples_seen = int(record["samples_seen"])
        self.pending = list(record["pending"])
        self.ended = record.get("ended")


def seed_process(seed: int, *, rank: int = 0) -> None:
    """Seed the global generators of this process.

    Initial weights and dropout depend on them. Data order and masks have generators of their own.
    """
    # SeedSequence gives independent streams for neighbouring seeds and ranks. torch takes 63 bits of it, NumPy 32.
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def capture_rng() -> dict[str, Tensor]:
    """Return the state of this process's global generators as tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    # Tensors and JSON instead of a pickle, so that a training state can be read without running code from it.
    rng = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([float(position), float(has_gauss), float(cached)], dtype=torch.float64),
        "python": torch.frombuffer(bytearray(json.dumps(random.getstate()).encode()), dtype=torch.uint8),
    }
    # Asking an uninitialised CUDA for its generator would create a context and take hundreds of megabytes.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def restore_rng(rng: dict[str, Tensor]) -> None:
    """Set the global generators to a captured state."""
    torch.set_rng_state(rng["torch"])
    position, has_gauss, cached = rng["numpy_rest"].tolist()
    keys = rng["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, internal, gauss = json.loads(bytes(rng["python"].numpy().tobytes()))
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the global generators on exit, so that an evaluation cannot change the training."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode and restore the mode of each submodule on exit."""
    # Frozen parts of a training module are in evaluation mode already; module.train() would change them.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_resumable(
    record: Mapping[str, Any],
    *,
    config: TrainerConfig,
    device: DeviceChoice,
    counters: RunCounters,
    continue_command: str,
) -> bool:
    """Check this session against the record of a training state.

    A difference that would change the run is refused. One that may change the last bits is reported as a warning.

    Returns:
        True if the number of processes is the same, so that each can restore its generators.

    Raises:
        UsageError: If the number of processes differs and ``allow_resize`` is not set.
        DataError: If the data differ from those of the earlier sessions.
    """
    world_size = device.devices * device.num_nodes
    if counters.data_fingerprint != record["data_fingerprint"]:
        raise DataError(
            "the training data are not those that the run was started with (their fingerprint differs). "
            "Choose another NAME= for a run on other data.",
            kept="the run, unchanged",
        )
    before = int(record["world_size"])
    if world_size != before and not config.allow_resize:
        raise UsageError(
            f"the run was started with another number of processes (got {world_size}, expected {before}). Use the same "
            "number, or set trainer.allow_resize=true, which keeps the order of samples but not the same bits.",
            where="trainer.devices",
            next_command=f"torchrun --no-python --nproc-per-node {before} {repeat_command()}"
            if before > 1
            else continue_command,
        )
    if world_size != before:
        log.warning(
            "processes %d -> %d: not bit-exact from this step on; the order of samples is kept.", before, world_size
        )
    # These change the order or the rounding of floating-point sums, but not what is computed.
    for name, old, new in (
        ("threads", record["num_threads"], thread_count()),
        ("precision", record["precision"], device.precision),
        ("batch size", record["batch_size"], counters.batch_size),
        ("accumulation", record["accumulate"], counters.accumulate),
    ):
        if old != new:
            log.warning("%s %s -> %s: not bit-exact from this step on.", name, old, new)
    versions, stored = software_versions(), record["versions"]
    for name in BITWISE_PACKAGES:
        if stored.get(name) != versions[name]:
            log.warning("%s %s -> %s: may not be bit-exact from this step on.", name, stored.get(name), versions[name])
    return world_size == before
