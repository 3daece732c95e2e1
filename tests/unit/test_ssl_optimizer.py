"""Learning rates by depth and weight decay of stage 1 on both kinds of encoder."""

import re

import pytest
from samgraft.ssl.config import PretrainOptimizerConfig
from samgraft.ssl.objectives.mae import MAE, MAEConfig
from samgraft.ssl.objectives.masked_image import MaskedImage, MaskedImageConfig
from samgraft.ssl.optimizer import build_pretrain_optimizer, build_schedule, pretrain_groups
from tiny_encoders import plain_encoder, tiny_encoder

NEVER_DECAYED = re.compile(r"bias$|biases$|norm\d?\.|\.bn\.|pos_embed|rel_pos_|mask_token|neck\.[13]\.")
CONFIG = PretrainOptimizerConfig(lr=1e-3, weight_decay=0.1, layer_decay=0.5, head_lr_factor=3.0)


def objective_of(kind):
    if kind == "vit_t":
        return MaskedImage(tiny_encoder(), MaskedImageConfig(mask_unit_px=8, decoder_dim=8, train_neck=True), seed=0)
    return MAE(plain_encoder(), MAEConfig(decoder_dim=16, num_decoder_heads=2), seed=0)


def settings_of(objective):
    names = {id(p): name for name, p in objective.named_parameters()}
    groups = pretrain_groups(objective, CONFIG)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found)
    assert set(found) == {name for name, p in objective.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("kind", ["vit_t", "plain"])
def test_pretrain_groups__norms_biases_positions_and_tokens_have_no_decay(kind):
    found = settings_of(objective_of(kind))
    encoder = {name: decay for name, (_, decay) in found.items() if name.startswith("encoder.")}
    free = {name for name, decay in encoder.items() if decay == 0}
    assert free == {name for name in encoder if NEVER_DECAYED.search(name)}
    kept = {"vit_t": "attention_biases", "plain": "rel_pos_h"}[kind]
    assert any(kept in name for name in free)
    assert any(name.endswith("qkv.weight") for name in set(encoder) - free)


@pytest.mark.parametrize("kind", ["vit_t", "plain"])
def test_pretrain_groups__rate_halves_with_every_depth_towards_the_input(kind):
    objective = objective_of(kind)
    found = settings_of(objective)
    names = {id(p): name for name, p in objective.named_parameters()}
    deepest = max(depth for depth, _ in objective.encoder.layer_groups())
    for depth, parameters in objective.encoder.layer_groups():
        for parameter in parameters:
            if parameter.requires_grad:
                assert found[names[id(parameter)]][0] == pytest.approx(1e-3 * 0.5 ** (deepest - depth))
    heads = {rate for name, (rate, _) in found.items() if not name.startswith("encoder.")}
    assert list(heads) == [pytest.approx(3e-3)]


def test_build_pretrain_optimizer__decays_of_both_moments_are_those_of_the_settings():
    config = PretrainOptimizerConfig(beta1=0.8, beta2=0.7)
    optimizer = build_pretrain_optimizer(objective_of("vit_t"), config)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}


def test_build_schedule__has_the_warm_up_and_the_end_of_the_settings():
    schedule = build_schedule(PretrainOptimizerConfig(warmup_steps=2, final_lr_factor=0.3), max_steps=10)
    assert [schedule.factor(step) for step in (0, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.65, 0.3])
