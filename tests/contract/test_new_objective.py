"""A new objective, added by one class and one line of ``OBJECTIVES``, trains through the whole of stage 1."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from samgraft.shared import config
from samgraft.shared.config import load_config
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import UsageError
from samgraft.shared.training.device import choose_device
from samgraft.ssl import config as ssl_config
from samgraft.ssl.objectives import OBJECTIVES, Objective, ObjectiveLoss, Panel, objective_config
from samgraft.ssl.pretrain import pretrain
from tiny_pretrain import make_lab
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of the toy objective."""

    target: float = 0.5
    """Value that the head must predict from every slice."""


class Toy(Objective):
    """A regression of one number from the mean feature."""

    settings_type = ToyConfig

    def __init__(self, encoder, config, *, seed, max_steps=1):
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        encoder.neck.requires_grad_(False)
        self.head = nn.Linear(encoder.feature_dim, 1)

    def loss(self, images_B1SS, *, sample_counters, step, planes=None):
        features_BChw = self.encoder.forward_features(to_pixels(images_B1SS, self.encoder.spec))
        features_BC = features_BChw.mean((2, 3))
        total = (self.head(features_BC) - self.config.target).square().mean()
        return ObjectiveLoss(total=total, features_BC=features_BC.detach())

    def panel(self, images_B1SS, *, sample_counters):
        return Panel(columns=("input",), images_KBHW=images_B1SS[:, 0].cpu()[None])


@pytest.fixture
def toy(monkeypatch):
    """Add the line ``"toy": Toy`` to the table; the configuration class follows from the table."""
    monkeypatch.setitem(OBJECTIVES, "toy", Toy)
    monkeypatch.setattr(ssl_config, "ObjectiveConfig", objective_config(OBJECTIVES))
    config._adapter.cache_clear()
    yield
    config._adapter.cache_clear()  # or later tests would accept the toy


def config_of(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "num_held_out_slices": 2},
        "model": {"base": str(lab / "base"), "image_size": 32},
        "objective": {"name": "toy"},
        "optim": {"warmup_steps": 1},
        "trainer": {"max_steps": 3, "save_every_steps": 3, "device": "cpu", "precision": "fp32"},
    }
    return load_config(ssl_config.PretrainConfig, layers=[layer], overrides=overrides)


def test_new_objective__trains_and_exports_its_encoder(tmp_path, toy):
    lab = make_lab(tmp_path)
    run_config = config_of(lab, "objective.toy.target=2.0")
    path = pretrain(run_config, name="toy", runs=lab / "runs", device=choose_device("cpu", precision="fp32", devices=1))
    before, after = load_file(lab / "base" / "encoder.safetensors"), load_file(path)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if not name.startswith("neck."))
    assert json.loads((path.parent / "card.json").read_text())["objective"] == "toy"
    assert set(load_file(path.parents[1] / "ssl_state" / "state.safetensors")) == {"head.weight", "head.bias"}


def test_new_objective__settings_of_another_objective_are_refused(tmp_path, toy):
    with pytest.raises(UsageError, match=r"objective.mae is set but objective.name is toy"):
        config_of(tmp_path, "objective.mae.mask_ratio=0.5")


def test_objective__unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"objective.name must be one of masked_image, mae, .*, got 'simclr'"):
        objective_config(OBJECTIVES)(name="simclr")
