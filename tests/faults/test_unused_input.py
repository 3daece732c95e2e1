"""Nothing that a user gives is ignored silently: empty values, options without effect, unknown keys, other folders."""

import json
import os

import nibabel as nib
import numpy as np
import pytest
from finished_factory import make_lab
from samgraft.api.calls import as_call
from samgraft.finetune.evaluation.comparison import read_evaluated_run
from samgraft.finetune.evaluation.scores import CASE_COLUMNS
from samgraft.finetune.evaluation.subgroups import read_subgroups
from samgraft.finetune.model_folder import read_task
from samgraft.shared.cli import main
from samgraft.shared.commands.release import release
from samgraft.shared.errors import DataError, UsageError, WeightsError
from samgraft.shared.samples.own_splits import read_own_split
from samgraft.shared.samples.split import load_split, make_split
from samgraft.shared.scans.discovery import SourceOptions
from samgraft.shared.scans.readers.images import read_spacing_file
from samgraft.shared.scans.sources import discover
from store_factory import make_scan, write_nifti

SHAPE = (3, 24, 24)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"), shape_zyx=SHAPE)


@pytest.fixture
def scans(tmp_path):
    """Two scans of one volume, without labels."""
    for number in range(2):
        write_nifti(tmp_path / "scans" / f"P{number}" / "t1.nii.gz", make_scan(shape_zyx=SHAPE, seed=number)[0])
    return tmp_path / "scans"


# Empty values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["finetune", "--base", "b.pth", "--name", ""], "--name"),
        (["finetune", "--base", "b.pth", "--name="], "--name"),
        (["pretrain", "--data", ""], "--data"),
        (["predict", "", "scans", "--out", "x"], "RUN_OR_RELEASE"),
        (["predict", "runs/a", "scans", "--out", ""], "--out"),
        (["compare", "runs/a", "", "runs/b"], "RUN"),
        (["store", "build", "scans", "--out", "x.zarr", "--label-map", ""], "--label-map"),
    ],
)
def test_command__empty_argument_is_refused_by_name(capsys, arguments, named):
    assert main(arguments) == 2
    assert f"error: {named} has an empty value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "arguments", "named"),
    [
        ("predict", ["predict", "runs/a", "", "--out", "x"], "DATA"),
        ("store", ["store", "build", "scans", "--out", ""], "OUT"),
        ("finetune", ["finetune", "--runs", ""], "--runs"),
    ],
)
def test_command__empty_argument_of_a_make_target_is_named_by_its_variable(
    capsys, monkeypatch, target, arguments, named
):
    monkeypatch.setenv("SAMGRAFT_FRONT_END", f"make {target}")
    assert main(arguments) == 2
    assert f"error: {named} has an empty value" in capsys.readouterr().err


def test_as_call__empty_text_is_refused_and_none_is_not():
    def train(data=None, *, name=None, **options):
        return data, name, options

    assert as_call(train)(None, name="a", planes=()) == (None, "a", {"planes": ()})
    for given in ({"data": ""}, {"name": ""}, {"modality": ""}):
        with pytest.raises(UsageError, match=f"{next(iter(given))} has an empty value"):
            as_call(train)(**given)


# Options without effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SourceOptions(frame=3), None),
        (SourceOptions(label_map={1: 1}), "--label-map would be ignored for this source, because it has no label"),
        (SourceOptions(label_names={1: "a"}), "--label-names would be ignored"),
        (SourceOptions(ignore_label=255), "--ignore-label would be ignored"),
        (SourceOptions(label_desc="lesion"), "--label-desc is for labels of BIDS"),
    ],
)
def test_discover__option_that_the_source_ignores_is_refused(scans, options, message):
    if message is None:  # of a format that may have several volumes: whether it has is read later
        assert len(discover(scans, options).cases) == 2
        return
    with pytest.raises(UsageError, match=message):
        discover(scans, options)


def test_discover__label_map_for_masks_of_one_class_each_is_refused(tmp_path):
    write_nifti(tmp_path / "P1" / "t1.nii.gz", make_scan(shape_zyx=SHAPE)[0])
    write_nifti(tmp_path / "P1" / "t1_seg_liver.nii.gz", make_scan(shape_zyx=SHAPE)[1])
    with pytest.raises(UsageError, match=r"--label-map would be ignored .* its labels name one class each"):
        discover(tmp_path, SourceOptions(label_map={1: 4}))


def test_discover__frame_of_formats_with_one_volume_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", make_scan(shape_zyx=SHAPE)[0])
    with pytest.raises(UsageError, match="--frame has no effect"):
        discover(tmp_path, SourceOptions(frame=0))


@pytest.mark.parametrize(("column", "field"), [("patient", "patient_pattern"), ("site", "site_pattern")])
def test_csv_cases__pattern_beside_a_full_column_is_refused_and_beside_a_part_noted(scans, column, field):
    options = SourceOptions(**{field: "(P[0-9])"})
    table = scans / "list.csv"
    table.write_text(f"image,{column}\nP0/t1.nii.gz,a\nP1/t1.nii.gz,b\n")
    with pytest.raises(UsageError, match=f"--{column}-pattern would be ignored, because every row has its {column}"):
        discover(table, options)
    table.write_text(f"image,{column}\nP0/t1.nii.gz,a\nP1/t1.nii.gz,\n")
    assert f"1 rows have their {column} from the list and not from --{column}-pattern" in discover(table, options).notes


def test_csv_cases__header_without_a_column_for_scans_is_refused(scans):
    (scans / "list.csv").write_text("file,label\nP0/t1.nii.gz,P0/t1.nii.gz\n")
    with pytest.raises(DataError, match=r"the column label and none for the scans \(got file, label\)"):
        discover(scans / "list.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{store}", "--frame", "1", "--label-map", "1=1"], "--label-map and --frame would be ignored"),
        (["check", "{scans}", "--source", "{scans}"], "--source is compared with a store"),
        (["split", "{store}", "--repeats", "3"], "--repeats would be ignored without --few-shot"),
        (["split", "{store}", "--unit", "slices"], "--unit would be ignored without --few-shot"),
        (["split", "{store}", "--few-shot", "1", "--repeats", "0"], "--repeats must be at least 1"),
        (["split", "{store}", "--from", "own.csv", "--seed", "1"], "--seed would be ignored"),
    ],
)
def test_store_command__option_without_effect_is_refused(lab, scans, capsys, arguments, message):
    assert main(["store", *(word.format(store=lab.store.path, scans=scans) for word in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_predict__frame_of_files_with_one_volume_is_counted(lab, scans, tmp_path, capsys):
    command = ["predict", str(lab.run), str(scans), "--out", str(tmp_path / "out"), "--device", "cpu", "--frame", "3"]
    assert main(command) == 0
    assert "note: 2 x --frame 3 is not used, the file has one volume" in capsys.readouterr().err


def test_predict__another_frame_is_segmented_again(lab, tmp_path, capsys):
    volumes = [make_scan(shape_zyx=SHAPE, seed=seed)[0].transpose(2, 1, 0) for seed in range(2)]
    nib.save(nib.Nifti1Image(np.stack(volumes, axis=-1), np.diag([-1, -1, 5, 1])), tmp_path / "a.nii.gz")
    command = ["predict", str(lab.run), str(tmp_path / "a.nii.gz"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for frame, expected in (("0", "1 segmented"), ("1", "1 segmented"), ("1", "1 finished before")):
        assert main([*command, "--frame", frame]) == 0
        shown = capsys.readouterr().err
        assert expected in shown
        assert "is not used" not in shown


def test_compare__folder_of_another_part_is_refused(tmp_path):
    (tmp_path / "cases.csv").write_text(",".join(CASE_COLUMNS) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"part": "val", "num_cases": 0}))
    assert read_evaluated_run(tmp_path, part=None).rows == []
    assert read_evaluated_run(tmp_path, part="val").rows == []
    with pytest.raises(DataError, match=r"an evaluation of val \(expected test\)"):
        read_evaluated_run(tmp_path, part="test")
    assert main(["compare", str(tmp_path), str(tmp_path), "--metrics", ","]) == 2


def test_release__list_without_identifiers_is_refused(tmp_path):
    (tmp_path / "ids.txt").write_text("\n  \n")
    with pytest.raises(UsageError, match="--known-identifiers must list one id"):
        release(tmp_path, out=tmp_path / "out", license="mit", known_identifiers=tmp_path / "ids.txt")


# Unknown keys of the user's files ------------------------------------------------------------------------------------


def test_load_split__further_part_is_refused(lab, tmp_path):
    path = tmp_path / "s.json"
    make_split(lab.store).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "holdout": ["P7"]}))
    with pytest.raises(DataError, match=r"keys that are not read \(got holdout, expected train, val, test\)"):
        load_split(path, lab.store)


def test_read_own_split__test_part_of_a_fold_is_refused_and_further_columns_listed(lab, tmp_path, caplog):
    caplog.set_level("INFO")
    names = sorted(lab.store.patient_ids)
    (tmp_path / "splits_final.json").write_text(
        json.dumps([{"train": names[:3], "val": names[3:5], "test": names[5:]}])
    )
    with pytest.raises(UsageError, match="a fold of nnU-Net has train and val \\(got test too\\)"):
        read_own_split(tmp_path / "splits_final.json", lab.store)
    rows = "".join(f"{name},train,4\n" for name in names)
    (tmp_path / "own.csv").write_text(f"patient,part,fold\n{rows}")
    read_own_split(tmp_path / "own.csv", lab.store)
    assert "columns of own.csv that are not used: fold" in caplog.text


def test_read_subgroups__further_columns_are_listed(lab, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "g.csv").write_text("patient_id,group,age\n" + "".join(f"{p},a,7\n" for p in lab.store.patient_ids))
    read_subgroups(tmp_path / "g.csv", lab.store, patients=lab.store.patient_ids)
    assert "columns of g.csv that are not used: age" in caplog.text


def test_read_spacing_file__further_key_is_refused(tmp_path):
    (tmp_path / "spacing.json").write_text('{"spacing_mm": [3, 1, 1], "origin": [0, 0, 0]}')
    with pytest.raises(DataError, match="origin is not read"):
        read_spacing_file(tmp_path / "spacing.json", where="x")


def test_msd_cases__list_under_another_name_is_noted(scans):
    listed = {"training": [{"image": "P0/t1.nii.gz"}], "holdout": [{"image": "P1/t1.nii.gz"}], "labels": {"0": "none"}}
    (scans / "dataset.json").write_text(json.dumps(listed))
    found = discover(scans)
    assert len(found.cases) == 1
    assert any(note.startswith("parts of dataset.json that are not read: holdout") for note in found.notes)


# Folders that are something else -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(lab):
    """Folders of every other kind beside the lab's run."""
    root = lab.root
    for name in ("runs/ssl/encoder/encoder.safetensors", "releases/ssl/encoder.safetensors", "runs/half/config.yaml"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "runs/self/round-1").mkdir(parents=True)
    (root / "studies/a").mkdir(parents=True)
    (root / "studies/a/study.yaml").touch()
    os.symlink(root / "runs", root / "studies/a/runs")
    return root


OTHERS = {
    "runs/no": ("the run or release does not exist", "make finetune"),
    "store.zarr": ("the folder is a slice store", "samgraft store info"),
    "store.split.json": ("the path is a file", "the same command with the folder"),
    "studies/a": ("the folder is a study with 1 finished runs (seg)", "studies/a/runs/seg"),
    "releases/ssl": ("an encoder alone and no classes", "make finetune CKPT="),
    "runs/self": ("a self-training that is not finished", "it resumes"),
    "runs/half": ("a run that is not finished", "it resumes"),
    "runs": ("the folder has 1 finished runs (seg) below it", "runs/seg"),
    "scans_store.zarr": ("neither a run nor a release", "make finetune"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refuse_other_folder__every_kind_is_named_with_a_next_step(places, name):
    what, advice = OTHERS[name]
    with pytest.raises(WeightsError) as predicting:
        read_task(places / name)
    with pytest.raises(WeightsError) as releasing:
        release(places / name, out=places / "out", license="mit")
    for error in (predicting.value, releasing.value):
        assert what in error.what
        assert advice in error.next_command


def test_refuse_other_folder__what_only_one_command_takes(places):
    with pytest.raises(WeightsError, match="a run of stage 1, which has an encoder and no classes"):
        read_task(places / "runs/ssl")
    with pytest.raises(WeightsError, match="the folder is a part of a run") as error:
        release(places / "runs/seg/model", out=places / "out", license="mit")
    assert error.value.next_command.endswith("runs/seg")
