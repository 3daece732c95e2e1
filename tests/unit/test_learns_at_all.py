"""The controls of ``benchmarks/learns_at_all.py``, with commands that only pretend to train."""

import json

import learns_at_all
import nibabel as nib
import numpy as np
import pytest
import ssl_helps
from learns_at_all import WANTED_GAIN, prepare_shuffled, render, run_arms, shuffle_scan
from samgraft.shared.cli import main
from samgraft.shared.samples.split import load_split
from samgraft.shared.store.store import SliceStore
from ssl_helps_plan import SCALES, Plan

DICE = {"base": 0.5, "masked_image": 0.6, "masked_image_shuffled": 0.5}


@pytest.fixture
def source(tmp_path):
    """Write a folder like the hippocampus task, with nine training and two validation subjects."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(11):
        entry = {"image": f"./imagesTr/h_{number:03}.nii.gz", "label": f"./labelsTr/h_{number:03}.nii.gz"}
        voxels = rng.normal(100, 30, (20, 24, 4)).clip(1).astype(np.float32)
        for key, values in (("image", voxels), ("label", (voxels > 120).astype(np.uint8))):
            path = tmp_path / "task" / entry[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        entries.append(entry)
    about = {"labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}}
    lists = {"training": entries[:9], "validation": entries[9:]}
    (tmp_path / "task" / "dataset.json").write_text(json.dumps({**about, **lists}))
    return tmp_path / "task"


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Return a small plan and replace the training commands by files with made results."""
    small = {"NUM_HELD_OUT": 4, "NUM_PROBE_TRAIN": 1, "NUM_PROBE_TEST": 1, "FEW": 2}
    for name, value in small.items():
        monkeypatch.setattr(ssl_helps, name, value)
    commands = []

    def pretend(arguments, plan, *, log):
        commands.append([*arguments])
        if arguments[0] == "store":
            assert main([*arguments]) == 0
        name = arguments[arguments.index("--name") + 1] if "--name" in arguments else ""
        if arguments[0] == "pretrain":
            (plan.work / "runs" / name).mkdir(parents=True)
            values = {"train/epochs": 2.5, "held_out/loss": 0.5}
            lines = [{"step": step, **values} for step in (0, 4)]
            (plan.work / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if arguments[0] == "evaluate":
            arm = arguments[1].rsplit("few-", 1)[1].rsplit("-", 1)[0]
            folder = plan.work / "runs" / f"few-{arm}-{arguments[1][-1]}" / "evaluation" / "test"
            folder.mkdir(parents=True)
            rows = [f"p{i},{DICE[arm] + i / 100}" for i in range(6)]
            (folder / "cases.csv").write_text("\n".join(["patient_id,dice", *rows]) + "\n")

    monkeypatch.setattr(ssl_helps, "run", pretend)
    settings = {"few_steps": 4, "full_steps": 0, "few_seeds": 3, "full_seeds": 0, "geometry": "mild", "device": "cpu"}
    base = tmp_path / "base.pth"
    plan = Plan(work=tmp_path / "work", base=base, objectives=(), stage_1_steps=4, scale=SCALES[56], **settings)
    plan.work.mkdir()
    return plan, commands


def test_controls__run_once_and_state_what_was_met(plan, source):
    plan, commands = plan
    ssl_helps.prepare(plan, source)
    prepare_shuffled(plan, source)
    run_arms(plan, "masked_image", 5e-4)
    trained = [c for c in commands if c[0] == "pretrain"]
    assert ["optim.lr=1e-12" in c for c in trained] == [True, False, False]
    assert ["shuffled" in c[c.index("--data") + 1] for c in trained] == [False, False, True]
    assert all("--base=random" in c for c in trained)
    count = len(commands)
    run_arms(plan, "masked_image", 5e-4)
    assert len(commands) == count
    text = render(plan, "masked_image")
    assert "masked_image: +0.100 against random weights, expected at least +0.05: met" in text
    assert "masked_image_shuffled: +0.000 against random weights, expected below +0.05: met" in text
    assert "| masked_image | 4 | 2.5 |" in text


def test_controls__fail_where_shuffled_pixels_help_as_much(plan, source, monkeypatch):
    plan, _ = plan
    monkeypatch.setitem(DICE, "masked_image_shuffled", 0.6)
    monkeypatch.setitem(DICE, "masked_image", 0.5 + WANTED_GAIN / 2)
    ssl_helps.prepare(plan, source)
    prepare_shuffled(plan, source)
    run_arms(plan, "masked_image", 5e-4)
    text = render(plan, "masked_image")
    assert "masked_image: +0.025 against random weights, expected at least +0.05: not met" in text
    assert "masked_image_shuffled: +0.100 against random weights, expected below +0.05: not met" in text


def test_prepare_shuffled__has_the_same_patients_in_the_same_parts(plan, source):
    plan, _ = plan
    ssl_helps.prepare(plan, source)
    prepare_shuffled(plan, source)
    shuffled = learns_at_all.shuffled_plan(plan)
    original, permuted = SliceStore.open(plan.store), SliceStore.open(shuffled.store)
    wanted = load_split(plan.work / "pretrain.split.json", original)
    found = load_split(shuffled.work / "pretrain.split.json", permuted)
    assert (len(found.train), len(found.val)) == (len(wanted.train), len(wanted.val)) == (3, 4)
    # The probe's and the test subjects are in no shuffled file.
    assert len(permuted.series) == 7


def test_shuffle_scan__keeps_every_voxel_and_no_order(tmp_path, source):
    scan = source / "imagesTr" / "h_000.nii.gz"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shuffle_scan(scan, tmp_path / f"{name}.nii.gz", seed=seed)
    before, a, b, c = (nib.load(p).get_fdata() for p in (scan, *(tmp_path / f"{n}.nii.gz" for n in "abc")))
    assert np.array_equal(np.sort(before, axis=None), np.sort(a, axis=None))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert (a == before).mean() < 0.1
