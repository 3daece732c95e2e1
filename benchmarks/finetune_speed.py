"""Fine-tuning: training on cached embeddings, LoRA against its straightforward form, and what each mode costs.

    python benchmarks/finetune_speed.py --write NAME                     # on a CPU: cached, lora, modes
    python benchmarks/finetune_speed.py --device cuda --write NAME       # the memory table, batch 1, 2, 4

Every measured step is forward, loss, backward and AdamW on vit_b, with random images of the real shape. Both sides
take turns in one process; the claim is the ratio of medians, with the smallest and largest ratio of a turn. Saved bytes
are distinct storages that autograd keeps for the backward pass, weights left out.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from encoder_speed import hardware, saved_mib, seconds
from samgraft.finetune.adapters import AdapterConfig, Targets, TuningScope, adapt
from samgraft.finetune.embedding_cache import CacheType, EmbeddingCache, RecordShape
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import build_sam
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
R = 8
LATE = 4


class Training:
    """One model, its loss and its optimizer; a step is what the trainer does with one micro-batch."""

    def __init__(self, segmenter: Segmenter, *, device: str, half: bool) -> None:
        self.segmenter = segmenter.train()
        self.device = device
        self.half = half
        self.loss = SegmentationLoss()
        self.optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=1e-4)

    def loss_of(self, images: Tensor, labels: Tensor, *, embeddings: Tensor | None = None) -> Tensor:
        """Return the loss; with embeddings the encoder is left out."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half):
            logits = self.segmenter(images) if embeddings is None else self.segmenter.decode(ImageFeatures(embeddings))
            return self.loss(logits.float(), labels)

    def step(self, images: Tensor, labels: Tensor, *, embeddings: Tensor | None = None) -> None:
        """Update the weights once."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_of(images, labels, embeddings=embeddings).backward()
        self.optimizer.step()


def sample(batch: int, size: int, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of one class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 1, size, size, generator=generator)
    labels = (torch.rand(batch, size, size, generator=generator) > 0.9).long()
    return images.to(device), labels.to(device)


def random_weights(sam: Sam) -> Sam:
    """Seeded noise of a trained model's scale; fresh positions are 0 and would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0))
    return sam


def ours(arch: str, size: int, config: AdapterConfig, *, device: str, half: bool, checkpointing: bool) -> Training:
    torch.manual_seed(1)
    sam = random_weights(build_sam(arch, image_size=size))
    sam.image_encoder.activation_checkpointing = checkpointing
    adapt(sam, config, num_classes=1)
    return Training(Segmenter(sam, num_classes=1).to(device), device=device, half=half)


def straightforward(arch: str, size: int, *, device: str, half: bool) -> Training:
    """segment_anything's model, peft's LoRA on qkv and on the decoder's queries and values, nothing else changed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    sam = sam_model_registry[arch]()
    if size != 1024:
        raise SystemExit("segment_anything's model is fixed to 1024 px: use --size 1024.")
    sam.load_state_dict(random_weights(build_sam(arch, image_size=size)).state_dict(), strict=True)
    sam.image_encoder.spec = build_sam_spec(arch)
    sam.image_encoder.image_size = size
    target = r"(image_encoder\.blocks\.\d+\.attn\.qkv|mask_decoder\.transformer\..*\.[qv]_proj)"
    whole = ["mask_decoder.mask_tokens", "mask_decoder.output_upscaling", "mask_decoder.output_hypernetworks_mlps.0"]
    sam.requires_grad_(False)
    get_peft_model(sam, LoraConfig(r=R, lora_alpha=R, target_modules=target, modules_to_save=whole))
    return Training(Segmenter(sam, num_classes=1).to(device), device=device, half=half)


def build_sam_spec(arch: str) -> object:
    from samgraft.shared.encoders.registry import arch_spec

    return arch_spec(arch)


def lora_config(**options: object) -> AdapterConfig:
    return AdapterConfig(method="lora", r=R, lora_alpha=R, **options)


def take_turns(first: Callable[[], None], second: Callable[[], None], *, turns: int, device: str) -> list[list[float]]:
    """Warm both up, then A B A B."""
    taken: list[list[float]] = [[], []]
    for run in (first, second):
        run()
    for _ in range(turns):
        for run, times in zip((first, second), taken, strict=True):
            times.append(seconds(run, device))
    return taken


def ratio_line(taken: list[list[float]]) -> str:
    ratios = [a / b for a, b in zip(*taken, strict=True)]
    middle = statistics.median(taken[0]) / statistics.median(taken[1])
    return f"**{middle:.2f}** ({min(ratios):.2f}-{max(ratios):.2f})"


def cached_epoch(arguments: argparse.Namespace) -> list[str]:
    """Decoder-only training: the encoder at every step against its embeddings from disk, checksums verified."""
    size, slices = arguments.size, arguments.slices
    training = ours(
        arguments.arch, size, AdapterConfig(method="full", scope=TuningScope.DECODER),
        device=arguments.device, half=arguments.half, checkpointing=False,
    )  # fmt: skip
    samples = [sample(1, size, arguments.device, seed=i) for i in range(slices)]
    grid = size // 16
    with tempfile.TemporaryDirectory() as folder:
        shape = RecordShape(maps=((256, grid, grid),), image_size=size, dtype=CacheType.FP16)
        cache = EmbeddingCache(Path(folder), shape, num_records=slices, facts={"benchmark": size})

        def embedded(first: int) -> Iterator[tuple[ImageFeatures, Tensor]]:
            for images, labels in samples[first:]:
                with torch.no_grad(), torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.half):
                    yield training.segmenter.embed(images), labels

        cache.fill(embedded)
        [kept], label = cache.read(0)
        with torch.no_grad():
            images, labels = samples[0]
            direct = training.loss_of(images, labels)
            through_disk = training.loss_of(images, label[None].to(labels), embeddings=kept[None].to(arguments.device))
        difference = abs(float(direct - through_disk)) / float(direct)
        if difference > 1e-3:
            raise SystemExit(f"cached and recomputed embeddings must give one loss, they differ by {difference:.1e}.")

        def recomputing() -> None:
            for images, labels in samples:
                training.step(images, labels)

        def reading() -> None:
            for record in range(slices):
                embedding, label = cache.read(record)
                images = samples[record][0]  # not looked at
                training.step(images, label[None].to(arguments.device), embeddings=embedding[None].to(arguments.device))

        taken = take_turns(recomputing, reading, turns=arguments.turns, device=arguments.device)
    medians = [statistics.median(times) / slices for times in taken]
    return [
        "## Decoder-only epoch, full decoder: encoder at every step / embeddings from disk",
        "",
        f"- loss through the disk differs by {difference:.1e} of itself",
        "",
        "| s per slice, recomputing | s per slice, cached | speed-up (range) |",
        "|---|---|---|",
        f"| {medians[0]:.2f} | {medians[1]:.3f} | {ratio_line(taken)} |",
        "",
    ]


def lora_step(arguments: argparse.Namespace) -> list[str]:
    """LoRA on queries and values of encoder and decoder: the straightforward form against ours."""
    build = partial(ours, arguments.arch, arguments.size, device=arguments.device, half=arguments.half)
    sides = {
        "ours, same placement": build(lora_config(targets=Targets.QV), checkpointing=False),
        "ours, same placement, activation checkpointing": build(lora_config(targets=Targets.QV), checkpointing=True),
    }
    baseline = straightforward(arguments.arch, arguments.size, device=arguments.device, half=arguments.half)
    images, labels = sample(1, arguments.size, arguments.device)
    check_equal(baseline, sides["ours, same placement"], images, labels)
    baseline_mib = mib_of(baseline, images, labels)
    lines = [
        "## LoRA training step, encoder and decoder: segment_anything + peft / ours",
        "",
        "| ours | straightforward s | ours s | speed-up (range) | straightforward saved MiB | ours saved MiB | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, training in sides.items():
        mib = mib_of(training, images, labels)
        taken = take_turns(
            partial(baseline.step, images, labels),
            partial(training.step, images, labels),
            turns=arguments.turns,
            device=arguments.device,
        )
        medians = [statistics.median(times) for times in taken]
        lines.append(
            f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio_line(taken)} | {baseline_mib:.0f} | {mib:.0f} | "
            f"**{mib / baseline_mib:.2f}** |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def check_equal(baseline: Training, ours: Training, images: Tensor, labels: Tensor) -> None:
    """The same loss, and the same gradient of a head that both train, up to the number format."""
    gradients = []
    losses = []
    for training in (baseline, ours):
        loss = training.loss_of(images, labels)
        loss.backward()
        losses.append(float(loss))
        head = next(p for n, p in training.segmenter.named_parameters() if "mask_tokens.modules_to_save" in n)
        assert head.grad is not None
        gradients.append(head.grad.flatten().float())
        training.optimizer.zero_grad(set_to_none=True)
    cosine = float(torch.cosine_similarity(*gradients, dim=0))
    print(f"loss {losses[0]:.5f} / {losses[1]:.5f}, cosine of the gradients {cosine:.4f}", flush=True)
    if abs(losses[0] - losses[1]) > 0.01 * losses[0] or cosine < 0.95:
        raise SystemExit("both sides must compute the same: the timing would say nothing.")


def mib_of(training: Training, images: Tensor, labels: Tensor) -> float:
    def run() -> Tensor:
        return training.loss_of(images, labels)

    return saved_mib(run, training.segmenter)


MODES: dict[str, tuple[AdapterConfig, bool]] = {
    "full": (AdapterConfig(method="full"), False),
    "full, activation checkpointing": (AdapterConfig(method="full"), True),
    "LoRA": (lora_config(), False),
    "LoRA, activation checkpointing": (lora_config(), True),
    f"LoRA, last {LATE} blocks": (lora_config(last_blocks=LATE), False),
    "adapter": (AdapterConfig(method="adapter"), False),
    "decoder, LoRA": (lora_config(scope=TuningScope.DECODER), False),
    "decoder, full": (AdapterConfig(method="full", scope=TuningScope.DECODER), False),
    "decoder, full, cached embeddings": (AdapterConfig(method="full", scope=TuningScope.DECODER), False),
}


def modes(arguments: argparse.Namespace) -> list[str]:
    """What each mode costs: on a GPU its peak memory per batch, on a CPU what is saved for the backward pass."""
    on_gpu = arguments.device == "cuda"
    batches = arguments.batches if on_gpu else [1]
    head = [f"batch {b}: peak GiB / s" for b in batches] if on_gpu else ["saved MiB", "s per step"]
    lines = [f"## Modes, {arguments.arch} at {arguments.size} px", "", "| mode | " + " | ".join(head) + " |"]
    lines.append("|---" * (len(head) + 1) + "|")
    for name, (config, checkpointing) in MODES.items():
        cells = []
        for batch in batches:
            cells += mode_cells(arguments, config, batch=batch, checkpointing=checkpointing, cached="cached" in name)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def mode_cells(
    arguments: argparse.Namespace, config: AdapterConfig, *, batch: int, checkpointing: bool, cached: bool
) -> list[str]:
    device = arguments.device
    gc.collect()
    images, labels = sample(batch, arguments.size, device)
    grid = arguments.size // 16
    embeddings = torch.randn(batch, 256, grid, grid).to(device) if cached else None
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lies_there = torch.cuda.memory_allocated() if device == "cuda" else 0  # of parts measured before
    training = ours(
        arguments.arch, arguments.size, config, device=device, half=arguments.half, checkpointing=checkpointing
    )
    step = partial(training.step, images, labels, embeddings=embeddings)
    try:
        mib = 0.0 if device == "cuda" else saved_mib(
            partial(training.loss_of, images, labels, embeddings=embeddings), training.segmenter
        )  # fmt: skip
        step()
        taken = statistics.median(seconds(step, device) for _ in range(arguments.turns))
    except torch.OutOfMemoryError:
        return ["out of memory"]
    if device == "cuda":
        return [f"{(torch.cuda.max_memory_allocated() - lies_there) / 2**30:.2f} / {taken:.3f}"]
    return [f"{mib:.0f}", f"{taken:.2f}"]


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "cached": cached_epoch,
    "lora": lora_step,
    "modes": modes,
}


def heading(arguments: argparse.Namespace, loads: list[float]) -> list[str]:
    half = "bf16 autocast" if arguments.half else "float32"
    return [
        f"# Fine-tuning speed and memory, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"- {arguments.arch}, {arguments.size} px, {half}; medians of {arguments.turns} interleaved turns",
        f"- {hardware(arguments.device)}; {torch.get_num_threads()} thread(s) used; load average during the run "
        f"{min(loads):.1f}-{max(loads):.1f}",
        "- times are processor seconds on a CPU, wall seconds on a GPU: read the ratios",
        f"- torch {version('torch')}, segment-anything {version('segment-anything')}, peft {version('peft')}, "
        f"Python {platform.python_version()}",
        f"- `python benchmarks/finetune_speed.py {' '.join(sys.argv[1:])}`",
        "",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: all on a CPU, modes on a GPU")
    parser.add_argument("--arch", default="vit_b", choices=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--slices", type=int, default=2, help="slices of an epoch of the cached part")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--float32", dest="half", action="store_false", help="without bf16 autocast")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", metavar="NAME", help="keep the tables as benchmarks/results/DATE-NAME.md")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    parts = arguments.parts or (["modes"] if arguments.device == "cuda" else list(PARTS))
    loads, lines = [os.getloadavg()[0]], []
    for part in parts:
        lines += PARTS[part](arguments)
        loads.append(os.getloadavg()[0])
        text = "\n".join([*heading(arguments, loads), *lines])
        print(text, flush=True)
        if arguments.write:  # after every part: a long run that is stopped keeps what it has
            RESULTS.mkdir(parents=True, exist_ok=True)
            path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{arguments.write}.md"
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
