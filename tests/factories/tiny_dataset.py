"""Samples for the tiny run, in a module of their own that loader workers import without Lightning."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch.utils.data import Dataset

NUM_SAMPLES = 26
BATCH_SIZE = 4  # 6 batches per epoch, 2 samples dropped


class TinyDataset(Dataset[dict[str, Any]]):
    """Dataset of noise that depends on the sample counter alone."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, sample_counter = item
        noise = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(sample_counter))
        return {"image": noise + index / 10, "sample_counter": sample_counter}


class FatalDataset(TinyDataset):
    """Dataset whose worker is killed as if it ran out of memory."""

    def __init__(self, *, at_sample: int) -> None:
        self.at_sample = at_sample

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        if item[1] == self.at_sample:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


class PatientDataset(FatalDataset):
    """Dataset that hangs at one sample."""

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        if item[1] == self.at_sample:
            time.sleep(60)
        return TinyDataset.__getitem__(self, item)


class SlowStart(TinyDataset):
    """Dataset that takes long to arrive in a worker, as imports on a loaded machine do."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(state["seconds"])
        self.__dict__.update(state)


class NoStart(TinyDataset):
    """Dataset that kills the worker that it arrives in."""

    def __getstate__(self) -> dict[str, Any]:
        return {"kill": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(1)
