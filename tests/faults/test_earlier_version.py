"""Stores, runs and releases of an earlier version open, resume and give the same bytes as there."""

import json
import subprocess
import sys
from pathlib import Path

import earlier_version
import pytest
from samgraft.shared.cli import main
from samgraft.shared.weights.load import load_sam

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    source = folder / "source"
    source.mkdir()
    if not earlier_version.unpack(source, ROOT):
        pytest.skip("this clone does not contain the commit of the earlier version")
    root = folder / "lab"
    root.mkdir()
    script = Path(earlier_version.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(source)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.fixture(autouse=True)
def _in_lab(lab, monkeypatch):
    monkeypatch.chdir(lab)


def test_store__of_an_earlier_version_is_verified(capsys):
    assert main(["store", "check", "store.zarr"]) == 0
    assert main(["store", "info", "labelled.zarr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_labelled"] == 8


def test_pretrain__run_of_an_earlier_version_resumes_to_the_same_bytes(lab):
    assert main(["pretrain", "--config", "pretrain.yaml", "--name", "pretrain-half"]) == 0
    for name in ("encoder/encoder.safetensors", "ssl_state/state.safetensors"):
        assert (lab / "runs/pretrain-half" / name).read_bytes() == (lab / "runs/ssl" / name).read_bytes()


def test_finetune__run_of_an_earlier_version_resumes_to_the_same_bytes(lab):
    assert main(["finetune", "--config", "finetune.yaml", "--name", "finetune-half"]) == 0
    [resumed] = (lab / "runs/finetune-half/model").glob("*.safetensors")
    assert resumed.read_bytes() == (lab / "runs/seg/model" / resumed.name).read_bytes()


def test_finetune__accepts_the_encoder_of_an_earlier_run():
    words = ["--config", "finetune.yaml", "--ckpt", "runs/ssl", "--base", "sam.safetensors", "--dry-run"]
    # Both stores are made from the same synthetic patients.
    assert main(["finetune", *words, "--name", "next", "data.allow_transductive=true"]) == 0


def test_evaluate__run_of_an_earlier_version_is_measured(lab):
    assert main(["evaluate", "runs/seg", "--split", "test"]) == 0
    assert (lab / "runs/seg/evaluation/test/cases.csv").is_file()


@pytest.mark.parametrize("model", ["runs/seg", "release"])
def test_predict__model_of_an_earlier_version_segments(lab, model):
    out = f"masks-{Path(model).name}"
    assert main(["predict", model, "scans_labelled.zarr/case00_0.nii.gz", "--out", out]) == 0
    assert list((lab / out).rglob("*.nii.gz"))


def test_release__of_an_earlier_version_loads_by_its_cards_own_lines(lab):
    from samgraft.shared.models.weights import load_sam as load_by_former_path

    former = load_by_former_path("release/sam.safetensors").state_dict()
    assert all((former[name] == tensor).all() for name, tensor in load_sam("release/sam.pth").state_dict().items())


def test_release__run_of_an_earlier_version_is_released():
    words = ["release", "runs/ssl", "--out", "release-encoder", "--license", "cc-by-4.0"]
    assert main(words) == 0
