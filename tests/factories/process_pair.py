"""Two processes of the gloo backend, started as torchrun does."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
NEXT_PORTS = "SAMGRAFT_TEST_NEXT_PORTS"


def run_pair(
    root: Path, case: str, *, worker: str = "two_processes.py", timeout_s: int = 150
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script of this folder as both processes and return their results."""
    first, *others = _free_ports(3)
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": first,
        NEXT_PORTS: ",".join(others),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / worker), str(root), case],
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


def leave_group() -> None:
    """Leave the process group, so that this process can join a new one."""
    # The new group uses another port. Otherwise the faster process could join the old group, which its slower partner
    # has not left yet, and both would wait for each other without end.
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"], _, os.environ[NEXT_PORTS] = os.environ[NEXT_PORTS].partition(",")


def _free_ports(num: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
