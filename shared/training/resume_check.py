"""May this run go on from that training state, and with the same bits?"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.training.bookkeeping import Bookkeeping
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.environment import BITWISE_PACKAGES, software_versions, thread_count
from samgraft.shared.training.trainer_config import TrainerConfig

log = logging.getLogger(__name__)


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
