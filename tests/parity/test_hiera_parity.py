"""Hiera against SAM 2's own code and against the definition of its attention, dense and with units left out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_factory import randomise, tiny_hiera_spec
from original_hiera import masked_stages, original_encoder
from samgraft.shared.encoders.hiera import HieraEncoder, HieraSpec, map_to_units, units_to_map
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.weights.transformers_format import save_transformers_encoder


def encoder_of(image_size: int, spec: HieraSpec | None = None) -> HieraEncoder:
    encoder = (spec or tiny_hiera_spec()).build(image_size=image_size)
    randomise(encoder)
    return encoder


def images_of(encoder: HieraEncoder, count: int = 2) -> torch.Tensor:
    shape = (count, 3, encoder.image_size, encoder.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(encoder.parameters()))


@pytest.mark.parametrize("image_size", [32, 96, 288])
def test_encoder__equals_the_original(image_size: int) -> None:
    ours = encoder_of(image_size)
    theirs = original_encoder(ours.spec)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    _compare_with_original(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [256, 512, 1024])
@pytest.mark.parametrize("arch", ["sam2_t", "sam2_s", "sam2_bp", "sam2_l"])
def test_encoder__of_real_shape_equals_the_original(arch: str, image_size: int) -> None:
    ours = arch_spec(arch).build(image_size=image_size)
    randomise(ours, scale=0.03)
    theirs = original_encoder(ours.spec)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    _compare_with_original(ours, theirs, count=1)


@pytest.mark.parametrize("image_size", [64, 288])
def test_encoder__equals_sam2_vision_model_of_transformers(tmp_path: Path, image_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    ours = encoder_of(image_size)
    tensors = {f"image_encoder.{name}": tensor for name, tensor in ours.state_dict().items()}
    save_transformers_encoder(tensors, tmp_path, ours.spec, image_size=image_size)
    theirs = transformers.Sam2VisionModel.from_pretrained(str(tmp_path)).eval()
    images = images_of(ours)
    with torch.no_grad():
        features, expected = ours.forward_with_high_res(images), theirs(images).fpn_hidden_states
    for found, wanted in zip([*features.high_res, features.embeddings], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def _compare_with_original(ours: HieraEncoder, theirs: torch.nn.Module, count: int = 2) -> None:
    images = images_of(ours, count)
    with torch.no_grad():
        features, expected = ours.forward_with_high_res(images), theirs(images)
        assert torch.equal(features.embeddings, ours(images))
    maps = [*features.high_res, features.embeddings]
    assert len(maps) == len(expected["backbone_fpn"]) == 3
    for found, wanted in zip(maps, expected["backbone_fpn"], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


KEPT = {
    "all": lambda grid: torch.arange(grid * grid).repeat(2, 1),
    "random": lambda grid: torch.stack([torch.randperm(grid * grid)[: max(1, grid * grid // 4)] for _ in range(2)]),
    # Two corners of the grid, so that most windows are empty and one image has units in edge windows only.
    "corners": lambda grid: torch.tensor([[0, 1, grid], [grid * grid - 1, grid * grid - 2, grid * (grid - 1) - 1]]),
    "ragged": lambda grid: torch.tensor([[grid + 1, 0, -1, -1], [2, 0, 1, grid * grid - 1]]),
}


@pytest.mark.parametrize("image_size", [96, 288])
@pytest.mark.parametrize("kind", sorted(KEPT))
def test_visible__equals_dense_with_hidden_keys_at_minus_infinity(kind: str, image_size: int) -> None:
    """288 px have a grid of 9 units, which windows of 7 do not divide."""
    torch.manual_seed(0)
    encoder = encoder_of(image_size).double()
    images, ids = images_of(encoder), KEPT[kind](encoder.grid)
    kept = ids >= 0
    visible = torch.zeros(2, encoder.grid**2 + 1, dtype=torch.bool)
    visible.scatter_(1, torch.where(kept, ids, encoder.grid**2), value=True)
    visible = visible[:, :-1].unflatten(1, (encoder.grid, encoder.grid))

    def expected() -> torch.Tensor:
        *_, third, fourth = (map_to_units(m.permute(0, 3, 1, 2), grid=encoder.grid) for m in reference())
        units = torch.cat([third.flatten(2), fourth.flatten(2)], -1)
        return units.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, units.shape[-1]))

    def reference() -> list[torch.Tensor]:
        return masked_stages(encoder, images, visible)

    results = []
    for run in (lambda: encoder.forward_visible(images, ids), expected):
        encoder.zero_grad()
        out = run()[kept]
        (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).pow(2).mean().backward()
        results.append((out.detach(), {n: p.grad.clone() for n, p in encoder.trunk.named_parameters()}))
    (out, grads), (wanted, wanted_grads) = results
    torch.testing.assert_close(out, wanted, atol=1e-11, rtol=1e-11)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-11 * max(1.0, float(grad.abs().max())), rtol=0)


def test_visible__of_all_units_equals_the_dense_encoder() -> None:
    encoder = encoder_of(288)
    images = images_of(encoder)
    order = torch.arange(81).repeat(2, 1)
    with torch.no_grad():
        features, expected = (
            encoder.units_to_features(encoder.forward_visible(images, order)),
            encoder.forward_features(images),
        )
    torch.testing.assert_close(features, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_visible__does_not_depend_on_hidden_pixels() -> None:
    """The patch embedding overlaps, so a hidden neighbour's pixels must not enter it either."""
    encoder = encoder_of(96)
    images = images_of(encoder)
    hidden = torch.ones(2, 9, dtype=torch.bool)
    ids = torch.tensor([[0, 4, 5], [8, 2, 1]])
    hidden.scatter_(1, ids, value=False)
    pixels = hidden.view(2, 1, 3, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    changed = torch.where(pixels, images + 100.0, images)
    with torch.no_grad():
        out = encoder.forward_visible(images, ids)
        assert torch.equal(out, encoder.forward_visible(changed, ids))
        assert not torch.equal(out, encoder.forward_visible(torch.where(pixels, images, images + 1.0), ids))


@pytest.mark.parametrize("side", [3, 6, 24])
def test_features__do_not_depend_on_hidden_pixels(side: int) -> None:
    encoder = encoder_of(96)
    images = images_of(encoder)
    mask = torch.rand(2, side, side, generator=torch.Generator().manual_seed(3)) < 0.5
    pixels = mask[:, None].repeat_interleave(96 // side, 2).repeat_interleave(96 // side, 3)
    token = torch.linspace(-1, 1, encoder.mask_token_dim)
    with torch.no_grad():
        out = encoder.forward_features(images, token_mask_Bhw=mask, mask_token=token)
        changed = torch.where(pixels, images + 100.0, images)
        assert torch.equal(out, encoder.forward_features(changed, token_mask_Bhw=mask, mask_token=token))
        assert not torch.equal(out, encoder.forward_features(images, token_mask_Bhw=mask))
        nothing = torch.zeros_like(mask)
        assert torch.equal(encoder.forward_features(images), encoder.forward_features(images, token_mask_Bhw=nothing))


def test_views_of_another_size__equal_an_encoder_of_that_size() -> None:
    large, small = encoder_of(96), encoder_of(64)
    small.load_state_dict(large.state_dict())
    views = images_of(small)
    with torch.no_grad():
        assert torch.equal(large.forward_features(views), small.forward_features(views))


def test_windows__of_the_large_shape_differ_from_those_of_the_tiny_one() -> None:
    """At 512 px windows of 8 units divide the grid, and windows of 7 units do not."""
    images = torch.randn(1, 3, 512, 512)
    tiny = encoder_of(512)
    other = replace(tiny_hiera_spec(), attn_window_sizes=(8, 4, 16, 8)).build(image_size=512)
    other.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        assert not torch.allclose(tiny(images), other(images), atol=1e-3)


def test_units__are_squares_in_z_order() -> None:
    numbers = torch.arange(64.0).view(1, 1, 8, 8)
    units = map_to_units(numbers, grid=2)
    assert units[0, :, :, 0].tolist()[1] == [4, 5, 12, 13, 6, 7, 14, 15, 20, 21, 28, 29, 22, 23, 30, 31]
    assert torch.equal(units_to_map(units, grid=2), numbers)
    assert torch.equal(units_to_map(map_to_units(numbers, grid=8), grid=8), numbers)


def test_norms__have_the_epsilon_of_sam_2():
    """SAM 2 builds every norm with 1e-6, which is not the default of torch."""
    encoder = tiny_hiera_spec().build(image_size=64)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert len(norms) == 2 * sum(tiny_hiera_spec().depths)
