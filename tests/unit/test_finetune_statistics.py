"""Overlap, averages and bootstrap intervals against numbers worked out by hand."""

import numpy as np
import pytest
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation import statistics
from samgraft.finetune.evaluation.metrics import class_scores, mean_or_none
from samgraft.finetune.evaluation.statistics import MIN_PATIENTS, bootstrap_mean
from samgraft.finetune.evaluation.validation import CaseResult, mean_dice

CLASSES = ClassTable(ids=(2, 5), names=("a", "b"))


def case(patient, predicted, true):
    predicted, true = np.array(predicted), np.array(true)
    scores = tuple(class_scores(predicted, true, CLASSES))
    return CaseResult(series_id=f"s{patient}{predicted.sum()}", patient_id=patient, scores=scores, predicted=predicted)


def test_class_scores__dice_and_empty_cases_worked_out_by_hand():
    predicted = np.array([2, 2, 0, 0, 5, 0])
    true = np.array([2, 0, 2, 2, 0, 0])
    a, b = class_scores(predicted, true, CLASSES)
    assert a.dice == pytest.approx(2 * 1 / (2 + 3))
    assert b.dice == 0.0  # predicted only
    nothing = class_scores(np.zeros(3), np.zeros(3), CLASSES)
    assert [score.dice for score in nothing] == [None, None]
    missed = class_scores(np.zeros(2), np.array([5, 5]), CLASSES)
    assert missed[1].dice == 0.0


def test_class_scores__other_shape_is_refused():
    with pytest.raises(ValueError, match="shape of true"):
        class_scores(np.zeros(3), np.zeros(4), CLASSES)


def test_mean_dice__scans_are_averaged_within_patients():
    """Patient p has scans of Dice 1 and 0, q one of Dice 1: 0.75, where the mean over scans would be 2/3."""
    results = [case("p", [2], [2]), case("p", [0], [2]), case("q", [2], [2])]
    assert mean_dice(results) == pytest.approx(0.75)
    assert mean_dice([case("p", [0], [0])]) is None
    assert mean_or_none([None, 0.5, None, 1.0]) == 0.75


def test_bootstrap_mean__few_patients_give_no_interval():
    interval = bootstrap_mean([0.2, 0.4])
    assert (interval.mean, interval.low, interval.high) == (pytest.approx(0.3), None, None)
    assert "too few" in interval.render()
    assert bootstrap_mean([]) is None


def test_bootstrap_mean__normal_values_have_the_known_width():
    """The half width for normal values is close to 1.96 s / sqrt(n)."""
    values = np.random.default_rng(0).normal(0.8, 0.1, size=40)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 40**0.5
    assert interval.low == pytest.approx(values.mean() - half, abs=0.004)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.004)
    assert interval == bootstrap_mean(values)
    assert len(values) > MIN_PATIENTS


def test_bootstrap_mean__global_generators_are_unchanged():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bootstrap_mean([0.1] * 10)
    assert np.array_equal(before, np.random.get_state()[1])


def test_bootstrap_means__equal_those_of_single_columns_and_are_drawn_once(monkeypatch):
    rng = np.random.default_rng(0)
    columns = [list(rng.normal(size=number)) for number in (50, 7, 50, 2, 0, 50, 7)]
    single = [bootstrap_mean(column) for column in columns]
    drawn = []
    original = statistics._resamples
    monkeypatch.setattr(statistics, "_resamples", lambda n, *a, **k: drawn.append(n) or original(n, *a, **k))
    assert statistics.bootstrap_means(columns) == single
    assert drawn == [50, 7]
    assert single[0] != single[2]
    assert (single[3].low, single[4]) == (None, None)


def test_bootstrap_mean__blocks_of_resamples_do_not_change_the_interval(monkeypatch):
    """Resamples are drawn in blocks, because 10,000 patients at once would need 800 MB."""
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_mean(values)
    indices = np.random.default_rng([0, 3]).integers(0, 50, size=(statistics.NUM_RESAMPLES, 50))
    low, high = np.percentile(values[indices].mean(axis=1), [2.5, 97.5])
    monkeypatch.setattr(statistics, "MAX_DRAWN", 1234)
    assert bootstrap_mean(values) == whole
    assert (whole.low, whole.high) == (pytest.approx(low), pytest.approx(high))


def test_bootstrap_mean__seed_and_confidence_change_the_interval():
    values = np.random.default_rng(0).normal(size=40)
    usual, other, narrow = (
        bootstrap_mean(values),
        bootstrap_mean(values, seed=1),
        bootstrap_mean(values, confidence=0.5),
    )
    assert (usual.low, usual.high) != (other.low, other.high)
    assert usual.mean == other.mean
    assert usual.low < narrow.low < narrow.high < usual.high
