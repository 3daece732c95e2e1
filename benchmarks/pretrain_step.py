"""A whole stage-1 step: MAE with hidden tokens left out against dense masked-image modelling; and a run of vit_t.

    python benchmarks/pretrain_step.py mae --repeats 3 --write pretrain_step
    python benchmarks/pretrain_step.py mae --arch sam2_t --decoders "cross 384 x 2" --write pretrain_step-hiera
    python benchmarks/pretrain_step.py run --threads 2 --steps 20 --write pretrain_run

``mae``: encoder, decoder, loss, backward and AdamW of ViT-B (or Hiera) on random slices of the real shape, both sides
taking turns in one process. The other side is what there was before: segment_anything's (or SAM 2's) own encoder with
mask tokens in place and a linear head (SimMIM). Both in autocast, as a run has it, or with weights in bf16
(``--weights bfloat16``).
Memory: distinct storages kept for the backward pass, and the peak of resident memory during a step above what weights,
gradients and optimizer take (``VmHWM`` on a CPU, ``max_memory_allocated`` on a GPU).

``run``: ``samgraft pretrain`` itself on a store of synthetic scans: slices per second and how long it waits for data.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from data_path import write_scans
from encoder_speed import RESULTS, build, hardware, original_package, saved_mib, seconds
from samgraft.shared.encoders.hiera import HieraEncoder
from samgraft.shared.encoders.sam import to_pixels
from samgraft.ssl.config import PretrainOptimizerConfig
from samgraft.ssl.objectives.decoders import DecoderKind
from samgraft.ssl.objectives.mae import MAE, MAEConfig
from samgraft.ssl.optimizer import build_pretrain_optimizer
from torch import nn

DECODERS = {
    "cross 384 x 2": {},
    "cross 512 x 4, a third": {"decoder_dim": 512, "num_decoder_blocks": 4, "num_decoder_heads": 8,
                               "answered_share": 1 / 3},
    "windowed 512 x 2": {"decoder": DecoderKind.WINDOWED, "decoder_dim": 512, "num_decoder_heads": 16},
    "full 512 x 8 (MAE's own)": {"decoder": DecoderKind.FULL, "decoder_dim": 512, "num_decoder_blocks": 8,
                                 "num_decoder_heads": 16},
}  # fmt: skip


class DenseSimMIM(nn.Module):
    """The original encoder with mask tokens in place, a linear head, and the same target as ours."""

    def __init__(self, encoder: nn.Module, ours: MAE, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(ours.encoder.mask_token_dim))
        self.head = nn.Linear(in_dim, out_dim)
        self.masks = partial(ours.draw_masks, side=ours.grid)
        self.target, self.spec = ours._target, ours.encoder.spec

    def loss(self, images: torch.Tensor, counters: list[int]) -> torch.Tensor:
        """Mean squared error on hidden tokens."""
        mask = self.masks(counters).to(images.device)
        tokens = self.encode(to_pixels(images, self.spec).to(self.mask_token.dtype), mask)
        ids = mask.flatten(1).nonzero()[:, 1].view(len(images), -1)
        hidden = tokens.flatten(1, 2).gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))
        target, _, _ = self.target(images, ids)
        return (self.head(hidden).float() - target).square().mean()

    def encode(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last tokens of segment_anything's encoder, shape (B, g, g, C)."""
        tokens = self.encoder.patch_embed(images)
        tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens) + self.encoder.pos_embed
        for block in self.encoder.blocks:
            tokens = block(tokens)
        return tokens


class DenseHieraSimMIM(DenseSimMIM):
    """The same for SAM 2's own trunk, whose last tokens are mask units."""

    def encode(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last tokens of SAM 2's trunk, shape (B, g, g, C)."""
        trunk = self.encoder.encoder.trunk
        tokens = trunk.patch_embed(images)
        hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None]
        tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens) + trunk._get_pos_embed(tokens.shape[1:3])
        for block in trunk.blocks:
            tokens = block(tokens)
        return tokens


@dataclass(kw_only=True)
class Side:
    """One of the two, with its optimizer."""

    name: str
    module: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


def peak_mib(action: Callable[[], None], device: str) -> float:
    """MiB above what lies in memory before the action."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if platform.system() != "Linux":
        action()
        return float("nan")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = status_mib("VmRSS")
    action()
    return status_mib("VmHWM") - before


def timed_step(side: Side, taken: list[float], device: str) -> None:
    taken.append(seconds(side.step, device))


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def sides(arguments: argparse.Namespace, decoder: str) -> tuple[Side, Side]:
    """(dense SimMIM, ours) with the same weights of the encoder, slices and masks."""
    torch.manual_seed(0)
    encoder, stock = build(arguments.arch, arguments.size, arguments.depth, arguments.device)
    objective = MAE(encoder, MAEConfig(mask_ratio=arguments.hidden, **DECODERS[decoder]), seed=0).to(arguments.device)
    is_hiera = isinstance(encoder, HieraEncoder)
    dense = (DenseHieraSimMIM if is_hiera else DenseSimMIM)(
        stock,
        objective,
        in_dim=encoder.spec.widths[-1] if is_hiera else encoder.feature_dim,
        out_dim=encoder.unit_px**2,
    ).to(arguments.device)
    (stock.encoder if is_hiera else stock).neck.requires_grad_(False)
    dtype = getattr(torch, arguments.weights)
    objective, dense = objective.to(dtype), dense.to(dtype)
    shape = (arguments.our_batch, 1, arguments.size, arguments.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(arguments.device, dtype)
    counters = list(range(arguments.our_batch))

    def cast() -> torch.autocast:
        return torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.autocast == "bfloat16")

    def dense_loss() -> torch.Tensor:
        with cast():
            return dense.loss(images[: arguments.batch], counters[: arguments.batch])

    def our_loss() -> torch.Tensor:
        with cast():
            return objective.loss(images, sample_counters=counters, step=0).total

    config = PretrainOptimizerConfig()
    trained = [p for p in dense.parameters() if p.requires_grad]
    return (
        Side(name="dense", module=dense, loss=dense_loss, optimizer=torch.optim.AdamW(trained, lr=config.lr)),
        Side(
            name="ours",
            module=objective,
            loss=our_loss,
            optimizer=build_pretrain_optimizer(objective, config),
        ),
    )


def mae(arguments: argparse.Namespace) -> Iterator[str]:
    sides_of = "dense {0} | ours {0} | share"
    yield (
        f"| decoder | dense s | ours s | speed-up | range | {sides_of.format('saved MiB')} | "
        f"{sides_of.format('peak MiB')} |"
    )
    yield "|" + "---|" * 11
    for decoder in arguments.decoders:
        dense, ours = sides(arguments, decoder)
        saved = [saved_mib(side.loss, side.module) for side in (dense, ours)]
        for side in (dense, ours):
            side.step()  # warm-up: the optimizer takes its memory
        peaks, times = [], ([], [])
        for turn in range(arguments.repeats):
            for side, taken in zip((dense, ours), times, strict=True):
                side.optimizer.zero_grad(set_to_none=True)  # or the last step's gradients would count as lying there
                one = partial(timed_step, side, taken, arguments.device)
                if turn == 0:
                    peaks.append(peak_mib(one, arguments.device))
                else:
                    one()
        batches = (arguments.batch, arguments.our_batch)
        times = [[t / batch for t in taken] for taken, batch in zip(times, batches, strict=True)]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        medians = [statistics.median(taken) for taken in times]
        yield (
            f"| {decoder} | {medians[0]:.3f} | {medians[1]:.3f} | **{medians[0] / medians[1]:.2f}** | "
            f"{min(ratios):.2f}-{max(ratios):.2f} | {saved[0]:.0f} | {saved[1]:.0f} | {saved[1] / saved[0]:.3f} | "
            f"{peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.3f} |"
        )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    # Imported here: the other half needs no Lightning.
    from samgraft.shared.config import load_config, packaged_config
    from samgraft.shared.runs.metrics import MetricsLog
    from samgraft.shared.scans.intensity import IntensityPreset
    from samgraft.shared.scans.volume import Modality
    from samgraft.shared.store.build import build_store
    from samgraft.shared.store.examine import BuildSettings
    from samgraft.shared.training.device import choose_device
    from samgraft.ssl.config import PretrainConfig
    from samgraft.ssl.pretrain import pretrain

    yield "| preset | encoder | px | batch | workers | slices per s | data wait % | peak GiB |"
    yield "|" + "---|" * 8
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "scans").mkdir()
        settings = BuildSettings(modality=Modality.MRI, salt="benchmark")
        cases = write_scans(root / "scans", 4, suffix=".nii.gz")
        build_store(cases, out=root / "store.zarr", settings=settings, label_names={}, intensity=IntensityPreset())
        for objective in arguments.objectives:
            preset = f"{objective}-{'cpu' if arguments.device == 'cpu' else 'gpu'}"
            layers = [packaged_config(f"pretrain/{preset}.yaml"), {"modality": "mri"}]
            overrides = [
                f"data.store={root / 'store.zarr'}",
                "data.num_held_out_slices=0",
                "model.base=random",
                "optim.warmup_steps=1",
                f"trainer.max_steps={arguments.steps}",
                f"trainer.save_every_steps={arguments.steps}",
                f"trainer.log_every_steps={arguments.steps}",
                *(
                    f"{key}={value}"
                    for key, value in {
                        "model.arch": arguments.arch,
                        "model.image_size": arguments.size,
                        "data.batch_size": arguments.batch,
                        "trainer.num_workers": arguments.workers,
                    }.items()
                    if value is not None
                ),
            ]
            config = load_config(PretrainConfig, layers=layers, overrides=overrides)
            device = choose_device(arguments.device)
            torch.set_num_threads(arguments.threads)
            pretrain(config, name=objective, runs=root / "runs", device=device)
            last = list(MetricsLog(root / "runs" / objective / "metrics.jsonl").read())[-1]
            model, data = config.model, config.data
            yield (
                f"| {preset} | {model.arch} | {model.image_size} | {data.batch_size} | {config.trainer.num_workers} | "
                f"{last['perf/slices_per_s']:.2f} | {last['perf/data_wait_percent']:.2f} | "
                f"{gpu_peak(arguments.device)} |"
            )


def gpu_peak(device: str) -> str:
    """The most that the allocator held since the last question, in GiB; empty on a CPU."""
    if device == "cpu":
        return ""
    peak = torch.cuda.max_memory_reserved() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return f"{peak:.1f}"


def head(arguments: argparse.Namespace, load: float) -> list[str]:
    what = (
        f"{arguments.arch}, {arguments.size} px, batch {arguments.batch} (ours {arguments.our_batch}), "
        f"{arguments.hidden:.0%} hidden, autocast {arguments.autocast}, weights {arguments.weights}; whole steps with "
        f"AdamW, {arguments.repeats} interleaved "
        "turns after a warm-up: median per slice, and the range of the ratio per turn"
        if arguments.what == "mae"
        else f"`samgraft pretrain` with the objective's preset, {arguments.steps} steps, the first wait not counted"
    )
    return [
        f"# Stage-1 step, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"- {what}",
        f"- {hardware(arguments.device)}; {arguments.threads} thread(s) used; load average at the start {load:.1f}",
        "- times of `mae` are processor seconds on a CPU, wall seconds on a GPU; other work on a shared machine "
        "inflates both sides: read the ratios",
        f"- torch {version('torch')}, {original_package(arguments.arch or 'vit_b')}, "
        f"Python {platform.python_version()}",
        f"- `python benchmarks/pretrain_step.py {' '.join(sys.argv[1:])}`",
        "",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["mae", "run"])
    parser.add_argument("--size", type=int, help="pixels; default 1024 for mae; for run 128, on a GPU the preset's")
    parser.add_argument("--batch", type=int, help="default 1 for mae; for run 16, on a GPU the preset's")
    parser.add_argument("--our-batch", type=int, help="mae: where the other side's memory ends before ours")
    parser.add_argument("--arch", help="default vit_b for mae; for run the preset's encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--write", metavar="NAME", help="keep the table as benchmarks/results/NAME-DATE.md")
    parser.add_argument("--repeats", type=int, default=3, help="mae: turns")
    parser.add_argument("--hidden", type=float, default=0.75, help="mae: share of tokens hidden")
    parser.add_argument("--autocast", default="bfloat16", choices=["bfloat16", "off"], help="mae")
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"], help="mae")
    parser.add_argument("--depth", type=int, help="mae: only the first blocks, for a quick look")
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS)[:1], choices=list(DECODERS), help="mae")
    parser.add_argument("--objectives", nargs="+", default=["masked_image"], help="run")
    parser.add_argument("--steps", type=int, default=20, help="run: optimizer steps")
    parser.add_argument("--workers", type=int, help="run: processes that load data; default 0, on a GPU the preset's")
    arguments = parser.parse_args()
    if arguments.what == "mae" or arguments.device == "cpu":
        arguments.size = arguments.size or {"mae": 1024, "run": 128}[arguments.what]
        arguments.batch = arguments.batch or {"mae": 1, "run": 16}[arguments.what]
        arguments.workers = arguments.workers or 0
    if arguments.what == "mae":
        arguments.arch = arguments.arch or "vit_b"
    arguments.our_batch = arguments.our_batch or arguments.batch
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    lines = head(arguments, os.getloadavg()[0])
    for line in {"mae": mae, "run": run}[arguments.what](arguments):
        print(line, flush=True)
        lines.append(line)
        if arguments.write:  # after every line: a long run that is stopped keeps what it has
            RESULTS.mkdir(parents=True, exist_ok=True)
            path = RESULTS / f"{arguments.write}-{datetime.now(UTC):%Y-%m-%d}.md"
            path.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
