"""Commands that a finished fine-tuning prints can be executed, and its last lines report what the report does."""

import re
import shlex
from types import SimpleNamespace

import pytest
from doc_commands import arguments_of, fake_environment, parse
from samgraft.finetune.config import DataConfig, FinetuneConfig, ModelConfig
from samgraft.finetune.release import adapter_format
from samgraft.finetune.task import Task
from samgraft.finetune.training.report import next_commands, short_training
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.split import Split
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.config import TrainerConfig
from store_factory import make_scan, make_store, write_nifti
from tiny_sams import tiny_sam


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("next")
    make_store(root, num_patients=5, shape_zyx=(3, 24, 24))
    write_tensors(root / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    return root


def save_split(root, name, *, num_test):
    """Write a split that differs from the one that samgraft would draw."""
    store = SliceStore.open(root / "store.zarr")
    patients = store.patient_ids
    test, val, train = patients[:num_test], patients[num_test : num_test + 1], patients[num_test + 1 :]
    Split(
        train=tuple(train), val=tuple(val), test=tuple(test), seed=9, store_fingerprint=store.fingerprint
    ).save(root / name)  # fmt: skip
    return name


def finetune(name, *settings):
    return main([
        "finetune", "--base", "base.safetensors", "--data", "store.zarr", "--name", name, "--preset", "cpu",
        "trainer.max_steps=2", "data.batch_size=2", "model.image_size=32", "watch.validate_every_n_steps=2",
        "watch.num_overlays=1", "optim.warmup_steps=1", "adapter.r=2", *settings,
    ])  # fmt: skip


def printed(capsys):
    """Return the terminal's text as one line, because log lines are wrapped."""
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_finetune__prints_commands_that_evaluate_and_release_its_run(lab, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(lab)
    monkeypatch.setenv("SAMGRAFT_FRONT_END", "make finetune")
    # A release is suggested for a model that segments something, which two steps do not reach.
    monkeypatch.setattr(Task, "warning", None)
    assert finetune("own", f"data.split={save_split(lab, 'own.json', num_test=2)}") == 0
    shown = printed(capsys)
    venv = fake_environment(tmp_path)

    evaluate = re.search(r"make evaluate RUN=\S+ SPLIT=test", shown)[0]
    assert main(arguments_of(evaluate, venv)) == 0
    assert (lab / "runs" / "own" / "evaluation" / "test" / "cases.csv").is_file()

    # Only base weights were given. The adapter is released with them.
    assert adapter_format._read_trained_on(lab / "runs" / "own").weights is not None
    release = re.search(r"make release RUN=\S+ OUT=\S+ LICENSE=\.\.\.", shown)[0]
    parsed = parse(arguments_of(release.replace("...", "cc-by-4.0"), venv))
    assert "own" in str(vars(parsed))


def test_finetune__without_test_patients_and_progress_prints_both_and_evaluates_validation(lab, monkeypatch, capsys):
    monkeypatch.chdir(lab)
    assert finetune("flat", f"data.split={save_split(lab, 'flat.json', num_test=0)}", "optim.lr=1e-12") == 0
    shown = printed(capsys)
    assert "SPLIT=test" not in shown
    assert "The split has no test patients." in shown
    report = (lab / "runs" / "flat" / "report.html").read_text(encoding="utf-8")
    endings = r"The model segments (?:nothing|hardly anything): its|Foreground Dice on validation did not rise: \S+"
    sentence = re.search(endings, shown)[0]
    assert sentence in " ".join(report.split())
    # Started by the command and not by make, so that commands are shown.
    evaluate = re.search(r"samgraft (evaluate runs/flat --split val)", shown)[1]
    assert main(shlex.split(evaluate)) == 0
    assert "samgraft evaluate runs/flat --split val" in report


def test_next_commands__quote_a_path_with_spaces():
    evaluate, release = next_commands("runs/my run", ["p1"], is_good=True)
    assert evaluate == "make evaluate RUN='runs/my run' SPLIT=test"
    assert release.startswith("make release RUN='runs/my run' OUT='releases/my run' ")
    assert next_commands("runs/my run", ["p1"], is_good=False) == [evaluate]


@pytest.mark.parametrize(
    ("steps", "further", "expected"), [(90, None, 768), (383, None, 768), (384, None, None), (9, 1, None)]
)
def test_short_training__names_the_steps_that_show_each_slice_ten_times(steps, further, expected):
    """307 slices in batches of 4 take 767.5 steps for ten epochs, and 383.75 for five."""
    config = FinetuneConfig(
        modality="mri",
        data=DataConfig(store="s.zarr", batch_size=4),
        model=ModelConfig(base="b.pth"),
        trainer=TrainerConfig(max_steps=steps),
    )
    note = short_training(config, SimpleNamespace(dataset=range(307), further=further))
    assert (note is None) if expected is None else f"trainer.max_steps={expected}'" in note
    assert expected is None or f"was seen {4 * steps / 307:.1f} times" in note


@pytest.mark.parametrize("labelled", [True, False])
def test_store_build__prints_the_training_that_its_store_is_for(labelled, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        image, label = make_scan(shape_zyx=(3, 24, 24), seed=number)
        write_nifti(tmp_path / "my scans" / f"P{number}" / "t1.nii.gz", image)
        if labelled:
            write_nifti(tmp_path / "my scans" / f"P{number}" / "t1_seg.nii.gz", label)
    for state in ("complete", "already complete"):
        assert main(["store", "build", "my scans", "--out", "my store.zarr"]) == 0
        found = re.search(rf"my store.zarr: {state} next (samgraft (\w+) .*)$", printed(capsys).strip())
        assert found[2] == ("finetune" if labelled else "pretrain")
        assert arguments_of(found[1], tmp_path) == [found[2], "--data", "my store.zarr"]


def test_store_build__refused_cases_can_be_skipped_as_the_message_says(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "scans" / "P1" / "t1.nii.gz", make_scan(shape_zyx=(3, 24, 24))[0])
    (tmp_path / "scans" / "P2.nii.gz").write_bytes(b"")
    build = ["store", "build", "scans", "--out", "s.zarr"]
    assert main(build) == 3
    option = re.search(r"or build with (--skip-refused)", printed(capsys))[1]
    assert main([*build, option]) == 0
    assert len(SliceStore.open(tmp_path / "s.zarr")) == 1
