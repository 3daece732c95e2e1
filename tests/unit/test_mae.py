"""The objective ``mae``, whose loss covers hidden tokens only and whose encoder never receives them."""

import dataclasses

import pytest
import torch
from samgraft.shared.config import load_config
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import UsageError
from samgraft.ssl.config import PretrainConfig
from samgraft.ssl.objectives.decoders import (
    Decoder,
    DecoderKind,
    chosen_ids,
    from_windows,
    sincos_positions,
    to_windows,
    window_side,
)
from samgraft.ssl.objectives.mae import MAE, Layout, MAEConfig
from samgraft.ssl.views.masking import MaskKind, token_masks, upsample_mask
from tiny_encoders import PLAIN_VIT, plain_encoder, slices, tiny_encoder

COUNTERS = (7, 8)


def make_objective(**settings):
    torch.manual_seed(1)
    config = MAEConfig(decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1, **settings)
    return MAE(plain_encoder(), config, seed=3)


def images_of(seed=0):
    return slices(size=96, seed=seed)


def masks_of(mask_ratio=0.75, **settings):
    return token_masks(COUNTERS, seed=3, grid_hw=(6, 6), mask_ratio=mask_ratio, **settings)


def test_loss__normalised_targets_equal_a_calculation_by_hand():
    objective = make_objective()
    images, masks = images_of(), masks_of()
    ids_hidden = chosen_ids(masks.flatten(1))
    guess, _ = objective._predict(images, masks, ids_hidden)
    errors, grey_errors = [], []
    for image, answers, numbers in zip(images[:, 0], guess, ids_hidden, strict=True):
        for answer, number in zip(answers, numbers.tolist(), strict=True):
            row, column = divmod(number, 6)
            square = image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].flatten()
            target = (square - square.mean()) / (square.var() + 1e-6).sqrt()
            errors.append((answer - target).square())
            grey_errors.append((answer.detach() * (square.var() + 1e-6).sqrt() + square.mean() - square).abs())
    result = objective.loss(images, sample_counters=COUNTERS, step=0)
    torch.testing.assert_close(result.total, torch.cat(errors).mean())
    torch.testing.assert_close(result.parts["grey_error"], torch.cat(grey_errors).mean())
    assert ids_hidden.shape == (2, 27)
    assert all(masks[b].flatten()[ids_hidden[b]].all() for b in range(2))


def test_loss__plain_targets_equal_a_calculation_by_hand():
    objective = make_objective(norm_pix_loss=False)
    with torch.no_grad():
        objective.decoder.to_answer.weight.zero_()
        objective.decoder.to_answer.bias.fill_(0.25)
    images = images_of()
    hidden = upsample_mask(masks_of(), image_size=96)
    expected = (images[hidden] - 0.25).square().mean()
    torch.testing.assert_close(objective.loss(images, sample_counters=COUNTERS, step=0).total, expected)


@pytest.mark.parametrize(
    "settings",
    [
        *({"mask_kind": kind} for kind in MaskKind),
        *({"decoder": kind} for kind in DecoderKind),
        {"layout": Layout.PLAIN_VIT},
    ],
    ids=str,
)
def test_prediction__does_not_depend_on_hidden_pixels(settings):
    objective = make_objective(**settings)
    images, masks = images_of(), objective.draw_masks(COUNTERS, side=objective.grid)
    hidden, ids_hidden = upsample_mask(masks, image_size=96), chosen_ids(masks.flatten(1))
    first, _ = objective._predict(images, masks, ids_hidden)
    second, _ = objective._predict(torch.where(hidden, torch.rand_like(images), images), masks, ids_hidden)
    assert torch.equal(first, second)
    third, _ = objective._predict(torch.where(hidden, images, 1 - images), masks, ids_hidden)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ("encoder.neck",)),
        ({"decoder": DecoderKind.WINDOWED}, ("encoder.neck",)),
        ({"decoder": DecoderKind.FULL}, ("encoder.neck",)),
        ({"answered_share": 0.3}, ("encoder.neck",)),
        (
            {"layout": Layout.PLAIN_VIT},
            ("encoder.neck", *(f"encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw")),
        ),
    ],
    ids=str,
)
def test_gradient_flow__everything_changes_but_the_neck(settings, kept):
    objective = make_objective(**settings)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1.0)
    objective.loss(images_of(), sample_counters=COUNTERS, step=0).total.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    optimizer.step()
    moved = {name for name, tensor in objective.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith(kept)}


def test_answered_share__predicts_a_part_that_differs_between_samples():
    objective = make_objective(answered_share=1 / 3)
    masks = objective.draw_masks(COUNTERS, side=objective.grid)
    asked = objective._predicted_ids(masks, COUNTERS)
    assert asked.shape == (2, 9)  # of 27 hidden ones
    assert masks.flatten(1).gather(1, asked).all()
    assert torch.equal(asked, objective._predicted_ids(masks, COUNTERS))
    places = [[chosen_ids(masks.flatten(1))[b].tolist().index(i) for i in asked[b].tolist()] for b in range(2)]
    assert places[0] != places[1]
    whole = make_objective().loss(images_of(), sample_counters=COUNTERS, step=0).total
    assert objective.loss(images_of(), sample_counters=COUNTERS, step=0).total != whole


def test_layout__plain_vit_has_no_windows_and_no_relative_positions():
    spec = dataclasses.replace(PLAIN_VIT, global_blocks=(0, 1))
    objective = make_objective(layout=Layout.PLAIN_VIT)
    torch.manual_seed(0)
    everywhere = spec.build(image_size=96)
    state = objective.encoder.state_dict()
    with torch.no_grad():
        for name, tensor in everywhere.state_dict().items():
            tensor.copy_(torch.zeros_like(tensor) if "rel_pos" in name else state[name])
    images, masks = images_of(), masks_of()
    _, visible = objective._predict(images, masks, chosen_ids(masks.flatten(1)))
    expected = everywhere.forward_visible(to_pixels(images, spec), chosen_ids(~masks.flatten(1)))
    torch.testing.assert_close(visible, expected, atol=1e-5, rtol=1e-5)
    _, windowed = make_objective()._predict(images, masks, chosen_ids(masks.flatten(1)))
    assert not torch.allclose(visible, windowed, atol=1e-3)


@pytest.mark.parametrize("kind", list(DecoderKind))
def test_decoder__visible_tokens_belong_to_their_places(kind):
    """The order of the visible tokens is of no consequence, but their places are."""
    torch.manual_seed(2)
    shape = MAEConfig(decoder=kind, decoder_dim=16, num_decoder_heads=2, num_decoder_blocks=1).decoder_shape()
    decoder = Decoder(5, shape, grid=6, out_dim=3)
    hidden, kept = (chosen_ids(mask.flatten(1)) for mask in (masks_of(), ~masks_of()))
    visible = torch.randn(2, kept.shape[1], 5)
    expected = decoder(visible, kept, hidden)
    torch.testing.assert_close(decoder(visible.flip(1), kept.flip(1), hidden), expected)
    assert (decoder(visible, kept.flip(1), hidden) - expected).abs().amax(dim=(1, 2)).min() > 1e-3


def test_decoder__windows_round_trip_and_do_not_mix():
    tokens = torch.arange(2 * 36 * 3.0).view(2, 36, 3)
    windows = to_windows(tokens, 6, 3)
    assert windows.shape == (8, 9, 3)
    assert windows[1, :, 0].div(3).tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert torch.equal(from_windows(windows, 6, 3), tokens)
    assert [window_side(grid) for grid in (6, 16, 64, 28, 17)] == [6, 16, 16, 14, 17]


def test_panel__changes_hidden_pixels_only():
    objective = make_objective(norm_pix_loss=False)
    with torch.no_grad():
        objective.decoder.to_answer.weight.zero_()
        objective.decoder.to_answer.bias.copy_(torch.linspace(0, 1, 256))
    images = images_of()
    hidden = upsample_mask(objective.draw_masks(COUNTERS, side=objective.grid), image_size=96)[:, 0]
    given, seen, filled = objective.panel(images, sample_counters=COUNTERS).images_KBHW
    assert torch.equal(given, images[:, 0])
    assert (seen[hidden] == 0.5).all()
    assert torch.equal(filled[~hidden], given[~hidden])
    ramp = torch.linspace(0, 1, 256).view(16, 16).repeat(6, 6)
    assert torch.equal(filled[0][hidden[0]], ramp[hidden[0]])


def test_panel__normalised_prediction_gets_the_mean_and_deviation_of_its_token():
    """A prediction of 0 everywhere is the mean of the token, one of 1/2 is half a deviation brighter."""
    objective, images = make_objective(), 0.3 + 0.3 * images_of()
    hidden = upsample_mask(objective.draw_masks(COUNTERS, side=objective.grid), image_size=96)[:, 0]
    for predicted in (0.0, 0.5):
        with torch.no_grad():
            objective.decoder.to_answer.weight.zero_()
            objective.decoder.to_answer.bias.fill_(predicted)
        given, _, filled = objective.panel(images, sample_counters=COUNTERS).images_KBHW
        squares = given.unflatten(1, (6, 16)).unflatten(3, (6, 16)).movedim(2, 3).flatten(3)
        grey = squares.mean(-1) + predicted * (squares.var(-1) + 1e-6).sqrt()
        expected = grey.repeat_interleave(16, 1).repeat_interleave(16, 2)
        torch.testing.assert_close(filled[hidden], expected[hidden])


def test_loss__falls_when_trained():
    objective = make_objective(norm_pix_loss=False)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective.loss(images_of(), sample_counters=COUNTERS, step=0).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_sincos_positions__differ_between_rows_and_columns():
    positions = sincos_positions(4, 16).view(4, 4, 16)
    assert torch.equal(positions[1, 0, :8], positions[1, 3, :8])
    assert torch.equal(positions[0, 2, 8:], positions[3, 2, 8:])
    assert len({tuple(p.tolist()) for p in positions.flatten(0, 1)}) == 16


def test_mae__encoder_that_cannot_drop_tokens_is_refused():
    with pytest.raises(UsageError, match=r"such as vit_b, got vit_t, whose.*Use METHOD=masked_image"):
        MAE(tiny_encoder(), MAEConfig(), seed=0)


def test_layout__plain_vit_with_sharded_weights_is_refused():
    layer = {
        "modality": "mri",
        "data": {"store": "a.zarr"},
        "model": {"base": "random"},
        "objective": {"name": "mae", "mae": {"layout": "plain_vit"}},
        "trainer": {"max_steps": 50, "strategy": "fsdp"},
    }
    with pytest.raises(UsageError, match=r"layout=plain_vit must not be combined with trainer.strategy=fsdp"):
        load_config(PretrainConfig, layers=[layer])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio\n  Input should be greater than 0"),
        ({"decoder_dim": 100}, "decoder_dim must be a multiple of 4 times num_decoder_heads"),
        ({"num_decoder_blocks": 0}, r"num_decoder_blocks\n  Input should be greater than or equal to 1"),
        ({"answered_share": 0.0}, r"answered_share\n  Input should be greater than 0"),
    ],
)
def test_config__bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MAEConfig(**settings)
