"""Run by tests/faults/test_objective_resume.py as each of two processes: stage 1, whole, and stopped and killed."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from process_pair import leave_group
from samgraft.shared.errors import StoppedAndSaved
from samgraft.ssl import start
from tiny_encoders import TINY_VIT
from tiny_pretrain import act_after, left_behind, run
from tiny_training import Killed, die


def main(lab: Path, objective: str, strategy: str, base: str = "") -> None:
    """Train whole, then stopped, killed and resumed; both ranks see the same files.

    Only the second process hears the signal, right before a look in which both take part. ``base`` random: small, and
    from nothing.
    """
    settings = ["trainer.accumulate=2", f"trainer.strategy={strategy}", "watch.log_images=true"]
    if base:
        start.arch_spec = lambda _: TINY_VIT
        settings.append(f"model.base={base}")
    whole = run(lab, f"pair-{objective}{base}-whole-{strategy}", objective, *settings)
    with pytest.MonkeyPatch.context() as patch:
        act_after(2, lambda: os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run(lab, f"pair-{objective}{base}-killed-{strategy}", objective, *settings)
    with pytest.MonkeyPatch.context() as patch:
        act_after(3, die, patch)
        try:
            run(lab, f"pair-{objective}{base}-killed-{strategy}", objective, *settings)
        except Killed:
            leave_group()
    killed = run(lab, f"pair-{objective}{base}-killed-{strategy}", objective, *settings)
    torch.distributed.barrier()
    sys.stdout.write(f"same bytes: {left_behind(whole) == left_behind(killed)}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]), *sys.argv[2].split("/"))
