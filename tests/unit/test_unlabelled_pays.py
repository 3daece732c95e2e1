"""The comparison of ``benchmarks/unlabelled_pays.py``, with commands that only pretend to train."""

import json

import numpy as np
import pytest
import unlabelled_pays
from samgraft.shared.scans.case import SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore
from store_factory import make_scan, nifti_files, write_nifti
from unlabelled_pays import cells, draw_patients, pseudo_quality, run_cell, subject_dice
from unlabelled_pays_plan import ARMS, Plan
from unlabelled_pays_table import draw, paired_gain, render

GAIN = {
    "unet": 0.0,
    "unet_unlabelled": 0.03,
    "unet_online": 0.02,
    "sam": -0.1,
    "sam_unlabelled": -0.05,
    "unet_all": 0.1,
    "unet_long": 0.01,
    "unet_long_unlabelled": 0.05,
    "unet_long_all": 0.11,
}


def record(arm, seed, *, labels=5, data="hippocampus"):
    dice = {f"p{i}": 0.7 + i / 100 + seed / 1000 + GAIN[arm] for i in range(6)}
    return {
        "data": data,
        "arm": arm,
        "labels": labels,
        "seed": seed,
        "dice": dice,
        "cpu_minutes": 3.0,
        "hardware": "a machine",
        "torch": "2",
        "code_revision": "0123456789abc",
    }


@pytest.fixture
def plan(tmp_path, monkeypatch):
    commands = []

    def pretend(arguments, plan, *, log):
        commands.append([*arguments])
        folder = plan.work / "runs" / log
        if arguments[0] == "selftrain":
            (folder / "round-1" / "teachers" / "dynunet2d" / "model").mkdir(parents=True, exist_ok=True)
            (folder / "round-1" / "teachers" / "dynunet2d" / "model" / "task.json").touch()
        if arguments[0] == "pretrain":
            folder.mkdir(parents=True)
            lines = [{"train/epochs": 0, "held_out/loss": 0.4}, {"train/epochs": 29.6, "held_out/loss": 0.3}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if arguments[0] == "evaluate":
            scores = plan.work / "scores" / arguments[arguments.index("--out") + 1].rsplit("/", 1)[1]
            scores.mkdir(parents=True)
            (scores / "cases.csv").write_text("patient_id,dice\np0,0.5\np0,0.7\np1,n/a\np1,0.8\n")

    monkeypatch.setattr(unlabelled_pays, "run", pretend)
    given = Plan(work=tmp_path, data="hippocampus", base=tmp_path / "base.pth", numbers=(5,), device="cpu")
    return given, commands


def test_cells__run_once_with_equal_draws_and_steps(plan):
    plan, commands = plan
    planned = list(cells(plan, list(ARMS), range(2)))
    assert [name for name, what in planned if what["arm"] == "unet_all"] == ["hippocampus-unet_all-all-0"]
    for cell in planned:
        run_cell(plan, *cell)
    count = len(commands)
    for cell in planned:
        run_cell(plan, *cell)
    assert len(commands) == count
    trained = {c[c.index("--name") + 1]: c for c in commands if "--name" in c}
    # The U-Net of labels alone is the teacher of the other arm.
    assert not any("-unet-5-" in name for name in trained)
    assert any(c[:2] == ["evaluate", str(plan.work / "runs/hippocampus-unet_unlabelled-5-1/round-1/teachers/dynunet2d")]
               for c in commands)  # fmt: skip
    alone, more = (set(trained[f"hippocampus-{arm}-5-1"]) for arm in ("sam", "sam_unlabelled"))
    labels = plan.work / "runs" / "hippocampus-unet_unlabelled-5-1" / "round-1" / "pseudo_labels.zarr"
    assert more ^ alone == {
        "hippocampus-sam-5-1",
        "hippocampus-sam_unlabelled-5-1",
        f"data.pseudo_labels={labels}",
        "data.pseudo_fraction=0.75",
    }
    assert "trainer.max_steps=2400" in trained["hippocampus-unet_long_unlabelled-5-1"]
    assert {"data.few_shot.num=5", "data.few_shot.repeat=1", "seed=1", "trainer.max_steps=600"} <= alone
    assert any("seed=10001" in text for text in trained["hippocampus-unet_unlabelled-5-1"])
    assert not any("few_shot" in text for text in trained["hippocampus-unet_all-all-0"])
    # All seeds fine-tune from one encoder, whose time is counted in its own record.
    assert [c[0] for c in commands].count("pretrain") == 1
    encoder = str(plan.work / "runs" / "hippocampus-stage_1")
    assert set(trained["hippocampus-sam_stage_1-5-1"]) ^ alone == {
        "hippocampus-sam_stage_1-5-1",
        "hippocampus-sam-5-1",
        "--ckpt",
        encoder,
    }


def test_train__labels_alone_are_trained_where_no_self_training_did_it(plan):
    plan, commands = plan
    run_cell(plan, "hippocampus-unet_long-5-3", {"arm": "unet_long", "data": "hippocampus", "labels": 5, "seed": 3})
    assert commands[0][0] == "finetune"
    assert {"trainer.max_steps=2400", "data.few_shot.repeat=3"} <= set(commands[0])
    assert commands[1][:2] == ["evaluate", str(plan.work / "runs" / "hippocampus-unet_long-5-3")]


def test_subject_dice__is_the_mean_over_scans_and_classes(tmp_path):
    (tmp_path / "cases.csv").write_text("patient_id,dice\np0,0.5\np0,0.7\np1,n/a\np1,0.8\n")
    assert subject_dice(tmp_path / "cases.csv") == {"p0": 0.6, "p1": 0.8}


def test_paired_gain__uses_only_the_seeds_of_both_arms():
    records = [record("sam", 0), record("sam", 1), record("sam_unlabelled", 1), record("sam_unlabelled", 2)]
    per_patient, per_seed = paired_gain(records, data="hippocampus", arm="sam_unlabelled", labels=5)
    assert per_seed == pytest.approx([0.05])
    assert per_patient == pytest.approx([0.05] * 6)
    assert paired_gain(records, data="hippocampus", arm="sam", labels=5) is None
    assert paired_gain(records, data="hc18", arm="sam_unlabelled", labels=5) is None


def test_render__gives_gains_with_both_intervals(tmp_path):
    records = [record(arm, seed) for arm in ("unet", "unet_unlabelled") for seed in range(3)]
    records[-1]["dice"] = {patient: value + 0.03 for patient, value in records[-1]["dice"].items()}
    text = render(records)
    # Gains of 0.03, 0.03 and 0.06; t interval of two degrees of freedom.
    reach = 4.302653 * np.std([0.03, 0.03, 0.06], ddof=1) / np.sqrt(3)
    assert "+0.040 (+0.040 to +0.040), 3 seeds" in text
    assert f"{0.04 - reach:+.3f} to {0.04 + reach:+.3f}" in text
    stage_1 = {
        "data": "hippocampus",
        "epochs": 29.6,
        "ends": {"held_out/loss": [0.4, 0.3]},
        "cpu_minutes": 48.6,
        **{key: records[0][key] for key in ("hardware", "torch", "code_revision")},
    }
    sentence = "30 epochs over the training patients, 49 core-minutes. The loss on held-out slices went from 0.400"
    assert sentence in render(records, stage_1=[stage_1])
    draw(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_draw_patients__does_not_depend_on_the_salt(tmp_path):
    drawn = []
    for salt in ("a", "b"):
        store = SliceStore.open(pictures_store(tmp_path / salt, salt))
        train, test = draw_patients(store, tmp_path / salt, 2)
        assert (len(train), len(test)) == (4, 2)
        assert not set(train) & set(test)
        hashes = {record.patient_id: record.source_sha256 for record in store.series}
        drawn.append([[hashes[patient] for patient in part] for part in (train, test)])
    assert drawn[0] == drawn[1]


def pictures_store(folder, salt):
    """Build a store from six scans in ``images``."""
    (folder / "images").mkdir(parents=True)
    cases = []
    for number in range(6):
        image, _ = make_scan(shape_zyx=(4, 16, 16), seed=number)
        files = nifti_files(write_nifti(folder / "images" / f"{number}.nii.gz", image))
        cases.append(SourceCase(name=str(number), patient_key=str(number), scan=files))
    settings = BuildSettings(modality=Modality.MRI, salt=salt)
    build_store(cases, out=folder / "s.zarr", settings=settings, label_names={}, intensity=IntensityPreset())
    return folder / "s.zarr"


def test_pseudo_quality__is_none_without_pseudo_labels(plan):
    plan, _ = plan
    assert pseudo_quality(plan, plan.work) == {}
