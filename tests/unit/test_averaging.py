"""Average of the weights along a run, which is validated, saved, resumed and written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samgraft.shared.training.optim import WeightAverage
from samgraft.shared.training.periodic import PeriodicTask, TaskContext
from samgraft.shared.training.preflight import state_bytes, training_bytes
from tiny_training import At, Killed, TinyModule, curve, die, final_bytes, tiny_config, tiny_fit
from torch import nn


def small_module() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    module[1].running_mean.fill_(1.0)
    return module


def test_weight_average__equals_the_recursion_worked_out_by_hand() -> None:
    module = small_module()
    average = WeightAverage(module, decay=0.3)
    expected, expected_mean = module[0].weight[0, 0].item(), 1.0
    for step in range(1, 6):
        with torch.no_grad():
            module[0].weight += step
            module[1].running_mean += step
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13 and then 0.3
        expected = decay * expected + (1 - decay) * module[0].weight[0, 0].item()
        expected_mean = decay * expected_mean + (1 - decay) * float(module[1].running_mean[0])
    assert float(average.state()["0.weight"][0, 0]) == pytest.approx(expected, rel=1e-6)
    assert float(average.state()["1.running_mean"][0]) == pytest.approx(expected_mean, rel=1e-6)
    assert set(average.state()) == {
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var"),
    }


def test_applied__module_has_the_average_and_then_its_own_weights_again() -> None:
    module = small_module()
    average = WeightAverage(module, decay=0.5)
    with torch.no_grad():
        module[0].weight += 1
        module[1].running_var += 1
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def look_and_fail() -> None:
        with average.applied():
            assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in average.state().items())
            assert not torch.equal(module[0].weight, own["0.weight"])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        look_and_fail()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in own.items())


def test_load__tensors_of_another_module_are_refused() -> None:
    average = WeightAverage(small_module(), decay=0.5)
    with pytest.raises(ValueError, match=r"1 differ, e.g. 0.bias"):
        average.load({name: tensor for name, tensor in average.state().items() if name != "0.bias"})


def test_preflight__counts_the_average() -> None:
    module = small_module()
    trained = 4 * (3 * 2 + 2 + 2 + 2)
    assert state_bytes(module, has_average=True) == state_bytes(module) + trained
    assert training_bytes(module, 0, has_average=True) == training_bytes(module, 0) + 2 * trained


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"channels_last": True}], ids=str)
def test_fit__with_an_average_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, settings: dict) -> None:
    config = tiny_config(**settings)
    tiny_fit(tmp_path, "whole", config, ema_decay=0.9)
    for step in (5, 11):
        with pytest.raises(Killed):
            tiny_fit(tmp_path, "killed", config, callbacks=[At(step, die)], ema_decay=0.9)
    tiny_fit(tmp_path, "killed", config, ema_decay=0.9)
    assert final_bytes(tmp_path, "whole", 15) == final_bytes(tmp_path, "killed", 15)
    assert curve(tmp_path, "whole") == curve(tmp_path, "killed")


def test_fit__average_changes_validation_and_result_but_not_the_training(tmp_path: Path) -> None:
    made: list[TinyModule] = []
    seen: dict[int, torch.Tensor] = {}

    def make_module(**settings: int) -> TinyModule:
        made.append(TinyModule(**settings))
        return made[-1]

    def look(context: TaskContext) -> dict[str, float]:
        seen[context.step] = context.module.student[0].weight.detach().clone()
        return {}

    task = PeriodicTask(name="look", every_steps=5, run=look, at_start=True)
    for name, ema_decay in (("plain", None), ("average", 0.9)):
        tiny_fit(tmp_path, name, tiny_config(), module=make_module, periodic=[task], ema_decay=ema_decay)
    state = load_file(tmp_path / "average" / "checkpoints" / "step-000015" / "state.safetensors")
    plain = load_file(tmp_path / "plain" / "checkpoints" / "step-000015" / "state.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    averaged = {name.removeprefix("average."): t for name, t in state.items() if name.startswith("average.")}
    assert {"student.0.weight", "student.1.running_var"} < set(averaged)
    assert "teacher.weight" not in averaged
    assert not torch.equal(averaged["student.0.weight"], plain["model.student.0.weight"])
    assert torch.equal(seen[15], averaged["student.0.weight"])
    assert all(torch.equal(made[1].state_dict()[name], tensor) for name, tensor in averaged.items())
    # A finished run that is opened again ends with the average too.
    tiny_fit(tmp_path, "average", tiny_config(), module=make_module, periodic=[task], ema_decay=0.9)
    assert all(torch.equal(made[2].state_dict()[name], tensor) for name, tensor in averaged.items())
