"""``predict``: geometry and formats checked with other readers, resume, prompts and refusals."""

import dataclasses
import json
import os
import re
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_factory import write_series
from finished_factory import make_lab, write_finished
from PIL import Image
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.postprocess import PostProcessing, apply_postprocessing
from samgraft.finetune.prediction import predict as predict_module
from samgraft.finetune.prediction import predictor as predictor_module
from samgraft.finetune.prediction.predict import PredictSettings, predict_scans
from samgraft.finetune.prediction.prediction_files import NativeMasks, write_label_list, write_nifti, write_seg_nrrd
from samgraft.finetune.prediction.prediction_inputs import find_inputs, make_unique
from samgraft.finetune.prediction.predictor import Predictor
from samgraft.finetune.prompting.prompt_file import SlicePrompt, read_prompts
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, NumericalError, UsageError
from samgraft.shared.scans.intensity import measure_intensity
from samgraft.shared.scans.readers.nifti import read_nifti
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from store_factory import make_scan
from store_factory import write_nifti as write_scan

CLASSES = ClassTable(ids=(1, 300), names=("core", 'rim "outer"'))
ENDS = (".nii.gz", ".seg.nrrd", ".samgraft.json")
ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SLA", "IPL")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def scans(tmp_path):
    """Three scans in two folders, one with a label beside it."""
    folder = tmp_path / "scans"
    for number, name in enumerate(("a.nii.gz", "b.nii.gz", "deep er/c.nii.gz")):
        image, label = make_scan(shape_zyx=(4, 32, 32), seed=number)
        write_scan(folder / name, image)
        if number == 0:
            write_scan(folder / "a_seg.nii.gz", label)
    return folder


def affine_of(codes):
    ornt = nib.orientations.axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(ornt):
        affine[int(world), axis] = sign * (2.0, 0.7, 1.3)[axis]
    affine[:3, 3] = (-20, 35, 7)
    return affine


def masks_with_marker(codes, shape=(9, 10, 11), voxel=(2, 7, 4)):
    labels = np.zeros(shape, dtype=np.int32)
    labels[voxel] = 1
    labels[5:8, 1:3, 2:9] = 300
    return NativeMasks(labels_ijk=labels, affine=affine_of(codes), classes=CLASSES), voxel


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_write_mask__marker_voxel_has_one_physical_point_for_three_readers(tmp_path, codes):
    sitk = pytest.importorskip("SimpleITK", reason="the second reader is a development dependency")
    masks, voxel = masks_with_marker(codes)
    wanted = (masks.affine @ [*voxel, 1])[:3]
    write_nifti(tmp_path / "m.nii.gz", masks)
    write_seg_nrrd(tmp_path / "m.seg.nrrd", masks)
    image = nib.load(tmp_path / "m.nii.gz")
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    found = np.argwhere(np.asarray(image.dataobj) == 1)
    assert np.allclose((image.affine @ [*found[0], 1])[:3], wanted, atol=1e-4)
    for name in ("m.nii.gz", "m.seg.nrrd"):
        other = sitk.ReadImage(str(tmp_path / name))
        array = sitk.GetArrayFromImage(other)
        z, y, x = (int(n) for n in np.argwhere(array == 1)[0])
        lps = np.asarray(other.TransformIndexToPhysicalPoint((x, y, z)))
        assert np.allclose(lps * [-1, -1, 1], wanted, atol=1e-4), name
        assert (array == 300).sum() == (masks.labels_ijk == 300).sum()


def test_write_nifti__header_is_new_and_bytes_are_reproducible(tmp_path):
    masks, _ = masks_with_marker("RAS")
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii.gz", masks)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    header = nib.load(tmp_path / "a.nii.gz").header
    assert header.get_data_dtype() == np.uint16
    assert header.get_xyzt_units()[0] == "mm"
    assert header["descrip"].item() == b""
    # The strict reader of this package accepts it too.
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz", where="a").array_ijk, masks.labels_ijk)


def test_write_seg_nrrd__slicer_reads_names_and_colours(tmp_path):
    slicerio = pytest.importorskip("slicerio", reason="the second reader is a development dependency")
    masks, _ = masks_with_marker("LPS")
    write_seg_nrrd(tmp_path / "m.seg.nrrd", masks)
    found = slicerio.read_segmentation(str(tmp_path / "m.seg.nrrd"))
    assert [s["name"] for s in found["segments"]] == list(CLASSES.names)
    assert [s["labelValue"] for s in found["segments"]] == [1, 300]
    assert all(len(s["color"]) == 3 for s in found["segments"])
    assert np.array_equal(found["voxels"], masks.labels_ijk)


def test_write_label_list__itk_snap_format_is_complete(tmp_path):
    write_label_list(tmp_path / "labels.txt", CLASSES)
    rows = [line for line in (tmp_path / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    pattern = re.compile(r'^\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d)\s+(\d)\s+(\d)\s+"([^"]*)"$')
    parsed = [pattern.match(row).groups() for row in rows]
    assert [(p[0], p[7]) for p in parsed] == [("0", "Clear Label"), ("1", "core"), ("300", "rim 'outer'")]


# --- python -----------------------------------------------------------------------------------------------------------


def test_predictor__python_call_equals_the_segmentation_of_evaluate(lab):
    from samgraft.finetune.inference import segment_series

    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    record = lab.store.series[0]
    labels = predictor(lab.store.read_volume(record.series_id))
    expected = segment_series(
        predictor.model.segmenter, lab.store, record.series_id, predictor.classes, predictor.model.task.inference()
    )
    assert labels.shape == record.shape_zyx
    assert np.array_equal(labels, expected)
    assert set(np.unique(labels)) == {0, 1}, "the random model must segment something for these tests to mean anything"
    one_by_one = Predictor(lab.run, device="cpu", precision="fp32", batch_size=1)
    assert np.array_equal(one_by_one(lab.store.read_volume(record.series_id)), labels)


def test_predictor__flips_average_mirrored_slices(lab):
    """With flips a mirrored volume gives the mirrored mask; without them it gives another one."""
    volume = lab.store.read_volume(lab.store.series[0].series_id)
    mirrored = volume[:, :, ::-1].copy()
    plain, flips = (Predictor(lab.run, device="cpu", precision="fp32", flips=f) for f in (False, True))
    differs = (plain(mirrored)[:, :, ::-1] != plain(volume)).sum()
    assert differs > 50
    assert (flips(mirrored)[:, :, ::-1] != flips(volume)).sum() <= 2


def test_predictor__postprocessing_changes_automatic_masks_only(lab):
    volume = lab.store.read_volume(lab.store.series[0].series_id)
    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    bare = predictor(volume)
    predictor.postprocessing = PostProcessing(steps={1: ["largest_component"]})
    assert np.array_equal(predictor(volume), apply_postprocessing(bare, {1: ["largest_component"]}))
    assert 0 < (predictor(volume) == 1).sum() < (bare == 1).sum()
    prompt = SlicePrompt(where="", slice_index=2, channel=0, box=(2.0, 2.0, 29.0, 29.0))
    with_steps = predictor(volume, prompts=[prompt])
    predictor.postprocessing = PostProcessing()
    assert np.array_equal(predictor(volume, prompts=[prompt]), with_steps)


def test_predictor__only_negative_points_segment_nothing(lab):
    """SAM itself predicts a mask around a negative point."""
    volume = lab.store.read_volume(lab.store.series[0].series_id)
    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    negative = SlicePrompt(where="", slice_index=1, channel=0, points=((16.0, 16.0),), labels=(0,))
    box = SlicePrompt(where="", slice_index=2, channel=0, box=(2.0, 2.0, 29.0, 29.0))
    assert not predictor(volume, prompts=[negative]).any()
    both = predictor(volume, prompts=[negative, box])
    assert both[2].any()
    assert not both[[0, 1, 3]].any()


def test_predictor__logits_that_are_not_finite_are_refused(lab):
    """NaN is not above 0, so that the result would be an empty mask."""
    volume = lab.store.read_volume(lab.store.series[0].series_id)
    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    with torch.no_grad():
        predictor.model.segmenter.sam.mask_decoder.mask_tokens.weight[0, 0] = torch.nan
    box = SlicePrompt(where="", slice_index=2, channel=0, box=(2.0, 2.0, 29.0, 29.0))
    for prompts in (None, [box]):
        with pytest.raises(NumericalError, match="logits must be finite"):
            predictor(volume, prompts=prompts)


def test_predictor__model_and_generators_are_unchanged(lab):
    predictor = Predictor(lab.run, device="cpu", precision="fp32", flips=True)
    predictor.model.segmenter.train()
    weights = {k: v.clone() for k, v in predictor.model.segmenter.state_dict().items()}
    state = torch.get_rng_state()
    predictor(lab.store.read_volume(lab.store.series[0].series_id))
    assert predictor.model.segmenter.training
    assert all(torch.equal(weights[k], v) for k, v in predictor.model.segmenter.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# --- folders ----------------------------------------------------------------------------------------------------------


def run(lab, source, out, *more):
    return main(["predict", str(lab.run), str(source), "--out", str(out), "--device", "cpu", *more])


def test_predict__folder_gives_a_mask_per_scan_and_leaves_labels_out(lab, scans, tmp_path, capsys):
    before = {p: p.read_bytes() for p in scans.rglob("*") if p.is_file()}
    assert run(lab, scans, tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert "3 scans: 3 segmented" in printed
    assert "left out: 1 x label file" in printed
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert names == sorted(
        ["labels.txt", *(f"{stem}{end}" for stem in ("a_seg", "b_seg", "deep er/c_seg") for end in ENDS)]
    )
    mask, scan = (nib.load(f) for f in (tmp_path / "out" / "b_seg.nii.gz", scans / "b.nii.gz"))
    assert mask.shape == scan.shape
    assert np.allclose(mask.affine, scan.affine)
    record = json.loads((tmp_path / "out" / "b_seg.samgraft.json").read_text())
    assert record["voxels"]["lesion"] == int((np.asarray(mask.dataobj) == 1).sum()) > 0
    assert {p: p.read_bytes() for p in before} == before


def test_predict__second_call_repeats_only_damaged_and_changed_scans(lab, scans, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(lab, scans, out) == 0
    stamps = {name: (out / f"{name}_seg.nii.gz").stat().st_mtime_ns for name in ("a", "b", "deep er/c")}
    (out / "b_seg.nii.gz").write_bytes((out / "b_seg.nii.gz").read_bytes()[:-1] + b"x")
    image, _ = make_scan(shape_zyx=(4, 32, 32), seed=9)
    write_scan(scans / "deep er/c.nii.gz", image)
    capsys.readouterr()
    assert run(lab, scans, out) == 0
    assert "3 scans: 2 segmented, 1 finished before (verified)" in capsys.readouterr().err
    assert (out / "a_seg.nii.gz").stat().st_mtime_ns == stamps["a"]
    assert (out / "b_seg.nii.gz").stat().st_mtime_ns != stamps["b"]
    assert run(lab, scans, out, "--flips") == 0
    assert "3 scans: 3 segmented" in capsys.readouterr().err


def test_predict__other_weights_under_the_same_name_are_not_taken_for_finished(lab, scans, tmp_path, capsys):
    model = tmp_path / "seg"
    write_finished(model, lab.store, lab.split, seed=0)
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    before = (tmp_path / "out" / "b_seg.nii.gz").read_bytes()
    shutil.rmtree(model)
    write_finished(model, lab.store, lab.split, seed=3)
    capsys.readouterr()
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "3 scans: 3 segmented" in capsys.readouterr().err
    assert (tmp_path / "out" / "b_seg.nii.gz").read_bytes() != before


def test_predict_scans__other_settings_prompts_and_volumes_are_not_taken_for_finished(
    lab, scans, tmp_path, monkeypatch
):
    """The same call again finds the scan finished."""
    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    scan = make_scan(shape_zyx=(4, 32, 32), seed=0)[0].transpose(2, 1, 0)
    nib.save(nib.Nifti1Image(np.stack([scan, scan[::-1]], axis=-1), np.diag([1.0, 1.0, 5.0, 1.0])), scans / "a.nii.gz")
    one, two = (write_prompt(tmp_path / f"{side}.yaml", side) for side in (20, 24))

    def is_written(*, frame=0, prompts=None, **settings):
        inputs = find_inputs(scans / "a.nii.gz", frame=frame).scans
        file = None if prompts is None else read_prompts(prompts, predictor.classes)
        chosen = PredictSettings(formats=("nifti",), **settings)
        return bool(predict_scans(predictor, inputs, tmp_path / "out", settings=chosen, prompts=file).written)

    calls = [{}, {"frame": 1}, {"zero_non_finite": True}, {"prompts": one}, {"prompts": two}]
    for call in calls:
        # Every call differs in one thing from the one before.
        before = {"prompts": one} if call.get("prompts") == two else {}
        is_written(**before)
        assert is_written(**call) or not call, call
        assert not is_written(**call), call
    is_written()
    for name, value in {
        "postprocessing": PostProcessing(steps={1: ["largest_component"]}),
        "is_bf16": True,
        "classes": ClassTable(ids=(1,), names=("another name",)),
    }.items():
        monkeypatch.setattr(Predictor, name, value, raising=False)
        predictor.__dict__.pop(name, None)
        assert is_written(), name
        assert not is_written(), name


def write_prompt(path, side):
    path.write_text(
        "version: 1\ncoordinates: voxel\nprompts:\n"
        f"  - {{case: a.nii.gz, class: lesion, box: [[8, 8, 1], [{side}, {side}, 2]]}}\n"
    )
    return path


def test_predictor__statistics_are_those_of_its_modality(lab, monkeypatch):
    """A volume of CT has air far below its tissue, which is not found as in MR."""
    volume = np.full((3, 16, 16), -1000, np.int16)
    volume[:, 2:14, 3:12] = np.random.default_rng(0).integers(-100, 200, size=(3, 12, 9))
    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    monkeypatch.setattr(Predictor, "modality", Modality.CT)
    seen = []

    def record(segmenter, volume, stats, *_, **__):
        seen.append(stats)
        return np.zeros(volume.shape, np.int32)

    monkeypatch.setattr(predictor_module, "segment_volume", record)
    predictor(volume)
    assert seen == [measure_intensity(volume, modality=Modality.CT)]
    assert seen != [measure_intensity(volume, modality=Modality.MRI)]


def test_predict__card_with_pixel_std_0_is_refused(lab, scans, tmp_path, capsys):
    model = tmp_path / "seg"
    write_finished(model, lab.store, lab.split)
    card = model / "model" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "pixel_std": [0.0, 0.0, 0.0]}))
    code = main(["predict", str(model), str(scans / "b.nii.gz"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert code in {4, 6}, capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("names", [("tumour core", "tumour-core", "TUMOUR CORE"), ("+", "*", "?")])
def test_file_names__classes_with_similar_names_have_different_files(names):
    classes = ClassTable.of_regions({name: [number] for number, name in enumerate(names, start=1)})
    found = predict_module.file_names("a_seg", ["nifti", "nrrd"], classes)
    assert len({name.casefold() for name in found}) == len(found) == 4


def test_make_unique__number_that_is_a_name_already_is_not_used():
    assert make_unique(["a", "A", "a-2", "b"]) == ["a", "A-2", "a-2-2", "b"]


def test_predict__interruption_leaves_finished_scans_only_and_resumes(lab, scans, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    write = predict_module.write_seg_nrrd

    def stop_in_the_second(path, masks):
        write(path, masks)
        if path.name.startswith("b"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(predict_module, "write_seg_nrrd", stop_in_the_second)
    assert run(lab, scans, out) == 75
    printed = capfd.readouterr().err
    assert "SIGTERM after 2 of 3 scans" in printed
    assert not list(out.rglob(".*partial*"))
    monkeypatch.undo()
    assert run(lab, scans, out) == 0
    assert "1 segmented, 2 finished before" in capfd.readouterr().err


def test_predict__crash_while_files_move_is_repeated_not_refused(lab, scans, tmp_path, monkeypatch, capsys):
    """Between the moves of masks and record the scan is neither finished nor written by another program."""
    from pathlib import Path

    out = tmp_path / "out"
    rename = Path.rename

    def cut_off(self, target):
        if self.name == "a_seg.samgraft.json":
            raise OSError(5, "pulled the plug")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", cut_off)
    assert run(lab, scans / "a.nii.gz", out) != 0
    monkeypatch.undo()
    assert (out / "a_seg.nii.gz").is_file()
    capsys.readouterr()
    assert run(lab, scans / "a.nii.gz", out) == 0
    assert "1 segmented" in capsys.readouterr().err


def test_predict__bad_scan_is_reported_and_the_others_are_segmented(lab, scans, tmp_path, capsys):
    (scans / "b.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes()[:-40])
    assert run(lab, scans, tmp_path / "out") == 3
    printed = capsys.readouterr().err
    assert "1 of 3 scans could not be segmented. b.nii.gz" in printed
    assert "kept   2 masks" in printed
    assert (tmp_path / "out" / "deep er" / "c_seg.nii.gz").is_file()


def test_predict__file_of_another_program_is_never_overwritten(lab, scans, capsys):
    """The output folder is the input folder, where scan a has a manual label."""
    label = (scans / "a_seg.nii.gz").read_bytes()
    assert run(lab, scans, scans) == 3
    assert "was not written by `samgraft predict`" in capsys.readouterr().err
    assert (scans / "a_seg.nii.gz").read_bytes() == label
    assert (scans / "b_seg.nii.gz").is_file()


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_predict__scan_stored_in_any_orientation_has_one_mask(lab, scans, tmp_path, codes):
    """Permuted and flipped axes describe the same scan, so the mask must be equal at every physical point."""
    source = nib.load(scans / "a.nii.gz")
    start = nib.io_orientation(source.affine)
    there = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(codes)))
    (tmp_path / "in").mkdir()
    nib.save(source.as_reoriented(there), tmp_path / "in" / "a.nii.gz")
    for place, name in ((scans, "plain"), (tmp_path / "in", "stored")):
        assert run(lab, place / "a.nii.gz", tmp_path / name, "--formats", "nifti", "--precision", "fp32") == 0
    plain, stored = (nib.load(tmp_path / name / "a_seg.nii.gz") for name in ("plain", "stored"))
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    back = stored.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(stored.affine), start))
    assert np.allclose(back.affine, plain.affine, atol=1e-4)
    assert np.asarray(plain.dataobj).any()
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(plain.dataobj))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_predict__prompts_segment_their_slices_only(lab, scans, tmp_path, capsys):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(
        "version: 1\ncoordinates: voxel\nprompts:\n"
        "  - {case: a.nii.gz, class: lesion, box: [[8, 8, 1], [24, 24, 2]]}\n"
        "  - {case: b.nii.gz, class: 1, points: [[16, 16, 3], [2, 2, 3]], labels: [1, 0]}\n"
    )
    assert run(lab, scans, tmp_path / "out", "--prompts", str(prompts)) == 0
    assert "2 segmented, 1 without a prompt" in capsys.readouterr().err
    a, b = (np.asarray(nib.load(tmp_path / "out" / f"{n}_seg.nii.gz").dataobj) for n in "ab")
    assert set(np.flatnonzero(a.any(axis=(0, 1)))) <= {1, 2}
    assert set(np.flatnonzero(b.any(axis=(0, 1)))) <= {3}
    assert a.any() or b.any(), "the random model must segment something"
    prompts.write_text(prompts.read_text().replace("labels: [1, 0]", "labels: [0, 0]"))
    assert run(lab, scans, tmp_path / "negative", "--prompts", str(prompts)) == 0
    assert "has only negative points, it stays empty (prompts.yaml, prompt 2)" in capsys.readouterr().err
    assert not np.asarray(nib.load(tmp_path / "negative" / "b_seg.nii.gz").dataobj).any()
    record = json.loads((tmp_path / "negative" / "b_seg.samgraft.json").read_text())
    assert "only negative points" in record["notes"][-1]
    prompts.write_text(prompts.read_text().replace("a.nii.gz", "z.nii.gz"))
    assert run(lab, scans, tmp_path / "out2", "--prompts", str(prompts)) == 2
    assert "got 'z.nii.gz'" in capsys.readouterr().err


def test_predictor__prompts_that_do_not_fit_the_model_are_refused(lab):
    predictor = Predictor(lab.run, device="cpu")
    task = predictor.model.task
    volume = lab.store.read_volume(lab.store.series[0].series_id)
    predictor.model = dataclasses.replace(predictor.model, task=dataclasses.replace(task, prompt={"mode": "box"}))
    with pytest.raises(UsageError, match=r"trained with prompts \(box\)"):
        predictor(volume)
    predictor.flips = True
    with pytest.raises(UsageError, match="automatic segmentation only"):
        predictor(volume, prompts=[])
    predictor.flips = False
    predictor.model = dataclasses.replace(predictor.model, task=dataclasses.replace(task, network={"name": "unet"}))
    with pytest.raises(UsageError, match="network without prompts"):
        predictor(volume, prompts=[])


def test_predictor__box_in_a_slice_equals_segment_anything(lab):
    """One box on one slice gives SamPredictor's mask."""
    from samgraft.shared.scans.intensity import normalise

    predictor = Predictor(lab.run, device="cpu", precision="fp32")
    record = lab.store.series[0]
    volume = lab.store.read_volume(record.series_id)
    box = (8.0, 6.0, 25.0, 27.0)
    labels = predictor(volume, prompts=[SlicePrompt(where="", slice_index=2, channel=0, box=box)])
    sam = predictor.model.segmenter.sam
    image = normalise(volume[2], record.stats, predictor.model.task.inference().intensity)
    from samgraft.shared.encoders.sam import decode_boxes, encode_images, to_pixels

    with torch.inference_mode():
        features = encode_images(sam, to_pixels(torch.from_numpy(image)[None, None], sam.image_encoder.spec))
        logits, _ = decode_boxes(sam, features, torch.tensor([box]), multimask=False)
        expected = sam.postprocess_masks(logits, (32, 32), (32, 32))[0, 0] > 0
    assert np.array_equal(labels[2] > 0, expected.numpy())
    assert not labels[[0, 1, 3]].any()


# --- dicom ------------------------------------------------------------------------------------------------------------

PATIENT = {
    "PatientName": "Doe^Jane", "PatientBirthDate": "19500101", "PatientSex": "F", "StudyDate": "20260101",
    "StudyTime": "120000", "AccessionNumber": "1", "ReferringPhysicianName": "", "StudyID": "1",
    "FrameOfReferenceUID": "1.2.3.9", "PositionReferenceIndicator": "",
}  # fmt: skip


def test_predict__dicom_seg_has_the_geometry_of_its_series(lab, tmp_path, capsys):
    hd = pytest.importorskip("highdicom", reason="highdicom is a development dependency")
    image, _ = make_scan(shape_zyx=(5, 32, 32), seed=1)
    volume = image.astype(np.uint16)
    write_series(tmp_path / "scan" / "series", volume, step=3.0, **PATIENT)
    assert run(lab, tmp_path / "scan", tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert "1 segmented" in printed
    assert "attributes from dataset" not in printed, "highdicom logs UIDs, which identify a study"
    (path,) = (tmp_path / "out").rglob("*.dcm")
    seg = hd.seg.segread(path)
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == ["lesion"]
    back = seg.get_volume(combine_segments=True, rescale_fractional=False)
    nifti = nib.load(next((tmp_path / "out").rglob("*.nii.gz")))
    labels = np.asarray(nifti.dataobj)
    lps = back.affine @ np.array([*np.argwhere(back.array == 1)[0], 1.0])
    ijk = np.linalg.inv(nifti.affine) @ (lps * [-1, -1, 1, 1])
    assert labels[tuple(np.rint(ijk[:3]).astype(int))] == 1
    # All voxels, through the geometry of both files.
    places = np.argwhere(back.array == 1)
    world = (back.affine @ np.c_[places, np.ones(len(places))].T) * np.array([[-1], [-1], [1], [1]])
    native = np.rint(np.linalg.inv(nifti.affine) @ world)[:3].astype(int)
    found = np.zeros_like(labels)
    found[tuple(native)] = 1
    assert np.array_equal(found, labels)
    # The reader of this package accepts it as a label of the series.
    from samgraft.shared.scans.readers.dicom import read_dicom_series
    from samgraft.shared.scans.readers.dicom_seg import read_dicom_seg

    series = read_dicom_series(sorted((tmp_path / "scan" / "series").iterdir()), where="s")
    assert np.array_equal(read_dicom_seg(path, like=series, where="seg").array_ijk, labels)
    assert path.read_bytes()[:128] == b"\0" * 128


def test_predict__series_without_required_attributes_is_refused(lab, tmp_path, capsys):
    pytest.importorskip("highdicom", reason="highdicom is a development dependency")
    image, _ = make_scan(shape_zyx=(4, 32, 32), seed=1)
    write_series(tmp_path / "scan", image.astype(np.uint16))
    assert run(lab, tmp_path / "scan", tmp_path / "out") == 3
    assert "--formats nifti,nrrd" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").iterdir() if p.name != "labels.txt"]
    assert run(lab, tmp_path / "scan", tmp_path / "out", "--formats", "nifti,nrrd") == 0


def test_predict__missing_highdicom_is_refused_or_noted(lab, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("samgraft.finetune.prediction.dicom_seg_file.is_available", lambda: False)
    image, _ = make_scan(shape_zyx=(4, 32, 32), seed=1)
    write_series(tmp_path / "scan", image.astype(np.uint16), **PATIENT)
    assert run(lab, tmp_path / "scan", tmp_path / "out", "--formats", "nifti,dicom-seg") == 2
    assert "needs highdicom" in capsys.readouterr().err
    assert run(lab, tmp_path / "scan", tmp_path / "out") == 0
    assert "no DICOM-SEG for 1 series" in capsys.readouterr().err


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{run}", "{root}/gone", "--out", "{out}"], 3, "does not exist"),
        (["{root}/gone", "{scan}", "--out", "{out}"], 4, "does not exist"),
        (["{run}", "{scan}"], 2, "--out"),
        (["{run}", "{scan}", "--out", "{out}", "--batch-size", "0"], 2, "at least 1"),
        (["{run}", "{scan}", "--out", "{out}", "--formats", "mha"], 2, "nifti, nrrd, dicom-seg"),
        (["{run}", "{scan}", "--out", "{out}", "--formats", "dicom-seg"], 2, "not DICOM"),
        (["{run}", "{scan}", "--out", "{out}", "--prompts", "{root}/gone.yaml"], 2, "does not exist"),
        (["{run}", "{notes}", "--out", "{out}"], 3, "must be a scan"),
        (["{run}", "{empty}", "--out", "{out}"], 3, "no scan was found"),
        (["{run}", "{nan}", "--out", "{out}"], 3, "must be finite"),
        (["{run}", "{scan}", "--out", "{out}", "--device", "cuda"], 2, "device cuda is not available"),
        (
            ["{run}", "{scan}", "--out", "{out}", "--device", "gpu"],
            2,
            "device must be one of auto, cpu, cuda, mps, got",
        ),
        (["{run}", "{scan}", "--out", "{scan}"], 5, "must be a folder"),
    ],
)
def test_predict__bad_request_is_refused_with_its_exit_code(lab, tmp_path, capsys, arguments, code, text):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    image, _ = make_scan(shape_zyx=(4, 32, 32))
    broken = image.astype(np.float32)
    broken[0, 0, 0] = np.nan
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no scan")
    places = {
        "run": lab.run, "root": lab.root, "out": tmp_path / "out", "scan": write_scan(tmp_path / "s.nii.gz", image),
        "nan": write_scan(tmp_path / "nan.nii.gz", broken), "empty": tmp_path / "empty",
        "notes": tmp_path / "notes.txt",
    }  # fmt: skip
    assert main(["predict", *(a.format(**places) for a in arguments)]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_predict__nan_policy_zero_is_recorded(lab, tmp_path):
    image, _ = make_scan(shape_zyx=(4, 32, 32))
    broken = image.astype(np.float32)
    broken[0, 0, 0] = np.nan
    path = write_scan(tmp_path / "nan.nii.gz", broken)
    assert run(lab, path, tmp_path / "out", "--nan-policy", "zero") == 0
    record = json.loads((tmp_path / "out" / "nan_seg.samgraft.json").read_text())
    assert record["zero_non_finite"] is True
    assert "were NaN or Inf and are 0" in record["notes"][0]


def test_find_inputs__unusual_names_become_valid_files(lab, tmp_path):
    image, _ = make_scan(shape_zyx=(4, 32, 32))
    folder = tmp_path / "dä ta 患者"
    write_scan(folder / 'we"ird: name.nii.gz', image)
    write_scan(folder / "same.nii.gz", image)
    np.save(folder / "same.npy", image)
    inputs = find_inputs(folder)
    assert sorted(s.out_stem for s in inputs.scans) == ["same-2_seg", "same_seg", "we_ird_ name_seg"]
    predictor = Predictor(lab.run, device="cpu")
    report = predict_scans(predictor, inputs.scans, tmp_path / "out", settings=PredictSettings(formats=("nifti",)))
    assert len(report.written) == 3
    assert dataclasses.asdict(report)["refused"] == {}


def write_pictures(folder, names):
    folder.mkdir()
    for number, name in enumerate(names):
        image = make_scan(shape_zyx=(1, 32, 32), seed=number)[0][0]
        Image.fromarray(image.astype(np.uint16)).save(folder / name)


def test_predict__pictures_without_an_order_are_no_stack(lab, tmp_path, capsys):
    write_pictures(tmp_path / "pictures", ["left.png", "right.png", "front.png"])
    command = ["predict", str(lab.run), str(tmp_path / "pictures"), "--out", str(tmp_path / "masks")]
    assert main(command) == 3
    advice = re.search(r"Number them, or pass (--pictures single)", capsys.readouterr().err)[1]
    assert main([*command, *advice.split()]) == 0
    assert {path.name for path in (tmp_path / "masks").rglob("*_seg.nii.gz")} == {
        "left_seg.nii.gz", "right_seg.nii.gz", "front_seg.nii.gz"
    }  # fmt: skip


def test_predict__x_ray_pictures_are_scans_of_their_own(tmp_path):
    lab = make_lab(tmp_path, num_patients=4, modality="xray")
    write_pictures(tmp_path / "pictures", ["p1.png", "p2.png"])
    assert main(["predict", str(lab.run), str(tmp_path / "pictures"), "--out", str(tmp_path / "masks")]) == 0
    assert len(list((tmp_path / "masks").rglob("*_seg.nii.gz"))) == 2


def test_find_inputs__refusals_and_notes_about_labels_and_patients_do_not_count(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_scan(tmp_path / name, make_scan(shape_zyx=(4, 32, 32))[0])
    label = make_scan(shape_zyx=(4, 32, 32))[1]
    # One class by its name and one label with ids are refused in training.
    write_scan(tmp_path / "a_seg_liver.nii.gz", label)
    write_scan(tmp_path / "b_seg.nii.gz", label)
    assert any(case.refusal for case in discover(tmp_path).cases)
    inputs = find_inputs(tmp_path)
    assert [scan.case.refusal or scan.case.scan_refusal for scan in inputs.scans] == [None, None]
    assert not any("--patient-pattern" in note for note in inputs.notes)


def test_predict__video_is_refused_in_words(lab, tmp_path):
    video = tmp_path / "heart.MP4"
    video.write_bytes(b"\x00\x00\x00\x18ftypmp42")
    with pytest.raises(DataError, match="videos are not segmented, not even by SAM 2") as refused:
        find_inputs(video)
    assert refused.value.where == "heart.MP4"
