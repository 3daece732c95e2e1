"""What a training step costs on this machine, measured before the run: time and memory; nothing is changed by it."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from samgraft.finetune.baselines.volume_patches import VolumePatches
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.training.module import FinetuneModule
from samgraft.finetune.training.preparation import Prepared
from samgraft.shared.samples.dataset import collate_slices
from samgraft.shared.training.device import DeviceChoice
from samgraft.shared.training.failures import explain_out_of_memory
from samgraft.shared.training.progress import format_duration
from samgraft.shared.training.resume import rng_untouched
from torch.utils.data import default_collate

MEASURED_STEPS = 5
"""Counted ones; the warm-up comes before."""
LONG_STEP_S = 10.0
"""After a warm-up longer than this one step is counted."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one optimizer step, without data loading by other processes and without the update itself."""

    seconds: float
    """Median of the counted steps."""
    num_measured: int
    peak_gb: float
    """CUDA: memory of tensors. CPU: peak of this process so far."""
    on_gpu: bool

    def describe(self, max_steps: int) -> str:
        """Return the pre-flight line."""
        memory = f"{self.peak_gb:.1f} GB of GPU memory" if self.on_gpu else f"{self.peak_gb:.1f} GB of memory"
        return (
            f"measured: {self.seconds:.2f} s per step (median of {self.num_measured}), {memory}; {max_steps} steps "
            f"take about {format_duration(self.seconds * max_steps)} without validation"
        )


def measure_step(prepared: Prepared, config: FinetuneConfig, device: DeviceChoice) -> StepCost:
    """Run forward and backward passes on the first batch; weights, statistics and generators stay as they are.

    Raises:
        SamgraftError: If a step does not fit in memory.
    """
    target = device.torch_device
    on_gpu = target.type == "cuda"
    module = FinetuneModule(prepared.segmenter, config, prepared.classes).to(target)
    was_training = module.training
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(target)
    with rng_untouched():
        module.train()
        batch = _first_batch(prepared, config, target)
        try:
            # The first step also allocates: it is the warm-up.
            is_long = _one_step(module, batch, config, device) > LONG_STEP_S
            times = [_one_step(module, batch, config, device) for _ in range(1 if is_long else MEASURED_STEPS)]
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(
                batch_size=config.data.batch_size, accumulate=config.trainer.accumulate
            ) from error
    module.train(was_training)
    for parameter in module.parameters():
        parameter.grad = None
    peak = torch.cuda.max_memory_allocated(target) / 1e9 if on_gpu else _process_peak_gb()
    return StepCost(seconds=median(times), num_measured=len(times), peak_gb=peak, on_gpu=on_gpu)


def _one_step(module: FinetuneModule, batch: Any, config: FinetuneConfig, device: DeviceChoice) -> float:
    kind = device.torch_device.type
    started = time.perf_counter()
    for _ in range(config.trainer.accumulate):
        with torch.autocast(kind, dtype=torch.bfloat16, enabled="bf16" in str(device.precision)):
            loss = module.training_step(batch, 0)["loss"]
        loss.backward()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _first_batch(prepared: Prepared, config: FinetuneConfig, target: torch.device) -> Any:
    samples: list[Any] = [prepared.dataset[index, index] for index in range(config.data.batch_size)]
    if isinstance(prepared.dataset, VolumePatches):
        return {key: value.to(target) for key, value in default_collate(samples).items()}
    return collate_slices(samples)


def _process_peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
