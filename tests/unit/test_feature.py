"""The objective ``feature``, its loss, its frozen copy and its settings."""

import pytest
import torch
from samgraft.shared.encoders.sam import to_pixels
from samgraft.ssl.objectives.feature import Feature, FeatureConfig, FeatureTarget
from samgraft.ssl.views.masking import MaskKind, upsample_mask
from tiny_encoders import lively_encoder, plain_encoder, slices

COUNTERS = (7, 8)
ENCODERS = {"vit_t": lively_encoder, "plain": plain_encoder}
TARGETS = list(FeatureTarget)


def make_objective(kind="vit_t", **settings):
    encoder = ENCODERS[kind]()
    torch.manual_seed(1)
    config = FeatureConfig(decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1, **settings)
    objective = Feature(encoder, config, seed=3)
    if objective.mask_token is not None:
        torch.nn.init.normal_(objective.mask_token)
    return objective


def predict(objective, images, masks):
    return objective._predict(objective._encode(objective.encoder, images, masks), masks)


def images_for(objective):
    return slices(size=objective.encoder.image_size)


@pytest.mark.parametrize("kind", list(ENCODERS))
@pytest.mark.parametrize("target", TARGETS)
def test_loss__equals_a_calculation_by_hand(kind, target):
    objective = make_objective(kind, target=target, visible_weight=0.5)
    images, masks = images_for(objective), objective.draw_masks(COUNTERS, side=objective.mask_side)
    wanted = objective.frozen_copy.forward_features(to_pixels(images, objective.encoder.spec))
    guess, _ = predict(objective, images, masks)
    if target is FeatureTarget.EMBEDDINGS:
        wanted = objective.frozen_copy.neck(wanted)
    else:
        both = (wanted, guess)
        wanted, guess = (
            (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in both
        )
    squares = (guess - wanted).square()
    scale = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    hidden = upsample_mask(masks, image_size=wanted.shape[-1]).expand_as(squares)
    expected = (squares[hidden].mean() + 0.5 * squares[~hidden].mean()) / scale / 1.5
    result = objective.loss(images, sample_counters=COUNTERS, step=0)
    torch.testing.assert_close(result.total, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.parts["hidden_error"], squares[hidden].mean() / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_error__is_one_for_the_mean_and_zero_for_sams_features(kind):
    objective = make_objective(kind)
    target = objective._target(images_for(objective))
    mean = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    assert objective._error(mean, target).mean().item() == pytest.approx(1.0, rel=1e-4)
    assert objective._error(target, target).max() == 0


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_prediction__does_not_depend_on_hidden_pixels(kind):
    objective = make_objective(kind)
    images, masks = images_for(objective), objective.draw_masks(COUNTERS, side=objective.mask_side)
    hidden = upsample_mask(masks, image_size=images.shape[-1])
    first, _ = predict(objective, images, masks)
    second, _ = predict(objective, torch.where(hidden, torch.rand_like(images), images), masks)
    assert torch.equal(first, second)
    third, _ = predict(objective, torch.where(hidden, images, 1 - images), masks)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("kind", list(ENCODERS))
@pytest.mark.parametrize(
    "settings", [{}, {"train_neck": True}, {"target": FeatureTarget.FEATURES}], ids=["frozen", "trained", "before"]
)
def test_gradient_flow__frozen_copy_does_not_change(kind, settings):
    objective = make_objective(kind, **settings)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).total.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert all(p.grad is None for p in objective.frozen_copy.parameters())
    optimizer.step()
    moved = {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}
    kept = ("frozen_copy.",) if settings.get("train_neck") else ("frozen_copy.", "encoder.neck")
    assert moved == {name for name, _ in objective.named_parameters() if not name.startswith(kept)}


def test_frozen_copy__stays_in_evaluation_mode():
    objective = make_objective("vit_t").train()
    assert objective.encoder.training
    assert not any(module.training for module in objective.frozen_copy.modules())


def test_fill_grid__puts_every_token_at_its_position():
    objective = make_objective("plain", mask_ratio=0.5)
    images = images_for(objective)
    hidden = upsample_mask(objective.draw_masks(COUNTERS, side=objective.mask_side), image_size=6).flatten(1)
    with torch.no_grad():
        objective.decoder.to_answer.weight.zero_()
        objective.decoder.to_answer.bias.fill_(9.0)
    pixels = to_pixels(images, objective.encoder.spec)
    masks = objective.draw_masks(COUNTERS, side=objective.mask_side)
    encoded = objective._encode(objective.encoder, images, masks)
    filled = objective._fill_grid(encoded, hidden).flatten(2).mT
    assert (filled[hidden] == 9).all()
    ids = torch.stack([(~row).nonzero()[:, 0] for row in hidden])
    visible = objective.encoder.forward_visible(pixels, ids)
    assert torch.equal(filled[~hidden], visible.flatten(0, 1))


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_loss__falls_when_trained(kind):
    objective = make_objective(kind)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = objective.loss(images_for(objective), sample_counters=COUNTERS, step=0).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_panel__has_input_visible_prediction_and_target(kind):
    objective = make_objective(kind)
    images = images_for(objective)
    given, seen, _, truth = objective.panel(images, sample_counters=COUNTERS).images_KBHW
    hidden = upsample_mask(objective.draw_masks(COUNTERS, side=objective.mask_side), image_size=images.shape[-1])[:, 0]
    assert torch.equal(given, images[:, 0])
    assert (seen[hidden] == 0.5).all()
    assert truth.std() > 0.05


def test_feature__unsuitable_mask_is_refused():
    with pytest.raises(ValueError, match="must be random or block for vit_t, which hides whole squares"):
        make_objective("vit_t", mask_kind=MaskKind.PER_WINDOW)
    with pytest.raises(ValueError, match="must not be set with mask_kind per_window"):
        make_objective("plain", mask_kind=MaskKind.PER_WINDOW, mask_unit_px=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio\n  Input should be less than 1"),
        ({"visible_weight": -1.0}, r"visible_weight\n  Input should be greater than or equal to 0"),
        ({"train_neck": True, "target": FeatureTarget.FEATURES}, "train_neck must be false with target features"),
        ({"decoder_dim": 100}, "decoder_dim must be a multiple of 4 times num_decoder_heads"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**settings)
