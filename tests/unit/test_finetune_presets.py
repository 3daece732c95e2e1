"""Presets of stage 2, the choice for a machine, and the recipe of the study."""

import dataclasses

import pytest
import torch
from samgraft.finetune.adapters import BottleneckInit, Heads, Targets, TuningScope
from samgraft.finetune.config import FinetuneConfig, Schedule
from samgraft.finetune.training import presets
from samgraft.finetune.training.presets import preset_for_memory, preset_layers
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.optim import LearningRate

REQUIRED = {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "runs/a"}}


def load(name, *overrides):
    layers = [packaged_config(f"finetune/{part}.yaml") for part in preset_layers(name)]
    return load_config(FinetuneConfig, layers=[*layers, REQUIRED], overrides=overrides)


@pytest.mark.parametrize(
    ("memory_gib", "preset"),
    [
        (5.8, "gpu_8gb"),
        (7.8, "gpu_8gb"),
        (11.6, "gpu_12gb"),
        (15.9, "gpu_12gb"),
        (23.5, "gpu_24gb"),
        (79.0, "gpu_24gb"),
    ],
)
def test_auto_preset__follows_the_gpu_memory(monkeypatch, memory_gib, preset):
    assert preset_for_memory(memory_gib) == preset
    gpu = DeviceChoice(accelerator="cuda", devices=1, num_nodes=1, precision="bf16-mixed", reason="")
    monkeypatch.setattr(presets, "choose_device", lambda: gpu)
    properties = type("Properties", (), {"total_memory": int(memory_gib * 2**30)})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert preset_layers("auto") == ["default", preset]


def test_auto_preset__without_a_gpu_is_cpu(monkeypatch):
    cpu = DeviceChoice(accelerator="cpu", devices=1, num_nodes=1, precision="32-true", reason="")
    monkeypatch.setattr(presets, "choose_device", lambda: cpu)
    assert preset_layers("auto") == ["cpu"]


def test_gpu_presets__differ_in_memory_only():
    default = load("default")
    for name, (batch, accumulate, recomputes) in {
        "gpu_8gb": (2, 4, False), "gpu_12gb": (4, 2, False), "gpu_24gb": (8, 1, False),
    }.items():  # fmt: skip
        config = load(name)
        assert (config.data.batch_size, config.trainer.accumulate) == (batch, accumulate)
        assert batch * accumulate == default.data.batch_size * default.trainer.accumulate
        assert config.trainer.activation_checkpointing is recomputes
        same = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, batch_size=default.data.batch_size),
            trainer=dataclasses.replace(config.trainer, accumulate=1, activation_checkpointing=False),
            watch=default.watch,
        )
        assert same == default


def test_paper_preset__equals_the_studys_recipe():
    config = load("paper")
    assert (config.model.image_size, config.data.batch_size, config.loss.size) == (1024, 2, 256)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (1e-3, 0.1, 200)
    assert (config.optim.beta1, config.optim.beta2) == (0.9, 0.999)
    assert config.schedule is Schedule.POLY
    assert config.trainer.clip_grad_norm is None
    assert config.data.labelled_slices_only
    assert not config.data.keep_aspect
    assert config.adapter.heads is Heads.RELEASED
    assert config.adapter.bottleneck_init is BottleneckInit.RANDOM
    assert (config.adapter.targets, config.adapter.r, config.adapter.lora_alpha) == (Targets.QV, 4, 4)


@pytest.mark.parametrize("method", ["full", "adapter", "lora"])
@pytest.mark.parametrize("scope", [TuningScope.ENCODER_DECODER, TuningScope.DECODER])
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_presets__every_combination_of_the_study_needs_one_key_each(preset, method, scope):
    config = load(preset, f"adapter.method={method}", f"adapter.scope={scope.value}")
    assert (config.adapter.method, config.adapter.scope) == (method, scope)


def test_default_preset__has_no_known_defect_of_the_study():
    """Other defects have separate tests (nearest labels, q and v per head, frozen BatchNorm, splits by volume)."""
    config = load("default")
    assert config.adapter.bottleneck_init is BottleneckInit.ZERO
    assert config.adapter.heads is Heads.NEEDED
    assert not config.data.labelled_slices_only
    assert config.optim.warmup_steps < config.watch.validate_every_n_steps
    assert config.trainer.max_steps > 10 * config.optim.warmup_steps


def test_poly_schedule__equals_the_studys():
    rate = LearningRate(warmup_steps=200, max_steps=1000, poly_power=0.9)
    assert rate.factor(0) == pytest.approx(1 / 200)
    assert rate.factor(199) == 1.0
    for step in (200, 600, 999):
        assert rate.factor(step) == pytest.approx((1 - (step - 200) / 1000) ** 0.9)
    assert LearningRate(warmup_steps=200, max_steps=1000).factor(600) != rate.factor(600)


def test_few_shot_preset__ends_early_after_warm_up_only():
    config = load("few_shot", "data.few_shot.num=5")
    assert config.data.few_shot.num == 5
    assert config.data.batch_size <= 5
    rounds = config.watch.patience_rounds * config.watch.validate_every_n_steps
    assert config.optim.warmup_steps + rounds <= config.watch.min_steps < config.trainer.max_steps
