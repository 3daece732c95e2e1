"""Order of the samples of a run.

It is a function of seed, step, rank and world size only, so that a resumed run sees the same slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

MAX_SEED = 2**32 - 1
"""Largest seed that the generators of NumPy and torch accept, also as a part of other seeds."""


def check_seed(seed: int) -> None:
    """Check that every generator accepts the seed.

    Raises:
        ValueError: If it is negative or too large.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in 0..{MAX_SEED}, got {seed}.")


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Sampler of batches of ``(index, sample_counter)``, starting at any micro-step.

    All samples of a run form one endless sequence, which joins a permutation of all indices per epoch, drawn from
    (seed, epoch). Micro-step ``m`` takes ``batch_size * world_size`` samples, and rank ``r`` gets every
    ``world_size``-th of them. All ranks drop the end of an epoch that does not fill a global batch. ``sample_counter``
    is the position in the sequence. It seeds augmentation and masks, so nothing random depends on the number of
    workers or on where a run was interrupted.

    Args:
        num_samples: Length of the dataset.
        batch_size: Samples per rank and micro-step.
        seed: Seed of the run.
        start_micro_step: First micro-step to yield, 0 or the one at which a run was interrupted.
        num_micro_steps: Number of micro-steps to yield.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If one global batch needs more samples than there are.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        start_micro_step: int = 0,
        num_micro_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size and world_size must be positive and 0 <= rank < world_size, got batch_size {batch_size}, "
                f"rank {rank}, world_size {world_size}."
            )
        self.batches_per_epoch = num_samples // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size {batch_size} times {world_size} processes must not exceed the {num_samples} slices. "
                "Use a smaller batch_size."
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start_micro_step = start_micro_step
        self.num_micro_steps = num_micro_steps
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_micro_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        global_batch = self.batch_size * self.world_size
        epoch_of_order, order = -1, np.empty(0, dtype=np.int64)
        for micro_step in range(self.start_micro_step, self.start_micro_step + self.num_micro_steps):
            # Everything follows from the number of the micro-step, so starting in the middle needs no replay.
            epoch, batch = divmod(micro_step, self.batches_per_epoch)
            if epoch != epoch_of_order:
                epoch_of_order, order = epoch, epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
            # The permutation is indexed within the epoch. The counter is not: it must be new in every epoch, or each
            # epoch would repeat the augmentation of the one before.
            places = batch * global_batch + self.rank + self.world_size * np.arange(self.batch_size)
            counters = micro_step * global_batch + self.rank + self.world_size * np.arange(self.batch_size)
            yield [(int(order[place]), int(counter)) for place, counter in zip(places, counters, strict=True)]


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the samples in one epoch."""
    # The middle number keeps this stream apart from those of samples (1), splits (2) and few-shot draws (3).
    return np.random.default_rng([seed, 0, epoch]).permutation(num_samples)


def sample_generator(seed: int, sample_counter: int) -> np.random.Generator:
    """Return the random generator of one sample, equal in any worker, on any rank and after any resume."""
    return np.random.default_rng([seed, 1, sample_counter])
