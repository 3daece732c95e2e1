"""The anchor of every objective, which keeps the encoder near its initial weights."""

import re

import pytest
import torch
from samgraft.shared.errors import UsageError
from samgraft.ssl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from samgraft.ssl.objectives.anchor import Anchor, AnchorConfig, AnchorKind, weight_distance
from samgraft.ssl.ssl_state import state_without_encoder
from tiny_encoders import lively_encoder, plain_encoder, slices
from tiny_pretrain import PLAIN_ONLY, SETTINGS, config_of, left_behind, make_lab, run

COUNTERS = (7, 8)
KINDS = [kind for kind in AnchorKind if kind is not AnchorKind.NONE]


def settings_of(name):
    values = {}
    for text in SETTINGS[name]:
        key, value = text.split("=")
        *section, key = key.split(".")
        if not section:
            values[key] = int(value)
    return OBJECTIVES[name].settings_type(**values)


def make_objective(name, *, plain=False, **anchor):
    encoder = plain_encoder() if plain or name in PLAIN_ONLY else lively_encoder()
    torch.manual_seed(1)
    config = ObjectiveConfig(name=name, anchor=AnchorConfig(**anchor), **{name: settings_of(name)})
    return build_objective(encoder, config, seed=3, max_steps=4)


def loss_of(objective):
    images = slices(size=objective.encoder.image_size)
    return objective.loss(images, sample_counters=COUNTERS, step=0)


def train(objective, *, steps, rate=3e-3):
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        # The rate falls, because a step of Adam does not become smaller near a minimum.
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(objective).total.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_anchor__is_zero_at_the_initial_weights_and_positive_after_a_step(name, kind):
    objective, plain = make_objective(name, kind=kind), make_objective(name)
    first = loss_of(objective)
    assert first.parts["anchor"] < 1e-9  # a pass without gradients is rounded differently
    torch.testing.assert_close(first.total, loss_of(plain).total)
    train(objective, steps=3)
    second = loss_of(objective)
    assert second.parts["anchor"] > 0
    anchor, objective.anchor = objective.anchor, None
    own = loss_of(objective)
    torch.testing.assert_close(second.total, own.total + second.parts["anchor"])
    with torch.no_grad():
        objective.anchor = anchor
        held_out = loss_of(objective)
    torch.testing.assert_close(held_out.total, own.total)
    torch.testing.assert_close(held_out.parts["anchor"], second.parts["anchor"])
    assert not any(p.requires_grad for p in anchor.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["masked_image", "mae", "lejepa"])
def test_anchor__with_a_large_weight_keeps_the_encoder_nearer(name, kind):
    free, held = make_objective(name, kind=kind, weight=1e-9), make_objective(name, kind=kind, weight=100.0)
    train(free, steps=12)
    train(held, steps=12)
    assert loss_of(held).parts["anchor"] < 0.7 * loss_of(free).parts["anchor"]


def test_features__equal_a_calculation_by_hand():
    encoder, other = lively_encoder(), lively_encoder(seed=1)
    anchor = Anchor(other, AnchorKind.FEATURES)
    features, kept = torch.randn(2, encoder.feature_dim, 4, 4), torch.randn(2, encoder.feature_dim, 4, 4)
    hidden = torch.zeros(2, 2, 2, dtype=torch.bool)
    hidden[0, 1, 0] = hidden[1, 0, 1] = True
    found = anchor.distance(encoder, features, lambda _: kept, hidden_Bhw=hidden)
    shown = ~hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = []
    for ours, theirs, norm in ((features, kept, True), (encoder.neck(features), other.neck(kept), False)):
        a, b = ours.movedim(1, -1)[shown], theirs.movedim(1, -1)[shown]
        if norm:
            a, b = (
                (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in (a, b)
            )
        expected.append((a - b).square().mean() / (b - b.mean(0)).square().mean())
    torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-4, atol=1e-6)


def test_relations__do_not_change_when_all_features_turn_together():
    encoder = lively_encoder()
    encoder.neck = torch.nn.Identity()
    anchor = Anchor(encoder, AnchorKind.RELATIONS)
    kept = torch.nn.functional.layer_norm(torch.randn(2, 4, 4, 16), (16,)).movedim(-1, 1)
    # A permutation of the channels is a rotation that the normalisation of tokens does not change either.
    turned = kept[:, torch.randperm(16)]
    features = Anchor(encoder, AnchorKind.FEATURES)
    assert anchor.distance(encoder, turned, lambda _: kept) < 1e-6
    assert features.distance(encoder, turned, lambda _: kept) > 0.1
    assert anchor.distance(encoder, torch.randn(2, 16, 4, 4), lambda _: kept) > 0.1


def test_weight_distance__counts_trained_weights_only():
    encoder, frozen = lively_encoder(), lively_encoder()
    encoder.neck.requires_grad_(False)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    assert weight_distance(encoder, frozen).item() == pytest.approx(0.25, rel=1e-5)
    with torch.no_grad():
        for parameter in encoder.neck.parameters():
            parameter.add_(7.0)
    assert weight_distance(encoder, frozen).item() == pytest.approx(0.25, rel=1e-5)


def test_hidden_tokens__do_not_enter_the_anchor():
    encoder = lively_encoder()
    encoder.neck = torch.nn.Identity()
    anchor = Anchor(encoder, AnchorKind.FEATURES)
    kept = torch.randn(1, encoder.feature_dim, 4, 4)
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    hidden[0, 0, 0] = True
    changed = kept.clone()
    changed[0, :, 0, 0] += 9.0
    assert anchor.distance(encoder, changed, lambda _: kept, hidden_Bhw=hidden) == 0
    assert anchor.distance(encoder, changed, lambda _: kept) > 0


def test_anchor__stays_in_evaluation_mode_and_out_of_the_ssl_state():
    objective = make_objective("masked_image", kind=AnchorKind.FEATURES).train()
    assert objective.encoder.training
    assert not any(module.training for module in objective.anchor.modules())
    plain = make_objective("masked_image")
    assert state_without_encoder(objective).keys() == state_without_encoder(plain).keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.anchor.weight=2",), "anchor.kind is none, so it would be ignored"),
        (("objective.anchor.kind=features", "objective.anchor.weight=0"), "objective.anchor.weight"),
        (("objective.anchor.kind=weights", "trainer.strategy=fsdp"), "must not be combined with trainer.strategy=fsdp"),
        (("objective.anchor.kind=weights", "model.scope.kind=lora"), "must not be combined with model.scope.kind=lora"),
        (("objective.anchor.kind=gram",), "objective.anchor.kind"),
    ],
)
def test_settings__contradictions_are_refused(tmp_path, overrides, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        config_of(make_lab(tmp_path), "masked_image", *overrides)


@pytest.mark.parametrize("kind", ["features", "weights"])
def test_run__with_an_anchor_records_it_and_resumes_exactly(tmp_path, kind):
    lab = make_lab(tmp_path)
    anchored = (f"objective.anchor.kind={kind}", "objective.anchor.weight=3")
    whole = left_behind(run(lab, "whole", "masked_image", *anchored))
    assert {"train/anchor", "held_out/anchor"} <= {key for line in whole["metrics"] for key in line}
    folder = run(lab, "parts", "masked_image", *anchored)
    # A run that lost its last state trains the last steps again from the one before.
    states = sorted((folder / "checkpoints").glob("step-*"))
    for file in sorted(states[-1].rglob("*"), reverse=True):
        file.unlink()
    states[-1].rmdir()
    assert left_behind(run(lab, "parts", "masked_image", *anchored)) == whole
    other = left_behind(run(lab, "other", "masked_image"))
    assert other["encoder/encoder.safetensors"] != whole["encoder/encoder.safetensors"]
