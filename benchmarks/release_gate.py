"""Measure the privacy gate of a release: speed over bytes and identifiers, and false alarms on random weights.

    python benchmarks/release_gate.py                        # sizes 10 to 400 MB, 5 to 1,000 identifiers
    python benchmarks/release_gate.py --random-gb 2 --seeds 3   # ViT-L-sized random weights in every container

Times are processor seconds of one core, so that other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from samgraft.shared.release.privacy import scan_folder

SIZES_MB = (10, 40, 100, 400)
NUM_IDENTIFIERS = (5, 100, 1000)


def identifiers(number):
    generator = np.random.default_rng(7)
    return [f"patient-{value:08x}" for value in generator.integers(0, 2**32, size=number)]


def weights(seed, megabytes):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(0.02 * generator.standard_normal(megabytes * 250_000, dtype=np.float32))


def seconds(folder, known):
    begin = time.process_time()
    findings = scan_folder(folder, known=known)
    return time.process_time() - begin, findings


def speed_table():
    rows = []
    for size in SIZES_MB:
        with tempfile.TemporaryDirectory() as name:
            save_file({"w": weights(0, size)}, Path(name) / "sam.safetensors")
            for number in NUM_IDENTIFIERS:
                spent, findings = min(
                    (seconds(Path(name), identifiers(number)) for _ in range(3)), key=lambda pair: pair[0]
                )
                rows.append((size, number, spent, size / spent, len(findings)))
                print(f"{size} MB, {number} identifiers: {spent:.2f} s, {size / spent:.0f} MB/s", flush=True)
    sizes = np.log([row[0] for row in rows if row[1] == 1000 and row[0] >= 40])
    times = np.log([row[2] for row in rows if row[1] == 1000 and row[0] >= 40])
    lines = ["| MB | identifiers | CPU seconds | MB/s | findings |", "|---|---|---|---|---|"]
    lines += [f"| {a} | {b} | {c:.2f} | {d:.0f} | {e} |" for a, b, c, d, e in rows]
    lines += [
        "",
        f"Exponent of time over bytes (40 to 400 MB, 1,000 identifiers): {np.polyfit(sizes, times, 1)[0]:.2f}",
    ]
    return lines


def onnx_file(path, tensor):
    import onnx

    raw = tensor.numpy().tobytes()
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [tensor.numel()], raw, raw=True)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[proto])), str(path))


def random_table(gigabytes, seeds):
    """Search random weights, in pieces of 500 MB, and a planted canary in each container."""
    lines = ["| seed | container | GB | CPU seconds | false alarms | canary found |", "|---|---|---|---|---|---|"]
    for seed in range(seeds):
        for kind in ("safetensors", "pth", "onnx"):
            spent = alarms = canaries = 0
            pieces = max(1, round(gigabytes * 2))
            for piece in range(pieces):
                with tempfile.TemporaryDirectory() as name:
                    tensor = weights(1000 * seed + piece, 500)
                    write(kind, Path(name), tensor)
                    time_spent, findings = seconds(Path(name), identifiers(1000))
                    spent, alarms = spent + time_spent, alarms + len(findings)
                    if piece == 0:
                        canary = identifiers(1000)[500].encode()
                        tensor.view(torch.uint8)[123_456_789 : 123_456_789 + len(canary)] = torch.tensor(list(canary))
                        write(kind, Path(name), tensor)
                        canaries = len(seconds(Path(name), identifiers(1000))[1])
            lines.append(
                f"| {seed} | {kind} | {pieces / 2:g} | {spent:.1f} | {alarms} | {'yes' if canaries else 'NO'} |"
            )
            print(lines[-1], flush=True)
    return lines


def write(kind, folder, tensor):
    if kind == "safetensors":
        save_file({"w": tensor}, folder / "sam.safetensors")
    elif kind == "pth":
        torch.save({"w": tensor}, folder / "sam.pth")
    else:
        onnx_file(folder / "encoder.onnx", tensor)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random-gb", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [f"{datetime.date.today()}, {cpu()}, one core, `python benchmarks/release_gate.py`", ""]
    lines += random_table(arguments.random_gb, arguments.seeds) if arguments.random_gb else speed_table()
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def cpu():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
