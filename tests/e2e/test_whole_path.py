"""The whole path by its own commands, small: scans -> store -> pretrain -> finetune -> evaluate -> release -> load."""

from pathlib import Path

import pytest
import torch
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.weights.load import load_sam, read_weights
from store_factory import make_scan, write_nifti

PRETRAIN = [
    "trainer.max_steps=4", "data.batch_size=2", "model.image_size=64", "watch.every_n_steps=2",
    "data.num_held_out_slices=2", "watch.num_panel_rows=2", "optim.warmup_steps=1",
]  # fmt: skip
FINETUNE = [
    "trainer.max_steps=3", "data.batch_size=2", "model.image_size=64", "watch.validate_every_n_steps=2",
    "watch.num_overlays=1", "optim.warmup_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of five patients with labels, an unlabelled set, and base weights: what a lab has on day one."""
    root = tmp_path_factory.mktemp("lab")
    for patient in range(5):
        image, label = make_scan(shape_zyx=(4, 40, 36), seed=patient)
        write_nifti(root / "labelled" / f"scan{patient}.nii.gz", image)
        write_nifti(root / "labelled" / f"scan{patient}_label.nii.gz", label)
    for patient in range(5, 9):
        write_nifti(root / "unlabelled" / f"scan{patient}.nii.gz", make_scan(shape_zyx=(4, 40, 36), seed=patient)[0])
    sam = make_sam(tiny_vit_t_spec(), image_size=64)
    write_tensors(root / "base.safetensors", dict(sam.state_dict()))
    return root


def _run(*arguments: str) -> None:
    assert main(list(arguments)) == 0, arguments


def test_whole_path__from_scans_to_a_release_that_loads_strictly(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(workplace)
    _run("store", "build", "unlabelled", "--out", "unlabelled.zarr", "--modality", "mri", "--workers", "1")
    _run("store", "build", "labelled", "--out", "labelled.zarr", "--modality", "mri", "--workers", "1")
    _run("store", "check", "labelled.zarr")

    _run("pretrain", "--data", "unlabelled.zarr", "--base", "base.safetensors", "--name", "ssl", *PRETRAIN)
    for name in (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "report.html",
        "encoder/encoder.safetensors",
        "encoder/card.json",
    ):
        assert (workplace / "runs" / "ssl" / name).is_file(), name
    base, encoder = read_weights(Path("base.safetensors")), read_weights(Path("runs/ssl"))
    assert set(encoder.tensors) == {k for k in base.tensors if k.startswith("image_encoder.")}
    moved = [k for k, v in encoder.tensors.items() if not torch.equal(v, base.tensors[k])]
    assert moved, "stage 1 changed nothing"

    _run(
        "finetune",
        "--ckpt",
        "runs/ssl",
        "--base",
        "base.safetensors",
        "--data",
        "labelled.zarr",
        "--name",
        "seg",
        *FINETUNE,
    )
    _run("evaluate", "runs/seg", "--split", "test")
    # Forced, because it is chance whether three steps from random weights raise the Dice.
    _run("release", "runs/seg", "--out", "released", "--license", "cc-by-4.0", "--format", "sam", "--force")

    released = load_sam(Path("released/sam.safetensors"))
    stock = make_sam(tiny_vit_t_spec(), image_size=64, seed=9)
    stock.load_state_dict(torch.load("released/sam.pth", weights_only=True), strict=True)
    for (name, ours), theirs in zip(released.state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    sums = {line.split()[1].lstrip("*") for line in Path("released/SHA256SUMS").read_text().splitlines()}
    on_disk = {str(p.relative_to("released")) for p in Path("released").rglob("*") if p.is_file()}
    assert sums == on_disk - {"SHA256SUMS"}


def test_whole_path__nothing_identifying_reaches_runs_or_release(workplace: Path) -> None:
    """Runs after the path above: no absolute path of the lab, no source file name."""
    if not (workplace / "released").is_dir():
        pytest.skip("the whole path did not finish")
    canaries = [str(workplace).encode(), b"scan0", b"scan7"]
    found = [
        f"{path.relative_to(workplace)}: {canary!r}"
        for folder in ("runs", "released", "labelled.zarr", "unlabelled.zarr")
        for path in (workplace / folder).rglob("*")
        if path.is_file()
        for canary in canaries
        if canary in path.read_bytes()
    ]
    assert found == []


@pytest.mark.slow
def test_whole_path__every_format_loads_back_in_a_fresh_process(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs after the path above; a minute or two, because a stranger's libraries are imported anew."""
    if not (workplace / "runs" / "seg" / "model" / "task.json").is_file():
        pytest.skip("the whole path did not finish")
    monkeypatch.chdir(workplace)
    _run("release", "runs/seg", "--out", "everything", "--license", "cc-by-4.0")
    _run("release", "runs/ssl", "--out", "encoder", "--license", "cc-by-4.0", "--continuable")
    said = capsys.readouterr().err
    for client in ("SamPredictor", "PeftModel", "ONNX Runtime", "ConfigParser"):
        assert client in said
    assert "transformers: left out" in said
    assert sorted(p.name for p in (workplace / "encoder").iterdir()) == [
        "README.md", "SHA256SUMS", "card.json", "encoder.pth", "encoder.safetensors", "onnx", "ssl_state",
    ]  # fmt: skip
