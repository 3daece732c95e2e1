"""Synthetic scans are equal on every machine, have a lesion each, and give enough test patients."""

import numpy as np
from samgraft.finetune.evaluation.statistics import MIN_PATIENTS
from samgraft.shared.samples.split import load_split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.synthetic import synthetic_scan, synthetic_store


def test_synthetic_scan__depends_on_its_number_only():
    image, label = synthetic_scan(3)
    again, _ = synthetic_scan(3)
    other, _ = synthetic_scan(4)
    assert np.array_equal(image, again)
    assert not np.array_equal(image, other)
    assert image.dtype == np.int16
    assert 20 < label.sum() < label.size / 10
    inside, around = image[label > 0].mean(), image[(label == 0) & (image > 200)].mean()
    assert inside > around + 100


def test_synthetic_store__is_built_once_with_its_split(tmp_path):
    path = synthetic_store(tmp_path / "s.zarr", num_patients=16)
    store = SliceStore.open(path)
    split = load_split(None, store)
    assert len(split.test) >= MIN_PATIENTS
    assert len(store.series) == 16
    assert all(record.label_voxels[1] > 0 for record in store.series)
    fingerprint = store.fingerprint
    assert SliceStore.open(synthetic_store(path, num_patients=16)).fingerprint == fingerprint
