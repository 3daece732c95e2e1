"""Pseudo-labels by rule, from the averaged probabilities of teachers, and the choice of the scans that get some."""

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.inference import NO_FLIPS
from samgraft.finetune.pseudo_labels import pseudo_record
from samgraft.finetune.selftraining import labelling
from samgraft.finetune.selftraining.labelling import LEFT_RIGHT, allowed_flips, choose_labels, find_consensus
from samgraft.finetune.training.unlabelled import choose_unlabelled
from samgraft.shared.config import load_config
from samgraft.shared.errors import DataError
from samgraft.shared.samples.split import make_split
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from store_factory import make_store

CLASSES = ClassTable(ids=(3, 7), names=("a", "b"))
DEVICE = choose_device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=10, shape_zyx=(4, 24, 20))
    return root


def config_of(*overrides):
    layer = {
        "modality": "mri",
        "data": {"store": "store.zarr", "batch_size": 2},
        "trainer": {"max_steps": 2},
        "selftrain": {"mode": "offline", "min_agreement": 0.5, "min_slice_agreement": 0.0},
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


def probabilities(*rows):
    """Return (1 + C, Z=len(rows), 1, W) from the probabilities of the two classes in every pixel."""
    foreground = np.array(rows, dtype=np.float32)  # Z, W, C
    everything = np.concatenate([1 - foreground.sum(axis=-1, keepdims=True), foreground], axis=-1)
    return everything.transpose(2, 0, 1)[:, :, None, :]


def test_choose_labels__low_agreement_is_ignored():
    mean = probabilities([(0.9, 0.0), (0.3, 0.3), (0.0, 0.05)], [(0.6, 0.1), (0.1, 0.6), (0.0, 0.0)])
    is_class = mean.argmax(axis=0) > 0
    is_class[0, 0, 1] = True
    found = choose_labels(mean, is_class, CLASSES, min_agreement=0.8, min_slice_agreement=0.0)
    assert found.label_ZHW[:, 0].tolist() == [[3, IGNORE_LABEL, 0], [IGNORE_LABEL, IGNORE_LABEL, 0]]
    np.testing.assert_allclose(found.slice_agreement_Z, [(0.9 + 0.4) / 2, 0.6], atol=1e-6)
    strict = choose_labels(mean, is_class, CLASSES, min_agreement=0.5, min_slice_agreement=0.63)
    assert strict.label_ZHW[:, 0].tolist() == [[3, IGNORE_LABEL, 0], [IGNORE_LABEL] * 3]


def test_choose_labels__slice_on_which_no_teacher_finds_a_class_is_background():
    mean = probabilities([(0.05, 0.0), (0.0, 0.1)])
    found = choose_labels(mean, mean.argmax(axis=0) > 0, CLASSES, min_agreement=0.8, min_slice_agreement=1.0)
    assert found.label_ZHW.tolist() == [[[0, 0]]]
    assert found.slice_agreement_Z.tolist() == [1.0]


def test_choose_labels__agreement_at_the_border_is_kept():
    """0.75 and 0.5 are exact in float32."""
    mean = probabilities([(0.75, 0.0), (0.75, 0.25)], [(0.5, 0.25), (0.0, 0.5)])
    found = choose_labels(mean, np.ones((2, 1, 2), bool), CLASSES, min_agreement=0.75, min_slice_agreement=0.75)
    assert found.label_ZHW[:, 0].tolist() == [[3, 3], [IGNORE_LABEL] * 2]
    found = choose_labels(mean, np.ones((2, 1, 2), bool), CLASSES, min_agreement=0.5, min_slice_agreement=0.5)
    assert found.label_ZHW[1, 0].tolist() == [3, 0]


def test_find_consensus__every_teacher_counts(lab, monkeypatch):
    """What only the first teacher finds in the second slice is a disagreement, although the last one finds nothing."""
    store, series_id = SliceStore.open(lab / "store.zarr"), SliceStore.open(lab / "store.zarr").series[0].series_id
    opinions = {
        "first": probabilities([(0.9, 0.0), (0.0, 0.0)], [(0.7, 0.0), (0.0, 0.0)]),
        "last": probabilities([(0.5, 0.1), (0.0, 0.0)], [(0.1, 0.0), (0.0, 0.2)]),
    }
    task = SimpleNamespace(inference=lambda batch_size: None, classes=CLASSES)
    models = [SimpleNamespace(segmenter=name, task=task) for name in opinions]
    monkeypatch.setattr(labelling, "_plane_probabilities", lambda model, *_: opinions[model.segmenter])
    monkeypatch.setattr(SliceStore, "read_volume", lambda *_: np.zeros((2, 1, 2)))
    found = find_consensus(models, store, series_id, config_of(), DEVICE)
    np.testing.assert_allclose(found.agreement_ZHW[:, 0], [[0.7, 1.0], [0.6, 0.9]], atol=1e-6)
    np.testing.assert_allclose(found.slice_agreement_Z, [0.7, 0.6], atol=1e-6)
    assert found.label_ZHW[:, 0].tolist() == [[3, 0], [0, 0]]


def test_allowed_flips__only_those_that_the_training_shows():
    assert allowed_flips(config_of(), Plane.CORONAL) == LEFT_RIGHT
    assert allowed_flips(config_of(), Plane.SAGITTAL) == NO_FLIPS
    assert allowed_flips(config_of("data.augment.flip_columns_probability=0"), Plane.AXIAL) == NO_FLIPS
    assert allowed_flips(config_of("selftrain.flips=false"), Plane.AXIAL) == NO_FLIPS


def test_pseudo_record__pixels_are_those_of_each_slice(lab):
    record = SliceStore.open(lab / "store.zarr").series[0]
    label_ZHW = np.zeros(record.shape_zyx, dtype=np.int32)
    label_ZHW[1, :3, :4], label_ZHW[2, 0, :5], label_ZHW[3, :2] = 7, 3, IGNORE_LABEL
    table = pseudo_record(record, {record.plane: label_ZHW}, label_sha256="").planes[record.plane]
    assert table.label_pixels == {7: (0, 12, 0, 0), 3: (0, 0, 5, 0), IGNORE_LABEL: (0, 0, 0, 2 * label_ZHW.shape[2])}


def test_choose_unlabelled__scan_without_label_of_a_training_patient_is_labelled(lab):
    store, split = open_store(lab)
    drawn = dataclasses.replace(split, train=split.train[:2])
    series_id = next(r.series_id for r in store.series if r.patient_id == drawn.train[0])
    store.series = tuple(dataclasses.replace(r, has_label=r.series_id != series_id) for r in store.series)
    scans = choose_unlabelled(store, store, drawn)
    assert series_id in scans.series
    assert scans.left_out["with labels in the training"] == 1


def test_choose_unlabelled__other_slices_of_a_scan_with_drawn_slices_are_labelled(lab):
    store, split = open_store(lab)
    series = [r.series_id for r in store.series if r.patient_id in split.train]
    drawn = dataclasses.replace(split, train=split.train[:1], train_slices=((series[0], 1),))
    assert choose_unlabelled(store, store, drawn).series == tuple(series)


def open_store(lab):
    store = SliceStore.open(lab / "store.zarr")
    return store, make_split(store)


def test_choose_unlabelled__patients_of_validation_and_test_are_never_labelled(lab):
    store, split = open_store(lab)
    drawn = dataclasses.replace(split, train=split.train[:2])
    scans = choose_unlabelled(store, store, drawn)
    labelled = {store.record(series).patient_id for series in scans.series}
    assert labelled == set(split.train[2:])
    assert scans.left_out == {"of validation or test patients": 4, "with labels in the training": 2}
    assert not scans.transductive


def test_choose_unlabelled__same_patients_in_another_store_are_left_out(lab, tmp_path, caplog):
    """The second store has another salt, so its ids differ; its voxels are equal."""
    store, split = open_store(lab)
    other = SliceStore.open(make_store(tmp_path, num_patients=12, shape_zyx=(4, 24, 20), labelled=False))
    caplog.set_level(logging.INFO)
    scans = choose_unlabelled(other, store, split)
    contents = {r.content_sha256 for r in store.series}
    assert len(scans.series) == 2
    assert all(other.record(series).content_sha256 not in contents for series in scans.series)
    assert scans.left_out == {"of validation or test patients": 4, "with labels in the training": 6}


def test_choose_unlabelled__transductive_use_is_possible_and_recorded(lab):
    store, split = open_store(lab)
    scans = choose_unlabelled(store, store, split, allow_transductive=True)
    assert scans.transductive
    assert len(scans.series) == 4
    with pytest.raises(DataError, match="0 scans are left to label"):
        choose_unlabelled(store, store, split)
