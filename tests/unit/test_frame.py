"""The input frame has a known geometry, keeps label ids and maps logits back to their pixels."""

import pytest
import torch
from samgraft.shared.samples.frame import fit_frame, image_to_frame, label_to_frame, logits_to_native


@pytest.mark.parametrize(
    ("native", "keep", "content"),
    [
        ((100, 50), True, (128, 64)),
        ((50, 100), True, (64, 128)),
        ((100, 50), False, (128, 128)),
        ((1, 300), True, (1, 128)),
        ((128, 128), True, (128, 128)),
    ],
)
def test_fit_frame__content_size_is_known(native, keep, content):
    assert fit_frame(native, image_size=128, keep_aspect=keep).content_hw == content


def test_image_to_frame__pads_right_and_bottom():
    frame = fit_frame((100, 50), image_size=128, keep_aspect=True)
    out = image_to_frame(torch.ones(1, 1, 100, 50), frame)
    assert out.shape == (1, 1, 128, 128)
    assert (out[..., :64] == 1).all()
    assert (out[..., 64:] == 0).all()


def test_image_to_frame__downscale_averages_instead_of_picking():
    checker = (torch.arange(64)[:, None] + torch.arange(64)[None]) % 2
    out = image_to_frame(checker[None, None].float(), fit_frame((64, 64), image_size=16, keep_aspect=True))
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.full((1, 1, 12, 12), 0.5), atol=0.05, rtol=0)


def test_label_to_frame__ids_stay_a_subset_and_large_ids_survive():
    label = torch.zeros(1, 30, 20, dtype=torch.int64)
    label[0, 5:9, 5:9] = 7
    label[0, 20:, :10] = 65535
    for size in (13, 64, 20):
        out = label_to_frame(label, fit_frame((30, 20), image_size=size, keep_aspect=True))
        assert out.dtype == torch.int64
        assert set(out.unique().tolist()) <= {0, 7, 65535}
        assert 65535 in out


def test_label_to_frame__is_aligned_with_the_image():
    # A label doubled by nearest neighbour must lie on the image's doubled pixels, not half a pixel beside.
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[0, 2:4, 4:6] = 1
    frame = fit_frame((8, 8), image_size=32, keep_aspect=True)
    out = label_to_frame(label, frame)
    expected = torch.zeros(32, 32, dtype=torch.int64)
    expected[8:16, 16:24] = 1
    assert torch.equal(out[0], expected)


@pytest.mark.parametrize("side", [128, 32])
@pytest.mark.parametrize("native", [(100, 50), (64, 64), (31, 200)])
@pytest.mark.parametrize("keep", [True, False])
def test_logits_to_native__undoes_image_to_frame(side, native, keep):
    # A linear ramp survives bilinear resizing: every native pixel gets its own value back away from the border.
    height, width = native
    ramp = (torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 2, width)[None])[None, None]
    frame = fit_frame(native, image_size=128, keep_aspect=keep)
    logits = image_to_frame(ramp, frame)
    if side != 128:
        logits = torch.nn.functional.interpolate(logits, size=(side, side), mode="bilinear")
    back = logits_to_native(logits, frame)
    assert back.shape == ramp.shape
    inner = (..., slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4))
    torch.testing.assert_close(back[inner], ramp[inner], atol=0.03, rtol=0)


def test_frame__slices_of_another_size_are_refused():
    frame = fit_frame((10, 10), image_size=32, keep_aspect=True)
    with pytest.raises(ValueError, match=r"must have \(10, 10\) pixels"):
        image_to_frame(torch.zeros(1, 1, 11, 10), frame)
    with pytest.raises(ValueError, match="positive"):
        fit_frame((0, 10), image_size=32, keep_aspect=True)


def test_label_to_frame__reduced_label_is_that_of_the_pixel_centres():
    """6 x 9 pixels become 2 x 3. The centres are rows 1 and 4 and columns 1, 4 and 7."""
    label = torch.arange(54).view(1, 6, 9)
    out = label_to_frame(label, fit_frame((6, 9), image_size=3, keep_aspect=True))
    assert out.tolist() == [[[10, 13, 16], [37, 40, 43], [0, 0, 0]]]
    assert out.dtype == torch.int64


def test_image_to_frame__reduction_averages_with_antialiasing():
    """8 columns become 2 with the triangle filter of four columns half width, whose weights are worked out here."""
    image = torch.eye(8)[:, None, None, :].expand(8, 1, 8, 8)  # one bright column each
    frame = fit_frame((8, 8), image_size=2, keep_aspect=True)
    out = image_to_frame(image, frame)
    weights = torch.tensor([0.625, 0.875, 0.875, 0.625, 0.375, 0.125, 0, 0]) / 3.5
    torch.testing.assert_close(out[:, 0, 0, 0], weights)
    torch.testing.assert_close(out[:, 0, 1, 1], weights.flip(0))


def test_image_to_frame__padding_is_on_the_right_and_at_the_bottom():
    wide = image_to_frame(torch.ones(1, 2, 2, 4), fit_frame((2, 4), image_size=4, keep_aspect=True))
    assert wide[0, 1].tolist() == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]
    tall = image_to_frame(torch.ones(1, 1, 4, 1), fit_frame((4, 1), image_size=4, keep_aspect=True))
    assert tall[0, 0].tolist() == [[1, 0, 0, 0]] * 4


def test_logits_to_native__enlarges_before_the_padding_is_cut():
    """A quarter of 8 px has 2 columns, and 3 of the 8 columns are content, a border inside a logit."""
    frame = fit_frame((8, 3), image_size=8, keep_aspect=True)
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    # Bilinear without aligned corners: the columns lie at (i + 0.5) / 4 - 0.5 = -0.375, -0.125, 0.125, ...
    expected = torch.tensor([0.0, 0.0, 0.125]).expand(1, 1, 8, 3)
    torch.testing.assert_close(logits_to_native(logits, frame), expected)


def test_label_to_frame__every_slice_of_a_batch_has_its_own_label():
    label = torch.arange(2 * 4 * 4).view(2, 4, 4)
    out = label_to_frame(label, fit_frame((4, 4), image_size=4, keep_aspect=True))
    assert torch.equal(out, label)
