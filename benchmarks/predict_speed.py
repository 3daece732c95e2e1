"""Slices per second of `samgraft predict` against the per-slice SamPredictor loop, same weights, same machine.

    python benchmarks/predict_speed.py                 vit_t at 256 px, a 256 x 256 x 130 volume, this CPU
    python benchmarks/predict_speed.py --device cuda

All sides take a native volume and give label maps of its slices. The loop does what everybody writes: normalise a
slice, make it 8-bit RGB, `set_image`, `predict` without a prompt, threshold. It runs twice: with timm's TinyViT, which
is the published vit_t's code to the bit (the side that the target of 3 is measured against), and with samgraft's own
encoder in its place, which is faster and equal (what is left is the loop, and bf16). Turns of some slices alternate,
A B C D A B C D, and the table gives both ratios with their range over turns. On a CPU the clock is this process's own
time, which other work on the machine does not stretch; the allocator is tuned for all sides alike, as `predict` does.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from original_encoders import tiny_twin
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.inference import InferenceConfig, segment_volume
from samgraft.finetune.prediction.predictor import default_batch_size
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.sam import build_sam, decode_automatic, to_pixels
from samgraft.shared.scans.intensity import IntensityPreset, measure_intensity, normalise
from samgraft.shared.scans.volume import Modality
from samgraft.shared.training.device import choose_device, retain_freed_memory
from samgraft.shared.weights.load import load_sam
from segment_anything import SamPredictor
from torch import nn

BASELINE = "SamPredictor loop, published encoder code"
OWN_ENCODER = "the same loop, samgraft's encoder"
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


class PublishedEncoder(nn.Module):
    """timm's TinyVit with vit_t's two changes and SAM's neck, as SamPredictor users have it."""

    def __init__(self, encoder):
        super().__init__()
        self.body, self.neck, self.img_size = tiny_twin(encoder), encoder.neck, encoder.img_size

    def forward(self, images):
        """Return image embeddings."""
        return self.neck(self.body.forward_features(images))


def logits_of(sam, frames, *, bf16):
    """Low-resolution logits without a prompt."""
    with torch.inference_mode(), torch.autocast(frames.device.type, dtype=torch.bfloat16, enabled=bf16):
        embeddings = sam.image_encoder(to_pixels(frames, arch_spec("vit_t")))
        return decode_automatic(sam, ImageFeatures(embeddings), multimask=False)[0].float()


def clock(device):
    synchronise(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/weights/lite_medsam.pth"))
    parser.add_argument("--shape", type=int, nargs=3, default=(130, 256, 256), metavar=("Z", "H", "W"))
    parser.add_argument("--slices-per-turn", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="default as predict's: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    retain_freed_memory()
    choice = choose_device(arguments.device)
    device = choice.torch_device
    arguments.batch_size = arguments.batch_size or default_batch_size(device)
    known = arguments.weights.is_file()
    sam = (load_sam(arguments.weights) if known else build_sam("vit_t")).to(device).eval()
    segmenter = Segmenter(sam, num_classes=1)
    published = copy.deepcopy(sam)
    published.image_encoder = PublishedEncoder(sam.image_encoder).to(device).eval()
    predictors = {BASELINE: SamPredictor(published), OWN_ENCODER: SamPredictor(sam)}
    volume, preset = head(tuple(arguments.shape)), IntensityPreset()
    stats = measure_intensity(volume, modality=Modality.MRI)
    config = InferenceConfig(intensity=preset, keep_aspect=True, batch_size=arguments.batch_size)

    def ours(part, *, bf16):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return segment_volume(segmenter, part, stats, CLASSES, config)

    is_bf16 = choice.precision == "bf16-mixed"
    sides = {
        **{name: lambda part, one=one: loop(one, part, stats, preset) for name, one in predictors.items()},
        "predict, fp32": lambda part: ours(part, bf16=False),
        f"predict, {'bf16' if is_bf16 else 'fp32'} (its default here)": lambda part: ours(part, bf16=is_bf16),
    }
    middle = volume[len(volume) // 2 - 2 : len(volume) // 2 + 2]
    first = volume[: arguments.slices_per_turn]  # of the measured shape: a GPU prepares for each
    for side in sides.values():
        side(first)
    frames = torch.stack([torch.from_numpy(normalise(s, stats, preset)) for s in middle])[:, None].to(device)
    models = [published, sam, sam, sam]
    formats = [False, False, False, is_bf16]
    logits = {
        name: logits_of(model, frames, bf16=bf16) for name, model, bf16 in zip(sides, models, formats, strict=True)
    }
    cut = logits[BASELINE].median()
    agreement = {name: float(((one > cut) == (logits[BASELINE] > cut)).float().mean()) for name, one in logits.items()}
    rates = {name: [] for name in sides}
    places = np.linspace(0, len(volume) - arguments.slices_per_turn, arguments.turns).round().astype(int)
    for place in places:
        part = volume[place : place + arguments.slices_per_turn]
        for name, side in sides.items():
            start = clock(device)
            side(part)
            rates[name].append(len(part) / (clock(device) - start))
    write(arguments, rates, agreement, choice, known)


def spread(values):
    """Median and range over turns."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write(arguments, rates, agreement, choice, known):
    z, h, w = arguments.shape
    lines = [
        "| side | slices/s (range) | ratio to the published code's loop | ratio to the loop with our encoder | equal "
        "pixels* |",
        "|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        ratios = [spread([v / b for v, b in zip(values, rates[side], strict=True)]) for side in (BASELINE, OWN_ENCODER)]
        lines.append(f"| {name} | {spread(values)} | {ratios[0]} | {ratios[1]} | {100 * agreement[name]:.2f} % |")
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
            f"Command: `python benchmarks/predict_speed.py --turns {arguments.turns} --slices-per-turn "
            f"{arguments.slices_per_turn} --device {arguments.device} --threads {arguments.threads}`.",
            "",
            *lines,
            "",
            "*of masks cut at the median logit of the first side: half of all pixels, no agreement is for free.",
            "",
        ]
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"predict_speed-{today}.md").write_text(text)


if __name__ == "__main__":
    main()
