"""Order of the samples of a run.

It is a function of seed, step, rank and world size only, so that a resumed run sees the same slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """Consecutive indices of a dataset that fill a fixed number of places in every batch."""

    num_samples: int
    """Number of indices. The indices of the next part follow them."""
    per_batch: int
    """Number of places in the batch of each process."""


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Sampler of batches of ``(index, sample_counter)``, starting at any micro-step.

    All samples of a run form one endless sequence, which joins a permutation of all indices per epoch, drawn from
    (seed, epoch). Micro-step ``m`` takes ``batch_size * world_size`` samples, and rank ``r`` gets every
    ``world_size``-th of them. All ranks drop the end of an epoch that does not fill a global batch. ``sample_counter``
    is the position in the sequence. It seeds augmentation and masks, so nothing random depends on the number of
    workers or on where a run was interrupted.

    With ``parts`` every part has its own permutations and epochs, and the places of a batch are those of the first
    part, then those of the second, and so on.

    Args:
        num_samples: Length of the dataset.
        batch_size: Samples per rank and micro-step.
        seed: Seed of the run.
        start_micro_step: First micro-step to yield, 0 or the one at which a run was interrupted.
        num_micro_steps: Number of micro-steps to yield.
        rank: Rank of this process.
        world_size: Number of processes.
        parts: Parts of the dataset with a fixed number of places in every batch. Empty draws from the whole dataset.

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
        parts: Sequence[BatchPart] = (),
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size and world_size must be positive and 0 <= rank < world_size, got batch_size {batch_size}, "
                f"rank {rank}, world_size {world_size}."
            )
        self.parts = tuple(parts) or (BatchPart(num_samples=num_samples, per_batch=batch_size),)
        for part in self.parts:
            if part.num_samples < part.per_batch * world_size:
                raise ValueError(
                    f"batch_size {part.per_batch} times {world_size} processes must not exceed the "
                    f"{part.num_samples} slices. Use a smaller batch_size."
                )
        # A part that was forgotten would never be sampled.
        if sum(p.per_batch for p in self.parts) != batch_size or sum(p.num_samples for p in self.parts) != num_samples:
            raise ValueError(f"parts must fill the batch of {batch_size} and have all {num_samples} samples.")
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
        orders: dict[int, tuple[int, np.ndarray]] = {}
        for micro_step in range(self.start_micro_step, self.start_micro_step + self.num_micro_steps):
            indexes: list[int] = []
            first = 0
            for number, part in enumerate(self.parts):
                # Everything follows from the number of the micro-step, so starting in the middle needs no replay.
                global_part = part.per_batch * self.world_size
                epoch, batch = divmod(micro_step, part.num_samples // global_part)
                if number not in orders or orders[number][0] != epoch:
                    orders[number] = epoch, epoch_order(part.num_samples, seed=self.seed, epoch=epoch, part=number)
                # The permutation is indexed within the epoch.
                places = batch * global_part + self.rank + self.world_size * np.arange(part.per_batch)
                indexes += [first + int(index) for index in orders[number][1][places]]
                first += part.num_samples
            # The counter must be new in every epoch, or each epoch would repeat the augmentation of the one before.
            counters = micro_step * global_batch + self.rank + self.world_size * np.arange(self.batch_size)
            yield [(index, int(counter)) for index, counter in zip(indexes, counters, strict=True)]


def epoch_order(num_samples: int, *, seed: int, epoch: int, part: int = 0) -> np.ndarray:
    """Return the permutation of the samples of one part of the dataset in one epoch."""
    # The middle number keeps this stream apart from those of samples (1), splits (2) and few-shot draws (3).
    return np.random.default_rng([seed, 0, epoch, *([part] if part else [])]).permutation(num_samples)


def sample_generator(seed: int, sample_counter: int) -> np.random.Generator:
    """Return the random generator of one sample, equal in any worker, on any rank and after any resume."""
    return np.random.default_rng([seed, 1, sample_counter])
