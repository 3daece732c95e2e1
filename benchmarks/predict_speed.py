"""Slices per second of `samgraft predict` against the per-slice SamPredictor loop, same weights, same machine.

    python benchmarks/predict_speed.py                 vit_t at 256 px, a 256 x 256 x 130 volume, this CPU
    python benchmarks/predict_speed.py --device cuda

Both sides take a native volume and give label maps of its slices. The loop does what everybody writes: normalise a
slice, make it 8-bit RGB, `set_image`, `predict` without a prompt, threshold. Turns of some slices alternate, A B A B.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.inference import InferenceConfig, segment_volume
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.data.intensity import IntensityPreset, measure_intensity, normalise
from samgraft.shared.data.volume import Modality
from samgraft.shared.models.sam import build_sam
from samgraft.shared.models.weights import load_sam
from samgraft.shared.training.device import choose_device, tune_cpu
from segment_anything import SamPredictor

CLASSES = ClassTable(ids=(1,), names=("structure",))


def head(shape_zyx):
    """A scan with air around tissue and noise everywhere, int16."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    tissue = (z / 1.2) ** 2 + (y / 0.85) ** 2 + (x / 0.75) ** 2 < 1
    pattern = 60 * np.sin(9 * x) * np.cos(7 * y + 3 * z)
    return (tissue * (400 + pattern) + rng.integers(0, 12, size=shape_zyx)).astype(np.int16)


def loop(predictor, volume, stats, preset):
    labels = np.zeros(volume.shape, dtype=np.int32)
    for index, slice_HW in enumerate(volume):
        gray = (normalise(slice_HW, stats, preset) * 255).round().astype(np.uint8)
        predictor.set_image(np.repeat(gray[..., None], 3, axis=2))
        masks, _, _ = predictor.predict(multimask_output=False)
        labels[index] = masks[0]
    return labels


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/weights/lite_medsam.pth"))
    parser.add_argument("--shape", type=int, nargs=3, default=(130, 256, 256), metavar=("Z", "H", "W"))
    parser.add_argument("--slices-per-turn", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tune_cpu()
    choice = choose_device(arguments.device)
    device = choice.torch_device
    known = arguments.weights.is_file()
    sam = (load_sam(arguments.weights) if known else build_sam("vit_t")).to(device).eval()
    segmenter = Segmenter(sam, num_classes=1)
    predictor = SamPredictor(sam)
    volume, preset = head(tuple(arguments.shape)), IntensityPreset()
    stats = measure_intensity(volume, modality=Modality.MRI)
    config = InferenceConfig(intensity=preset, keep_aspect=True, batch_size=arguments.batch_size)

    def ours(part, *, bf16):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return segment_volume(segmenter, part, stats, CLASSES, config)

    sides = {
        "SamPredictor loop": lambda part: loop(predictor, part, stats, preset),
        "predict, fp32": lambda part: ours(part, bf16=False),
        f"predict, {'bf16' if choice.precision == 'bf16-mixed' else 'fp32'} (auto)": lambda part: ours(
            part, bf16=choice.precision == "bf16-mixed"
        ),
    }
    agreement = {}
    probe = volume[len(volume) // 2 - 2 : len(volume) // 2 + 2]
    reference = sides["SamPredictor loop"](probe)
    for name, side in sides.items():  # also warms up
        agreement[name] = float((side(probe) == reference).mean())
    rates = {name: [] for name in sides}
    places = np.linspace(0, len(volume) - arguments.slices_per_turn, arguments.turns).round().astype(int)
    for place in places:
        part = volume[place : place + arguments.slices_per_turn]
        for name, side in sides.items():
            synchronise(device)
            start = time.perf_counter()
            side(part)
            synchronise(device)
            rates[name].append(len(part) / (time.perf_counter() - start))
    write(arguments, rates, agreement, choice, known)


def write(arguments, rates, agreement, choice, known):
    base = rates["SamPredictor loop"]
    z, h, w = arguments.shape
    lines = ["| side | slices/s (range) | ratio to the loop (range over turns) | equal pixels |", "|---|---|---|---|"]
    for name, values in rates.items():
        ratios = [value / first for value, first in zip(values, base, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{100 * agreement[name]:.2f} % |"
        )
    today = datetime.date.today().isoformat()
    weights = arguments.weights.name if known else "random weights"
    text = "\n".join(
        [
            f"# Predicting a volume, slices per second, {today}",
            "",
            f"vit_t at its native size, {weights}, volume {w} x {h} x {z}, {arguments.turns} interleaved turns of "
            f"{arguments.slices_per_turn} slices, batch {arguments.batch_size}.",
            f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, load "
            f"{os.getloadavg()[0]:.1f}, {choice.reason}, torch {torch.__version__}.",
            "Command: `python benchmarks/predict_speed.py`.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"predict_speed-{today}.md").write_text(text)


if __name__ == "__main__":
    main()
