"""Training slices of several planes from one store."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_factory import randomise
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.inference import InferenceConfig, segment_series, segment_volume
from samgraft.finetune.loss import with_background
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.release.monai_bundle import monai_format
from samgraft.finetune.segmenter import Segmenter
from samgraft.finetune.selftraining.labelling import find_consensus
from samgraft.finetune.selftraining.selftraining import plan_selftraining, run_selftraining
from samgraft.finetune.training.preparation import prepare, training_set
from samgraft.shared.cli import main
from samgraft.shared.config import load_config
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.frame import fit_frame, image_to_frame, logits_to_native
from samgraft.shared.samples.split import make_split
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.scans.orientation import Plane, change_plane
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from store_factory import make_scan, make_store, nifti_files, write_nifti
from tiny_sams import tiny_sam

ALL = "data.planes=[axial,coronal,sagittal]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    cases = []
    for number in range(4):
        image, label = make_scan(shape_zyx=(16, 24, 20), seed=number)
        scan = nifti_files(write_nifti(root / f"{number}.nii.gz", image, spacing_mm=(1.5, 1.0, 1.0)))
        seg = nifti_files(write_nifti(root / f"{number}_seg.nii.gz", label, spacing_mm=(1.5, 1.0, 1.0)))
        cases.append(SourceCase(name=str(number), patient_key=str(number), scan=scan, labels=(LabelFiles(scan=seg),)))
    settings = BuildSettings(modality=Modality.MRI, salt="x", planes=tuple(Plane))
    build_store(
        cases, out=root / "store.zarr", settings=settings, label_names={1: "lesion"}, intensity=IntensityPreset()
    )
    make_store(root, num_patients=4, name="thick.zarr")
    write_tensors(root / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    return root


def config_of(lab, *overrides, store="store.zarr"):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / store), "batch_size": 2, "foreground_fraction": 0, "min_foreground_fraction": 0},
        "model": {"ckpt": str(lab / "base.safetensors"), "image_size": 32},
        "trainer": {"max_steps": 2},
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


def dataset_of(lab, *overrides):
    store = SliceStore.open(lab / "store.zarr")
    split = make_split(store)
    classes = ClassTable(ids=(1,), names=("lesion",))
    return store, split, training_set(config_of(lab, *overrides), store, split, classes, IntensityPreset())


def test_training_set__has_the_slices_of_all_planes_with_their_labels(lab):
    store, split, dataset = dataset_of(lab, ALL)
    assert len(dataset) == len(split.train) * (16 + 24 + 20)
    _, _, one_plane = dataset_of(lab)
    assert len(one_plane) == len(split.train) * 16
    for plane in Plane:
        number, ref = next((i, r) for i, r in enumerate(dataset.slices) if r.plane is plane and r.slice_index == 9)
        plain = dataset.without_augmentation()[number, 0]
        label = store.read_label_volume(ref.series_id, plane=plane)[9]
        assert plain["plane"] is plane
        assert plain["label"].tolist() == label.tolist()
        assert plain["image"].shape[1:] == label.shape


def test_data_planes__scans_without_them_are_refused(lab):
    with pytest.raises(DataError, match="2 of 2 labelled training scans do not have slices of every plane"):
        prepare(config_of(lab, ALL, store="thick.zarr"))
    with pytest.raises(DataError, match=r"must contain the plane in which the training scans were acquired \(axial\)"):
        prepare(config_of(lab, "data.planes=[coronal]"))
    with pytest.raises(UsageError, match="draws slices of the acquired plane"):
        prepare(config_of(lab, ALL, "data.few_shot.num=2", "data.few_shot.unit=slices"))
    with pytest.raises(UsageError, match="3D baseline trains on volumes"):
        prepare(config_of(lab, ALL, "model.ckpt=null", "model.arch=unet3d"))


def test_finetune__planes_through_the_command_and_its_resume(lab, monkeypatch):
    monkeypatch.chdir(lab)
    command = ["finetune", "--ckpt", "base.safetensors", "--data", "store.zarr", "--name", "planes", "--preset", "cpu"]
    command += ["model.image_size=32", "data.batch_size=2", "trainer.max_steps=2", "watch.num_overlays=1"]
    command += ["optim.warmup_steps=1", "watch.validate_every_n_steps=2", ALL]
    assert main(command) == 0
    assert main(command) == 0
    assert main(["evaluate", "runs/planes", "--split", "test"]) == 0
    with pytest.raises(DataError, match="needs near-isotropic scans"):
        segment_series(*thick_inputs(lab))


def thick_inputs(lab):
    """Return the arguments of ``segment_series`` for a scan of thick slices and the model of several planes."""
    model, store = read_model(lab / "runs" / "planes"), SliceStore.open(lab / "thick.zarr")
    assert model.task.planes == ["axial", "coronal", "sagittal"]
    return model.segmenter, store, store.series[0].series_id, model.task.classes, model.task.inference()


def test_change_plane__equals_the_cut_of_the_store(lab):
    store = SliceStore.open(lab / "store.zarr")
    axial = store.read_volume(store.series[0].series_id)
    for plane in Plane:
        cut = store.read_volume(store.series[0].series_id, plane=plane)
        assert np.array_equal(change_plane(axial, Plane.AXIAL, plane), cut)
        assert np.array_equal(change_plane(cut, plane, Plane.AXIAL), axial)


@pytest.mark.parametrize(
    "classes", [ClassTable(ids=(1, 3), names=("a", "b")), ClassTable.of_regions({"a": [1], "b": [3]})]
)
def test_segment_volume__averages_the_probabilities_of_the_planes(lab, classes):
    store = SliceStore.open(lab / "store.zarr")
    record = store.series[0]
    volume = store.read_volume(record.series_id)
    noisy = tiny_sam("vit_t")
    randomise(noisy)
    segmenter = Segmenter(noisy, num_classes=2)
    config = InferenceConfig(intensity=IntensityPreset(), keep_aspect=True, batch_size=5, planes=tuple(Plane))
    done = []
    found = segment_volume(segmenter, volume, record.stats, classes, config, on_slices=lambda *n: done.append(n))
    assert done[-1] == (60, 60)
    mean = 0
    for plane in Plane:
        cut = store.read_volume(record.series_id, plane=plane)
        images = torch.from_numpy(np.stack([normalise(one, record.stats, IntensityPreset()) for one in cut]))[:, None]
        frame = fit_frame(cut.shape[1:], image_size=32, keep_aspect=True)
        with torch.no_grad():
            logits = logits_to_native(segmenter.eval()(image_to_frame(images, frame)), frame)
        odds = torch.sigmoid(logits) if classes.is_overlapping else torch.softmax(with_background(logits), dim=1)[:, 1:]
        mean = mean + np.stack([change_plane(one.numpy(), plane, Plane.AXIAL) for one in odds.swapaxes(0, 1)]) / 3
    if classes.is_overlapping:
        expected = (mean[0] > 0.5) * 1 + (mean[1] > 0.5) * 2
    else:
        expected = np.array([0, 1, 3])[np.concatenate([1 - mean.sum(0, keepdims=True), mean]).argmax(0)]
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() > 0.999  # ties of rounding
    assert np.array_equal(segment_volume(segmenter, volume, record.stats, classes, config, only=[3, 5]), found[[3, 5]])
    one = segment_volume(segmenter, volume, record.stats, classes, replace(config, planes=()))
    axial = segment_volume(segmenter, volume, record.stats, classes, replace(config, planes=(Plane.AXIAL,)))
    assert (one == axial).mean() > 0.999
    assert not np.array_equal(one, found)


def test_monai_format__model_of_several_planes_is_left_out():
    task = SimpleNamespace(planes=["axial", "coronal"])
    assert "of several planes" in monai_format(SimpleNamespace(task=task)).why_not(None)


def test_find_consensus__of_a_model_of_several_planes_is_its_segmentation(lab):
    store = SliceStore.open(lab / "store.zarr")
    record = store.series[0]
    noisy = tiny_sam("vit_t")
    randomise(noisy)
    classes = ClassTable(ids=(1, 3), names=("a", "b"))
    inference = InferenceConfig(intensity=IntensityPreset(), keep_aspect=True, batch_size=5, planes=tuple(Plane))
    task = SimpleNamespace(classes=classes, inference=lambda batch_size: inference)
    model = SimpleNamespace(segmenter=Segmenter(noisy, num_classes=2), task=task)
    settings = ["selftrain.flips=false", "selftrain.min_agreement=0.001", "selftrain.min_slice_agreement=0"]
    device = SimpleNamespace(torch_device=torch.device("cpu"), precision="32-true")
    found = find_consensus([model], store, record.series_id, config_of(lab, *settings), device).label_ZHW
    expected = segment_volume(model.segmenter, store.read_volume(record.series_id), record.stats, classes, inference)
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() > 0.999  # ties of rounding


def test_run_selftraining__pseudo_labels_are_cut_into_the_planes_of_the_student(lab, tmp_path):
    config = config_of(
        lab,
        ALL,
        "model.arch=dynunet2d",
        "model.ckpt=null",
        "baseline.base_channels=4",
        "optim.warmup_steps=1",
        "trainer.device=cpu",
        "data.few_shot.num=1",
        # All scans of this lab are near-duplicates of each other.
        "data.allow_transductive=true",
        "selftrain.mode=offline",
        "selftrain.teachers=[dynunet2d]",
        # An untrained teacher is uncertain, and voxels that are ignored on a whole slice would leave no slices.
        "selftrain.min_agreement=0.5",
        "selftrain.min_slice_agreement=0",
    )
    plan = plan_selftraining(config, tmp_path / "run", choose_device("cpu"), measure=False)

    def in_this_process(arguments, log_file, num_threads, processes):
        return main(list(arguments)), 1.0, 1.0

    run_selftraining(plan, choose_device("cpu"), run=in_this_process)
    round_1 = plan.rounds[0]
    labels = SliceStore.open(round_1.pseudo_path)
    record = labels.series[0]
    for plane in Plane:
        label = labels.read_label_volume(record.series_id, plane=plane)
        cut = change_plane(labels.read_label_volume(record.series_id), Plane.AXIAL, plane)
        assert label.tolist() == cut.tolist()
        agreement = labels.read_volume(record.series_id, plane=plane)
        assert agreement.tolist() == change_plane(labels.read_volume(record.series_id), Plane.AXIAL, plane).tolist()
        for label_id, pixels in record.planes[plane].label_pixels.items():
            assert list(pixels) == (cut == label_id).sum(axis=(1, 2)).tolist()
    pseudo = prepare(round_1.student.config, run_path=plan.path).dataset.datasets[1]
    assert {ref.plane for ref in pseudo.slices} == set(Plane)
    number, ref = next((i, r) for i, r in enumerate(pseudo.slices) if r.plane is Plane.CORONAL)
    sample = pseudo.without_augmentation()[number, 0]
    expected = labels.read_label_volume(ref.series_id, plane=Plane.CORONAL)[ref.slice_index]
    assert sample["label"].tolist() == expected.tolist()
