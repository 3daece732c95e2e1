"""Time of a training step with spinning and with sleeping OpenMP threads.

Each policy has a process of its own, because OpenMP reads its variables once. The two processes measure in turn, first
on the machine as it is and then beside further busy processes, so that a change of the load affects both.

    python benchmarks/openmp_wait.py --rounds 5 --busy 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from samgraft.shared.machine import PASSIVE_WAIT
from samgraft.shared.training.device import cpu_name

NUM_STEPS = 2
IMAGE_SIZE = 64
BATCH_SIZE = 1


def serve_measurements() -> None:
    """Print the median seconds of a ``vit_t`` step for each line that is read."""
    import torch
    from samgraft.shared.encoders.registry import arch_spec

    torch.manual_seed(0)
    encoder = arch_spec("vit_t").build(image_size=IMAGE_SIZE).train()
    images_B3SS = torch.rand(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    for _ in sys.stdin:
        seconds = []
        for _ in range(NUM_STEPS):
            started = time.perf_counter()
            encoder(images_B3SS).square().mean().backward()
            encoder.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
        print(statistics.median(seconds), flush=True)


def start_server(*, threads: int, is_passive: bool) -> subprocess.Popen[str]:
    """Start a process that measures with one policy."""
    environment = {key: value for key, value in os.environ.items() if key not in PASSIVE_WAIT}
    environment |= {"OMP_NUM_THREADS": str(threads), **(PASSIVE_WAIT if is_passive else {})}
    command = [sys.executable, __file__, "--child"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(server: subprocess.Popen[str]) -> float:
    """Return the seconds of a step in a server process."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("go\n")
    server.stdin.flush()
    return float(server.stdout.readline())


def main() -> None:
    """Measure both policies with and without further load and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=2, help="number of busy processes in the loaded case")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.child:
        serve_measurements()
        return
    servers = [start_server(threads=arguments.threads, is_passive=is_passive) for is_passive in (False, True)]
    for server in servers:
        measure(server)  # The first measurement allocates memory and is not counted.
    print(f"{cpu_name()}, {os.cpu_count()} cores, {arguments.threads} threads, {arguments.rounds} rounds\n")
    print(
        "| further busy processes | spinning s/step | sleeping s/step | ratio | load average |\n|---|---|---|---|---|"
    )
    for num_busy in (0, arguments.busy):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            pairs = [[measure(server) for server in servers] for _ in range(arguments.rounds)]
        finally:
            for process in busy:
                process.kill()
        cells = [
            f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in zip(*pairs, strict=True)
        ]
        ratio = statistics.median(spinning / sleeping for spinning, sleeping in pairs)
        print(f"| {num_busy} | {cells[0]} | {cells[1]} | {ratio:.2f} | {os.getloadavg()[0]:.1f} |", flush=True)
    for server in servers:
        server.kill()


if __name__ == "__main__":
    main()
