"""Tests of the SLURM template."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "configs" / "slurm" / "pretrain.sbatch"

SRUN = """#!/bin/bash
shift            # --kill-on-bad-exit=1
exec "$@"
"""
SCANCEL = "#!/bin/bash\nexit 1\n"  # The template then uses a plain kill.
SCONTROL = '#!/bin/bash\necho "$@" >> "$RECORD"\n'
TRAINING = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD.arguments"
trap 'exit 75' USR1
touch "$RECORD.started"
for _ in $(seq 100); do [ -n "${FINISH:-}" ] && exit 0; sleep 0.05; done
exit 1
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("samgraft", TRAINING)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(TEMPLATE), "MODALITY=mri", "DATA=my scans.zarr", "optim.lr=1e-4"],
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SAMGRAFT": str(programs / "samgraft"),
            "RECORD": str(folder / "record"),
            "SLURM_JOB_ID": "4711",
            **environment,
        },
        cwd=folder,
    )


def test_template__on_a_signal_requeues_the_job(tmp_path: Path) -> None:
    job = start(tmp_path)
    deadline = time.monotonic() + 10
    while not (tmp_path / "record.started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=10) == 75
    assert (tmp_path / "record").read_text() == "requeue 4711\n"
    arguments = (tmp_path / "record.arguments").read_text().splitlines()
    assert arguments == ["pretrain", "--modality", "mri", "--data", "my scans.zarr", "optim.lr=1e-4"]


def test_template__of_a_finished_run_does_not_requeue(tmp_path: Path) -> None:
    assert start(tmp_path, FINISH="1").wait(timeout=10) == 0
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize("line", ["--signal=B:USR1@120", "--requeue", "--open-mode=append"])
def test_template__requests_an_early_signal_and_requeue(line: str) -> None:
    assert f"#SBATCH {line}" in TEMPLATE.read_text().splitlines()
