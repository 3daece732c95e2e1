"""Voxels that are not annotated change no loss, no score and no sampling, and are kept from file to batch."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samgraft.finetune.classes import IGNORE_LABEL, ClassTable
from samgraft.finetune.evaluation.metrics import class_scores
from samgraft.finetune.evaluation.overlays import FILL_ALPHA, class_key, overlay
from samgraft.finetune.evaluation.postprocess import choose_postprocessing
from samgraft.finetune.evaluation.scores import case_rows
from samgraft.finetune.evaluation.surface import surface_score
from samgraft.finetune.loss import LossConfig, MaskLoss, Overlap, PixelTerm, SegmentationLoss
from samgraft.finetune.prompting.prompted_loss import _iou
from samgraft.finetune.training.sampling import has_foreground
from samgraft.shared.cli import main
from samgraft.shared.errors import UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.augment import AugmentConfig, SliceAugmentation
from samgraft.shared.samples.frame import fit_frame, label_to_frame
from samgraft.shared.samples.slices import SliceRef, select_slices
from samgraft.shared.samples.store_info import describe_store
from samgraft.shared.scans.discovery import SourceOptions
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.check import check_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.monitor.linear_probe import DiceCount, class_shares
from store_factory import make_scan, write_nifti
from tiny_sams import tiny_sam

CLASSES = ClassTable(ids=(3, 7), names=("a", "b"))
REGIONS = ClassTable.of_regions({"whole": [3, 7], "core": [7]})
LOSSES = [
    LossConfig(overlap=overlap, pixel=pixel, class_weights=weights)
    for overlap in Overlap
    for pixel in PixelTerm
    for weights in ([], [0.5, 2.0])
]


def random_case(seed):
    """Return logits (2, 2, 9, 8) and label ids (2, 9, 8), of which a random third is not annotated."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 2, 9, 8, generator=generator)
    label = torch.tensor([0, 3, 7])[torch.randint(0, 3, (2, 9, 8), generator=generator)]
    return logits, label.masked_fill(torch.rand(2, 9, 8, generator=generator) < 1 / 3, IGNORE_LABEL)


def remaining(logits, label):
    """Return the annotated pixels as one slice of one column."""
    known = label != IGNORE_LABEL
    return logits.movedim(1, -1)[known].T[None, :, :, None], label[known][None, :, None]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["exclusive", "regions"])
@pytest.mark.parametrize("config", LOSSES, ids=lambda c: f"{c.overlap.value}-{c.pixel.value}-{len(c.class_weights)}")
def test_segmentation_loss__equals_the_loss_of_the_remaining_pixels(config, classes, seed):
    loss = SegmentationLoss(config, overlapping=classes.is_overlapping)
    logits, label = random_case(seed)
    few_logits, few_label = remaining(logits, label)
    value = loss(logits.requires_grad_(), classes.to_target(label))
    assert value.item() == pytest.approx(loss(few_logits, classes.to_target(few_label)).item(), rel=1e-5)
    value.backward()
    is_ignored = (label == IGNORE_LABEL)[:, None].expand_as(logits)
    assert (logits.grad[is_ignored] == 0).all()
    assert (logits.grad[~is_ignored] != 0).all()


@pytest.mark.parametrize("overlap", list(Overlap))
@pytest.mark.parametrize("pixel", list(PixelTerm))
def test_mask_loss__equals_the_loss_of_the_remaining_pixels_of_each_mask(overlap, pixel):
    loss = MaskLoss(LossConfig(overlap=overlap, pixel=pixel))
    logits, label = random_case(0)
    target = (label > 0).long().masked_fill(label == IGNORE_LABEL, IGNORE_LABEL)
    values = loss(logits[:, 0], target)
    for value, logits_hw, target_hw in zip(values, logits[:, 0], target, strict=True):
        known = target_hw != IGNORE_LABEL
        alone = loss(logits_hw[known][None, None], target_hw[known][None, None])
        assert value.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["exclusive", "regions"])
def test_boundary_term__logits_of_ignored_pixels_change_nothing(classes):
    """The distance maps know no ignored pixels, so that only the value of such pixels can be compared."""
    loss = SegmentationLoss(LossConfig(boundary_weight=1.0), overlapping=classes.is_overlapping)
    logits, label = random_case(1)
    changed = logits.masked_fill((label == IGNORE_LABEL)[:, None], 5.0)
    assert loss(changed, classes.to_target(label)) == loss(logits, classes.to_target(label))


@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["exclusive", "regions"])
@pytest.mark.parametrize("config", LOSSES[::2], ids=lambda c: f"{c.overlap.value}-{c.pixel.value}")
def test_segmentation_loss__without_an_annotated_pixel_is_finite_and_has_no_gradient(config, classes):
    logits = random_case(0)[0].requires_grad_()
    label = torch.full((2, 9, 8), IGNORE_LABEL)
    loss = SegmentationLoss(config, overlapping=classes.is_overlapping)(logits, classes.to_target(label))
    loss.backward()
    assert torch.isfinite(loss)
    assert (logits.grad == 0).all()


def test_segmentation_loss__a_class_255_is_not_ignored():
    """Masks with the values 0 and 255 are common."""
    classes = ClassTable(ids=(255,), names=("a",))
    assert classes.to_target(torch.tensor([[0, 255, IGNORE_LABEL]])).tolist() == [[0, 1, IGNORE_LABEL]]


def test_prompted_iou__ignored_pixels_are_not_counted():
    logits = torch.full((1, 4, 4), 1.0)
    true = torch.zeros(1, 4, 4, dtype=torch.int64)
    true[:, :2] = 1
    true[:, 2:] = IGNORE_LABEL
    assert _iou(logits, true).tolist() == [1.0]


def test_scores__predictions_on_ignored_voxels_change_nothing():
    rng = np.random.default_rng(0)
    true = rng.choice([0, 3, 7, IGNORE_LABEL], size=(4, 16, 16))
    true[:, :, 8:] = IGNORE_LABEL
    predicted = rng.choice([0, 3, 7], size=true.shape)
    other = np.where(true == IGNORE_LABEL, rng.choice([0, 3, 7], size=true.shape), predicted)
    record = SimpleNamespace(patient_id="p", series_id="s", spacing_mm=(3.0, 1.0, 1.0))
    assert (predicted != other).any()
    assert class_scores(predicted, true, CLASSES) == class_scores(other, true, CLASSES)
    assert case_rows(predicted, true, record, CLASSES, tolerance_mm=1.0) == case_rows(
        other, true, record, CLASSES, tolerance_mm=1.0
    )
    known = true != IGNORE_LABEL
    assert class_scores(predicted, true, CLASSES) == class_scores(predicted[known], true[known], CLASSES)


def test_case_rows__class_predicted_on_ignored_voxels_only_is_not_measured():
    true = np.zeros((4, 16, 16), dtype=np.int16)
    true[:, :, 8:] = IGNORE_LABEL
    predicted = np.where(true == IGNORE_LABEL, 3, 0)
    record = SimpleNamespace(patient_id="p", series_id="s", spacing_mm=(3.0, 1.0, 1.0))
    row = case_rows(predicted, true, record, CLASSES, tolerance_mm=1.0)[0]
    assert row["dice"] is None
    assert row["hd95_mm"] is None


@pytest.mark.parametrize("slices", [8, 1])
def test_surface_score__surface_at_the_end_of_the_annotation_is_not_counted(slices):
    """The true structure is annotated up to row 8. The prediction is one column wider and equal else."""
    true, predicted = np.zeros((slices, 20, 20), dtype=bool), np.zeros((slices, 20, 20), dtype=bool)
    inner = slice(2, 6) if slices > 1 else slice(None)
    true[inner, 4:8, 4:10] = True
    predicted[inner, 4:8, 4:11] = True
    ignored = np.zeros_like(true)
    ignored[:, 8:] = True
    values = {"spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 0.1}
    # Only the columns end elsewhere: equal structures have distance 0, and the end of the annotation adds nothing.
    assert surface_score(true, true, ignored=ignored, **values).nsd == 1.0
    score, plain = surface_score(predicted, true, ignored=ignored, **values), surface_score(predicted, true, **values)
    assert score.hd95_mm == pytest.approx(1.0)
    assert score.nsd < plain.nsd  # the equal surface at row 8 counted as agreement
    assert surface_score(predicted, true, ignored=np.zeros_like(true), **values) == plain


def test_surface_score__structure_with_no_surface_left_is_a_miss_or_not_measured():
    mask = np.zeros((3, 9, 9), dtype=bool)
    mask[1, 4, 4] = True
    other = np.roll(mask, 3, axis=1)
    ignored = np.ones_like(mask)
    values = {"spacing_mm": (1.0, 1.0, 1.0)}
    assert surface_score(mask, mask, ignored=ignored & ~mask, **values) is None
    around = np.zeros_like(mask)
    around[0:3, 3:6, 3:6] = True
    one_sided = surface_score(mask, other, ignored=around & ~mask & ~other, **values)
    assert one_sided.nsd == 0.0
    assert one_sided.hd95_mm == pytest.approx(np.linalg.norm(mask.shape))


def test_choose_postprocessing__false_pieces_outside_the_annotation_are_no_reason():
    true = np.zeros((3, 12, 12), dtype=np.int32)
    true[:, 2:6, 2:6] = 3
    true[:, :, 8:] = IGNORE_LABEL
    predicted = np.where(true == 3, 3, 0)
    predicted[:, 2:5, 9:12] = 3  # a second piece, which largest_component would remove
    cases = [(f"p{number}", predicted, true) for number in range(4)]
    chosen = choose_postprocessing(cases, CLASSES, weights_sha256="", split_sha256="")
    assert chosen.steps == {}
    assert chosen.dice[3]["before"] == 1.0


def test_overlay__ignored_pixels_are_dark():
    image = np.ones((256, 256), dtype=np.float32)
    true = np.zeros((256, 256), dtype=np.int16)
    true[:, 128:] = IGNORE_LABEL
    picture = overlay(image, true_HW=true, predicted_HW=np.zeros_like(true))
    assert picture[0, 0].tolist() == [1, 1, 1]
    assert picture[0, 200].tolist() == pytest.approx([0.4] * 3)


def test_overlay__classes_have_different_colors_for_lines_and_areas():
    image = np.zeros((256, 256), dtype=np.float32)
    label = np.zeros((256, 256), dtype=np.int16)
    label[50:100, 50:100], label[150:200, 50:100] = 1, 2
    colors = list(class_key(ClassTable(ids=(1, 2), names=("anterior", "posterior"))).values())
    assert len(set(colors)) == 2
    lines, areas = overlay(image, true_HW=label), overlay(image, predicted_HW=label)
    for row, color in zip((50, 150), colors, strict=True):
        rgb = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert lines[row, 70].tolist() == pytest.approx(rgb)
        assert lines[row + 25, 70].tolist() == [0, 0, 0]
        assert areas[row + 25, 70].tolist() == pytest.approx([FILL_ALPHA * part for part in rgb])


def nnunet(root, labels, *, names, num_cases=4):
    """Write an nnU-Net data set. ``labels`` changes the label of each case."""
    for number in range(num_cases):
        image, label = make_scan(shape_zyx=(6, 32, 32), seed=number)
        write_nifti(root / "imagesTr" / f"c{number}_0000.nii.gz", image, spacing_mm=(1.0, 1.0, 1.0))
        write_nifti(root / "labelsTr" / f"c{number}.nii.gz", labels(label, number), spacing_mm=(1.0, 1.0, 1.0))
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MRI"}, "labels": names}))
    return root


def build(root, *, options=None, **settings):
    found = discover(root, options)
    build_store(
        found.cases,
        out=root / "store.zarr",
        settings=BuildSettings(modality=Modality.MRI, salt="x", **settings),
        label_names=found.label_names,
        intensity=IntensityPreset(),
    )
    return SliceStore.open(root / "store.zarr")


def half_annotated(label, number):
    """Return a label whose right half is not annotated, with the id 9 for that."""
    label = label.copy()
    label[:, :, 16:] = 9
    return label


NAMES = {"background": 0, "lesion": 1, "ignore": 9}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = nnunet(tmp_path_factory.mktemp("nnunet"), half_annotated, names=NAMES)
    return build(root, planes=(Plane.AXIAL, Plane.CORONAL, Plane.SAGITTAL))


def test_build__ignore_of_nnunet_is_declared_by_its_name(store):
    assert store.label_names == {1: "lesion"}
    for record in store.series:
        label = store.read_label_volume(record.series_id)
        assert (label[:, :, 16:] == IGNORE_LABEL).all()
        assert record.ignored_voxels == 6 * 32 * 16
        assert record.label_voxels.get(1, 0) == (label == 1).sum()
        assert set(record.label_voxels) <= {1}
        for plane in Plane:
            assert (store.read_label_volume(record.series_id, plane=plane) == IGNORE_LABEL).sum() == 6 * 32 * 16
    assert check_store(store.path).problems == []
    assert describe_store(store)["ignored_voxels"] == 4 * 6 * 32 * 16


@pytest.mark.parametrize(
    "options",
    [
        SourceOptions(ignore_label=9),
        SourceOptions(label_names={1: "lesion", 9: "ignore"}),
        SourceOptions(label_map={1: 1, 9: 255}, ignore_label=255),
    ],
)
def test_build__ignore_is_declared_by_option(store, options, tmp_path):
    names = {"background": 0, "lesion": 1} | ({"other": 255} if options.label_map else {"other": 9})
    again = build(nnunet(tmp_path, half_annotated, names=names), options=options)
    assert again.label_names == {1: "lesion"}
    assert [r.label_voxels for r in again.series] == [r.label_voxels for r in store.series]
    assert all(r.ignored_voxels == 6 * 32 * 16 for r in again.series)


def test_build__undeclared_255_stays_a_class(tmp_path):
    root = nnunet(tmp_path, lambda label, _: 255 * label, names={"background": 0, "lesion": 255})
    store = build(root)
    assert all(record.label_voxels[255] and not record.ignored_voxels for record in store.series)


def test_build__dropped_ignore_is_background(tmp_path):
    options = SourceOptions(label_map={1: 1, 9: 0})
    store = build(nnunet(tmp_path, half_annotated, names=NAMES), options=options)
    assert all(record.ignored_voxels == 0 for record in store.series)
    assert store.read_label_volume(store.series[0].series_id).min() == 0


def test_store_build__options_reach_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nnunet(tmp_path / "scans", half_annotated, names={"background": 0, "lesion": 1, "other": 9})
    options = ["--ignore-label", "9", "--empty-slices", "ignore", "--workers", "1"]
    assert main(["store", "build", "scans", "--out", "a.zarr", *options]) == 0
    for record in SliceStore.open(tmp_path / "a.zarr").series:
        empty = sum(pixels == 0 for pixels in record.planes[record.plane].label_pixels[1])
        assert record.ignored_voxels == 6 * 32 * 16 + empty * 32 * 16


def test_discover__two_ignored_ids_are_refused(tmp_path):
    root = nnunet(tmp_path, half_annotated, names=NAMES)
    with pytest.raises(UsageError, match="one label id can be ignored, got 1, 9"):
        discover(root, SourceOptions(ignore_label=1))


@pytest.mark.parametrize("plane", list(Plane))
def test_build__slices_without_a_label_are_ignored_on_request(plane, tmp_path):
    root = nnunet(tmp_path, lambda label, _: label, names={"background": 0, "lesion": 1})
    plain = build(root)
    store = SliceStore.open(root / "store.zarr")
    before = {r.series_id: store.read_label_volume(r.series_id) for r in plain.series}
    (root / "store.zarr" / "complete.json").unlink()
    store = build(root, ignore_empty_slices=True, planes=(Plane.AXIAL, plane))
    for record in store.series:
        label, old = store.read_label_volume(record.series_id), before[record.series_id]
        empty = ~(old > 0).any(axis=(1, 2))
        assert empty.any()
        assert (label[empty] == IGNORE_LABEL).all()
        assert (label[~empty] == old[~empty]).all()
        other = store.read_label_volume(record.series_id, plane=plane)
        assert (other == IGNORE_LABEL).sum() == record.ignored_voxels == empty.sum() * 32 * 32
        assert f"{empty.sum()} of 6 slices have no label and are not counted" in record.notes


def test_classes_of_one_file_each__ignored_value_and_ignored_file(tmp_path):
    """A second value in the mask of a class, or a mask named ignore, both without a clash of ids."""
    image, label = make_scan(shape_zyx=(6, 32, 32))
    for number in range(2):
        write_nifti(tmp_path / f"p{number}" / "scan.nii.gz", image)
        write_nifti(tmp_path / f"p{number}" / "scan_seg_lesion.nii.gz", label)
        rest = np.zeros_like(label)
        rest[:, :, 28:] = 1
        write_nifti(tmp_path / f"p{number}" / "scan_seg_ignore.nii.gz", rest)
    store = build(tmp_path)
    assert list(store.label_names.values()) == ["lesion"]
    for record in store.series:
        assert record.ignored_voxels == 6 * 32 * 4
        assert sum(record.label_voxels.values()) == label.sum()


def test_select_slices__ignored_slices_show_nothing(tmp_path):
    def partly(label, _):
        label = label.copy()
        label[:3] = 9
        return label

    store = build(nnunet(tmp_path, partly, names=NAMES))
    series_id = store.series[0].series_id
    everything = select_slices(store, store.patient_ids)
    annotated = select_slices(store, store.patient_ids, annotated_only=True)
    assert len(everything) == 6 * 4
    assert len(annotated) == 3 * 4
    assert min(ref.slice_index for ref in annotated) == 3
    labelled = select_slices(store, store.patient_ids, labelled_only=True)
    assert all((store.read_label_slice(ref.series_id, ref.slice_index) > 0).any() for ref in labelled)
    assert not has_foreground(store, SliceRef(series_id, 0), ClassTable(ids=(1,), names=("lesion",)))


def test_augmentation_and_frame__ids_stay_ids():
    label = torch.zeros(20, 30, dtype=torch.int64)
    label[:, 15:] = IGNORE_LABEL
    label[5:10, 5:10] = 3
    config = AugmentConfig(max_rotation_deg=30, min_scale=0.7, max_scale=1.3, max_shift=0.1, flip_columns_probability=0)
    image = torch.rand(1, 20, 30)
    found = set()
    for seed in range(5):
        _, moved = SliceAugmentation(config)(image, label, np.random.default_rng(seed))
        frame = fit_frame((20, 30), image_size=64, keep_aspect=True)
        framed = label_to_frame(moved[None], frame)
        found |= set(framed.unique().tolist())
        assert (framed == IGNORE_LABEL).sum() > 64
    assert found == {IGNORE_LABEL, 0, 3}


def test_linear_probe__ignored_pixels_are_neither_fitted_nor_scored():
    label = torch.zeros(32, 32, dtype=torch.int64)
    label[:16] = 1
    label[:, 20:] = IGNORE_LABEL
    frame = fit_frame((32, 32), image_size=32, keep_aspect=True)
    slices = SimpleNamespace(labels=(label,), frames=(frame,))
    shares, inside = class_shares(slices, (1,), stride=8)
    assert inside[0].tolist() == [[True, True, False, False]] * 4
    assert shares[0, 0, :, 0].tolist() == [1, 1, 0, 0]
    count = DiceCount((1,))
    count.add("p", torch.where(label == IGNORE_LABEL, 1, label), label)
    assert count.dice() == 1.0


def test_build__key_of_stores_without_ignored_voxels_does_not_change(tmp_path):
    """Otherwise every store of an earlier version would be built again."""
    root = nnunet(tmp_path, lambda label, _: label, names={"background": 0, "lesion": 1})
    found = discover(root)
    settings = BuildSettings(modality=Modality.MRI, salt="x", label_ids=(1,))
    from samgraft.shared.store.build import _build_key

    key = _build_key(found.cases[0], settings)
    ignoring = replace(found.cases[0], labels=tuple(replace(one, ignore_id=9) for one in found.cases[0].labels))
    assert key != _build_key(ignoring, settings)
    assert key != _build_key(found.cases[0], replace(settings, ignore_empty_slices=True))


@pytest.mark.parametrize(
    "settings", [[], ["prompt.mode=box"], ["data.regions={a: [1]}"], ["model.arch=unet3d"]], ids=str
)
def test_finetune__ignored_voxels_reach_the_loss_and_no_score(store, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_baseline = "model.arch=unet3d" in settings
    if not is_baseline:
        write_tensors(tmp_path / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    seen = []
    for loss in (SegmentationLoss, MaskLoss):
        forward = loss.forward
        monkeypatch.setattr(
            loss, "forward", lambda self, logits, target, f=forward: (seen.append(target), f(self, logits, target))[1]
        )
    code = main([
        "finetune", *(() if is_baseline else ("--ckpt", "base.safetensors", "model.image_size=32")),
        "--data", str(store.path), "--name", "x", "--preset", "cpu", "trainer.max_steps=2", "data.batch_size=2",
        "watch.validate_every_n_steps=2", "watch.num_overlays=1", "optim.warmup_steps=1", *settings,
    ])  # fmt: skip
    assert code == 0
    assert any((target == IGNORE_LABEL).any() for target in seen)
    with (tmp_path / "runs" / "x" / "evaluation" / "val" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert int(row["true_voxels"]) == store.record(row["series_id"]).label_voxels.get(1, 0)
        # The annotated half has 6 x 32 x 16 voxels. An untrained model marks voxels everywhere.
        assert int(row["predicted_voxels"]) <= 6 * 32 * 16
