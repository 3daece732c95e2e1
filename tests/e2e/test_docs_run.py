"""The shell commands of the documentation run in their order, on synthetic scans and a tiny model.

``make`` is translated to ``samgraft`` by the real Makefile. Training commands get a few settings more, which make them
short, and releases ``--force``. A command that was run before, on this or an earlier page, is not run again.
"""

import json
import shutil

import numpy as np
import pytest
from dicom_factory import write_series
from doc_commands import ROOT, arguments_of, fake_environment, shell_commands
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.shared.cli import main
from samgraft.shared.files import write_tensors
from samgraft.shared.training import preflight
from store_factory import make_scan, write_nifti

DOCS = ROOT / "docs"
EXECUTED = (
    "quick_start.md",
    "files.md",
    "howto/viewers.md",
    "howto/napari.md",
    "howto/release.md",
    "howto/choose_method.md",
    "howto/own_splits.md",
)
"""Pages in the order in which they are run. They share one folder."""
NOT_EXECUTED = {
    "../README.md": "the commands are those of quick_start.md and howto/self_training.md",
    "tutorial.md": "the commands are those of quick_start.md, with variants that other tests run",
    "install.md": "installs packages and builds images from the network",
    "troubleshooting.md": "each command is the remedy for another fault, and is tested with that fault",
    "unlabelled.md": "the commands are those of quick_start.md and howto/self_training.md",
    "privacy.md": "has samgraft doctor alone, which tests/unit/test_doctor.py runs",
    "howto/self_training.md": "trains models in processes of their own, as tests/unit/test_selftraining.py does",
    "howto/slurm.md": "needs SLURM or several processes",
    "howto/small_gpu.md": "needs a GPU, or is quick_start.md with one setting more",
}
"""Reason of every page that is not run. Its commands are parsed by tests/contract/test_docs.py."""
SKIPPED = {
    "make pretrain MODALITY=mri": "downloads the demo",
    "CKPT=runs/mri-vit_t-masked_image": "needs the run of the demo",
    "samgraft demo": "downloads the demo",
    "pip install": "installs packages",
    "--push": "uploads to the Hugging Face Hub",
    "--known-identifiers": "needs a file of identifiers, for a release that exists by then",
}
"""Reason by a part of every command that is left out of these pages."""
SHORT = ["trainer.max_steps=2", "data.batch_size=2", "model.image_size=64", "optim.warmup_steps=1"]
ADDED = {
    # The default are the demo's weights, which would be downloaded.
    "pretrain": [
        "--base",
        "data/weights/lite_medsam.pth",
        *SHORT,
        "watch.every_n_steps=2",
        "data.num_held_out_slices=2",
        "watch.num_panel_rows=2",
    ],
    "finetune": [*SHORT, "watch.validate_every_n_steps=2", "watch.num_overlays=1"],
    # Two steps may end below the start by chance.
    "release": ["--force"],
}


def commands_of(page):
    return [one for one in shell_commands(DOCS / page) if not any(part in one for part in SKIPPED)]


def test_docs__every_page_with_commands_is_run_or_has_a_reason():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "reference" not in path.parts}
    with_commands = {page for page in pages if not page.startswith("commands/") and shell_commands(DOCS / page)}
    assert with_commands | {"../README.md"} == {*EXECUTED, *NOT_EXECUTED}
    shown = [command for page in EXECUTED for command in shell_commands(DOCS / page)]
    assert [part for part in SKIPPED if not any(part in command for command in shown)] == []


def write_labelled(folder, patients, *, shape_zyx=(4, 40, 36), layout="{}_label.nii.gz"):
    for patient in patients:
        image, label = make_scan(shape_zyx=shape_zyx, seed=patient)
        write_nifti(folder / f"scan{patient}.nii.gz", image)
        write_nifti(folder / layout.format(f"scan{patient}"), label)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What a lab has before the first command: scans, labels of some, weights, and files that pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "MAX_MEASURED_STEPS", 1)  # the estimate is not what is tested
    for patient in range(8):
        write_nifti(tmp_path / "scans" / f"scan{patient}.nii.gz", make_scan(shape_zyx=(4, 40, 36), seed=patient)[0])
    write_labelled(tmp_path / "labelled", range(5))
    values = np.random.default_rng(0).integers(0, 900, (4, 40, 36)).astype(np.int16)
    # A DICOM-SEG repeats these attributes of its scan.
    write_series(tmp_path / "dicom_export", values, PatientName="Doe^Jane", PatientBirthDate="19500101",
                 PatientSex="F", StudyDate="20260101", StudyTime="120000", AccessionNumber="1", StudyID="1",
                 ReferringPhysicianName="", FrameOfReferenceUID="1.2.3.9", PositionReferenceIndicator="")  # fmt: skip
    raw = tmp_path / "nnUNet_raw" / "Dataset004_Hippocampus"
    for patient in range(5):
        image, label = make_scan(shape_zyx=(4, 40, 36), seed=20 + patient)
        write_nifti(raw / "imagesTr" / f"hip_{patient:03d}_0000.nii.gz", image)
        write_nifti(raw / "labelsTr" / f"hip_{patient:03d}.nii.gz", label)
    (raw / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "hippocampus": 1}, "numTraining": 5,
                    "file_ending": ".nii.gz"})
    )  # fmt: skip
    cases = [f"hip_{patient:03d}" for patient in range(5)]
    folds = [{"train": [c for c in cases if c not in cases[k : k + 2]], "val": cases[k : k + 2]} for k in (0, 2)]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    parts = ["train", "train", "train", "val", "test"]
    rows = [f"scan{patient},{part}" for patient, part in enumerate(parts)]
    (tmp_path / "patients.csv").write_text("\n".join(["patient,part", *rows]) + "\n")
    box = {"case": "scan0.nii.gz", "class": 1, "box": [[5, 5, 1], [30, 30, 2]]}
    (tmp_path / "prompts.yaml").write_text(json.dumps({"version": 1, "coordinates": "voxel", "prompts": [box]}))
    (tmp_path / "data" / "weights").mkdir(parents=True)
    sam = make_sam(tiny_vit_t_spec(), image_size=64)
    write_tensors(tmp_path / "data" / "weights" / "lite_medsam.pth", dict(sam.state_dict()))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_labelled(tmp_path / "other", range(40, 43))
    assert main(["store", "build", "other", "--out", "data/other_site.zarr", "--modality", "mri"]) == 0
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_docs__commands_run_in_their_order(workplace, capsys):
    (workplace / "venv").mkdir()
    venv = fake_environment(workplace / "venv")
    done = set()
    for page in EXECUTED:
        for command in commands_of(page):
            arguments = arguments_of(command, venv)
            if tuple(arguments) in done:
                continue
            done.add(tuple(arguments))
            code = main([*arguments, *ADDED.get(arguments[0], ())])
            assert code == 0, f"{page}: {command}\n{capsys.readouterr().err[-2000:]}"
    assert len(done) > 20
