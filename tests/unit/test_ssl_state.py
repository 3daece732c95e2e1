"""Going on from an earlier run: decoder, heads, student and centers come back to the bit, or the run refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import load_into, read_weights
from samgraft.ssl.export.encoder_weights import write_encoder_weights
from samgraft.ssl.objectives import OBJECTIVES
from samgraft.ssl.objectives.dino import DINOConfig
from samgraft.ssl.objectives.mae import MAEConfig
from samgraft.ssl.scope import Scope, ScopeConfig, apply_scope, lora_layers, merged_state
from samgraft.ssl.ssl_state import StateUse, find_state, restore_ssl_state, state_without_encoder
from tiny_encoders import PLAIN_VIT, lively_encoder, plain_encoder

CARD = Card(arch="vit_b", image_size=96, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3, objective="dino")
DINO = DINOConfig(output_dim=12, head_hidden_dim=8, head_bottleneck_dim=4)
MAE = MAEConfig(decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1)


def build(method, encoder, settings):
    return OBJECTIVES[method](encoder, settings, seed=0, max_steps=10)


def trained_dino(encoder=None, scope=None):
    """Return an objective in which student, teacher, heads and centers differ, as after a run."""
    torch.manual_seed(3)
    encoder = encoder or plain_encoder()
    apply_scope(encoder, scope or ScopeConfig(), num_frozen_depths=0)
    objective = build("dino", encoder, DINO)
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return objective


@pytest.fixture
def run(tmp_path):
    write_encoder_weights(trained_dino(), tmp_path / "runs" / "first", CARD)
    return tmp_path / "runs" / "first"


def restore(objective, weights, *, name="dino", use=StateUse.AUTO):
    return restore_ssl_state(objective, initial_weights=str(weights), objective_name=name, use=use)


def next_objective(run, image_size=96, scope=None, settings=DINO):
    encoder = PLAIN_VIT.build(image_size=image_size)
    load_into(encoder, read_weights(run), resize_positions=True)
    apply_scope(encoder, scope or ScopeConfig(), num_frozen_depths=0)
    return build("dino", encoder, settings)


def test_restore__every_tensor_is_equal(run):
    before, after = trained_dino(), next_objective(run)
    notes = restore(after, run, use=StateUse.REQUIRE)
    expected = before.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
    total = len(state_without_encoder(before))
    assert notes == [
        f"continued from the ssl_state of first: {total}/{total} tensors of decoder, heads and teacher restored"
    ]
    assert any(name.startswith("encoder.") for name in state_without_encoder(before))  # the student
    assert not any(name.startswith("teacher.encoder.") for name in state_without_encoder(before))


@pytest.mark.parametrize(
    "tail", ["", "encoder", "encoder/encoder.safetensors", "ssl_state", "ssl_state/state.safetensors"]
)
def test_find_state__every_name_of_the_run_finds_it(run, tail):
    assert find_state(str(run / tail)) == run / "ssl_state"


def test_find_state__other_files_near_a_state_do_not_find_it(run, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"")
    assert find_state(str(tmp_path / "other.pth")) is None
    assert find_state("random") is None
    assert find_state(str(run / "report.html")) is None


def test_restore__lora_is_merged_and_new(tmp_path):
    lora = ScopeConfig(kind=Scope.LORA, lora_r=2)
    first = trained_dino(scope=lora)
    write_encoder_weights(first, tmp_path / "run", CARD)
    names = plain_encoder().state_dict().keys()
    assert {f"image_encoder.{n}" for n in names} == set(load_file(tmp_path / "run/encoder/encoder.safetensors"))
    second = next_objective(tmp_path / "run", scope=lora)
    restore(second, tmp_path / "run", use=StateUse.REQUIRE)
    for side in ("encoder", "teacher.encoder"):
        expected = merged_state(first.get_submodule(side))
        found = merged_state(second.get_submodule(side))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert all((layer.lora_B["default"].weight == 0).all() for layer in lora_layers(second.encoder).values())


def test_read_weights__unfinished_lora_run_is_refused(tmp_path):
    """Its training state contains weights and updates separately, and the weights alone are not the encoder."""
    state = trained_dino(scope=ScopeConfig(kind=Scope.LORA, lora_r=2)).state_dict()
    save_file({f"model.objective.{name}": t.contiguous() for name, t in state.items()}, tmp_path / "state.safetensors")
    with pytest.raises(
        WeightsError, match=r"16 layers with adapters that are not merged. Finish the run first"
    ) as refusal:
        read_weights(tmp_path / "state.safetensors")
    assert "which resumes it; BASE=runs/NAME is then its result" in str(refusal.value.next_command)


def test_restore__another_image_size_resizes_positions(run):
    after = next_objective(run, image_size=128)
    notes = restore(after, run)
    assert "2 position tables resized" in notes[0] or "3 position tables resized" in notes[0]
    assert after.encoder.pos_embed.shape[1] == 8


def test_restore__state_of_another_objective_is_not_used(run, caplog):
    objective = build("mae", plain_encoder(), MAE)
    with caplog.at_level("INFO"):
        assert restore(objective, run, name="mae") == []
    assert "ssl_state of first is one of dino: decoder and heads are new" in caplog.text
    with pytest.raises(UsageError, match="must have initial weights with an ssl_state of mae, got one of dino"):
        restore(objective, run, name="mae", use=StateUse.REQUIRE)


def test_restore__ignore_restores_nothing_and_require_refuses(run, tmp_path):
    after = next_objective(run)
    before = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    assert restore(after, run, use=StateUse.IGNORE) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())
    with pytest.raises(UsageError, match="must have initial weights with an ssl_state of dino, got none"):
        restore(after, tmp_path / "sam.pth", use=StateUse.REQUIRE)


def test_restore__other_settings_are_refused_and_nothing_is_loaded(run):
    after = next_objective(run, settings=DINOConfig(output_dim=20, head_hidden_dim=8, head_bottleneck_dim=4))
    before = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    with pytest.raises(WeightsError, match=r"of another shape \(dino_loss.*model.ssl_state=ignore"):
        restore(after, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("mask_token"), r"1 missing \(mask_token\)"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"1 unexpected \(extra\)"),
        (lambda tensors: tensors["mask_token"].fill_(float("nan")), "got NaN or Inf in mask_token"),
    ],
)
def test_restore__damaged_state_is_refused(run, change, message):
    path = run / "ssl_state" / "state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=message):
        restore(next_objective(run), run)


def test_restore__newer_schema_is_refused(run):
    about = run / "ssl_state" / "state.json"
    about.write_text(json.dumps({"schema": 9, "objective": "dino"}))
    with pytest.raises(WeightsError, match="schema of ssl_state must be 1, got 9"):
        restore(next_objective(run), run)
    about.write_text("{}")
    with pytest.raises(WeightsError, match="must contain schema and objective"):
        restore(next_objective(run), run)


def test_write_encoder_weights__lora_run_has_the_names_of_the_encoder(tmp_path):
    encoder = lively_encoder()
    names = set(encoder.state_dict())
    scope = ScopeConfig(kind=Scope.LORA, lora_r=2)
    write_encoder_weights(trained_dino(encoder, scope), tmp_path, Card.from_dict({**CARD.to_dict(), "arch": "vit_t"}))
    assert set(load_file(tmp_path / "encoder/encoder.safetensors")) == {f"image_encoder.{name}" for name in names}
