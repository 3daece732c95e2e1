"""Multi-crop: views are pure functions of slice, seed and counter, lie in the content, and every option matters."""

import dataclasses

import pytest
import torch
from samgraft.shared.errors import UsageError
from samgraft.shared.models.architecture import arch_spec
from samgraft.ssl.crops import CropConfig, content_boxes, local_size, multi_crop
from tiny_encoders import PLAIN_VIT, TINY_VIT, slices

STILL = CropConfig(
    num_local_crops=1,
    min_global_area=1.0,
    max_aspect=1.0,
    flip_probability=0.0,
    max_gamma=1.0,
    max_contrast=1.0,
    max_shift=0.0,
    blur_probability=0.0,
)
"""Views that are the slice itself."""


def crop(images, config, counters=(7, 8), seed=3, size=16):
    return multi_crop(images, sample_counters=counters, seed=seed, config=config, local_size_px=size)


def test_multi_crop__depends_on_seed_and_counter_only():
    images, config = slices(count=3), CropConfig(num_local_crops=2)
    whole = crop(images, config, counters=(7, 8, 9))
    alone = crop(images[1:2], config, counters=(8,))
    assert torch.equal(whole.global_BCSS[1], alone.global_BCSS[0])  # first large view of the second slice
    assert torch.equal(whole.global_BCSS[3 + 1], alone.global_BCSS[1])
    assert torch.equal(whole.local_BCss[1], alone.local_BCss[0])
    assert torch.equal(whole.local_BCss[3 + 1], alone.local_BCss[1])
    assert not torch.equal(whole.global_BCSS[1], crop(images[1:2], config, counters=(9,)).global_BCSS[0])
    assert not torch.equal(whole.global_BCSS[1], crop(images[1:2], config, counters=(8,), seed=4).global_BCSS[0])


def test_multi_crop__shapes_and_range():
    crops = crop(slices(count=3), CropConfig(num_local_crops=2), counters=(1, 2, 3), size=12)
    assert crops.global_BCSS.shape == (6, 1, 32, 32)
    assert crops.local_BCss.shape == (6, 1, 12, 12)
    assert crops.global_BCSS.min() >= 0
    assert crops.global_BCSS.max() <= 1
    assert crop(slices(), CropConfig(num_local_crops=0)).local_BCss is None


def test_multi_crop__still_views_are_the_slice():
    images = slices()
    torch.testing.assert_close(crop(images, STILL).global_BCSS, torch.cat([images, images]))


@pytest.mark.parametrize(
    "change",
    [
        {"min_global_area": 0.3},
        {"max_aspect": 2.0, "min_global_area": 0.5},
        {"flip_probability": 1.0},
        {"max_gamma": 2.0},
        {"max_contrast": 2.0},
        {"max_shift": 0.3},
        {"blur_probability": 1.0, "max_blur_sigma_px": 3.0},
    ],
)
def test_multi_crop__every_option_changes_the_large_views(change):
    images = slices()
    changed = crop(images, dataclasses.replace(STILL, **change)).global_BCSS
    assert not torch.allclose(changed, torch.cat([images, images]), atol=1e-3)


def test_multi_crop__flip_is_a_flip_and_small_views_are_small_parts():
    images = slices()
    flipped = crop(images, dataclasses.replace(STILL, flip_probability=1.0))
    torch.testing.assert_close(flipped.global_BCSS[:2].flip(-1), images)
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32).contiguous()
    small = crop(ramp, dataclasses.replace(STILL, min_local_area=0.25, max_local_area=0.25), counters=(1,))
    spread = small.local_BCss.max() - small.local_BCss.min()
    assert spread.item() == pytest.approx(0.5, abs=0.05)


def test_multi_crop__stays_inside_the_content():
    images = torch.zeros(1, 1, 32, 32)
    images[..., 4:12, 6:26] = 1.0
    assert content_boxes(images) == [(4, 6, 8, 20)]
    crops = crop(images, dataclasses.replace(STILL, num_local_crops=4), counters=(1,))
    assert (crops.global_BCSS == 1).all()
    assert (crops.local_BCss == 1).all()
    assert content_boxes(torch.zeros(1, 1, 32, 32)) == [(0, 0, 32, 32)]


@pytest.mark.parametrize(
    ("spec", "image_size", "expected"),
    [
        pytest.param(arch_spec("vit_b"), 1024, 448, id="two windows of 14 tokens"),
        pytest.param(arch_spec("vit_b"), 448, 192, id="less than a window"),
        pytest.param(arch_spec("vit_t"), 64, 28, id="a window of 7 positions"),
        pytest.param(arch_spec("vit_t"), 112, 56, id="two windows"),
        pytest.param(TINY_VIT, 32, 16, id="tiny"),
        pytest.param(PLAIN_VIT, 96, 48, id="plain"),
    ],
)
def test_local_size__fits_windows(spec, image_size, expected):
    assert local_size(spec, image_size, CropConfig()) == expected


def test_local_size__takes_what_is_asked_for_or_refuses():
    assert local_size(arch_spec("vit_b"), 1024, CropConfig(local_size_px=224)) == 224
    with pytest.raises(UsageError, match=r"local_size_px must be a multiple of the encoder's stride 16.*got 100"):
        local_size(arch_spec("vit_b"), 1024, CropConfig(local_size_px=100))
    with pytest.raises(UsageError, match="up to image_size 64, got 96"):
        local_size(arch_spec("vit_b"), 64, CropConfig(local_size_px=96))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_local_crops": -1}, "num_local_crops must be at least 0"),
        ({"min_local_area": 0.5, "max_local_area": 0.4}, "crop areas must satisfy"),
        ({"min_global_area": 0.0}, "crop areas must satisfy"),
        ({"max_gamma": 0.9}, "max_gamma must be at least 1"),
        ({"flip_probability": 1.5}, "flip_probability must lie in"),
        ({"max_blur_sigma_px": 0.1}, "max_blur_sigma_px must be at least 0.3"),
    ],
)
def test_config__refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        CropConfig(**settings)
