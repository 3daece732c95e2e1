"""Every command that an ending prints can be executed, whatever ended and in whichever grammar it was typed."""

import os
import signal
import zipfile

import pytest
import torch
from doc_commands import fake_environment, parse
from endings import run_to_end
from finished_factory import make_lab
from samgraft.shared.demo.heads import demo_paths
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.split import default_split_path
from store_factory import make_scan, make_store, write_nifti
from tiny_pretrain import act_after
from tiny_sams import tiny_sam

SMALL = [
    "--preset", "cpu", "trainer.device=cpu", "trainer.precision=fp32", "trainer.max_steps=2", "data.batch_size=2",
    "model.image_size=32", "optim.warmup_steps=1",
]  # fmt: skip
PRETRAIN = [
    "pretrain", "--data", "many.zarr", "--labelled", "store.zarr", "--base", "my weights/base.safetensors", *SMALL,
    "data.num_held_out_slices=2", "objective.masked_image.mask_unit_px=8", "objective.masked_image.decoder_dim=8",
    "watch.every_n_steps=2",
]  # fmt: skip
FINETUNE = ["finetune", "--base", "my weights/base.safetensors", "--data", "store.zarr", *SMALL, "adapter.r=2"]


def write_study(path, *, store):
    path.write_text(
        "name: adapters\n"
        f"data_sets: [{{name: tumours, store: {store}}}]\n"
        "initialisations: [{name: tiny, ckpt: {vit_t: 'my weights/base.safetensors'}}]\n"
        "architectures: [vit_t]\n"
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a finished model, stores, scans and weights."""
    root = tmp_path_factory.mktemp("endings")
    make_lab(root, shape_zyx=(3, 24, 24))
    make_store(root, num_patients=4, shape_zyx=(3, 24, 24), labelled=False, seed=50, name="many.zarr")
    for number in range(4):
        image, label = make_scan(shape_zyx=(3, 24, 24), seed=number)
        write_nifti(root / "my scans" / f"P{number}" / "t1.nii.gz", image)
        write_nifti(root / "my scans" / f"P{number}" / "t1_seg.nii.gz", label)
    (root / "my weights").mkdir()
    write_tensors(root / "my weights" / "base.safetensors", dict(tiny_sam("vit_t").state_dict()))
    write_study(root / "my study.yaml", store="no.zarr")
    torch.save({**tiny_sam("vit_t").state_dict(), "made with": zipfile.Path}, root / "my weights" / "foreign.pth")
    return root


@pytest.fixture
def end(lab, monkeypatch, capfd, tmp_path):
    """Return a function that runs a command in the lab to its end."""
    monkeypatch.chdir(lab)
    # The estimate of the cost is not what is tested.
    monkeypatch.setattr("samgraft.shared.training.preflight.MAX_MEASURED_STEPS", 1)
    venv = fake_environment(tmp_path)
    return lambda *arguments: run_to_end(list(arguments), capfd, venv)


@pytest.fixture(params=["samgraft", "make"])
def typed(request, monkeypatch):
    """Print messages as after a command and as after a target of make."""
    if request.param == "make":
        monkeypatch.setenv("SAMGRAFT_FRONT_END", "make finetune")
    return request.param


SCREEN_LINES = 24
REFUSED = {
    "finetune without weights": (["finetune", "--data", "store.zarr"], 2, {"pretrain"}),
    "finetune of weights that do not exist": (
        ["finetune", "--base", "no.pth", "--data", "store.zarr"],
        4,
        {"pretrain"},
    ),
    "pretrain of a model without weights": (["pretrain", "--model", "vit_b", "--data", "many.zarr"], 2, {"pretrain"}),
    "pretrain of another method": (["pretrain", "--method", "moco", "--data", "many.zarr"], 2, set()),
    "evaluate of no run": (["evaluate", "runs/no"], 4, {"finetune"}),
    "predict of no run": (["predict", "runs/no", "my scans", "--out", "x"], 4, {"finetune"}),
    "release of no run": (["release", "runs/no", "--out", "x"], 4, {"finetune"}),
    "release without a licence": (["release", "runs/seg", "--out", "my releases/a"], 2, {"release"}),
    "compare before an evaluation": (["compare", "runs/seg", "runs/seg", "--split", "val"], 3, {"evaluate"}),
    "no store": (["store", "info", "no.zarr"], 3, {"store"}),
    "folder without a store": (["store", "info", "my scans"], 3, {"store"}),
    "store check of damage": (["store", "check", "damaged.zarr"], 3, set()),
    "unknown option": (["predict", "--no-such-option"], 2, set()),
    "selftrain without scans to label": (["selftrain", *FINETUNE[1:]], 3, set()),
    "selftrain of scans that do not exist": (["selftrain", *FINETUNE[1:], "--unlabelled", "no.zarr"], 3, {"store"}),
    "study of a store that does not exist": (["study", "my study.yaml"], 3, {"store"}),
    "inspect of foreign objects": (["inspect", "my weights/foreign.pth"], 4, {"inspect"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal__commands_are_understood(end, typed, name):
    arguments, code, expected = REFUSED[name]
    ended = end(*arguments)
    assert ended.code == code, ended.text
    assert len(ended.text.splitlines()) <= SCREEN_LINES, ended.text
    assert {command[0] for command in ended.commands if "--help" not in command} == expected, ended.text
    for command in ended.commands:
        if "--help" not in command:
            parse(command)


def test_demo__dry_run_prints_commands_that_are_understood(end):
    ended = end("demo", "--dry-run")
    assert [command[0] for command in ended.commands] == ["demo-data", "pretrain", "finetune", "evaluate", "predict"]
    assert all(parse(command) for command in ended.commands)


def test_evaluate_and_compare__run_what_the_refusal_and_the_ending_print(lab, end):
    [command] = end("compare", "runs/seg", "runs/seg", "--split", "test").commands
    ended = end(*command)
    assert ended.code == 0
    assert (lab / "runs/seg/evaluation/test/cases.csv").is_file()
    predict, release = ended.commands
    predict[predict.index("SCANS")] = "my scans"
    assert end(*predict).code == 0
    assert len(list((lab / "masks").rglob("*_seg.nii.gz"))) == 4
    # Nothing to do.
    assert "4 finished before" in end(*predict).text
    assert parse(release)


def test_inspect__prints_a_command_that_extracts_the_tensors(lab, end):
    [command] = end("inspect", "my weights/foreign.pth").commands
    assert end(*command).code == 0
    assert end("inspect", command[-1]).code == 0


def test_store__endings_of_build_check_and_split(lab, end):
    build = ["store", "build", "my scans", "--out", "my store.zarr"]
    for _ in range(2):  # The second one has nothing to do.
        built = end(*build)
        assert built.code == 0
    assert end(*build, "--dry-run").commands == ()
    assert built.commands == (["finetune", "--data", "my store.zarr"],)
    assert end("store", "split", "my store.zarr", "--fractions", "0.5,0.25,0.25").code == 0
    assert default_split_path(lab / "my store.zarr").is_file()
    assert end("store", "check", "my store.zarr").commands == ()


@pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_training__commands_of_a_stop_and_of_the_end_are_executed(lab, end, command):
    name = command[0]
    with pytest.MonkeyPatch.context() as patch:
        act_after(1, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        stopped = end(*command, "--name", name)
    assert stopped.code == 75, stopped.text
    [resume] = stopped.commands
    finished = end(*resume)
    assert finished.code == 0
    # Two steps segment hardly anything, and the release of such a model would be refused.
    following = finished.commands[-1:]
    assert [command[0] for command in following] == (["evaluate"] if name == "finetune" else ["finetune"])
    assert all(parse(command) for command in following)
    if name == "pretrain":
        assert end(*following[0], *SMALL, "--dry-run").code == 0
    else:
        assert end(*following[0]).code == 0
    # Nothing to do: the same commands are printed.
    again = end(*resume)
    assert again.code == 0
    assert [one for one in again.commands if one[0] != name] == [one for one in finished.commands if one[0] != name]


def test_demo_data__commands_of_both_endings_are_understood(end, monkeypatch):
    monkeypatch.setattr("samgraft.shared.demo.heads.demo_data", lambda root, modality: demo_paths(root))
    assert [command[0] for command in end("demo-data").commands] == ["pretrain"]
    monkeypatch.setattr("samgraft.shared.demo.decathlon.decathlon_data", lambda *_, root, cache: root / "mri.zarr")
    pretrain, finetune = end("demo-data", "--task", "hippocampus", "--root", "my data/demo").commands
    assert pretrain == ["pretrain", "--data", "my data/mri.zarr", "--labelled", "my data/mri.zarr"]
    assert finetune == ["finetune", "--data", "my data/mri.zarr"]
