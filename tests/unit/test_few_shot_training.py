"""Few-shot draws reach the split, and early stopping waits for the warm-up."""

import pytest
from samgraft.finetune.few_shot import FewShotConfig, Unit, draw_few_shot, may_end
from samgraft.shared.errors import DataError
from samgraft.shared.samples.slices import keep_train_slices, select_slices
from samgraft.shared.samples.split import make_split
from samgraft.shared.store.store import SliceStore
from store_factory import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=6))


def test_draw_few_shot__patients_are_drawn_anew_per_repeat(store):
    split = make_split(store)
    assert draw_few_shot(split, store, FewShotConfig()) is split
    draws = [draw_few_shot(split, store, FewShotConfig(num=2, repeat=r)) for r in range(4)]
    assert all(len(d.train) == 2 and set(d.train) <= set(split.train) for d in draws)
    assert all(d.test == split.test and d.val == split.val for d in draws)
    assert len({d.train for d in draws}) > 1
    with pytest.raises(DataError, match="training patients, got 99"):
        draw_few_shot(split, store, FewShotConfig(num=99))


@pytest.mark.parametrize("unit", list(Unit))
def test_draw_few_shot__larger_draw_of_a_repeat_contains_the_smaller_one(store, unit):
    split = make_split(store)
    for repeat in range(6):
        draws = [draw_few_shot(split, store, FewShotConfig(num=num, unit=unit, repeat=repeat)) for num in (1, 2, 3)]
        kept = [set(d.train_slices or d.train) for d in draws]
        assert kept[0] < kept[1] < kept[2]


def test_draw_few_shot__only_the_drawn_slices_are_trained_on(store):
    drawn = draw_few_shot(make_split(store), store, FewShotConfig(num=3, unit=Unit.SLICES))
    kept = keep_train_slices(select_slices(store, drawn.train), drawn)
    assert len(kept) == 3


@pytest.mark.parametrize("values", [{"num": 0}, {"repeat": -1}])
def test_few_shot_config__impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=rf"{next(iter(values))}\n  Input should be greater than or equal to"):
        FewShotConfig(**values)


def end(rounds, **settings):
    return may_end(rounds, **{"patience_rounds": 2, "min_steps": 0, "warmup_steps": 0} | settings)


def test_may_end__after_patience_rounds_without_gain():
    assert not end({10: 0.1, 20: 0.2})
    assert not end({10: 0.1, 20: 0.3, 30: 0.2})
    assert end({10: 0.1, 20: 0.3, 30: 0.2, 40: 0.3})
    assert not end({10: 0.1, 20: 0.3, 30: 0.2, 40: 0.31})
    assert not end({10: 0.1, 20: 0.3, 30: 0.2, 40: 0.3}, patience_rounds=None)
    assert not end({})


def test_may_end__never_inside_warm_up_or_below_the_floor():
    """Early stopping inside the warm-up would end such a run (5 slices, 67 epochs of warm-up, patience 22)."""
    flat = {step: 0.0 for step in range(10, 210, 10)}
    assert end(flat)
    assert not end(flat, warmup_steps=200)
    assert not end(flat, warmup_steps=180)
    assert end(flat, warmup_steps=170)
    assert not end(flat, min_steps=201)
    assert end(flat, min_steps=200)
