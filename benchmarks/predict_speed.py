"""Slices per second of `samgraft predict` against the per-slice SamPredictor loop, same weights, same machine.

    python benchmarks/predict_speed.py                 vit_t at 256 px, a 256 x 256 x 130 volume, this CPU
    python benchmarks/predict_speed.py --device cuda
    python benchmarks/predict_speed.py --model sam2_t  sam2_t at 1024 px with random weights, beside SAM2ImagePredictor

All sides take a native volume and give label maps of its slices. The loop does what everybody writes: normalise a
slice, make it 8-bit RGB, `set_image`, `predict` without a prompt, threshold. It runs twice: with timm's TinyViT, which
is the published vit_t's code to the bit (the side that the target of 3 is measured against), and with samgraft's own
encoder in its place, which is faster and equal (what is left is the loop, and bf16). For SAM 2 the loop is that of
``SAM2ImagePredictor`` on the package's own model (target 2). Turns of some slices alternate, A B C D A B C D, and the
table gives the ratios with their range over turns. On a CPU the clock is this process's own time, which other work on
the machine does not stretch; the allocator is tuned for all sides alike, as `predict` does.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from original_encoders import tiny_twin
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.inference import InferenceConfig, segment_volume
from samgraft.finetune.prediction.predictor import default_batch_size
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.sam import build_sam, decode_automatic, encode_images, to_pixels
from samgraft.shared.samples.frame import fit_frame, image_to_frame
from samgraft.shared.scans.intensity import IntensityPreset, measure_intensity, normalise
from samgraft.shared.scans.volume import Modality
from samgraft.shared.training.device import choose_device, retain_freed_memory
from samgraft.shared.weights.load import load_sam
from segment_anything import SamPredictor
from torch import nn

BASELINE = "predictor loop, published code"
OWN_ENCODER = "same loop, samgraft's encoder"
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


def sam_sides(weights):
    """Return our SAM of type vit_t, and the predictors of both loops."""
    sam = (load_sam(weights) if weights.is_file() else build_sam("vit_t")).eval()
    published = copy.deepcopy(sam)
    published.image_encoder = PublishedEncoder(sam.image_encoder).eval()
    return sam, {BASELINE: SamPredictor(published), OWN_ENCODER: SamPredictor(sam)}


def sam2_sides(arch):
    """Return our SAM 2 with the random weights of the package's model, and the predictor of the loop."""
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    torch.manual_seed(0)
    size = {"sam2_t": "t", "sam2_s": "s", "sam2_bp": "b+", "sam2_l": "l"}[arch]
    published = build_sam2(f"configs/sam2.1/sam2.1_hiera_{size}.yaml", device="cpu", apply_postprocessing=False)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": published.state_dict()}, Path(folder) / "random.pt")
        sam = load_sam(Path(folder) / "random.pt").eval()
    return sam, {BASELINE: SAM2ImagePredictor(published)}


def logits_of_loop(predictor, slices, stats, preset):
    """Low-resolution logits of a predictor without a prompt, which it limits to 32."""
    found = []
    for slice_HW in slices:
        gray = (normalise(slice_HW, stats, preset) * 255).round().astype(np.uint8)
        predictor.set_image(np.repeat(gray[..., None], 3, axis=2))
        found.append(torch.as_tensor(predictor.predict(multimask_output=False, return_logits=True)[2]))
    return torch.stack(found).float().cpu()


def logits_of_ours(sam, slices, stats, preset, *, bf16):
    """Low-resolution logits of our model without a prompt."""
    spec, device = sam.image_encoder.spec, sam.device
    images = torch.stack([torch.from_numpy(normalise(s, stats, preset)) for s in slices])[:, None].to(device)
    frame = fit_frame(images.shape[-2:], image_size=sam.image_encoder.image_size, keep_aspect=True)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        features = encode_images(sam, to_pixels(image_to_frame(images, frame), spec))
        return decode_automatic(sam, features, multimask=False)[0].float().cpu()


def clock(device):
    synchronise(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t", choices=["vit_t", "sam2_t", "sam2_s", "sam2_bp", "sam2_l"])
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
    sam, predictors = sam_sides(arguments.weights) if arguments.model == "vit_t" else sam2_sides(arguments.model)
    for predictor in predictors.values():
        predictor.model.to(device)
    segmenter = Segmenter(sam.to(device), num_classes=1)
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
    middle = volume[len(volume) // 2 - 1 : len(volume) // 2 + 1]
    first = volume[: arguments.slices_per_turn]  # of the measured shape: a GPU prepares for each
    for side in sides.values():
        side(first)
    logits = {name: logits_of_loop(one, middle, stats, preset) for name, one in predictors.items()}
    for name, bf16 in zip(list(sides)[len(predictors) :], (False, is_bf16), strict=True):
        logits[name] = logits_of_ours(sam, middle, stats, preset, bf16=bf16)
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
    write(arguments, rates, agreement, choice)


def spread(values):
    """Median and range over turns."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write(arguments, rates, agreement, choice):
    z, h, w = arguments.shape
    references = [name for name in (BASELINE, OWN_ENCODER) if name in rates]
    lines = [
        f"| side | slices/s (range) | {' | '.join(f'ratio to the {name}' for name in references)} | equal pixels* |",
        "|---" * (3 + len(references)) + "|",
    ]
    for name, values in rates.items():
        ratios = [spread([v / b for v, b in zip(values, rates[side], strict=True)]) for side in references]
        lines.append(f"| {name} | {spread(values)} | {' | '.join(ratios)} | {100 * agreement[name]:.2f} % |")
    today = datetime.date.today().isoformat()
    is_read = arguments.model == "vit_t" and arguments.weights.is_file()
    weights = arguments.weights.name if is_read else "random weights"
    text = "\n".join(
        [
            f"# Predicting a volume, slices per second, {today}",
            "",
            f"{arguments.model} at its native size, {weights}, volume {w} x {h} x {z}, {arguments.turns} interleaved "
            f"turns of {arguments.slices_per_turn} slices, batch {arguments.batch_size}.",
            f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, load "
            f"{os.getloadavg()[0]:.1f}, {choice.reason}, torch {torch.__version__}.",
            f"Command: `python benchmarks/predict_speed.py --model {arguments.model} --shape "
            f"{' '.join(map(str, arguments.shape))} --turns {arguments.turns} "
            f"--slices-per-turn {arguments.slices_per_turn} --device {arguments.device} "
            f"--threads {arguments.threads}`.",
            "",
            *lines,
            "",
            "*of masks cut at the median logit of the first side: half of all pixels, no agreement is for free.",
            "",
        ]
    )
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "predict_speed" if arguments.model == "vit_t" else f"predict_speed-{arguments.model}"
    (arguments.out / f"{name}-{today}.md").write_text(text)


if __name__ == "__main__":
    main()
