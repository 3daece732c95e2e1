"""The Python interface, which has the functions and the words of the command line."""

import argparse
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points, version

import nibabel as nib
import numpy as np
import pytest
import samgraft.api as sg
from finished_factory import make_lab, write_finished
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.api import calls
from samgraft.finetune.prediction.predictor import Predictor
from samgraft.shared.cli import main
from samgraft.shared.commands import store as store_command
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.invocation import called_from_python, repeat_command
from samgraft.shared.training import preflight
from samgraft.shared.training.signals import STOP_SIGNALS, StopRequest, handle_stop_signals
from store_factory import make_scan, write_nifti

PRETRAIN = {
    "trainer.max_steps": 2, "data.batch_size": 2, "model.image_size": 32, "watch.every_n_steps": 2,
    "data.num_held_out_slices": 2, "watch.num_panel_rows": 2, "optim.warmup_steps": 1,
}  # fmt: skip
FINETUNE = {
    "trainer.max_steps": 2, "data.batch_size": 2, "model.image_size": 32, "watch.validate_every_n_steps": 2,
    "watch.num_overlays": 1, "optim.warmup_steps": 1,
}  # fmt: skip
HEAVY = ("torch", "torchvision", "timm", "monai", "peft", "lightly", "pytorch_lightning", "segment_anything", "zarr",
         "pandas", "nibabel", "scipy", "matplotlib", "omegaconf", "pydantic", "numpy", "requests", "rich")  # fmt: skip
FUNCTION_OF_COMMAND = {name: name for name in ("pretrain", "finetune", "selftrain", "evaluate", "compare", "release")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = make_lab(tmp_path_factory.mktemp("lab"))
    write_finished(lab.root / "runs" / "other", lab.store, lab.split, seed=1)
    (lab.root / "runs" / "other" / "config.yaml").write_text(f"data: {{store: '{lab.store.path}'}}\n")
    return lab


@pytest.fixture(scope="module")
def model(lab):
    return sg.load(lab.run, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A scan whose file has neither the order nor the directions of canonical slices."""
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    image, _ = make_scan(shape_zyx=(4, 32, 30), seed=7)
    write_nifti(path, image)
    turned = nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(("S", "R", "A")))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)
    return path


def test_import__loads_nothing_heavy():
    code = f"import sys, samgraft.api; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_version__is_that_of_the_package():
    assert sg.__version__ == version("samgraft")


@pytest.mark.parametrize("command", FUNCTION_OF_COMMAND)
def test_function__has_the_words_of_its_command(command):
    [point] = entry_points(group="samgraft.commands", name=command)
    parser = argparse.ArgumentParser()
    point.load().add_arguments(parser)
    words = {action.dest for action in parser._actions} - {"help"}
    assert words == set(inspect.signature(getattr(sg, FUNCTION_OF_COMMAND[command])).parameters)


def test_build_store__has_the_words_of_its_command():
    parser = argparse.ArgumentParser()
    store_command.COMMAND.add_arguments(parser)
    [actions] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    words = {action.dest for action in actions.choices["build"]._actions} - {"help"}
    own = set(inspect.signature(sg.build_store).parameters) - {"options"}
    assert words == own | set(store_command.ScanOptions.__annotations__)


def test_path__from_scans_to_a_release(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "MAX_MEASURED_STEPS", 1)  # the estimate is not what is tested
    for patient in range(5):
        image, label = make_scan(shape_zyx=(4, 32, 32), seed=patient)
        write_nifti(tmp_path / "labelled" / f"scan{patient}.nii.gz", image)
        write_nifti(tmp_path / "labelled" / f"scan{patient}_label.nii.gz", label)
        write_nifti(
            tmp_path / "plain" / f"other{patient}.nii.gz", make_scan(shape_zyx=(4, 32, 32), seed=9 + patient)[0]
        )
    write_tensors(tmp_path / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    examined = sg.build_store("labelled", "labelled.zarr", dry_run=True, workers=1)
    assert not examined.path.exists()
    store = sg.build_store("labelled", "labelled.zarr", workers=1, label_names={1: "lesion"}, report="report.json")
    assert len(store.cases) == 5
    assert store.cases["has_label"].all()
    assert store.report is not None
    assert store.report.is_file()
    assert len(sg.open_store(store.path).patient_ids) == 5
    unlabelled = sg.build_store("plain", "plain.zarr", workers=1)

    encoder = sg.pretrain(unlabelled.path, base="base.safetensors", name="ssl", settings=PRETRAIN)
    assert encoder.report.is_file()
    assert encoder.weights.is_file()
    assert list(encoder.metrics["step"])[-1] == 2
    run = sg.finetune(store.path, ckpt=encoder.path, base="base.safetensors", name="seg", settings=FINETUNE)
    assert (run.weights / "sam.safetensors").is_file()
    scores = sg.evaluate(run.path, batch_size=2)
    assert set(scores.cases["class"]) == {"lesion"}
    assert scores.summary["num_cases"] == scores.cases["series_id"].nunique()
    # Two steps may end below the start by chance.
    released = sg.release(run.path, out="released", license="cc-by-4.0", formats=["sam"], force=True)
    assert released.report.is_file()
    assert sg.load_sam(released.path).image_encoder.image_size == 32
    assert sg.load_encoder(encoder.path).image_size == 32
    assert sg.load(released.path).classes == {"lesion": 1}
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "pytest" not in (run.path / "run.json").read_text()


def test_dry_run__writes_no_run(lab, tmp_path):
    write_tensors(tmp_path / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    planned = sg.finetune(
        lab.store.path, base=tmp_path / "base.safetensors", runs=tmp_path / "runs", dry_run=True, settings=FINETUNE
    )
    assert planned.path.parent == tmp_path / "runs"
    assert not planned.path.exists()


def test_settings__of_python_types_equal_the_typed_ones(lab, tmp_path):
    base = tmp_path / "base.safetensors"
    write_tensors(base, dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    given = {**FINETUNE, "data.classes": [1], "data.keep_aspect": False, "data.planes": None, "optim.lr": 1e-5}
    with pytest.raises(UsageError, match=r"data\.classez"):
        sg.finetune(lab.store.path, base=base, settings={**given, "data.classez": [1]})


def test_compare__returns_the_pairs_as_a_table(lab, tmp_path):
    runs = []
    # The scores of the table are those of test patients, which must not choose a model.
    for name, on_validation in (("seg", 0.8), ("other", 0.7)):
        runs.append(shutil.copytree(lab.root / "runs" / name, tmp_path / name))
        task = json.loads((runs[-1] / "model" / "task.json").read_text())
        task["validation"] = {"zero_shot": 0.1, "start": 0.1, "best": on_validation, "best_step": 2}
        (runs[-1] / "model" / "task.json").write_text(json.dumps(task))
        sg.evaluate(runs[-1])
    result = sg.compare(runs, metrics=["dice"], out=tmp_path / "c")
    assert list(result.table["metric"].unique()) == ["dice"]
    assert {result.table["first"][0], result.table["second"][0]} == {"seg", "other"}
    assert result.report is not None
    [difference] = result.table.to_dict("records")
    assert difference["difference"] != 0
    assert "samgraft predict seg SCANS --out masks" in result.report.read_text()
    assert "samgraft predict other" not in result.report.read_text()
    assert sg.compare(runs).report is None


def test_predict__thick_slices_are_refused_by_a_model_of_several_planes(lab, tmp_path):
    run = shutil.copytree(lab.run, tmp_path / "run")
    task = json.loads((run / "model" / "task.json").read_text())
    task["planes"] = ["axial", "coronal", "sagittal"]
    (run / "model" / "task.json").write_text(json.dumps(task))
    model = sg.load(run, device="cpu", precision="fp32")
    values = np.random.default_rng(0).integers(0, 100, (24, 24, 24)).astype(np.int16)
    assert model.predict(values, spacing=(1, 1, 1), axes="RAS").labels.shape == (24, 24, 24)
    with pytest.raises(DataError, match="needs near-isotropic scans"):
        model.predict(values, spacing=(1, 1, 5), axes="RAS")


def test_predict__path_image_and_array_give_the_labels_of_the_command(lab, model, scan, tmp_path):
    assert main(["predict", str(lab.run), str(scan), "--out", str(tmp_path), "--device", "cpu", "--formats", "nifti",
                 "--precision", "fp32"]) == 0  # fmt: skip
    expected = nib.load(tmp_path / "scan_seg.nii.gz")
    labels = np.asarray(expected.dataobj)
    assert labels.any()
    image = nib.load(scan)
    codes = "".join(nib.aff2axcodes(image.affine))
    assert codes != "LPS"
    found = [
        model.predict(scan),
        model.predict(image),
        model.predict(np.asarray(image.dataobj), spacing=image.header.get_zooms(), axes=codes),
    ]
    for segmentation in found:
        assert np.array_equal(segmentation.labels, labels)
        assert segmentation.voxels == {"lesion": int((labels == 1).sum())}
    # An array has no position in the scanner, only directions and sizes.
    assert np.allclose(found[0].affine, expected.affine)
    assert np.allclose(found[1].affine, expected.affine)
    assert np.allclose(found[2].affine[:3, :3], expected.affine[:3, :3])


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.seg.nrrd"])
def test_save__file_reads_back_with_the_labels(model, scan, tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    segmentation = model.predict(scan)
    path = segmentation.save(tmp_path / name)
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(values, segmentation.labels.T)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_save__other_name_is_refused(model, scan, tmp_path):
    with pytest.raises(UsageError, match=r"must end with \.nii\.gz or \.seg\.nrrd, got 'mask\.png'"):
        model.predict(scan).save(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "an array has no orientation of its own"),
        ({"spacing": (1, 1, 1)}, "an array has no orientation of its own"),
        ({"spacing": (1, 1, 1), "axes": "RAR"}, "axes must name the direction of each array axis"),
        ({"spacing": (1, 1, 1), "axes": "XYZ"}, "axes must name the direction of each array axis"),
        ({"spacing": (1, 1), "axes": "RAS"}, "size of a voxel along each of the three"),
        ({"spacing": (1, 1, 0), "axes": "RAS"}, r"0\.01 to 50\.0 mm \(got \(1, 1, 0\)\)"),
        ({"spacing": (1, 1, 1), "axes": "RAS", "nan_policy": "drop"}, "nan_policy must be refuse or zero"),
    ],
)
def test_predict__array_without_a_clear_grid_is_refused(model, arguments, message):
    array = np.arange(32 * 32 * 4, dtype=np.int16).reshape(32, 32, 4)
    with pytest.raises((UsageError, DataError), match=message):
        model.predict(array, **arguments)


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        (np.zeros((8, 8)), "an array must have three axes"),
        (np.zeros((8, 8, 8, 2)), "must have three axes, got 4D"),
        (np.full((8, 8, 8), np.nan), "voxels must be finite"),
        (np.zeros((8, 8, 8), complex), "voxels must be real numbers"),
    ],
)
def test_predict__array_that_is_no_scan_is_refused(model, scan, message):
    with pytest.raises(DataError, match=message):
        model.predict(scan, spacing=(1, 1, 1), axes="RAS")


def test_predict__things_that_are_no_scan_are_refused(model, scan, tmp_path):
    with pytest.raises(UsageError, match="a path, a nibabel image or an array, got list"):
        model.predict([1, 2, 3])
    with pytest.raises(UsageError, match="spacing and axes describe an array"):
        model.predict(scan, axes="RAS")
    with pytest.raises(DataError, match="does not exist"):
        model.predict(tmp_path / "none.nii.gz")
    for name in "ab":
        (tmp_path / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    with pytest.raises(DataError, match="must contain one scan, got 2"):
        model.predict(tmp_path)


def test_predict__image_in_metres_has_the_grid_of_its_file(model, tmp_path):
    image, _ = make_scan(shape_zyx=(4, 32, 32), seed=3)
    write_nifti(tmp_path / "mm.nii.gz", image)
    loaded = nib.load(tmp_path / "mm.nii.gz")
    metres = nib.Nifti1Image(np.asarray(loaded.dataobj), np.diag([1e-3, 1e-3, 1e-3, 1]) @ loaded.affine)
    metres.header.set_xyzt_units("meter")
    segmentation = model.predict(metres)
    assert np.allclose(segmentation.affine, loaded.affine)
    assert segmentation.notes == ("spacing converted from meter to mm",)


def test_predict__prompts_for_an_automatic_model_are_used(model, scan, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps(
            {"version": 1, "coordinates": "voxel", "prompts": [{"class": "lesion", "box": [[2, 0, 2], [20, 3, 20]]}]}
        )
    )
    prompted = model.predict(scan, prompts=file)
    assert prompted.labels.shape == nib.load(scan).shape
    assert not np.array_equal(prompted.labels, model.predict(scan).labels)


def test_predictor__is_the_model_of_the_command(lab, model):
    assert isinstance(model.predictor, Predictor)
    assert (model.modality, model.classes) == ("mri", {"lesion": 1})


# --- the program that calls -------------------------------------------------------------------------------------------


def test_call__leaves_signal_handlers_alone():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def inside():
        with handle_stop_signals(StopRequest()):
            return [signal.getsignal(number) for number in STOP_SIGNALS]

    assert calls.as_call(inside)() == before
    assert inside() != before


def test_ctrl_c__in_a_training_raises_keyboard_interrupt_and_keeps_the_handler(tmp_path):
    from tiny_training import At, tiny_config, tiny_fit

    # A command in this process may have left a handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), called_from_python():
            tiny_fit(tmp_path, "a", tiny_config(), callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_repeat_command__does_not_contain_the_arguments_of_a_kernel(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/somewhere/kernel.json"])
    assert calls.as_call(repeat_command)() == "the same call"
    assert repeat_command() == "samgraft -f /somewhere/kernel.json"


def test_messages__are_shown_in_a_session_without_logging(monkeypatch, capsys):
    log, root = logging.getLogger("samgraft"), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    calls.as_call(lambda: logging.getLogger("samgraft.any").info("a message"))()
    calls.as_call(lambda: logging.getLogger("samgraft.any").info("another"))()
    assert capsys.readouterr().out == "a message\nanother\n"


@pytest.mark.parametrize("configured", ["samgraft", None])
def test_messages__of_a_program_with_logging_stay_its_own(monkeypatch, configured):
    log, root = logging.getLogger("samgraft"), logging.getLogger()
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    for one in (log, root):
        monkeypatch.setattr(one, "handlers", [logging.NullHandler()] if one.name == (configured or "root") else [])
    calls.as_call(lambda: None)()
    assert not any(isinstance(handler, logging.StreamHandler) for handler in log.handlers)
