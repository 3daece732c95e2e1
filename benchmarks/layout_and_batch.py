"""Memory layout and batch size of an encoder on a CPU, interleaved in one process.

    python benchmarks/layout_and_batch.py --image-size 128 --turns 8

The sides take turns, and processor time is measured, so that other work on the machine hardly matters. Each line gives
the ratio of the fastest turns with the smallest and the largest ratio of a turn. The last table is the profile of a
training step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.training.device import cpu_name, retain_freed_memory
from torch import Tensor, nn

Side = Callable[[], float]


def infer(encoder: nn.Module, images: Tensor) -> float:
    """Return the processor time of a forward pass, in seconds per slice."""
    with torch.inference_mode():
        begin = time.process_time()
        encoder(images)
    return (time.process_time() - begin) / len(images)


def train(encoder: nn.Module, images: Tensor) -> float:
    """Return the processor time of a forward and a backward pass, in seconds per slice."""
    begin = time.process_time()
    encoder(images).square().mean().backward()
    seconds = time.process_time() - begin
    encoder.zero_grad(set_to_none=True)
    return seconds / len(images)


def compare(name: str, a: Side, b: Side, *, turns: int) -> None:
    """Print how many times as long ``a`` takes as ``b``."""
    a(), b()
    times = [(a(), b()) for _ in range(turns)]
    ratios = sorted(first / second for first, second in times)
    best = min(first for first, _ in times) / min(second for _, second in times)
    sys.stdout.write(f"| {name} | {best:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |\n")
    sys.stdout.flush()


def main() -> None:
    """Measure one architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_t")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    retain_freed_memory()
    torch.manual_seed(0)
    size = arguments.image_size
    plain, last = (arch_spec(arguments.arch).build(image_size=size) for _ in range(2))
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, size, size)
    sys.stdout.write(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.arch} at {size} px\n\n"
        "| compared | ratio |\n|---|---|\n"
    )
    for mode in (infer, train):
        for encoder in (plain, last):
            encoder.train(mode is train)
        name = f"contiguous / channels_last weights, {mode.__name__}"
        compare(name, partial(mode, plain, images[:1]), partial(mode, last, images[:1]), turns=arguments.turns)
    plain.eval()
    for batch in (2, 4):
        compare(
            f"batch 1 / batch {batch}, infer, per slice",
            partial(infer, plain, images[:1]),
            partial(infer, plain, images[:batch]),
            turns=arguments.turns,
        )
    plain.train()
    with torch.profiler.profile() as profile:
        train(plain, images[:1])
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    sys.stdout.write("\n| operation of a training step | share |\n|---|---|\n")
    for event in events[:8]:
        sys.stdout.write(f"| {event.key} | {100 * event.self_cpu_time_total / total:.0f} % |\n")


if __name__ == "__main__":
    main()
