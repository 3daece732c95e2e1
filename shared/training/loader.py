"""Data loader with worker processes from a fork server."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from samgraft.shared.machine import exit_with_parent
from samgraft.shared.training.signals import ignore_stop_signals
from torch.utils.data import DataLoader, Dataset, Sampler

WORKER_TIMEOUT_S = 120
"""Seconds without a batch after which a worker counts as hung. The start does not count."""
WORKER_START_TIMEOUT_S = 900
"""Seconds after which a worker counts as never started. A loaded machine may need minutes to import torch."""
POLL_S = 1.0
"""Interval in seconds at which starting workers are checked."""

PRELOADED = ("torch", "samgraft.shared.samples.dataset", "samgraft.shared.training.loader")
"""Modules that the fork server imports once for all workers."""


def build_step_loader(
    dataset: Dataset[Any],
    *,
    batch_sampler: Sampler[list[Any]],
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
) -> DataLoader[Any]:
    """Build the loader of a step-addressed sampler.

    Args:
        dataset: Samples. It must be picklable if there are workers.
        batch_sampler: Lists of indices that ``dataset`` accepts.
        collate_fn: A module-level function.
        num_workers: Number of worker processes. With 0 the training process loads the data.
    """
    return StepLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        multiprocessing_context=worker_context() if num_workers else None,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        # Without its own generator a loader draws its seed from the global one whenever it is created.
        generator=torch.Generator().manual_seed(0),
    )


class StepLoader(DataLoader[Any]):
    """Loader whose batch time-out begins after all workers have started."""

    def __iter__(self) -> Any:
        """Start the workers and wait for them.

        Raises:
            RuntimeError: If a worker dies, or does not start within ``WORKER_START_TIMEOUT_S``.
        """
        if not self.num_workers:
            return super().__iter__()
        started = worker_context().Semaphore(0)
        self.worker_init_fn = partial(_start_worker, started)
        others = set(multiprocessing.active_children())
        iterator = super().__iter__()
        workers = set(multiprocessing.active_children()) - others
        deadline = time.monotonic() + WORKER_START_TIMEOUT_S
        for _ in range(self.num_workers):
            while not started.acquire(timeout=POLL_S):
                if dead := [str(worker.pid) for worker in workers if not worker.is_alive()]:
                    # torch raises an error with these words too, but only after the time-out of the first batch.
                    raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"DataLoader timed out: no worker within {WORKER_START_TIMEOUT_S} seconds")
        return iterator


def worker_context() -> BaseContext:
    """Return the start method of worker processes on this platform."""
    # A plain fork of a process with codec threads can deadlock, and spawn imports everything once per worker.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start_worker(started: Semaphore, _: int) -> None:
    exit_with_parent()
    ignore_stop_signals()
    torch.set_num_threads(1)
    started.release()
