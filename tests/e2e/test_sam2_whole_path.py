"""Both stages, evaluation and release on a file of SAM 2 with random weights."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from model_factory import make_sam, tiny_hiera_spec, tiny_vit_t_spec
from release_factory import InThisProcess
from samgraft.finetune.release import release_clients
from samgraft.finetune.study import schedule
from samgraft.finetune.study.cell_run import run_cell
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.release import load_back
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.sam2_format import to_sam2
from store_factory import make_scan, make_store, write_nifti

SIZE = 64
MEMORY = {
    "maskmem_tpos_enc": torch.full((7, 1, 1, 64), 0.25),
    "memory_attention.layers.0.self_attn.q_proj.weight": torch.eye(4),
    "no_mem_pos_enc": torch.ones(1, 1, 32, dtype=torch.bfloat16),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "labelled", num_patients=5, shape_zyx=(3, 24, 20))
    tensors = make_sam(tiny_hiera_spec(), image_size=SIZE).state_dict()
    torch.save({"model": {**to_sam2(tensors), **MEMORY}}, tmp_path / "sam2.pt")
    return tmp_path


def finetune(*settings: str, name: str = "seg", base: tuple[str, ...] = ("--base", "sam2.pt")) -> int:
    common = [f"model.image_size={SIZE}", "data.batch_size=2", "optim.warmup_steps=1", "trainer.max_steps=3"]
    common += ["watch.validate_every_n_steps=2", "watch.num_overlays=1", "adapter.r=2"]
    return main(["finetune", *base, "--data", "labelled/store.zarr", "--name", name, *common, *settings])


def test_sam2__goes_through_both_stages_and_a_release(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(place / "unlabelled", num_patients=4, shape_zyx=(3, 24, 20), labelled=False)
    settings = [f"model.image_size={SIZE}", "data.batch_size=2", "optim.warmup_steps=1", "trainer.max_steps=3"]
    settings += ["watch.every_n_steps=2", "watch.num_panel_rows=2", "data.num_held_out_slices=2"]
    arguments = ["--data", "unlabelled/store.zarr", "--base", "sam2.pt", "--name", "ssl"]
    assert main(["pretrain", *arguments, *settings]) == 0
    card = json.loads(Path("runs/ssl/encoder/card.json").read_text())
    assert (card["arch"], card["objective"], card["image_size"]) == ("sam2_t", "mae", SIZE)

    start = ("--ckpt", "runs/ssl", "--base", "sam2.pt")
    assert finetune("data.allow_transductive=true", base=start) == 0
    assert main(["evaluate", "runs/seg", "--split", "test"]) == 0

    monkeypatch.setattr(load_back.subprocess, "run", InThisProcess(capsys, release_clients.CLIENTS).run)
    arguments = ["--out", "released", "--license", "cc-by-4.0", "--format", "sam,transformers,peft", "--force"]
    assert main(["release", "runs/seg", *arguments]) == 0
    released, base = read_weights(Path("released/sam2.pt")), read_weights(Path("sam2.pt"))
    assert released.format == "SAM 2"
    assert released.tensors.keys() == base.tensors.keys()
    assert released.memory.keys() == MEMORY.keys()
    for name, tensor in MEMORY.items():
        assert released.memory[name].dtype == tensor.dtype
        assert torch.equal(released.memory[name], tensor), name
    readme = Path("released/README.md").read_text()
    assert "no mask is propagated between slices" in readme
    assert "the 157 tensors of the memory of videos, of which the base weights contain 3" in readme
    assert read_weights(Path("released/transformers")).format == "transformers Sam2Model"
    assert mask_of("released").any()


def mask_of(model: str, *arguments: str) -> np.ndarray:
    """Return the mask (i, j, k) that ``predict`` writes for one scan."""
    image, _ = make_scan(shape_zyx=(3, 24, 20), seed=9)
    write_nifti(Path("new/scan.nii.gz"), image)
    assert (
        main(["predict", model, "new/scan.nii.gz", "--out", f"masks/{model}", "--precision", "fp32", *arguments]) == 0
    )
    (file,) = Path("masks", model).glob("*.nii.gz")
    return np.asarray(nib.load(file).dataobj)


def test_sam2__prompts_cached_embeddings_and_unmerged_adapters(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("prompt.mode=clicks", "prompt.num_clicks=1", name="clicks") == 0
    prompts = {"version": 1, "coordinates": "voxel", "prompts": [{"class": 1, "box": [[4, 4, 1], [15, 15, 1]]}]}
    Path("prompts.json").write_text(json.dumps(prompts))
    capsys.readouterr()
    segmented = mask_of("runs/clicks", "--prompts", "prompts.json")
    assert sorted(set(np.nonzero(segmented)[2])) == [1]
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "only slices with a prompt are segmented, and no mask is propagated between slices" in printed
    masks = "masks/runs/clicks"
    snap = f"itksnap -g new/scan.nii.gz -s {masks}/scan_seg.nii.gz -l {masks}/labels.txt"
    assert f"view in ITK-SNAP: {snap}; in 3D Slicer: drop {masks}/scan_seg.seg.nrrd and the scan" in printed
    cache = ["adapter.scope=decoder", "cache.variants=2", f"cache.folder={tmp_path / 'cache'}"]
    assert finetune(*cache, "data.num_neighbours=1", name="cached") == 0
    (folder,) = (tmp_path / "cache").iterdir()
    facts = json.loads((folder / "facts.json").read_text())
    records = facts["variants"] * len(facts["slices"])
    grid, dim = SIZE // 16, 32
    values = dim * grid**2 + dim // 8 * (4 * grid) ** 2 + dim // 4 * (2 * grid) ** 2
    assert (folder / "embeddings.bin").stat().st_size == 2 * records * values
    assert finetune("adapter.method=adapter", name="pair") == 0
    assert read_weights(Path("runs/pair/model/base.safetensors")).memory.keys() == MEMORY.keys()
    assert main(["evaluate", "runs/pair", "--split", "test"]) == 0


def test_sam2__study_of_two_families_on_few_shots(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(place / "vit_t.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=SIZE).state_dict()))
    grid = {
        "name": "families",
        "data_sets": [{"name": "a", "store": "labelled/store.zarr"}],
        "initialisations": [{"name": "base", "ckpt": {"vit_t": "vit_t.safetensors", "sam2_t": "sam2.pt"}}],
        "architectures": ["vit_t", "sam2_t"],
        "shots": [2],
        "preset": "cpu",
        "settings": [f"model.image_size={SIZE}", "data.batch_size=2", "optim.warmup_steps=1", "trainer.max_steps=2"],
    }
    Path("families.yaml").write_text(yaml.safe_dump(grid))
    texts: list[str] = []

    def in_process(arguments, log_file, num_threads, processes):
        texts.append(" ".join(arguments))
        return main(list(arguments)), 1.0, 1.0

    monkeypatch.setattr(schedule, "run_cell", lambda cell, folder, **_: run_cell(cell, folder, run=in_process))
    assert main(["study", "families.yaml", "--parallel", "1"]) == 0
    trained = [text for text in texts if text.startswith("finetune")]
    assert [text.split("--model ")[1].split()[0] for text in trained] == ["vit_t", "sam2_t"]
    assert all("data.few_shot.num=2" in text for text in trained)
    results = [json.loads(file.read_text()) for file in Path("studies/families/cells").glob("*[!t].json")]
    assert len(results) == 2
    assert all(result["dice_per_patient"] for result in results)
    (run, _) = sorted(Path("studies/families/runs").iterdir())
    assert len(json.loads((run / "model" / "task.json").read_text())["split"]["train"]) == 2
