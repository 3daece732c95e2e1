"""The order of samples is a function of seed, step, rank and world size only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samgraft.shared.samples.sampler import BatchPart, StepBatchSampler, epoch_order, sample_generator


def batches(**options):
    return list(StepBatchSampler(23, **{"batch_size": 3, "seed": 5, "num_micro_steps": 20, **options}))


def test_sampler__resumed_equals_uninterrupted_across_epochs():
    whole = batches()
    for start in (0, 1, 6, 7, 8, 19):
        assert batches(start_micro_step=start, num_micro_steps=20 - start) == whole[start:]


def test_sampler__epoch_has_no_repeats_and_the_next_one_another_order():
    whole = batches(num_micro_steps=14)  # 7 batches of 3 per epoch, 2 dropped
    first, second = ([i for b in whole[s : s + 7] for i, _ in b] for s in (0, 7))
    assert len(set(first)) == 21
    assert len(set(second)) == 21
    assert first != second


def test_sampler__counters_are_the_global_position():
    counters = [c for b in batches(num_micro_steps=9) for _, c in b]
    assert counters == list(range(27))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(20, 60), st.integers(0, 30))
def test_sampler__ranks_divide_one_sequence(world, batch, num, start):
    options = {"batch_size": batch, "seed": 1, "start_micro_step": start, "num_micro_steps": 6}
    ranks = [list(StepBatchSampler(num, rank=r, world_size=world, **options)) for r in range(world)]
    one = list(StepBatchSampler(num, **{**options, "batch_size": batch * world}))
    for step in range(6):
        merged = sorted((item for rank in ranks for item in rank[step]), key=lambda item: item[1])
        assert merged == one[step]


def test_sampler__another_seed_gives_another_order():
    assert batches() == batches()
    assert batches() != batches(seed=6)
    assert sorted(epoch_order(50, seed=0, epoch=3)) == list(range(50))


def test_sampler__parts_of_one_size_have_their_own_order():
    parts = [BatchPart(num_samples=12, per_batch=1), BatchPart(num_samples=12, per_batch=1)]
    found = list(StepBatchSampler(24, batch_size=2, seed=5, num_micro_steps=12, parts=parts))
    first, second = ([batch[place][0] for batch in found] for place in (0, 1))
    assert sorted(first) == list(range(12))
    assert sorted(second) == list(range(12, 24))
    assert first != [index - 12 for index in second]


def test_epoch_order__has_its_own_stream_and_the_first_part_that_of_a_run_without_parts():
    """The streams 1, 2 and 3 are those of samples, splits and few-shot draws."""
    expected = np.random.default_rng([5, 0, 2]).permutation(9)
    assert epoch_order(9, seed=5, epoch=2).tolist() == expected.tolist()
    second = np.random.default_rng([5, 0, 2, 1]).permutation(9)
    assert epoch_order(9, seed=5, epoch=2, part=1).tolist() == second.tolist()


def test_sample_generator__depends_on_seed_and_counter_only():
    draws = {float(sample_generator(0, c).random()) for c in range(100)}
    assert len(draws) == 100
    assert sample_generator(3, 9).random() == sample_generator(3, 9).random()
    assert sample_generator(3, 9).random() != np.random.default_rng([3, 0, 9]).random()


def test_sampler__impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="must not exceed the 23 slices"):
        batches(batch_size=12, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        batches(rank=1)
