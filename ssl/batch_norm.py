"""Batch norm's running statistics where several processes train: every process goes on with the mean of all.

Only ``vit_t`` from random weights has batch norms that move (:func:`samgraft.ssl.start.load_start`). Each batch is
normalised by its own process's statistics, as without this module: torch's SyncBatchNorm needs a GPU. Averaged after
every step the running ones are the same everywhere, under DDP (which would take the first process's) and under FSDP
(which would leave each process its own), so that looks, states and results do not depend on who computes them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from samgraft.shared.training.processes import in_group
from torch import nn


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics of the batch norms in training mode over all processes, in place."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    own = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if not own or not in_group():
        return
    every = torch.cat(own)
    dist.all_reduce(every)
    every /= dist.get_world_size()
    for buffer, mean in zip(own, every.split([len(buffer) for buffer in own]), strict=True):
        buffer.copy_(mean)
