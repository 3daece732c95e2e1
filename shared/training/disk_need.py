"""Disk that a run will need, predicted before it starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable

from samgraft.shared.errors import StorageError
from samgraft.shared.training.environment import process_rank
from samgraft.shared.training.run_folder import RunFolder
from samgraft.shared.training.trainer_config import TrainerConfig
from torch import Tensor, nn

log = logging.getLogger(__name__)

LOGS_BYTES = 2**26
"""Allowance for metrics, events, pictures and the report."""


def state_bytes(module: nn.Module) -> int:
    """Return the size of one training state: weights, buffers, and AdamW's two moments of what trains."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trainable = size(p for p in module.parameters() if p.requires_grad)
    return size(module.parameters()) + size(module.buffers()) + 2 * trainable


def check_disk(module: nn.Module, config: TrainerConfig, run: RunFolder) -> int:
    """Say how much disk the run will need and refuse to start if it is not there.

    Returns:
        Bytes needed.

    Raises:
        StorageError: If less is free.
    """
    one = state_bytes(module)
    milestones = config.max_steps // config.keep_every_steps if config.keep_every_steps else 0
    # The newest ones, the best, the one being written, and the weights that are handed on.
    need = one * (config.keep_last + 3 + milestones) + LOGS_BYTES
    place = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if process_rank() == 0:
        log.info("disk: up to %.2f GB for training states, %.1f GB free", need / 1e9, free / 1e9)
    if need > free:
        raise StorageError(
            f"the run needs {need / 1e9:.2f} GB for its training states ({one / 1e9:.2f} GB each), but only "
            f"{free / 1e9:.2f} GB are free.",
            where=run.path.name,
            kept="nothing was written yet",
            next_command="free space" + (", or unset trainer.keep_every_steps" if milestones else ""),
        )
    return need
