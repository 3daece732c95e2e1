"""Validation rounds, of which the earliest best one is kept, also after a resume."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samgraft.finetune.evaluation.evaluate import dice_per_class
from samgraft.finetune.evaluation.metrics import ClassScore
from samgraft.finetune.evaluation.validation import CaseResult
from samgraft.finetune.training.rounds import ValidationRounds


def case(patient, *shares, series="a"):
    """Return the result of a scan with one class per share, whose Dice is the share."""
    scores = tuple(
        ClassScore(
            label_id=number,
            class_name=f"class {number}",
            true_voxels=100,
            predicted_voxels=100,
            intersection_voxels=round(100 * share),
        )
        for number, share in enumerate(shares, start=1)
    )
    return CaseResult(
        series_id=f"{patient}-{series}", patient_id=patient, scores=scores, predicted=np.zeros((1, 2, 2), np.int32)
    )


def add(rounds, **dice):
    """Add rounds of one scan, whose tensors contain their step."""
    for name, value in dice.items():
        step = int(name.removeprefix("step_"))
        rounds.add(step, [case("p", value)], lambda step=step: {"w": torch.tensor([step])})


def kept(rounds):
    return int(load_file(rounds.best_file())["w"])


def test_rounds__earliest_of_the_best_is_kept(tmp_path):
    rounds = ValidationRounds(tmp_path)
    add(rounds, step_10=0.5, step_20=0.8, step_30=0.8, step_40=0.6)
    assert rounds.record.best_step == 20
    assert kept(rounds) == 20
    rounds.delete_others()
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-000020.safetensors"]


def test_rounds__resumed_run_forgets_what_came_after_its_state(tmp_path):
    add(ValidationRounds(tmp_path), step_10=0.5, step_20=0.4, step_30=0.9)
    resumed = ValidationRounds(tmp_path)
    resumed.remove_after(20)
    assert resumed.record.rounds == {10: 0.5, 20: 0.4}
    assert kept(resumed) == 10
    add(resumed, step_30=0.45)
    assert kept(resumed) == 10


def test_rounds__reference_and_summary_are_those_of_the_run(tmp_path):
    rounds = ValidationRounds(tmp_path)
    assert rounds.set_reference("zero_shot", [case("p", 0.1)]) == 0.1
    rounds.set_reference("start", [case("p", 0.2)])
    add(rounds, step_10=0.5, step_20=0.4)
    expected = {"zero_shot": 0.1, "start": 0.2, "best": 0.5, "best_step": 10}
    assert ValidationRounds(tmp_path).record.summary() == expected


def test_rounds__run_without_a_round_has_a_bad_ending(tmp_path):
    assert not ValidationRounds(tmp_path).record.ending.is_good


def test_rounds__patients_count_once(tmp_path):
    """The second patient has three scans. Classes are averaged within a scan, scans within a patient."""
    results = [case("a", 0.2, 0.6), *(case("b", 0.9, 0.7, series=str(number)) for number in range(3))]
    assert ValidationRounds(tmp_path).add(1, results, dict) == pytest.approx((0.4 + 0.8) / 2)
    assert dice_per_class(results) == pytest.approx({"class 1": (0.2 + 0.9) / 2, "class 2": (0.6 + 0.7) / 2})
