"""Self-training, with pseudo-labels by rule, the guard of validation and test patients, and whole runs."""

import json
import logging
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.finetune.baselines.volume_patches import cut
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.config import FinetuneConfig, SelftrainMode
from samgraft.finetune.ending import Ending
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.selftraining import labelling, selftraining
from samgraft.finetune.selftraining.labelling import (
    label_scans,
)
from samgraft.finetune.selftraining.parts import Round, Teacher, plan_rounds, plan_teachers
from samgraft.finetune.selftraining.report import write_report
from samgraft.finetune.selftraining.selftraining import PartFailed, plan_selftraining, run_selftraining
from samgraft.finetune.training import train
from samgraft.finetune.training.module import FinetuneModule
from samgraft.finetune.training.preparation import prepare
from samgraft.finetune.training.unlabelled import UnlabelledScans
from samgraft.shared.cli import main
from samgraft.shared.config import config_to_yaml, load_config
from samgraft.shared.errors import DataError, SamgraftError, StoppedAndSaved, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device
from store_factory import make_store

CLASSES = ClassTable(ids=(3, 7), names=("a", "b"))
DEVICE = choose_device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    make_store(root, num_patients=10, shape_zyx=(4, 24, 20))
    write_tensors(root / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))
    return root


def config_of(lab, *overrides):
    layer = {
        "modality": "mri",
        "data": {"store": str(lab / "store.zarr"), "batch_size": 2, "few_shot": {"num": 2}},
        "model": {"ckpt": str(lab / "base.safetensors"), "image_size": 32},
        "adapter": {"r": 2, "lora_alpha": 2},
        "baseline": {"base_channels": 4},
        "optim": {"warmup_steps": 1},
        "trainer": {"max_steps": 2, "save_every_steps": 1, "device": "cpu"},
        "watch": {"validate_every_n_steps": 2, "num_overlays": 1},
        "selftrain": {
            "mode": "offline",
            "teachers": ["lora", "dynunet2d"],
            "min_agreement": 0.5,
            "min_slice_agreement": 0.0,
        },
    }
    return load_config(FinetuneConfig, layers=[layer], overrides=overrides)


def in_this_process(arguments, log_file, num_threads, processes):
    code = main(list(arguments))
    log_file.write_text("" if code == 0 else "error: it failed\n")
    return code, 1.0, 1.0


def selftrain(config, path, run=in_this_process):
    plan = plan_selftraining(config, path, DEVICE, measure=False)
    return run_selftraining(plan, DEVICE, run=run)


def weights_of(path):
    return (path / "model" / "sam.safetensors").read_bytes()


def pseudo_bytes(path):
    folder = path / "round-1" / "pseudo_labels.zarr"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(lab):
    return selftrain(config_of(lab), lab / "runs" / "whole")


def test_run_selftraining__student_learns_from_teachers_in_an_ordinary_run(whole):
    model = read_model(whole)
    origin = "self-training: 4 scans of 4 patients have pseudo-labels of lora, dynunet2d"
    assert any(note.startswith(origin) for note in model.card.notes)
    assert main(["evaluate", str(whole), "--split", "test"]) == 0
    summary = json.loads((whole / "selftraining.json").read_text())
    assert list(summary["validation_dice"]) == ["teacher lora", "teacher dynunet2d", "student 1"]


@pytest.mark.parametrize(
    ("dice", "best"),
    [((0.6, 0.7, 0.8), "student"), ((0.6, 0.8, 0.7), "second"), ((0.8, 0.7, 0.8), "first")],
)
def test_write_report__next_commands_use_the_model_that_validation_prefers(whole, tmp_path, dice, best):
    """Equal Dice is no reason for the student, which costs more."""
    paths = [shutil.copytree(whole, tmp_path / name) for name in ("first", "second", "student")]
    for path, value in zip(paths, dice, strict=True):
        task = json.loads((path / "model" / "task.json").read_text())
        task["validation"] = {"zero_shot": 0.1, "start": 0.1, "best": value, "best_step": 2}
        (path / "model" / "task.json").write_text(json.dumps(task))
    first, second, student = (SimpleNamespace(name=path.name, path=path) for path in paths)
    pseudo_path = whole / "round-1" / "pseudo_labels.zarr"
    one = SimpleNamespace(number=1, teachers=(first, second), student=student, pseudo_path=pseudo_path)
    scans = SimpleNamespace(describe=lambda: "", left_out={}, transductive=False)
    write_report(tmp_path, [one], scans, log_images=False, test_patients=["p_1"])
    page = (tmp_path / "selftraining.html").read_text()
    assert f"samgraft evaluate {best} --split test" in page
    assert page.count("samgraft evaluate") == 1
    assert ("The student is not better." in page) == (best != "student")


PLACES = ["in a teacher", "between teachers", "in the student"]


@pytest.mark.parametrize("place", ["in the labelling", *(pytest.param(p, marks=pytest.mark.slow) for p in PLACES)])
def test_run_selftraining__stopped_anywhere_it_ends_with_the_same_bytes(lab, whole, monkeypatch, place):
    config = config_of(lab)
    path = lab / "runs" / place.replace(" ", "-")
    calls = []

    def stopping_run(arguments, log_file, num_threads, processes):
        calls.append(arguments)
        if len(calls) == {"in a teacher": 1, "between teachers": 2, "in the student": 3}.get(place):
            if place != "between teachers":
                stop_at_step(monkeypatch, 1)
            processes.stopping = True
            return (main(list(arguments)) if place != "between teachers" else 75), 1.0, 1.0
        return in_this_process(arguments, log_file, num_threads, processes)

    with monkeypatch.context() as patch:
        if place == "in the labelling":
            stop_in_labelling(patch)
        with pytest.raises(StoppedAndSaved, match="was stopped"):
            selftrain(config, path, run=stopping_run)
    monkeypatch.undo()
    selftrain(config, path)
    assert pseudo_bytes(path) == pseudo_bytes(whole)
    assert weights_of(path) == weights_of(whole)


def stop_at_step(monkeypatch, step):
    original = FinetuneModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FinetuneModule, "training_step", training_step)


def stop_in_labelling(patch):
    original, labelled = labelling.find_consensus, []

    def find_consensus(*arguments):
        if len(labelled) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        labelled.append(arguments)
        return original(*arguments)

    patch.setattr(labelling, "find_consensus", find_consensus)


VOLUMES = ("model.ckpt=null", "model.arch=dynunet3d")
STILL = ("data.augment.max_rotation_deg=0", "data.augment.min_scale=1", "data.augment.max_scale=1",
         "data.augment.max_shift=0", "data.augment.flip_columns_probability=0")  # fmt: skip


def test_run_selftraining__3d_network_learns_whole_scans_of_pseudo_labels(lab):
    path = selftrain(config_of(lab, *VOLUMES, "selftrain.teachers=[dynunet3d,dynunet2d]"), lab / "runs" / "volumes")
    assert any("pseudo-labels of dynunet3d, dynunet2d" in note for note in read_model(path).card.notes)
    labels = path / "round-1" / "pseudo_labels.zarr"
    known, pseudo = prepare(config_of(lab, *VOLUMES, *STILL, f"data.pseudo_labels={labels}")).dataset.datasets
    store, written = SliceStore.open(lab / "store.zarr"), SliceStore.open(labels)
    assert not set(known.series_ids) & set(pseudo.series_ids)
    assert set(pseudo.series_ids) == {record.series_id for record in written.series}
    for patches, source in ((known, store), (pseudo, written)):
        series_id = patches.series_ids[0]
        label = patches[0, 0]["label"].numpy()
        # The patch is larger than the scan, which is in its middle.
        whole_ZHW = source.read_label_volume(series_id)
        start = [-((side - size) // 2) for side, size in zip(label.shape, whole_ZHW.shape, strict=True)]
        assert np.array_equal(label, cut(whole_ZHW, start, label.shape, padding=0))


def test_prepare__3d_network_that_would_label_while_it_trains_is_refused_at_once(lab):
    with pytest.raises(UsageError, match=r"selftrain\.mode=offline or a 2D network"):
        prepare(config_of(lab, *VOLUMES, "selftrain.mode=online", "optim.ema_decay=0.9"))


def test_run_selftraining__second_round_uses_the_first_student(lab):
    config = config_of(lab, "selftrain.rounds=2", "selftrain.teachers=[lora]", "selftrain.keep_teachers=false")
    path = selftrain(config, lab / "runs" / "rounds")
    summary = json.loads((path / "selftraining.json").read_text())
    assert [row["teachers"] for row in summary["rounds"]] == ["lora", "student 1"]
    assert (path / "round-1" / "student" / "model").is_dir()
    assert any("student 1 (round 2)" in note for note in read_model(path).card.notes)


def test_run_selftraining__finished_runs_are_teachers(lab, whole):
    """A student of the same models has the same pseudo-labels, and the finished runs are not trained again."""
    teachers = whole / "round-1" / "teachers"
    before = {p: p.stat().st_mtime_ns for p in teachers.rglob("*") if p.is_file()}
    runs = f"selftrain.teachers=[{teachers}/lora,{teachers}/dynunet2d]"
    plan = plan_selftraining(config_of(lab, runs), lab / "runs" / "again", DEVICE)
    assert not any(line.startswith("teacher") for line in plan.lines)
    assert [part.name for part in plan.parts] == ["student 1"]
    again = run_selftraining(plan, DEVICE, run=in_this_process)
    assert {p: p.stat().st_mtime_ns for p in teachers.rglob("*") if p.is_file()} == before
    assert pseudo_bytes(again) == pseudo_bytes(whole)
    assert weights_of(again) == weights_of(whole)
    summary = json.loads((again / "selftraining.json").read_text())
    assert list(summary["validation_dice"]) == ["teacher lora", "teacher dynunet2d", "student 1"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("stage-1 run", "must be a finished fine-tuning"),
        ("no run", "must be a finished fine-tuning"),
        ("unfinished", "must be a finished fine-tuning"),
        ("other classes", "must segment the classes"),
        ("prompted", "without prompts"),
        ("other test patients", "test differs"),
        ("other parts", "val and test differs"),
        ("transductive", "its pretraining differs"),
    ],
)
def test_plan_selftraining__unfit_runs_as_teachers_are_refused(lab, whole, tmp_path, change, match):
    run = tmp_path / "run"
    shutil.copytree(whole / "round-1" / "teachers" / "lora", run)
    record, task = json.loads((run / "run.json").read_text()), json.loads((run / "model" / "task.json").read_text())
    val, test = task["split"]["val"], task["split"]["test"]
    if change == "stage-1 run":
        record["stage"] = "pretrain"
    elif change == "no run":
        record = {}
    elif change == "unfinished":
        del record["complete"]
    elif change == "other classes":
        task["class_names"][0] = "other"
    elif change == "prompted":
        task["prompt"] = {"mode": "box"}
    elif change == "other test patients":
        task["split"]["test"] = [*test, task["split"]["train"][0]]
    elif change == "other parts":
        task["split"].update(val=test, test=val)
    else:
        task["transductive"] = True
    (run / "run.json").write_text(json.dumps(record))
    (run / "model" / "task.json").write_text(json.dumps(task))
    with pytest.raises(SamgraftError, match=match):
        plan_selftraining(config_of(lab, f"selftrain.teachers=[{run}]"), tmp_path / "new", DEVICE, measure=False)
    assert not (tmp_path / "new").exists()


def test_run_selftraining__complete_run_trains_nothing_again(lab, whole):
    def refuse(*_):
        raise AssertionError("a complete part was run again")

    assert selftrain(config_of(lab), whole, run=refuse) == whole


def test_run_selftraining__bad_endings_and_the_comparison_are_in_the_terminal(lab, whole, caplog, monkeypatch):
    bad = Ending(is_good=False, text="The model segments nothing.")
    monkeypatch.setattr(selftraining, "describe_ending", lambda validation: bad)
    caplog.set_level(logging.INFO)
    selftrain(config_of(lab), whole)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings[:3] == [f"{name}: {bad.text}" for name in ("teacher lora", "teacher dynunet2d", "student 1")]
    assert any(
        "of the student" in record.message and "of the best teacher" in record.message for record in caplog.records
    )


def test_run_selftraining__other_settings_are_refused(lab, whole):
    with pytest.raises(UsageError, match=r"another configuration.*selftrain\.min_agreement: 0\.5 -> 0\.6"):
        plan_selftraining(config_of(lab, "selftrain.min_agreement=0.6"), whole, DEVICE, measure=False)


def test_run_selftraining__failed_teacher_ends_with_its_exit_code(lab):
    def fail(arguments, log_file, num_threads, processes):
        log_file.write_text("hello\nerror: the disk is full.\n")
        return 5, 1.0, 1.0

    with pytest.raises(PartFailed, match="teacher lora failed: error: the disk is full") as refusal:
        selftrain(config_of(lab), lab / "runs" / "failed", run=fail)
    assert refusal.value.exit_code == 5


def test_finetune__settings_of_a_selftraining_alone_are_refused(lab):
    with pytest.raises(UsageError, match="needs samgraft selftrain"):
        train.prepare_seeded(config_of(lab))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["selftrain.teachers=[]"], "at least one name"),
        (["selftrain.teachers=[lora,lora]"], "none twice"),
        (["selftrain.teachers=[lora,runs/lora]"], "none twice"),
        (["selftrain.teachers=[runs/mine]", "selftrain.teacher_settings.mine=[optim.lr=1e-4]"], "does not list"),
        (["selftrain.teachers=[mine]"], "must be one of lora"),
        (["selftrain.teachers=[a b]"], "letters, digits"),
        (["selftrain.teacher_settings.fool=[optim.lr=1e-4]"], "does not list"),
        (["selftrain.every_teacher=[trainer.steps=4]"], "trainer.steps"),
        (["data.pseudo_labels=a.zarr"], "Leave it out"),
    ],
)
def test_plan_rounds__wrong_teachers_are_refused(lab, overrides, match):
    with pytest.raises(UsageError, match=match):
        plan_rounds(config_of(lab, *overrides), lab / "runs" / "a")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["prompt.mode=box"], "exclusive classes without prompts"),
        (["data.regions={a: [1]}"], "exclusive classes without prompts"),
        (["adapter.scope=decoder", "cache.variants=2"], "cached embeddings and pseudo-labels"),
        (["data.pseudo_fraction=0.9"], "must leave places"),
        (["data.pseudo_fraction=0.1"], "must leave places"),
    ],
)
def test_finetune_config__settings_that_pseudo_labels_cannot_have_are_refused(lab, overrides, match):
    with pytest.raises(UsageError, match=match):
        config_of(lab, *overrides)


def test_plan_teachers__each_differs_from_the_student_in_its_own_settings(lab):
    config = config_of(
        lab,
        "selftrain.teachers=[full, dynunet2d, neighbours, late]",
        "selftrain.every_teacher=[trainer.max_steps=7]",
        "selftrain.teacher_settings={full: [optim.lr=1e-4], late: [trainer.max_steps=9]}",
    )
    full, network, neighbours, late = (part.config for part in plan_teachers(config, lab / "a"))
    assert (full.adapter.method, full.optim.lr, full.trainer.max_steps) == ("full", 1e-4, 7)
    assert (network.model.arch, network.model.ckpt) == ("dynunet2d", None)
    assert neighbours.data.num_neighbours == 1
    assert late.trainer.max_steps == 9
    assert all(part.selftrain.mode is SelftrainMode.OFF for part in (full, network, neighbours, late))
    assert late.optim == config.optim


def test_label_scans__many_ignored_voxels_are_a_warning(lab, capsys):
    """Untrained teachers are unsure of the background too, so that nearly every voxel is ignored."""
    config = config_of(lab, "selftrain.min_agreement=0.999")
    for _ in range(2):  # The second time, the labels are complete.
        with pytest.raises(PartFailed, match="student 1 failed"):
            selftrain(config, lab / "runs" / "unsure")
        assert "100 % of the voxels are ignored, also clear background" in capsys.readouterr().err


def test_label_scans__teacher_with_other_weights_under_one_name_labels_again(lab, whole, tmp_path):
    store = SliceStore.open(lab / "store.zarr")
    scans = UnlabelledScans(images=store, series=(store.series[0].series_id,))
    config = config_of(lab)
    found = []
    for name in ("lora", "dynunet2d", "dynunet2d"):
        teacher = Teacher(name="teacher", path=whole / "round-1" / "teachers" / name)
        one = Round(number=1, teachers=(teacher,), pseudo_path=tmp_path / "pseudo.zarr", student=None)
        labels = label_scans(one, scans, config, DEVICE, check_stop=lambda: None)
        found.append(labels.fingerprint)
    assert found[0] != found[1] == found[2]
    percent = labels.read_volume(scans.series[0])
    # The most probable of one class and background has at least half of the probability.
    assert 50 <= percent.min() <= percent.max() <= 100


def test_finetune__pseudo_labels_of_held_out_patients_are_refused(lab):
    """A student may be started by hand, with pseudo-labels that another self-training made with permission."""
    path = selftrain(config_of(lab, "data.allow_transductive=true"), lab / "runs" / "transductive")
    model = read_model(path)
    assert model.task.transductive
    assert any(note.startswith("transductive") for note in model.card.notes)
    config = config_of(lab, f"data.pseudo_labels={path}/round-1/pseudo_labels.zarr")
    with pytest.raises(DataError, match="4 validation or test patients have pseudo-labels"):
        train.prepare_seeded(config)
    with pytest.raises(DataError, match="must be a store of pseudo-labels"):
        train.prepare_seeded(config_of(lab, f"data.pseudo_labels={lab}/store.zarr"))


def test_selftrain__dry_run_measures_every_part_and_writes_nothing(lab, monkeypatch, capsys):
    monkeypatch.chdir(lab)
    file = lab / "settings.yaml"
    file.write_text(config_to_yaml(config_of(lab)))
    command = ["selftrain", "--config", str(file), "--preset", "cpu", "--runs", "runs", "--name", "dry", "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().err
    assert "teacher lora: 2 steps of" in printed
    assert "teacher dynunet2d: 400 steps of" in printed
    assert "labels of round 1: 16 slices" in printed
    assert "dry run: runs/dry would train 3 models" in printed
    assert not (lab / "runs" / "dry").exists()


def test_selftrain__several_processes_are_refused(lab, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["selftrain", "--base", str(lab / "base.safetensors")]) == 2
