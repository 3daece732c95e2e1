"""Slices become samples, and the randomness of a sample depends on nothing but the sample."""

import logging

import numpy as np
import pytest
import torch
from samgraft.shared.errors import DataError
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.sampler import StepBatchSampler
from samgraft.shared.samples.slices import SliceRef, select_slices
from samgraft.shared.scans.intensity import IntensityKind, IntensityPreset, normalise
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL, Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from store_factory import make_cases, make_scan, make_store, write_nifti
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return SliceStore.open(make_store(tmp_path_factory.mktemp("dataset"), num_patients=3))


def jitter(image, label, generator, plane):
    return image + float(generator.random()), label


def test_select_slices__filters_are_applied_and_logged(store, caplog):
    caplog.set_level(logging.INFO)
    everything = select_slices(store, store.patient_ids)
    assert len(everything) == 18
    labelled = select_slices(store, store.patient_ids, labelled_only=True)
    expected = {
        (r.series_id, z) for r in store.series for z in range(6) if store.read_label_slice(r.series_id, z).any()
    }
    assert {(ref.series_id, ref.slice_index) for ref in labelled} == expected
    assert f"left out: {18 - len(expected)} no label" in caplog.text
    fractions = [f for r in store.series for f in r.planes[r.plane].foreground_fraction]
    limit = sorted(fractions)[9]
    kept = select_slices(store, store.patient_ids, min_foreground_fraction=limit)
    assert len(kept) == sum(f >= limit for f in fractions) < 18
    one = select_slices(store, store.patient_ids[:1])
    assert {store.record(ref.series_id).patient_id for ref in one} == {store.patient_ids[0]}


def test_select_slices__no_usable_slice_is_an_error(store):
    with pytest.raises(DataError, match="0 usable slices: 18 air"):
        select_slices(store, store.patient_ids, min_foreground_fraction=0.999)
    with pytest.raises(DataError, match="18 other plane"):
        select_slices(store, store.patient_ids, planes=["coronal"])


def test_getitem__returns_the_normalised_slice_and_its_label(store):
    record = store.series[1]
    dataset = SliceDataset(store, [SliceRef(record.series_id, 2)], with_label=True)
    sample = dataset[0, 41]
    expected = normalise(store.read_slice(record.series_id, 2), record.stats, store.intensity)
    np.testing.assert_array_equal(sample["image"][0].numpy(), expected)
    np.testing.assert_array_equal(sample["label"].numpy(), store.read_label_slice(record.series_id, 2))
    assert sample["label"].dtype == torch.int64
    assert (sample["series_index"], sample["slice_index"], sample["sample_counter"]) == (1, 2, 41)
    assert "label" not in SliceDataset(store, [SliceRef(record.series_id, 2)])[0, 0]


def test_getitem__intensity_of_the_run_overrides_the_store(store):
    ref = SliceRef(store.series[0].series_id, 2)
    preset = IntensityPreset(kind=IntensityKind.MINMAX)
    assert not torch.equal(
        SliceDataset(store, [ref])[0, 0]["image"], SliceDataset(store, [ref], intensity=preset)[0, 0]["image"]
    )


def test_getitem__neighbours_become_channels_and_end_slices_repeat(store):
    record = store.series[0]
    dataset = SliceDataset(store, [SliceRef(record.series_id, z) for z in range(6)], num_neighbours=1)
    plain = SliceDataset(store, dataset.slices)
    for z, neighbours in ((0, (0, 0, 1)), (3, (2, 3, 4)), (5, (4, 5, 5))):
        expected = torch.cat([plain[n, 0]["image"] for n in neighbours])
        assert torch.equal(dataset[z, 0]["image"], expected)


def test_augment__depends_on_seed_and_counter_only(store):
    refs = select_slices(store, store.patient_ids)
    dataset = SliceDataset(store, refs, augment=jitter, seed=4)
    assert torch.equal(dataset[0, 7]["image"], dataset[0, 7]["image"])
    assert not torch.equal(dataset[0, 7]["image"], dataset[0, 8]["image"])
    other = SliceDataset(store, refs, augment=jitter, seed=5)
    assert not torch.equal(dataset[0, 7]["image"], other[0, 7]["image"])


def _batches(store, *, num_workers, start=0):
    refs = select_slices(store, store.patient_ids)
    dataset = SliceDataset(store, refs, augment=jitter, seed=4, with_label=True)
    sampler = StepBatchSampler(len(dataset), batch_size=4, seed=1, start_micro_step=start, num_micro_steps=6 - start)
    context = "spawn" if num_workers else None
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_slices,
        num_workers=num_workers,
        multiprocessing_context=context,
    )
    return [(b["sample_counter"].tolist(), torch.stack(b["images"]), torch.stack(b["labels"])) for b in loader]


def test_loader__resumed_batches_equal_uninterrupted_ones(store):
    whole, tail = _batches(store, num_workers=0), _batches(store, num_workers=0, start=4)
    for (counters_a, images_a, labels_a), (counters_b, images_b, labels_b) in zip(whole[4:], tail, strict=True):
        assert counters_a == counters_b
        assert torch.equal(images_a, images_b)
        assert torch.equal(labels_a, labels_b)


@pytest.mark.slow
def test_loader__number_of_workers_does_not_change_batches(store):
    for (ca, ia, la), (cb, ib, lb) in zip(_batches(store, num_workers=0), _batches(store, num_workers=2), strict=True):
        assert ca == cb
        assert torch.equal(ia, ib)
        assert torch.equal(la, lb)


def test_batch_to_input__mixed_sizes_share_one_frame_size(tmp_path):
    small = SliceStore.open(make_store(tmp_path / "a", num_patients=1, shape_zyx=(2, 20, 30)))
    large = SliceStore.open(make_store(tmp_path / "b", num_patients=1, shape_zyx=(2, 64, 40)))
    samples = [SliceDataset(s, [SliceRef(s.series[0].series_id, 0)], with_label=True)[0, 0] for s in (small, large)]
    images, labels, frames = batch_to_input(collate_slices(samples), image_size=32, keep_aspect=True, device="cpu")
    assert images.shape == (2, 1, 32, 32)
    assert labels is not None
    assert labels.shape == (2, 32, 32)
    assert [f.content_hw for f in frames] == [(21, 32), (32, 20)]
    assert (images[0, :, 21:] == 0).all()


def test_select_slices__requested_planes_are_used_where_a_series_has_them(tmp_path):
    """Planes from `store build --planes` are used where a run requests them and a series has them."""
    cases = make_cases(tmp_path / "scans", num_patients=1, labelled=False)
    image = make_scan(shape_zyx=(12, 16, 20))[0]
    write_nifti(cases[0].scan.paths[0], image, spacing_mm=(1.0, 1.0, 1.0))
    settings = BuildSettings(modality=Modality.MRI, salt="", planes=(Plane.AXIAL, Plane.CORONAL))
    build_store(cases, out=tmp_path / "s.zarr", settings=settings, label_names={}, intensity=IntensityPreset())
    store = SliceStore.open(tmp_path / "s.zarr")
    assert len(select_slices(store, store.patient_ids)) == 12
    refs = select_slices(store, store.patient_ids, planes=["axial", "coronal", "sagittal"])
    assert [sum(ref.plane is plane for ref in refs) for plane in Plane] == [12, 16, 0]
    assert SliceDataset(store, [refs[-1]])[0, 0]["image"].shape == (1, 12, 20)
    seen = []
    dataset = SliceDataset(store, [refs[-1]], augment=lambda i, la, _, plane: seen.append(plane) or (i, la))
    assert [dataset[0, 0]["plane"], *seen] == [Plane.CORONAL] * 2


def test_without_augmentation__keeps_neighbours_and_hidden_labels(store):
    options = {"augment": jitter, "with_label": True, "num_neighbours": 1, "hide_labels": True}
    dataset = SliceDataset(store, [SliceRef(store.series[0].series_id, 2)], **options)
    plain = dataset.without_augmentation()[0, 7]
    assert plain["image"].shape[0] == 3
    assert (plain["label"] == IGNORE_LABEL).all()
    assert not torch.equal(plain["image"], dataset[0, 7]["image"])
