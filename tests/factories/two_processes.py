"""Script that tests/faults/test_two_processes.py runs in each of two processes."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
from pathlib import Path

import torch
from process_pair import leave_group
from samgraft.shared import files as tensor_file
from samgraft.shared.errors import NumericalError, StoppedAndSaved, StorageError
from tiny_training import At, Killed, TinyModule, curve, die, final_bytes, tiny_config, tiny_fit


def resume(root: Path) -> None:
    """Train without interruption, then killed and resumed, and compare the files."""
    config = tiny_config(accumulate=2, num_workers=0)
    tiny_fit(root, "whole", config)
    for step in (6, 11):
        try:
            tiny_fit(root, "killed", config, callbacks=[At(step, die)])
        except Killed:
            leave_group()
    tiny_fit(root, "killed", config)
    torch.distributed.barrier()
    equal = final_bytes(root, "whole", 15) == final_bytes(root, "killed", 15)
    equal = equal and curve(root, "whole") == curve(root, "killed")
    generators = {name for name in final_bytes(root, "whole", 15) if name.startswith("rng")}
    sys.stdout.write(f"same bytes: {equal and generators == {'rng-0000.safetensors', 'rng-0001.safetensors'}}\n")


def stop(root: Path) -> None:
    """Cause a signal, a NaN and a full disk in one process and print the errors."""
    second = os.environ["RANK"] == "1"
    try:
        tiny_fit(root, "a", tiny_config(), callbacks=[At(6, lambda: second and os.kill(os.getpid(), signal.SIGTERM))])
    except StoppedAndSaved as error:
        sys.stdout.write(f"StoppedAndSaved at {re.search('step [0-9]+', str(error))[0]}\n")
    try:
        tiny_fit(root, "b", tiny_config(), nan_at=4 if second else None, module=TinyModule)
    except NumericalError as error:
        sys.stdout.write(f"NumericalError at {re.search('step [0-9]+', str(error))[0]}\n")
    if not second:
        write = os.write

        def full(descriptor: int, data: memoryview) -> int:
            if "step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        tensor_file.os.write = full
    try:
        tiny_fit(root, "a", tiny_config())
    except StorageError as error:
        sys.stdout.write(f"StorageError: {error}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    {"resume": resume, "stop": stop}[sys.argv[2]](Path(sys.argv[1]))
