"""Kill of a self-training: its child stops, complete parts stay, and the same command ends with the same bytes."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from model_factory import make_sam, tiny_vit_t_spec
from samgraft.shared.files import write_tensors
from store_factory import make_store

SETTINGS = (
    "model.image_size=32", "adapter.r=2", "adapter.lora_alpha=2", "optim.warmup_steps=1", "trainer.max_steps=30",
    "trainer.save_every_steps=1", "trainer.device=cpu", "data.batch_size=2", "data.few_shot.num=2",
    "selftrain.teachers=[lora]", "selftrain.min_agreement=0.5", "selftrain.min_slice_agreement=0.0",
)  # fmt: skip


def wait_for(condition, *, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.05)


def results(path):
    folder = path / "round-1" / "pseudo_labels.zarr"
    files = [path / "model" / "sam.safetensors", *(file for file in sorted(folder.rglob("*")) if file.is_file())]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.timeout(1500)
@pytest.mark.slow  # five interpreters that import the whole package
def test_selftrain__killed_process_is_resumed_to_the_same_bytes(tmp_path):
    make_store(tmp_path, num_patients=8, shape_zyx=(4, 24, 20))
    write_tensors(tmp_path / "base.safetensors", dict(make_sam(tiny_vit_t_spec(), image_size=32).state_dict()))

    def command(name):
        program = "import sys; from samgraft.shared.cli import main; sys.exit(main(sys.argv[1:]))"
        given = ["selftrain", "--base", "base.safetensors", "--data", "store.zarr", "--preset", "cpu", "--name", name]
        return [sys.executable, "-c", program, *given, *SETTINGS]

    subprocess.run(command("whole"), cwd=tmp_path, check=True)
    killed = tmp_path / "runs" / "killed"
    parent = subprocess.Popen(command("killed"), cwd=tmp_path)
    wait_for((killed / "checkpoints" / "step-000005").exists)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not (killed / "model").exists()
    teacher = (killed / "round-1" / "teachers" / "lora" / "model" / "sam.safetensors").stat().st_mtime_ns
    subprocess.run(command("killed"), cwd=tmp_path, check=True)
    assert results(killed) == results(tmp_path / "runs" / "whole")
    assert (killed / "round-1" / "teachers" / "lora" / "model" / "sam.safetensors").stat().st_mtime_ns == teacher
