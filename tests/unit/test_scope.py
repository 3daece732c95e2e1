"""Trained part of the encoder, and LoRA that is exported merged under SAM's names."""

import dataclasses

import pytest
import torch
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import UsageError
from samgraft.ssl.objectives import OBJECTIVES
from samgraft.ssl.objectives.dino import DINOConfig
from samgraft.ssl.objectives.feature import FeatureConfig
from samgraft.ssl.objectives.lejepa import LeJEPAConfig
from samgraft.ssl.objectives.mae import MAEConfig
from samgraft.ssl.objectives.masked_image import MaskedImageConfig
from samgraft.ssl.scope import (
    Scope,
    ScopeConfig,
    apply_scope,
    freeze_depths,
    learns_mask_token,
    lora_layers,
    merged_state,
    unadapted_tensors,
)
from tiny_encoders import lively_encoder, plain_encoder, slices

ENCODERS = {"vit_t": lively_encoder, "plain": plain_encoder}
LORA = ScopeConfig(kind=Scope.LORA, lora_r=2, lora_alpha=4)
LAYERS = {
    "vit_t": {
        f"layers.{stage}.blocks.0.{layer}"
        for stage in (1, 2, 3)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    },
    "plain": {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    },
}
SMALL = {
    "masked_image": MaskedImageConfig(mask_unit_px=16, decoder_dim=8, num_decoder_blocks=1),
    "mae": MAEConfig(decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1),
    "dino": DINOConfig(output_dim=12, head_hidden_dim=8, head_bottleneck_dim=4, freeze_last_layer=0.0),
    "lejepa": LeJEPAConfig(head_hidden_dim=8, output_dim=4, num_directions=8),
    "feature": FeatureConfig(decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1),
}
CASES = [(method, kind) for method in OBJECTIVES for kind in ENCODERS if (method, kind) != ("mae", "vit_t")]


def disturb(encoder):
    """Give the updates random values, because their second factor is 0 at first."""
    with torch.no_grad():
        for layer in lora_layers(encoder).values():
            layer.lora_B["default"].weight.normal_(std=0.3)
    return encoder


def outputs(encoder):
    return encoder(to_pixels(slices(size=encoder.image_size), encoder.spec))


@pytest.mark.parametrize("kind", ENCODERS)
def test_lora__is_in_the_linear_layers_and_changes_nothing_at_first(kind):
    encoder = ENCODERS[kind]()
    before = outputs(encoder)
    trained = apply_scope(encoder, LORA, num_frozen_depths=0)
    # Not bitwise, because the kernel of a product depends on memory alignment. Adding exact zeros changes nothing.
    torch.testing.assert_close(outputs(encoder), before, atol=2e-6, rtol=0)
    assert set(lora_layers(encoder)) == LAYERS[kind]
    parts = {f"{layer}.lora_{letter}.default.weight" for layer in LAYERS[kind] for letter in "AB"}
    neck = {f"neck.{name}" for name, _ in encoder.neck.named_parameters()}
    assert set(trained) == parts | neck


@pytest.mark.parametrize("kind", ENCODERS)
def test_merged_state__update_is_the_product_of_the_factors_times_alpha_over_rank(kind):
    encoder = ENCODERS[kind]()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    apply_scope(encoder, LORA, num_frozen_depths=0)
    state = merged_state(disturb(encoder))
    for name, layer in lora_layers(encoder).items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(state[f"{name}.weight"] - before[f"{name}.weight"], 4 / 2 * product.detach())


@pytest.mark.parametrize("kind", ENCODERS)
def test_merged_state__equals_the_adapted_encoder_under_its_names(kind):
    encoder, fresh = ENCODERS[kind](), ENCODERS[kind](seed=5)
    names = encoder.state_dict().keys()
    apply_scope(encoder, LORA, num_frozen_depths=0)
    untouched = outputs(encoder)
    state = merged_state(disturb(encoder))
    assert state.keys() == names == unadapted_tensors(encoder).keys()
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(outputs(fresh), outputs(encoder), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs(fresh), untouched, atol=1e-3)
    assert state.keys() == merged_state(encoder).keys()  # Merging did not change the encoder.


def test_merged_state__without_lora_is_the_state_dict():
    encoder = plain_encoder()
    state = merged_state(encoder)
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def changed_by_training(objective):
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    images = slices(count=3, size=objective.encoder.image_size)
    objective.loss(images, sample_counters=(7, 8, 9), step=0).total.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)  # or DDP would wait
    optimizer.step()
    return {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}


def encoder_names(names):
    return {name.removeprefix("encoder.") for name in names if name.startswith("encoder.")}


@pytest.mark.parametrize(("method", "kind"), CASES, ids=str)
@pytest.mark.parametrize("scope", [LORA, ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=1)], ids=["lora", "last"])
def test_gradient_flow__exactly_the_scope_changes(method, kind, scope):
    torch.manual_seed(0)
    encoder = ENCODERS[kind]()
    apply_scope(encoder, scope, num_frozen_depths=0)
    objective = OBJECTIVES[method](encoder, SMALL[method], seed=3, max_steps=10)
    if method == "masked_image":
        torch.nn.init.normal_(objective.decoder.to_pixels.weight)
    disturb(encoder)  # With B = 0 the gradient of A is 0.
    moved = encoder_names(changed_by_training(objective))
    if scope.kind is Scope.LORA:
        expected = {f"{layer}.lora_{letter}.default.weight" for layer in LAYERS[kind] for letter in "AB"}
    else:
        last = {"vit_t": "layers.3.", "plain": "blocks.1."}[kind]
        expected = {name for name, _ in encoder.named_parameters() if name.startswith(last)}
    assert moved == expected


def test_last_blocks__are_counted_from_the_end():
    encoder = plain_encoder()
    apply_scope(encoder, ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=1), num_frozen_depths=0)
    trained = {name.split(".")[0] + name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("blocks")} == {"blocks1"}
    with pytest.raises(UsageError, match=r"scope.num_last_blocks must be at most 2.*got 3"):
        apply_scope(plain_encoder(), ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=3), num_frozen_depths=0)


def test_mask_token__trains_only_where_the_stem_does():
    assert learns_mask_token(plain_encoder())
    for encoder, expected in ((plain_encoder(), True), (lively_encoder(), False)):
        apply_scope(encoder, LORA, num_frozen_depths=0)  # in the first block of a plain ViT, behind vit_t's stem
        assert learns_mask_token(encoder) == expected
    encoder = lively_encoder()
    freeze_depths(encoder, 2)
    assert not learns_mask_token(encoder)


def test_apply_scope__frozen_depths_with_lora_are_refused():
    with pytest.raises(UsageError, match=r"num_frozen_depths must be 0 with scope.kind=lora, got 2"):
        apply_scope(plain_encoder(), LORA, num_frozen_depths=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": Scope.LAST_BLOCKS}, "num_last_blocks must be given for scope.kind=last_blocks and only then"),
        ({"num_last_blocks": 2}, "num_last_blocks must be given for scope.kind=last_blocks and only then"),
        (
            {"kind": Scope.LAST_BLOCKS, "num_last_blocks": 0},
            r"num_last_blocks\n  Input should be greater",
        ),
        ({"lora_r": 4}, "scope.lora_r is set but scope.kind is all, so it would be ignored"),
        ({"kind": Scope.LORA, "lora_r": 0}, r"lora_r\n  Input should be greater than or equal to 1"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScopeConfig(**settings)
    assert dataclasses.replace(LORA, lora_dropout=0.1).lora_dropout == 0.1
