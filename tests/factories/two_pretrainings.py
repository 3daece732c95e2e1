"""Stage 1 in each of two processes, uninterrupted, and stopped, killed and resumed."""

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
from samgraft.ssl import initial_weights
from tiny_encoders import TINY_VIT
from tiny_pretrain import act_after, left_behind, run
from tiny_training import Killed, die


def main(lab: Path, objective: str, strategy: str, base: str = "") -> None:
    """Train uninterrupted, then stopped, killed and resumed. Both ranks have the same files.

    Only the second process receives the signal, right before a monitoring round in which both take part. With ``base``
    random, a small encoder has random initial weights. Any other ``base`` is a folder of the lab with a Hiera.
    """
    settings = ["trainer.accumulate=2", f"trainer.strategy={strategy}", "watch.log_images=true"]
    if objective != "dino":  # which exports its teacher
        settings.append("optim.ema_decay=0.9")
    if base == "random":
        initial_weights.arch_spec = lambda _: TINY_VIT
        settings.append("model.base=random")
    elif base:
        settings += [f"model.base={lab / base}", "model.arch=sam2_t", "model.image_size=64"]
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
