"""Terms of the segmentation loss against values worked out by hand, with unequal weights and without symmetry."""

import math

import pytest
import torch
from samgraft.finetune.loss import LossConfig, MaskLoss, Overlap, PixelTerm, SegmentationLoss

LOGITS = torch.tensor([[[[2.0, -1.0, 0.5]], [[0.0, 1.5, -2.0]]]])  # (N = 1, C = 2, H = 1, W = 3), background 0
LABELS = torch.tensor([[[1, 0, 2]]])
WEIGHTS = [3.0, 5.0]


def pixels_only(**values):
    return LossConfig(dice_weight=0, ce_weight=1, **values)


def probabilities():
    """Return the softmax of the three pixels, background first."""
    rows = [[0.0, *LOGITS[0, :, 0, pixel].tolist()] for pixel in range(3)]
    return [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in rows]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_cross_entropy__class_weights_are_those_of_the_true_class():
    p = probabilities()
    terms = [-math.log(p[0][1]), -math.log(p[1][0]), -math.log(p[2][2])]
    assert float(SegmentationLoss(pixels_only())(LOGITS, LABELS)) == pytest.approx(sum(terms) / 3)
    weighted = (3 * terms[0] + 1 * terms[1] + 5 * terms[2]) / (3 + 1 + 5)
    loss = SegmentationLoss(pixels_only(class_weights=WEIGHTS))(LOGITS, LABELS)
    assert float(loss) == pytest.approx(weighted)


def test_focal__weight_and_gamma_of_the_true_class():
    p = probabilities()
    true = [p[0][1], p[1][0], p[2][2]]
    terms = [(1 - q) ** 3 * -math.log(q) for q in true]
    config = pixels_only(pixel=PixelTerm.FOCAL, focal_gamma=3, class_weights=WEIGHTS)
    expected = (3 * terms[0] + terms[1] + 5 * terms[2]) / 3
    assert float(SegmentationLoss(config)(LOGITS, LABELS)) == pytest.approx(expected)


def test_cross_entropy__regions_have_one_sigmoid_and_weight_each():
    masks = torch.tensor([[[[1, 0, 1]], [[0, 0, 1]]]])
    total = 0.0
    for channel, weight in enumerate(WEIGHTS):
        for pixel in range(3):
            q = sigmoid(float(LOGITS[0, channel, 0, pixel]))
            total += weight * -math.log(q if masks[0, channel, 0, pixel] else 1 - q)
    loss = SegmentationLoss(pixels_only(class_weights=WEIGHTS), overlapping=True)(LOGITS, masks)
    assert float(loss) == pytest.approx(total / 6)


@pytest.mark.parametrize(("label", "is_false_positive"), [(0, True), (1, False)])
def test_tversky__misses_and_false_alarms_have_their_own_weights(label, is_false_positive):
    """Two pixels, one hit with certainty, the other wrong with certainty: 1 - 1 / (1 + weight)."""
    logits = torch.tensor([[[[40.0, 40.0 if is_false_positive else -40.0]]]])
    config = LossConfig(overlap=Overlap.TVERSKY, ce_weight=0, tversky_fp=0.2, tversky_fn=0.9)
    loss = SegmentationLoss(config)(logits, torch.tensor([[[1, label]]]))
    weight = 0.2 if is_false_positive else 0.9
    assert float(loss) == pytest.approx(1 - 1 / (1 + weight), abs=1e-4)


def test_dice__is_taken_over_the_batch_and_weighted_by_class():
    """Class 1 has one hit of three pixels, class 2 a hit: Dice 2/3 and 1 over the batch."""
    logits = torch.full((2, 2, 1, 3), -40.0)
    labels = torch.tensor([[[1, 0, 0]], [[1, 2, 0]]])
    logits[0, 0, 0, 0] = logits[1, 1, 0, 1] = 40
    loss = SegmentationLoss(LossConfig(ce_weight=0, class_weights=WEIGHTS))(logits, labels)
    assert float(loss) == pytest.approx((3 * (1 - 2 / 3) + 5 * 0) / 8, abs=1e-4)


def test_loss_grid__reduced_labels_are_those_at_the_pixel_centres():
    """From 6 to 2 pixels a side the centres are pixels 1 and 4. Labels half a pixel off would be 0 and 3."""
    labels = torch.zeros(1, 6, 6, dtype=torch.int64)
    labels[0, 1, 4] = 1
    logits = torch.full((1, 1, 2, 2), -40.0)
    logits[0, 0, 0, 1] = 40
    assert float(SegmentationLoss(pixels_only(size=8))(logits, labels)) > 1  # 8 is the smallest grid: not reduced
    loss = SegmentationLoss(pixels_only(size=8))
    labels = torch.zeros(1, 24, 24, dtype=torch.int64)
    labels[0, 1, 4] = labels[0, 22, 19] = 1
    logits = torch.full((1, 1, 8, 8), -40.0)
    logits[0, 0, 0, 1] = logits[0, 0, 7, 6] = 40
    assert float(loss(logits, labels)) == pytest.approx(0, abs=1e-6)


def test_mask_loss__focal_term_is_a_mean_per_mask():
    logits = torch.tensor([[[2.0, -1.0]], [[-0.5, 3.0]]])
    masks = torch.tensor([[[1, 0]], [[1, 1]]])
    focal = MaskLoss(pixels_only(pixel=PixelTerm.FOCAL, focal_gamma=3))(logits, masks)
    plain = MaskLoss(pixels_only())(logits, masks)
    for mask in range(2):
        true = [sigmoid(v if m else -v) for v, m in zip(logits[mask, 0].tolist(), masks[mask, 0].tolist(), strict=True)]
        assert float(plain[mask]) == pytest.approx(sum(-math.log(q) for q in true) / 2)
        assert float(focal[mask]) == pytest.approx(sum((1 - q) ** 3 * -math.log(q) for q in true) / 2)
