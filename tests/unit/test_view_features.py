"""Features of small views in the windowed ViTs, with SAM's own positions and whole windows."""

import torch
from samgraft.shared.encoders.sam import to_pixels
from samgraft.ssl.views.view_features import draw_places, view_features
from tiny_encoders import plain_encoder, slices, tiny_encoder


def test_view_features__small_view_equals_a_part_of_the_grid():
    encoder, views = plain_encoder(), slices(size=48)
    places = torch.tensor([[0, 0], [0, 3]])
    small = view_features(encoder, views, with_neck=False, places_B2=places)
    assert small.shape == (2, 16, 3, 3)
    for view, (row, column), features in zip(views, places.tolist(), small, strict=True):
        canvas = torch.rand(1, 1, 96, 96)
        canvas[0, :, row * 16 : row * 16 + 48, column * 16 : column * 16 + 48] = view
        ids = torch.tensor([[(row + r) * 6 + column + c for r in range(3) for c in range(3)]])
        expected = encoder.forward_visible(to_pixels(canvas, encoder.spec), ids)
        torch.testing.assert_close(features.flatten(1).T, expected[0], atol=1e-5, rtol=1e-5)


def test_view_features__full_view_equals_the_encoder():
    for encoder, size in ((plain_encoder(), 96), (tiny_encoder(), 32)):
        views = slices(size=size)
        pixels = to_pixels(views, encoder.spec)
        assert torch.equal(view_features(encoder, views, with_neck=True), encoder(pixels))
        assert torch.equal(view_features(encoder, views, with_neck=False), encoder.forward_features(pixels))
    assert view_features(tiny_encoder(), slices(size=16), with_neck=False).shape == (2, 16, 4, 4)


def test_draw_places__are_multiples_of_windows_inside_the_grid():
    encoder = plain_encoder()  # 6 x 6 tokens, windows of 4
    places = draw_places(encoder, range(40), side_px=32, num_views=2, seed=0)
    assert places.shape == (80, 2)
    assert set(places.flatten().tolist()) == {0, 4}  # 2 tokens fit behind the first window too
    assert (draw_places(encoder, range(9), side_px=48, num_views=1, seed=0) == 0).all()
    again = draw_places(encoder, [5], side_px=32, num_views=2, seed=0)
    assert torch.equal(again, places.view(2, 40, 2)[:, 5])
    assert draw_places(tiny_encoder(), [0], side_px=16, num_views=1, seed=0) is None
