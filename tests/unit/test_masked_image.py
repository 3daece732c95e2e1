"""The objective ``masked_image``, its loss, its trained parts and its settings."""

import pytest
import torch
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives.masked_image import (
    MaskedImage,
    MaskedImageConfig,
    PixelTarget,
    fill_by_smoothing,
)
from samgraft.ssl.scope import freeze_depths
from samgraft.ssl.views.masking import MaskKind, token_masks, upsample_mask
from tiny_encoders import slices, tiny_encoder

COUNTERS = (7, 8)


def make_objective(**settings):
    torch.manual_seed(1)
    config = MaskedImageConfig(mask_unit_px=8, decoder_dim=8, num_decoder_blocks=1, **settings)
    return MaskedImage(tiny_encoder(), config, seed=3)


def hidden_pixels(mask_ratio=0.5, size=32):
    masks = token_masks(COUNTERS, seed=3, grid_hw=(size // 8, size // 8), mask_ratio=mask_ratio)
    return upsample_mask(masks, image_size=size)


def warm(objective):
    """Give the last layer random weights. It starts at zero, which would hide every influence."""
    with torch.no_grad():
        objective.decoder.to_pixels.weight.normal_(std=0.5)
        objective.mask_token.normal_()
    return objective


def test_loss__zero_prediction_equals_a_calculation_by_hand():
    images = slices()
    hidden = hidden_pixels()
    expected = []
    for image, holes in zip(images, hidden, strict=True):
        visible = image[~holes]
        deviation = visible.std(unbiased=False).clamp_min(0.05)
        expected.append(((image[holes] - visible.mean()) / deviation).abs())
    result = make_objective().loss(images, sample_counters=COUNTERS, step=0)
    torch.testing.assert_close(result.total, torch.cat(expected).mean())


def test_loss__unit_target_equals_a_calculation_by_hand():
    images = slices()
    squares = images.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 1, 4, 4, 8, 8)
    mean = squares.mean((-1, -2), keepdim=True)
    normalised = ((squares - mean) / (squares.var((-1, -2), unbiased=False, keepdim=True) + 1e-6).sqrt()).abs()
    masks = token_masks(COUNTERS, seed=3, grid_hw=(4, 4), mask_ratio=0.5)
    expected = normalised[:, 0][masks].mean()
    result = make_objective(target=PixelTarget.UNIT).loss(images, sample_counters=COUNTERS, step=0)
    torch.testing.assert_close(result.total, expected, rtol=1e-4, atol=0)


def test_loss__detail_target_begins_at_the_error_of_smoothing():
    images = slices()
    objective = make_objective(target=PixelTarget.DETAIL)
    result = objective.loss(images, sample_counters=COUNTERS, step=0)
    smoothing = objective.references(images, sample_counters=COUNTERS)["smoothing of the visible pixels"]
    assert result.parts["grey_error"].item() == pytest.approx(smoothing, rel=1e-5)
    changed = torch.where(hidden_pixels(), torch.rand_like(images), images)
    first, second = (warm(objective)._predict(x, COUNTERS) for x in (images, changed))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.std, second.std)


def test_loss__does_not_depend_on_the_prediction_of_visible_pixels():
    objective = warm(make_objective())
    images, hidden = slices(), hidden_pixels()
    guess = objective._predict(images, COUNTERS)
    assert torch.equal(guess.hidden_B1SS, hidden)
    by_hand = (guess.picture_B1SS - (images - guess.mean) / guess.std).abs()[hidden].mean()
    result = objective.loss(images, sample_counters=COUNTERS, step=0)
    torch.testing.assert_close(result.total, by_hand)


@pytest.mark.parametrize("settings", [{}, {"train_neck": True}, {"decoder_sees_pixels": True}])
def test_output__does_not_depend_on_hidden_pixels(settings):
    objective = warm(make_objective(**settings))
    images, hidden = slices(), hidden_pixels()
    changed = torch.where(hidden, torch.rand_like(images), images)
    first = objective.panel(images, sample_counters=COUNTERS)
    second = objective.panel(changed, sample_counters=COUNTERS)
    guess = first.columns.index("output")
    assert torch.equal(first.images_KBHW[guess], second.images_KBHW[guess])
    visible_changed = objective.panel(torch.where(hidden, images, 1 - images), sample_counters=COUNTERS)
    assert not torch.equal(first.images_KBHW[guess], visible_changed.images_KBHW[guess])


def moved_by_one_step(objective):
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    objective.loss(slices(), sample_counters=COUNTERS, step=0).total.backward()
    optimizer.step()
    return {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}


def parameter_names(objective, *, without=()):
    return {name for name, _ in objective.named_parameters() if not name.startswith(tuple(without))}


def test_gradient_flow__neck_and_statistics_do_not_change():
    objective = warm(make_objective())
    assert moved_by_one_step(objective) == parameter_names(objective, without=["encoder.neck"])


def test_gradient_flow__train_neck_changes_the_neck():
    objective = warm(make_objective(train_neck=True))
    assert moved_by_one_step(objective) == parameter_names(objective)


def test_gradient_flow__skip_connection_changes_too():
    objective = warm(make_objective(decoder_sees_pixels=True))
    moved = moved_by_one_step(objective)
    assert moved == parameter_names(objective, without=["encoder.neck"])
    assert "decoder.embed_pixels.weight" in moved


def test_output__unit_target_does_not_depend_on_hidden_statistics():
    objective = warm(make_objective(decoder_sees_pixels=True, target=PixelTarget.UNIT))
    images, hidden = slices(), hidden_pixels()
    changed = torch.where(hidden, torch.rand_like(images), images)
    first, second = (objective._predict(x, COUNTERS).picture_B1SS for x in (images, changed))
    assert torch.equal(first, second)


def test_gradient_flow__frozen_depths_and_their_mask_token_do_not_change():
    objective = warm(make_objective())
    frozen = freeze_depths(objective.encoder, 2)
    assert frozen[0].startswith("patch_embed")
    objective = MaskedImage(objective.encoder, objective.config, seed=3)
    warm(objective)
    kept = ["encoder.neck", "mask_token", *(f"encoder.{name}" for name in frozen)]
    assert moved_by_one_step(objective) == parameter_names(objective, without=kept)


def test_panel__has_input_visible_prediction_and_filling():
    objective = warm(make_objective())
    images, hidden = slices(), hidden_pixels()[:, 0]
    given, seen, guess, filled = objective.panel(images, sample_counters=COUNTERS).images_KBHW
    assert torch.equal(given, images[:, 0])
    assert (seen[hidden] == 0.5).all()
    assert torch.equal(seen[~hidden], given[~hidden])
    assert torch.equal(filled[hidden], guess[hidden])
    assert torch.equal(filled[~hidden], given[~hidden])


def test_panel__prediction_is_shown_in_grey_values():
    """A prediction of one unit everywhere is one deviation of the visible pixels above their mean."""
    objective, images, hidden = make_objective(), 0.3 * slices(), hidden_pixels()
    with torch.no_grad():
        objective.decoder.to_pixels.weight.zero_()
        objective.decoder.to_pixels.bias.fill_(1.0)
    guess = objective.panel(images, sample_counters=COUNTERS).images_KBHW[2]
    for picture, image, hidden_1SS in zip(guess, images, hidden, strict=True):
        visible = image[~hidden_1SS]
        expected = visible.mean() + max(0.05, float(visible.std(correction=0)))
        torch.testing.assert_close(picture, expected.expand_as(picture))


def test_references__visible_mean_equals_the_untrained_decoder():
    objective = make_objective()
    images = slices()
    untrained = objective.loss(images, sample_counters=COUNTERS, step=0).parts["grey_error"]
    references = objective.references(images, sample_counters=COUNTERS)
    assert references["mean of the visible pixels"] == pytest.approx(float(untrained), rel=1e-5)
    ramp = torch.linspace(0, 1, 32).expand(2, 1, 32, 32).contiguous()
    references = objective.references(ramp, sample_counters=COUNTERS)
    assert references["smoothing of the visible pixels"] < 0.5 * references["mean of the visible pixels"]


def test_fill_by_smoothing__equals_the_weighted_mean_of_visible_neighbours():
    images = torch.tensor([[[[1.0, 5.0, 3.0]]]])
    hidden = torch.tensor([[[[False, True, False]]]])
    filled = fill_by_smoothing(images, hidden, sigma_px=1.0)
    assert filled[0, 0, 0, 1].item() == pytest.approx(2.0)


def test_loss__falls_on_a_constant_slice():
    objective = make_objective()
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective.loss(slices(), sample_counters=COUNTERS, step=0).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arch", "stem", "unit_px"),
    [("vit_t", Stem.conv1x1, 8), ("vit_t", Stem.conv3x3, 16), ("vit_b", None, 16)],
)
def test_cpu_preset__hidden_squares_fit_every_encoder(arch, stem, unit_px):
    """Squares of half a token of MobileSAM and vit_b stopped the first command once."""
    layer = {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"base": "random"}}
    preset = load_config(PretrainConfig, layers=[packaged_config("pretrain/masked_image-cpu.yaml"), layer])
    with torch.device("meta"):
        encoder = arch_spec(arch, stem).build(image_size=preset.model.image_size)
        objective = MaskedImage(encoder, preset.objective.masked_image, seed=0)
    assert objective.mask_unit_px == unit_px
    assert objective.draw_masks([0], side=objective.mask_side).shape == (1, 64 // unit_px, 64 // unit_px)


@pytest.mark.parametrize("unit", [6, 24])
def test_masked_image__unsuitable_square_is_refused(unit):
    with pytest.raises(ValueError, match=f"mask_unit_px must be a multiple of 4 px for vit_t.*got {unit}"):
        MaskedImage(tiny_encoder(), MaskedImageConfig(mask_unit_px=unit), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_kind": MaskKind.PER_WINDOW}, "mask_kind of masked_image must be random or block"),
        ({"mask_ratio": 1.0}, r"mask_ratio\n  Input should be less than 1"),
        ({"mask_unit_px": 0}, r"mask_unit_px\n  Input should be greater than or equal to 1"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedImageConfig(**settings)
