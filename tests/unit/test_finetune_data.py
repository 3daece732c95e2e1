"""Classes, balance of slices and losses."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samgraft.finetune.classes import ClassTable, choose_classes, clean_class_names
from samgraft.finetune.evaluation.metrics import ClassScore, class_scores
from samgraft.finetune.evaluation.postprocess import choose_postprocessing
from samgraft.finetune.evaluation.scores import case_rows
from samgraft.finetune.evaluation.validation import CaseResult, select_example_cases
from samgraft.finetune.loss import LossConfig, MaskLoss, Overlap, PixelTerm, SegmentationLoss
from samgraft.finetune.training.sampling import balance_foreground, has_foreground
from samgraft.shared.errors import DataError, NumericalError, UsageError
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.store.store import SliceStore
from store_factory import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("store"), num_patients=3))


def test_class_table__ids_to_channels_and_back_are_equal():
    table = ClassTable(ids=(9, 4), names=("a", "b"))
    label = torch.tensor([[0, 4, 9], [7, 9, 0]])
    assert table.to_channels(label).tolist() == [[0, 2, 1], [0, 1, 0]]
    assert table.to_ids(table.to_channels(label)).tolist() == [[0, 4, 9], [0, 9, 0]]


@pytest.mark.parametrize("ids", [(), (0, 1), (2, 2)])
def test_class_table__background_or_repeated_id_is_refused(ids):
    with pytest.raises(UsageError, match="different label ids"):
        ClassTable(ids=ids, names=("x",) * len(ids))


def test_choose_classes__default_is_all_of_the_store(store):
    assert choose_classes(store, [], train_patients=store.patient_ids) == ClassTable(ids=(1,), names=("lesion",))


@pytest.mark.parametrize(
    ("names", "cleaned"),
    [
        (["core", "rim"], ("core", "rim")),
        (["core/rim", "a\\b"], ("core_rim", "a_b")),
        (["a\nSegment0_Name:=x", "-rf", "  "], ("a_Segment0_Name:=x", "_rf", "class")),
        (["x", "x", "x"], ("x", "x (2)", "x (3)")),
    ],
)
def test_clean_class_names__are_safe_and_different(names, cleaned):
    assert clean_class_names(names) == cleaned


@pytest.mark.parametrize("name", ["a/b", "a\n", "-a", "\x1b[31m"])
def test_regions__unsafe_name_is_refused(name):
    with pytest.raises(UsageError, match="names of regions must be"):
        ClassTable.of_regions({name: [1]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_from_logits__not_finite_is_refused(value):
    """NaN would count as "not above 0" and give an empty mask."""
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0] = value
    for table in (ClassTable(ids=(1, 2), names=("a", "b")), ClassTable.of_regions({"a": [1], "b": [2]})):
        with pytest.raises(NumericalError, match="NaN or Inf for 1 of 8"):
            table.from_logits(logits)


def test_choose_classes__unknown_id_is_refused(store):
    with pytest.raises(DataError, match="got 5; it has 1"):
        choose_classes(store, [1, 5], train_patients=store.patient_ids)


def store_of(*label_voxels):
    """Return a store's facts with one patient per argument, whose scan has these label counts or no label (None)."""
    series = [
        SimpleNamespace(patient_id=f"p{number}", has_label=counts is not None, label_voxels=counts or {})
        for number, counts in enumerate(label_voxels)
    ]
    return SimpleNamespace(series=series, path=Path("lab.zarr"), label_names={})


def test_choose_classes__class_outside_training_is_refused_with_the_classes_inside():
    with pytest.raises(DataError, match=r"classes 2 do not occur in the training part.*data\.classes=\[1\]"):
        choose_classes(store_of({1: 9}, {1: 9, 2: 9}), [], train_patients=["p0"])


@pytest.mark.parametrize(
    ("label_voxels", "message"),
    [
        ([None], r"the store has no labels \(0 of 1 scan\)"),
        ([{0: 50, 1: 0}], r"the labels of the store \(1 labelled scan\) are empty"),
        ([None, {1: 5}], "no patient of the training part has labels"),
    ],
    ids=["no label files", "background only", "labels in other parts"],
)
def test_choose_classes__without_labels_reports_the_cause(label_voxels, message):
    with pytest.raises(DataError, match=message):
        choose_classes(store_of(*label_voxels), [], train_patients=["p0"])


def test_balance_foreground__share_is_reached_and_every_slice_kept():
    refs = [SliceRef("s", i) for i in range(12)]
    flags = [i in (3, 7) for i in range(12)]
    balanced = balance_foreground(refs, flags, foreground_fraction=0.5)
    counts = [balanced.count(ref) for ref in refs]
    assert counts == [5 if flag else 1 for flag in flags]


def test_balance_foreground__large_share_is_kept():
    refs = [SliceRef("s", i) for i in range(4)]
    assert balance_foreground(refs, [True, True, True, False], foreground_fraction=0.5) == refs
    assert balance_foreground(refs, [True] * 4, foreground_fraction=0) == refs


def test_has_foreground__equals_the_label(store):
    record = store.series[0]
    table = ClassTable(ids=(1,), names=("lesion",))
    truth = [bool((store.read_label_slice(record.series_id, z) == 1).any()) for z in range(record.shape_zyx[0])]
    told = [has_foreground(store, SliceRef(record.series_id, z), table) for z in range(record.shape_zyx[0])]
    assert told == truth
    assert True in truth
    assert False in truth


def test_loss__equals_a_value_worked_out_by_hand():
    """Four pixels with logits 0 have p = 1/2, and two are lesion. Dice = (2*1+eps)/(2+2+eps) = 1/2, CE = log 2."""
    logits = torch.zeros(1, 1, 2, 2)
    channels = torch.tensor([[[1, 0], [0, 1]]])
    assert SegmentationLoss()(logits, channels).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)
    assert SegmentationLoss(LossConfig(dice_weight=0.0))(logits, channels).item() == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_loss__logits_are_resized_and_labels_not():
    """A one-pixel lesion must count. On the grid of the logits it would be lost."""
    logits = torch.full((1, 1, 2, 2), -4.0, requires_grad=True)
    channels = torch.zeros(1, 8, 8, dtype=torch.int64)
    empty = SegmentationLoss(LossConfig(dice_weight=0.0))(logits, channels)
    channels[0, 1, 1] = 1
    one = SegmentationLoss(LossConfig(dice_weight=0.0))(logits, channels)
    # One of 64 pixels costs 4.018 instead of 0.018.
    assert (one - empty).item() == pytest.approx(4.0 / 64, abs=1e-4)


def test_from_logits__one_class_follows_sams_rule_and_several_compete():
    logits = torch.tensor([[[[-1.0, 2.0]], [[-2.0, 3.0]]]])
    table = ClassTable(ids=(9, 4), names=("a", "b"))
    assert table.from_logits(logits).tolist() == [[[0, 4]]]
    assert ClassTable(ids=(9,), names=("a",)).from_logits(logits[:, :1]).tolist() == [[[0, 9]]]


REGIONS = {"whole": [1, 2], "core": [2]}


def test_regions__masks_and_predictions_overlap():
    table = ClassTable.of_regions(REGIONS)
    label = torch.tensor([[[0, 1, 2]]])
    masks = table.to_target(label)
    assert masks.tolist() == [[[[False, True, True]], [[False, False, True]]]]
    logits = torch.where(masks > 0, 3.0, -3.0)
    predicted = table.from_logits(logits).numpy()
    assert predicted.tolist() == [[[0, 1, 3]]]
    for channel in range(2):
        truth = table.true_mask(label.numpy(), channel)
        assert np.array_equal(table.predicted_mask(predicted, channel), truth)
    scores = class_scores(predicted, label.numpy(), table)
    assert [s.dice for s in scores] == [1.0, 1.0]
    assert [s.true_voxels for s in scores] == [2, 1]


def test_regions__metrics_are_those_of_the_union(store):
    table = ClassTable.of_regions(REGIONS)
    label = np.zeros((3, 8, 8), dtype=np.int32)
    label[1, 2:5, 2:5], label[1, 3, 3] = 1, 2
    predicted = np.where(label == 1, 1, np.where(label == 2, 3, 0)).astype(np.int32)
    rows = case_rows(predicted, label, store.series[0], table, tolerance_mm=1.0)
    assert [row["class"] for row in rows] == ["whole", "core"]
    assert [(row["dice"], row["nsd"], row["hd95_mm"]) for row in rows] == [(1.0, 1.0, 0.0)] * 2
    with pytest.raises(UsageError, match="exclusive classes"):
        choose_postprocessing([("p", predicted, label)], table, weights_sha256="", split_sha256="")


@pytest.mark.parametrize("regions", [{"a": []}, {"a": [0, 1]}, {"a": [1, 1]}, {"a": [1, 2], "b": [2, 1]}])
def test_regions__bad_union_is_refused(regions):
    with pytest.raises(UsageError, match="label ids"):
        ClassTable.of_regions(regions)


def test_choose_classes__regions_are_checked_against_the_store(store):
    everyone = store.patient_ids
    assert choose_classes(store, [], regions={"x": [1]}, train_patients=everyone).members == ((1,),)
    with pytest.raises(DataError, match="got 2; it has 1"):
        choose_classes(store, [], regions={"x": [1, 2]}, train_patients=everyone)
    with pytest.raises(DataError, match="no patient of the training part has labels"):
        choose_classes(store, [], regions={"x": [1]}, train_patients=[])
    with pytest.raises(UsageError, match="both given"):
        choose_classes(store, [1], regions={"x": [1]}, train_patients=everyone)


def test_regions__loss_is_a_sigmoid_per_class():
    """Logits 0 give half Dice and log 2 in one class, correct ones give 0 in the other. The loss is the mean."""
    masks = torch.tensor([[[[True, False], [False, True]], [[True, True], [True, False]]]])
    logits = torch.stack([torch.zeros(2, 2), torch.where(masks[0, 1], 30.0, -30.0)])[None]
    loss = SegmentationLoss(overlapping=True)(logits, masks)
    assert loss.item() == pytest.approx((0.5 + math.log(2)) / 2, abs=1e-4)


def two_class_case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 8, 8, generator=generator)
    channels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    return logits, channels


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"overlap": Overlap.TVERSKY}, {"overlap": Overlap.TVERSKY, "tversky_fn": 3.0}, {"pixel": PixelTerm.FOCAL},
        {"pixel": PixelTerm.FOCAL, "focal_gamma": 0.5}, {"boundary_weight": 0.1}, {"class_weights": [1.0, 5.0]},
        {"size": 16}, {"dice_weight": 0.5}, {"ce_weight": 0.0},
    ],
)  # fmt: skip
def test_loss__every_option_changes_the_value(change, overlapping):
    logits, channels = two_class_case()
    target = torch.stack([channels == 1, channels == 2], dim=1) if overlapping else channels
    logits.requires_grad_()
    plain = SegmentationLoss(overlapping=overlapping)(logits, target)
    changed = SegmentationLoss(LossConfig(**change), overlapping=overlapping)(logits, target)
    assert abs(plain.item() - changed.item()) > 1e-3
    changed.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_loss__default_equals_monais_dice_ce():
    from monai.losses.dice import DiceCELoss

    logits, channels = two_class_case()
    oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    filled = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
    expected = oracle(filled, channels[:, None])
    assert SegmentationLoss()(logits, channels).item() == pytest.approx(expected.item(), abs=1e-6)


def test_loss__focal_with_gamma_0_is_cross_entropy():
    logits, channels = two_class_case()
    focal = SegmentationLoss(LossConfig(pixel=PixelTerm.FOCAL, focal_gamma=0.0))(logits, channels)
    assert focal.item() == pytest.approx(SegmentationLoss()(logits, channels).item(), abs=1e-5)


def test_loss__tversky_with_halves_is_dice():
    logits, channels = two_class_case()
    even = LossConfig(overlap=Overlap.TVERSKY, tversky_fp=0.5, tversky_fn=0.5)
    assert SegmentationLoss(even)(logits, channels).item() == pytest.approx(
        SegmentationLoss()(logits, channels).item(), abs=1e-4
    )


def test_loss__class_weights_scale_each_class():
    """A tiny weight of the second class leaves the Dice of the first one."""
    logits, channels = two_class_case()
    heavy = LossConfig(ce_weight=0.0, class_weights=[1e6, 1.0])
    only_first = SegmentationLoss(LossConfig(ce_weight=0.0, class_weights=[1.0, 1e-6]))(logits, channels)
    assert SegmentationLoss(heavy)(logits, channels).item() == pytest.approx(only_first.item(), abs=1e-4)


def test_loss__volumes_are_accepted():
    logits = torch.zeros(1, 2, 4, 4, 4)
    channels = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    # Three equal probabilities: cross-entropy is log 3, Dice between 0 and 1.
    loss = SegmentationLoss(LossConfig(dice_weight=0.0))(logits, channels)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"overlap": Overlap.TVERSKY}, {"pixel": PixelTerm.FOCAL}, {"boundary_weight": 0.1}]
)
def test_mask_loss__one_value_per_mask(change):
    """Each value equals that of the mask alone, so that the best of several can be chosen."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 4, generator=generator)
    masks = torch.rand(3, 8, 8, generator=generator) > 0.5
    loss = MaskLoss(LossConfig(**change))
    together = loss(logits, masks)
    alone = torch.cat([loss(logits[i : i + 1], masks[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [({"dice_weight": 0.0, "ce_weight": 0.0}, "must not both be 0"), ({"tversky_fp": 0.0}, "tversky"),
     ({"class_weights": [1.0, 0.0]}, "class_weights"), ({"size": 2}, r"size\n  Input should be greater")],
)  # fmt: skip
def test_loss_config__bad_value_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


def test_loss_config__other_number_of_class_weights_is_refused():
    with pytest.raises(UsageError, match=r"one per class \(3\), got 2"):
        LossConfig(class_weights=[1.0, 2.0]).check_classes(3)


def test_select_example_cases__best_median_and_worst_of_every_class():
    def case(name, *dice):
        scores = tuple(
            ClassScore(
                label_id=i, class_name=f"c{i}", true_voxels=0 if d is None else 100,
                predicted_voxels=0 if d is None else 100, intersection_voxels=int(100 * (d or 0)),
            )
            for i, d in enumerate(dice, start=1)
        )  # fmt: skip
        return CaseResult(series_id=name, patient_id=name, scores=scores, predicted=np.zeros(1))

    cases = [case("a", 0.9, 0.2), case("b", 0.5, None), case("c", 0.1, 0.4), case("d", 0.6, 0.9)]
    told = select_example_cases(cases)
    assert told["a"] == ["best c1", "worst c2"]
    assert told["b"] == ["median c1"]
    assert told["c"] == ["worst c1", "median c2"]
    assert told["d"] == ["best c2"]
    assert select_example_cases([]) == {}
