"""Tests of the measurements before a training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from samgraft.shared.training import preflight
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.device import choose_device
from samgraft.shared.training.preflight import StepCost, measure_step
from torch import nn


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> tuple[StepCost, list[int]]:
    """Measure steps that take as many seconds as given for a number of threads."""
    used: list[int] = []

    def time_step(*_: object) -> float:
        used.append(torch.get_num_threads())
        return seconds[used[-1]]

    monkeypatch.setattr(preflight, "_time_micro_step", time_step)
    config = TrainerConfig(max_steps=1, accumulate=2)
    module = nn.Linear(1, 1)
    cost = measure_step(
        module, lambda: module.weight.sum(), config=config, device=choose_device("cpu", precision="fp32"), batch_size=1
    )
    return cost, used


def test_measure_step__one_thread_that_is_faster_is_recommended(monkeypatch):
    cost, used = measured(monkeypatch, {4: 0.5, 1: 0.1})
    assert (cost.seconds, cost.one_thread_s) == (1.0, 0.2)  # Two micro-steps each.
    assert used[-2:] == [1, 1]
    assert torch.get_num_threads() == 4
    advice = cost.thread_advice()
    assert advice is not None
    assert "with 1 thread instead of 4 a step takes 0.20 s instead of 1.00 s" in advice
    assert "OMP_NUM_THREADS=1 in front of the command" in advice


@pytest.mark.parametrize(
    ("seconds", "is_tried"),
    [
        ({4: 0.5, 1: 0.45}, True),
        ({4: 0.5, 1: 2.0}, True),
        # With one thread it might take more than eight seconds.
        ({4: 2.1, 1: 0.1}, False),
    ],
)
def test_measure_step__without_a_gain_nothing_is_recommended(monkeypatch, seconds, is_tried):
    cost, used = measured(monkeypatch, seconds)
    assert cost.thread_advice() is None
    assert (1 in used) == is_tried
    assert torch.get_num_threads() == 4


def test_measure_step__one_thread_alone_is_not_measured_again(monkeypatch):
    torch.set_num_threads(1)
    cost, used = measured(monkeypatch, {1: 0.1})
    assert cost.thread_advice() is None
    assert len(used) == 1 + preflight.MAX_MEASURED_STEPS
