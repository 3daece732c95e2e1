"""Health measures of a stage-1 run, and the rules that warn."""

from types import SimpleNamespace

import pytest
import torch
from samgraft.ssl.monitor.health import feature_health, health_warnings, probe_noise
from samgraft.ssl.monitor.held_out import (
    HeldOut,
    held_out_loss,
    held_out_panel,
    panel_picture,
    split_picture,
    spread_evenly,
)
from samgraft.ssl.objectives import ObjectiveLoss, Panel

HEALTHY = {
    "held_out/loss": [1.0, 0.6, 0.5],
    "held_out/effective_rank": [8.0, 7.0, 6.0],
    "held_out/feature_std": [0.2, 0.2, 0.15],
    "probe/dice": [0.5, 0.55, 0.49],
    "drift/box_dice": [0.8, 0.7, 0.6],
    "train/grad_norm": [5.0] * 20 + [1.0] * 40,
}
MOVING = {"held_out/loss": [1.0, 0.5, 3.0], "held_out/teacher_entropy": [0.9, 0.6, 0.5]}


def test_feature_health__two_equal_directions_have_rank_two():
    # Four points at +-e1 and +-e2 have two directions of equal weight.
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    health = feature_health(features)
    assert health["effective_rank"] == pytest.approx(2.0)
    assert health["feature_std"] == pytest.approx(0.5**0.5)


def test_feature_health__rank_ignores_the_mean_and_follows_the_singular_values():
    """Singular values in the ratio 2 to 1 have the shares 2/3 and 1/3, whose entropy is 0.6365."""
    features = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    for offset in (0.0, 30.0):
        assert feature_health(features + offset)["effective_rank"] == pytest.approx(1.8899, abs=1e-3)


def test_health_warnings__small_gradients_of_the_first_steps_do_not_count():
    assert health_warnings({**HEALTHY, "train/grad_norm": [0.1] * 20 + [1.0] * 20 + [5.0] * 20}, is_final=True) == []


def test_feature_health__one_direction_has_rank_one():
    line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert feature_health(line)["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_feature_health__equal_features_are_a_collapse():
    same = torch.ones(4, 3) + 1e-7 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    assert feature_health(same) == {"effective_rank": 1.0, "feature_std": 0.0}


def test_health_warnings__healthy_run_has_none():
    assert health_warnings(HEALTHY, is_final=True) == []


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"held_out/effective_rank": [8.0, 2.0]}, "the features of different slices spread over 2.0 directions"),
        ({"held_out/feature_std": [0.2, 0.01]}, "different slices differ by 0.01 (0.2 before training)"),
        ({"held_out/loss": [1.0, 0.99]}, "loss on held-out slices fell by less than 2% (0.99, 1 before training)"),
        ({"held_out/loss": [1.0, 1.1]}, "loss on held-out slices did not fall (1.1, 1 before training)"),
        ({"held_out/loss": [1.0, 0.5, 0.7]}, "rose from its best, 0.5, to 0.7"),
        ({"probe/dice": [0.5, 0.47]}, "probe fell to a Dice of 0.470 (0.500 before training)"),
        ({"drift/box_dice": [0.8, 0.39]}, "a Dice of 0.390 on the new encoder (0.800 before training)"),
        ({"train/grad_norm": [1.0] * 40 + [30.0] * 20}, "gradient norm rose from 1 to 30"),
        ({"train/grad_norm": [1.0] * 40 + [0.0] * 20}, "No gradient"),
        ({**MOVING, "held_out/teacher_entropy": [0.9, 0.005]}, "gives every slice the same prototype"),
        ({**MOVING, "held_out/teacher_entropy": [0.9, 0.995]}, "all prototypes are equally likely"),
    ],
)
def test_health_warnings__each_condition_gives_its_warning_alone(changed, word):
    found = health_warnings({**HEALTHY, **changed}, is_final=True)
    assert len(found) == 1
    assert word in found[0].text


@pytest.mark.parametrize(
    ("dice", "noise"),
    [
        ([0.6, 0.9], 0.02),
        ([0.6, 0.9, 0.6], 0.02),
        # One change that stays, and values that hardly change.
        ([0.7, 0.5, 0.5, 0.5], 0.02),
        ([0.60, 0.605, 0.60, 0.605], 0.02),
        # Changes of 0.1, 0.1, 0.12 and 0.02, whose median is 0.1.
        ([0.6, 0.7, 0.6, 0.72, 0.7], 2 * 1.4826 * 0.1),
    ],
)
def test_probe_noise__grows_with_the_changes_from_round_to_round(dice, noise):
    assert probe_noise(dice) == pytest.approx(noise)


@pytest.mark.parametrize("end", [0.45, 0.75])
def test_health_warnings__a_probe_that_moves_up_and_down_gives_none(end):
    assert health_warnings({**HEALTHY, "probe/dice": [0.6, 0.7, 0.6, 0.72, end]}, is_final=True) == []
    steady = {**HEALTHY, "probe/dice": [0.6, 0.6, 0.6, 0.6, 0.6, end]}
    assert len(health_warnings(steady, is_final=True)) == (end < 0.6)


def test_health_warnings__loss_of_a_moving_teacher_is_not_checked():
    assert health_warnings({**HEALTHY, **MOVING}, is_final=True) == []


def test_health_warnings__loss_is_checked_after_the_warm_up():
    slow = {**HEALTHY, "held_out/loss": [1.0, 0.999, 0.99, 0.99, 0.99]}
    assert health_warnings(slow, is_final=False) == []
    assert (
        health_warnings({**slow, "held_out/loss": [1.0, 0.999, 0.99, 0.99, 0.99, 0.99]}, is_final=False)[0].rule
        == "loss did not fall"
    )


def test_spread_evenly__positions_are_even_and_away_from_the_ends():
    assert spread_evenly(100, 4) == [12, 37, 62, 87]
    assert spread_evenly(2, 5) == [0, 1]


def test_split_picture__returns_the_pictures_of_panel_picture():
    pictures = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    grid = panel_picture(Panel(columns=("a", "b", "c"), images_KBHW=pictures))
    assert grid.shape == (2 * 7, 3 * 7)
    back = torch.from_numpy(split_picture(grid, num_columns=3, side=5))
    assert torch.equal(back, (pictures * 255).round().to(torch.uint8))


def test_held_out__every_slice_counts_once_and_keeps_its_counter():
    """Three slices in batches of two. The mean over batches would be 3 instead of 7 / 3."""
    images = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1)
    refs = tuple(SimpleNamespace(slice_index=number) for number in range(3))
    held_out = HeldOut(images_N1SS=images, sample_counters=(70, 71, 72), planes=(None,) * 3, refs=refs, num_patients=1)
    seen = []

    def loss(images_B1SS, *, sample_counters, step, planes):
        seen.extend(sample_counters)
        return ObjectiveLoss(total=images_B1SS.mean(), parts={"part": 2 * images_B1SS.mean()}, features_BC=None)

    cpu = torch.device("cpu")
    numbers = held_out_loss(SimpleNamespace(loss=loss), held_out, batch_size=2, step=5, device=cpu)
    assert numbers == {"loss": pytest.approx(7 / 3), "part": pytest.approx(14 / 3)}
    assert seen == [70, 71, 72]
    panel = SimpleNamespace(panel=lambda images, sample_counters: (images.flatten().tolist(), sample_counters))
    assert held_out_panel(panel, held_out, num_rows=1, device=cpu) == ([2.0], [71])
