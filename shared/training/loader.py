"""Data loaders whose workers cannot deadlock, ignore the parent's signals, and draw nothing from global generators."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Semaphore
from typing import Any

import torch
from samgraft.shared.machine import end_with_parent
from samgraft.shared.training.signals import ignore_stop_signals
from torch.utils.data import DataLoader, Dataset, Sampler

WORKER_TIMEOUT_S = 120
"""After this long without a batch a worker is taken for hung; starting does not count."""
WORKER_START_TIMEOUT_S = 900
"""A loaded machine that imports torch from a network drive needs minutes; more is a worker that never starts."""
POLL_S = 1.0
"""How often workers that start are asked whether they live."""

PRELOADED = ("torch", "samgraft.shared.samples.dataset", "samgraft.shared.training.loader")
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
    return StepLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=worker_context() if num_workers else None,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        # Its own generator: a loader otherwise draws its seed from the global one whenever it is made.
        generator=torch.Generator().manual_seed(0),
    )


class StepLoader(DataLoader[Any]):
    """A loader that waits for its workers to be up before the time-out of its batches begins to count."""

    def __iter__(self) -> Any:
        """Start the workers, if there are any, and wait for them.

        Raises:
            RuntimeError: If one dies, or does not start within ``WORKER_START_TIMEOUT_S``.
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
                    # torch's words; it would say them only after the time-out of the first batch.
                    raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"DataLoader timed out: no worker within {WORKER_START_TIMEOUT_S} seconds")
        return iterator


def worker_context() -> BaseContext:
    """Return the way to start worker processes on this platform."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start_worker(started: Semaphore, _: int) -> None:
    end_with_parent()
    ignore_stop_signals()
    torch.set_num_threads(1)
    started.release()
