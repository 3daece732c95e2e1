"""Token masks, their number and spread, which depend on seed and counter only."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samgraft.ssl.views.masking import MaskKind, hidden_count, mask_unit, token_masks, upsample_mask


@pytest.mark.parametrize("kind", [MaskKind.RANDOM, MaskKind.BLOCK])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.95])
def test_token_masks__every_sample_hides_the_same_number(kind, mask_ratio):
    mask_Bhw = token_masks(range(20), seed=3, grid_hw=(8, 10), mask_ratio=mask_ratio, kind=kind)
    assert mask_Bhw.dtype == torch.bool
    assert mask_Bhw.sum((1, 2)).tolist() == [hidden_count(80, mask_ratio)] * 20


def test_token_masks__same_seed_and_counter_give_the_same_mask():
    settings = {"seed": 3, "grid_hw": (8, 8), "mask_ratio": 0.5}
    together = token_masks([4, 5, 6], **settings)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(together[1], token_masks([5], **settings)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], token_masks([4], **{**settings, "seed": 4})[0])


def test_token_masks__random_hides_every_position_equally_often():
    share_hw = token_masks(range(2000), seed=0, grid_hw=(4, 4), mask_ratio=0.25).float().mean(0)
    torch.testing.assert_close(share_hw, torch.full((4, 4), 0.25), atol=0.05, rtol=0)


def test_token_masks__blocks_are_more_connected_than_random_tokens():
    def neighbour_agreement(kind):
        mask = token_masks(range(50), seed=0, grid_hw=(12, 12), mask_ratio=0.5, kind=kind)
        return (mask[:, :, 1:] == mask[:, :, :-1]).float().mean().item()

    assert neighbour_agreement(MaskKind.BLOCK) > neighbour_agreement(MaskKind.RANDOM) + 0.2


def test_token_masks__per_window_hides_the_same_share_of_every_window():
    mask_Bhw = token_masks(
        range(5), seed=0, grid_hw=(8, 8), mask_ratio=0.75, kind=MaskKind.PER_WINDOW, attn_window_size=4
    )
    windows = mask_Bhw.reshape(5, 2, 4, 2, 4).sum((2, 4))
    assert windows.unique().tolist() == [12]


def test_token_masks__per_window_keeps_a_token_in_small_edge_windows():
    mask_Bhw = token_masks(
        range(5), seed=0, grid_hw=(5, 5), mask_ratio=0.9, kind=MaskKind.PER_WINDOW, attn_window_size=4
    )
    assert (~mask_Bhw[:, 4, 4]).all()
    assert mask_Bhw[:, :4, :4].sum((1, 2)).tolist() == [14] * 5


def test_token_masks__per_window_without_window_size_is_refused():
    with pytest.raises(ValueError, match="attn_window_size must be given"):
        token_masks([0], seed=0, grid_hw=(4, 4), mask_ratio=0.5, kind=MaskKind.PER_WINDOW)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 0.01])
def test_token_masks__ratio_that_hides_nothing_or_all_is_refused(mask_ratio):
    with pytest.raises(ValueError, match="must hide at least one token and keep one"):
        token_masks([0], seed=0, grid_hw=(4, 4), mask_ratio=mask_ratio)


def test_upsample_mask__covers_the_pixels_below_each_token():
    mask_Bhw = torch.tensor([[[True, False], [False, False]]])
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[..., :2, :2] = True
    assert torch.equal(upsample_mask(mask_Bhw, image_size=4), expected)


def test_upsample_mask__grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="must divide image_size 5"):
        upsample_mask(torch.zeros(1, 2, 2, dtype=torch.bool), image_size=5)


def test_upsample_mask__rows_and_columns_have_their_own_size():
    mask_Bhw = torch.zeros(1, 2, 4, dtype=torch.bool)
    mask_Bhw[0, 1, 2] = True
    expected = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    expected[..., 4:, 4:6] = True
    assert torch.equal(upsample_mask(mask_Bhw, image_size=8), expected)


def test_mask_unit__half_and_double_are_equally_far():
    """The wanted side is 5.76 px, nearer to 8 than to 4 by its ratio and nearer to 4 by its difference."""
    encoder = SimpleNamespace(spec=SimpleNamespace(natural_mask_unit_px=None), image_size=48, stride=4)
    assert mask_unit(encoder, None, share=0.12) == 8
