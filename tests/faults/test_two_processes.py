"""Two gloo processes: killed and resumed they end with the same bytes; a failure in one ends both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "two_processes.py"


def run_pair(root: Path, case: str, *, timeout_s: int = 150) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(root), case],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
def test_two_processes__killed_and_resumed_same_bytes(tmp_path: Path) -> None:
    for done in run_pair(tmp_path, "resume"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "same bytes: True" in done.stdout


@pytest.mark.slow
def test_two_processes__stop_together(tmp_path: Path) -> None:
    """Only the second process hears the signal; NaN only in the second process's loss."""
    for done in run_pair(tmp_path, "stop"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "StoppedAndSaved at step 6" in done.stdout
        assert "NumericalError at step 4" in done.stdout
        assert "StorageError" in done.stdout
