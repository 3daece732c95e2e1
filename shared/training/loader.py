"""Data loaders whose workers cannot deadlock, ignore the parent's signals, and draw nothing from global generators."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch
from samgraft.shared.training.signals import ignore_stop_signals
from torch.utils.data import DataLoader, Dataset, Sampler

WORKER_TIMEOUT_S = 120
"""After this long without a batch a worker is taken for hung."""

PRELOADED = ("torch", "samgraft.shared.data.dataset", "samgraft.shared.training.loader")
"""What the fork server imports once, so that workers start in no time."""


def build_step_loader(
    dataset: Dataset[Any],
    *,
    batch_sampler: Sampler[list[Any]],
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Build the loader of a step-addressed sampler.

    Workers start from a fork server: a plain fork of a process with codec threads deadlocks, and spawn imports
    everything once per worker.

    Args:
        dataset: Must be picklable if there are workers.
        batch_sampler: Lists of what ``dataset[...]`` takes.
        collate_fn: A module-level function.
        num_workers: 0 loads in the training process.
        pin_memory: Faster copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=worker_context() if num_workers else None,
        worker_init_fn=_start_worker if num_workers else None,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        # Its own generator: a loader otherwise draws its seed from the global one whenever it is made.
        generator=torch.Generator().manual_seed(0),
    )


def worker_context() -> BaseContext:
    """Return the way to start worker processes on this platform."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start_worker(_: int) -> None:
    ignore_stop_signals()
    torch.set_num_threads(1)
