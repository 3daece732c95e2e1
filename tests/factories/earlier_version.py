"""Files written by an earlier version of samgraft, to show that this version still opens them.

    python earlier_version.py ROOT SOURCE

Fills the folder ROOT with stores, runs of both stages (one of each stopped half-way) and a release. SOURCE is an
unpacked checkout of the earlier version; every ``samgraft`` import of this script resolves to it.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

COMMIT = "e4071c35124753ac91003ff07e1f104341f597ad"
"""Last version with the folders ``shared/data`` and ``shared/models``."""

PRETRAIN = """
modality: mri
data: {store: store.zarr, batch_size: 2, num_held_out_slices: 2}
model: {base: sam.safetensors, image_size: 32}
objective: {name: masked_image, masked_image: {mask_unit_px: 8, decoder_dim: 8}}
optim: {warmup_steps: 1}
trainer: {max_steps: 4, save_every_steps: 2, precision: fp32}
watch: {every_n_steps: 2, num_panel_rows: 2}
"""
FINETUNE = """
modality: mri
data: {store: labelled.zarr, batch_size: 2}
model: {ckpt: sam.safetensors, image_size: 32}
adapter: {r: 2, lora_alpha: 2}
optim: {warmup_steps: 1}
trainer: {max_steps: 4, save_every_steps: 2, precision: fp32}
watch: {validate_every_n_steps: 2, num_overlays: 1}
"""


def unpack(folder: Path, repository: Path) -> bool:
    """Unpack the earlier version into ``folder``; False if the repository does not contain its commit."""
    parts = ("ssl", "finetune", "shared", "configs", "tests")
    archive = subprocess.run(["git", "archive", COMMIT, *parts], cwd=repository, capture_output=True, check=False)
    if archive.returncode:
        return False
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    (folder / "samgraft").mkdir()
    for part in parts[:-1]:
        (folder / "samgraft" / part).symlink_to(folder / part)
    return True


def write_files() -> None:
    """Write everything into the working directory."""
    import tiny_pretrain
    from model_factory import make_sam, tiny_vit_t_spec
    from samgraft.shared.cli import main
    from samgraft.shared.models.weights import save_tensors
    from samgraft.shared.training.step_boundary import StepBoundary
    from store_factory import make_store

    tiny_pretrain.make_lab(Path())
    make_store(Path(), num_patients=8, shape_zyx=(4, 32, 32), name="labelled.zarr")
    save_tensors(dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()), Path("sam.safetensors"))
    Path("pretrain.yaml").write_text(PRETRAIN)
    Path("finetune.yaml").write_text(FINETUNE)
    original = StepBoundary.on_train_batch_end

    def interrupt_after_step_2(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.global_step == 2:
            raise KeyboardInterrupt

    def run(*words: str) -> None:
        if code := main(list(words)):
            raise SystemExit(f"{words}: exit code {code}")

    run("pretrain", "--config", "pretrain.yaml", "--name", "ssl")
    run("finetune", "--config", "finetune.yaml", "--name", "seg")
    with patch.object(StepBoundary, "on_train_batch_end", interrupt_after_step_2):
        for stage in ("pretrain", "finetune"):
            try:
                main([stage, "--config", f"{stage}.yaml", "--name", f"{stage}-half"])
            except SystemExit:
                continue
    write_release()


def write_release() -> None:
    """Release the fine-tuned run; the formats are loaded back in this process, which sees the earlier version."""
    import contextlib
    import io

    from samgraft.finetune.release import release_clients
    from samgraft.shared.cli import main
    from samgraft.shared.release import load_back

    def in_this_process(command, **_):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = load_back.main([command[-1]], release_clients.CLIENTS)
        return subprocess.CompletedProcess(command, code, out.getvalue(), "")

    with patch.object(load_back.subprocess, "run", in_this_process):
        words = ["release", "runs/seg", "--out", "release", "--license", "cc-by-4.0"]
        if code := main(words):
            raise SystemExit(f"release: exit code {code}")


if __name__ == "__main__":
    root, source = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    # An editable install would answer every import with this version.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    sys.path[:] = [
        str(source),
        str(source / "tests"),
        *(p for p in sys.path if Path(p).resolve() != Path(__file__).parent),
    ]
    os.chdir(root)
    write_files()
