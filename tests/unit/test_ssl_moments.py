"""Optimizer moments of a stage-1 run, restored by name in the next one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from samgraft.shared.errors import WeightsError
from samgraft.shared.runs.training_state import find_newest_state, read_state
from samgraft.ssl.initial_weights import build_initial_objective
from samgraft.ssl.optimizer import MOMENTS_FILE, build_pretrain_optimizer, read_moments, restore_moments
from tiny_pretrain import config_of, make_lab, run


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def first(lab):
    return run(lab, "first", "masked_image", "trainer.max_steps=2")


def next_run(lab, first, *overrides):
    config = config_of(lab, "masked_image", f"model.base={first}", *overrides)
    objective, _, notes = build_initial_objective(config)
    return objective, build_pretrain_optimizer(objective, config.optim), notes


def test_moments__every_trained_tensor_has_those_of_the_last_step(lab, first):
    objective, optimizer, notes = next_run(lab, first)
    assert notes
    summary = restore_moments(optimizer, objective, read_moments(str(first)))
    total = sum(parameter.requires_grad for parameter in objective.parameters())
    assert summary == f"optimizer moments restored for {total}/{total} trained tensors"
    saved = read_state(find_newest_state(first / "checkpoints")).tensors
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], saved[f"optimizer.state.{number}.exp_avg"])
        assert optimizer.state[parameter]["step"] == 2


def test_moments__are_restored_by_name_with_frozen_depths(lab, first):
    objective, optimizer, _ = next_run(lab, first, "model.num_frozen_depths=2")
    moments = read_moments(str(first))
    restore_moments(optimizer, objective, moments)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], moments[f"{name}/exp_avg_sq"])


def test_moments__tensors_of_another_shape_begin_with_zeros(lab, first):
    objective, optimizer, _ = next_run(lab, first)
    moments = dict(read_moments(str(first)))
    name, parameter = next((n, p) for n, p in objective.named_parameters() if p.requires_grad and p.ndim == 1)
    for part in ("exp_avg", "exp_avg_sq"):
        moments[f"{name}/{part}"] = moments[f"{name}/{part}"][:-1]
    total = sum(p.requires_grad for p in objective.parameters())
    assert restore_moments(optimizer, objective, moments).endswith(f"for {total - 1}/{total} trained tensors")
    assert parameter not in optimizer.state


def test_moments__rates_are_those_of_the_new_run(lab, first):
    objective, optimizer, _ = next_run(lab, first, "optim.lr=0.5")
    restore_moments(optimizer, objective, read_moments(str(first)))
    assert max(group["peak_lr"] for group in optimizer.param_groups) >= 0.5


def test_moments__ignored_state_restores_none(lab, first):
    continued, new = (
        run(lab, name, "masked_image", f"model.base={first}", "trainer.max_steps=2", *settings)
        for name, settings in (("continued", ()), ("new", ("model.ssl_state=ignore",)))
    )
    steps = [load_file(path / "ssl_state" / MOMENTS_FILE)["mask_token/step"] for path in (continued, new)]
    assert steps == [4, 2]


def test_moments__lora_writes_none(lab):
    path = run(lab, "lora", "masked_image", "trainer.max_steps=2", "model.scope.kind=lora", "model.scope.lora_r=2")
    assert (path / "ssl_state" / "state.safetensors").is_file()
    assert read_moments(str(path)) is None


def test_moments__damaged_file_is_refused(lab, first, tmp_path):
    state = tmp_path / "run" / "ssl_state"
    state.mkdir(parents=True)
    for name in ("state.safetensors", "state.json"):
        (state / name).write_bytes((first / "ssl_state" / name).read_bytes())
    tensors = load_file(first / "ssl_state" / MOMENTS_FILE)
    tensors["mask_token/exp_avg"].fill_(float("nan"))
    save_file(tensors, state / MOMENTS_FILE)
    objective, optimizer, _ = next_run(lab, first)
    with pytest.raises(WeightsError, match="must be finite, got NaN or Inf for mask_token"):
        restore_moments(optimizer, objective, read_moments(str(tmp_path / "run")))
    (state / MOMENTS_FILE).write_bytes(b"\0" * 40)
    with pytest.raises(WeightsError, match="the file is damaged"):
        read_moments(str(tmp_path / "run"))
