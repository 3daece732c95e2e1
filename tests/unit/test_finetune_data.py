"""Classes, balance, augmentation, loss: what labels become on their way to the loss."""

import math

import numpy as np
import pytest
import torch
from samgraft.finetune.augment import AugmentConfig, SliceAugment
from samgraft.finetune.classes import ClassTable, choose_classes
from samgraft.finetune.inference import choose_channel
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.sampling import balance_foreground, has_foreground
from samgraft.shared.data.dataset import SliceRef
from samgraft.shared.data.store import SliceStore
from samgraft.shared.errors import DataError, UsageError
from store_factory import make_store

STILL = AugmentConfig(
    max_rotation_deg=0, min_scale=1, max_scale=1, max_shear=0, max_shift=0, flip_columns=False,
    max_log_gamma=0, max_log_contrast=0, blur_probability=0, noise_std=0,
)  # fmt: skip
STRONG = AugmentConfig(max_rotation_deg=180, max_scale=2.0, max_shear=0.3, max_shift=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=3))


def test_classes__ids_survive_the_way_to_channels_and_back():
    table = ClassTable(ids=(9, 4), names=("a", "b"))
    label = torch.tensor([[0, 4, 9], [7, 9, 0]])
    assert table.to_channels(label).tolist() == [[0, 2, 1], [0, 1, 0]]
    assert table.to_ids(table.to_channels(label)).tolist() == [[0, 4, 9], [0, 9, 0]]


@pytest.mark.parametrize("ids", [(), (0, 1), (2, 2)])
def test_classes__refuses_background_and_repeats(ids):
    with pytest.raises(UsageError, match="different label ids"):
        ClassTable(ids=ids, names=("x",) * len(ids))


def test_choose_classes__takes_all_of_the_store(store):
    assert choose_classes(store, [], train_patients=store.patient_ids) == ClassTable(ids=(1,), names=("lesion",))


def test_choose_classes__refuses_ids_the_store_does_not_have(store):
    with pytest.raises(DataError, match="got 5; it has 1"):
        choose_classes(store, [1, 5], train_patients=store.patient_ids)


def test_choose_classes__refuses_a_class_absent_from_training(store):
    with pytest.raises(DataError, match="must occur in the training part, 1 does not"):
        choose_classes(store, [1], train_patients=[])


def test_choose_classes__refuses_a_store_without_labels(tmp_path):
    unlabelled = SliceStore.open(make_store(tmp_path, num_patients=1, labelled=False))
    with pytest.raises(DataError, match="must have labels") as refusal:
        choose_classes(unlabelled, [], train_patients=unlabelled.patient_ids)
    assert "store build" in refusal.value.next_command


def test_balance__reaches_the_share_and_keeps_every_slice():
    refs = [SliceRef("s", i) for i in range(12)]
    flags = [i in (3, 7) for i in range(12)]
    balanced = balance_foreground(refs, flags, foreground_fraction=0.5)
    counts = [balanced.count(ref) for ref in refs]
    assert counts == [5 if flag else 1 for flag in flags]


def test_balance__leaves_enough_foreground_alone():
    refs = [SliceRef("s", i) for i in range(4)]
    assert balance_foreground(refs, [True, True, True, False], foreground_fraction=0.5) == refs
    assert balance_foreground(refs, [True] * 4, foreground_fraction=0) == refs


def test_has_foreground__is_what_the_label_says(store):
    record = store.series[0]
    table = ClassTable(ids=(1,), names=("lesion",))
    truth = [bool((store.read_label_slice(record.series_id, z) == 1).any()) for z in range(record.shape_zyx[0])]
    told = [has_foreground(store, SliceRef(record.series_id, z), table) for z in range(record.shape_zyx[0])]
    assert told == truth
    assert True in truth
    assert False in truth


def test_augment__switched_off_changes_nothing():
    image = torch.rand(1, 7, 9)
    label = torch.randint(0, 3, (7, 9))
    out, moved = SliceAugment(STILL)(image, label, np.random.default_rng(0))
    torch.testing.assert_close(out, image, atol=1e-6, rtol=0)
    assert torch.equal(moved, label)


@pytest.mark.parametrize("seed", range(5))
def test_augment__invents_no_class_and_moves_label_with_image(seed):
    """The label is where the image is bright, before and after; ids 0, 4 and 9 stay 0, 4 and 9."""
    image = torch.zeros(1, 64, 48)
    image[0, 20:44, 12:36] = 1.0
    label = (image[0] > 0.5).long() * 4
    label[28:36, 20:28] = 9
    geometry = AugmentConfig(max_rotation_deg=180, max_scale=1.5, max_log_gamma=0, max_log_contrast=0, noise_std=0)
    out, moved = SliceAugment(geometry)(image, label, np.random.default_rng(seed))
    assert set(moved.unique().tolist()) <= {0, 4, 9}
    inside = moved > 0
    assert ((out[0] > 0.5) == inside).float().mean() > 0.98
    assert inside.any()


def test_augment__depends_on_its_generator_only():
    image, label = torch.rand(1, 16, 16), torch.randint(0, 2, (16, 16))
    first = SliceAugment(STRONG)(image, label, np.random.default_rng(3))
    torch.manual_seed(99)
    np.random.seed(99)
    again = SliceAugment(STRONG)(image, label, np.random.default_rng(3))
    other = SliceAugment(STRONG)(image, label, np.random.default_rng(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].min() >= 0
    assert first[0].max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [({"min_scale": 0.0}, "0 < min_scale"), ({"noise_std": -1.0}, "noise_std"), ({"blur_probability": 2.0}, "blur")],
)
def test_augment_config__refuses(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)


def test_loss__hand_computed():
    """Four pixels with logits 0: p = 1/2; two are lesion. Dice = (2*1+eps)/(2+2+eps) = 1/2, CE = log 2."""
    logits = torch.zeros(1, 1, 2, 2)
    channels = torch.tensor([[[1, 0], [0, 1]]])
    assert SegmentationLoss()(logits, channels).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)
    assert SegmentationLoss(dice_weight=0.0)(logits, channels).item() == pytest.approx(math.log(2), abs=1e-6)


def test_loss__resizes_logits_never_labels():
    """A one-pixel lesion at label resolution must still count; shrunk to the logits' grid it would be lost."""
    logits = torch.full((1, 1, 2, 2), -4.0, requires_grad=True)
    channels = torch.zeros(1, 8, 8, dtype=torch.int64)
    empty = SegmentationLoss(dice_weight=0.0)(logits, channels)
    channels[0, 1, 1] = 1
    one = SegmentationLoss(dice_weight=0.0)(logits, channels)
    # One of 64 pixels costs 4.018 instead of 0.018.
    assert (one - empty).item() == pytest.approx(4.0 / 64, abs=1e-4)


def test_choose_channel__one_class_is_sams_rule_and_several_compete():
    logits = torch.tensor([[[[-1.0, 2.0]], [[-2.0, 3.0]]]])
    assert choose_channel(logits).tolist() == [[[0, 2]]]
    assert choose_channel(logits[:, :1]).tolist() == [[[0, 1]]]
