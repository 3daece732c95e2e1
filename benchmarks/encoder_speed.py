"""Speed and memory of the image encoders against segment_anything's or SAM 2's, interleaved in one process.

    python benchmarks/encoder_speed.py --sizes 1024 512 256 --types bfloat16 --cases full lora --write bf16
    python benchmarks/encoder_speed.py --arch sam2_t --sizes 1024 --write hiera

Every case is forward + backward on random data of the real shape, after a warm-up. In float32 the outputs are compared
first. The baseline and the other sides take turns (A B C A B C). The result is the ratio of medians, with the smallest
and the largest ratio of a turn. Saved bytes are distinct storages that autograd keeps for the backward pass, without
weights. The allocator is tuned as in training (``retain_freed_memory``), for all sides.

The cases ``engines`` and ``engines_kept`` compare the two attention engines: the baseline is the one of CPUs.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from original_encoders import HieraTwin, plain_twin
from samgraft.shared.encoders import attention
from samgraft.shared.encoders.base import TokenDroppingEncoder
from samgraft.shared.encoders.hiera import HieraEncoder
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.vit import ViTSpec
from samgraft.shared.training.device import retain_freed_memory
from torch import nn

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured case."""

    image_size: int
    dtype: str
    case: str
    baseline_s: float
    ours_s: float
    lowest_ratio: float
    highest_ratio: float
    baseline_mib: float
    ours_mib: float

    @property
    def ratio(self) -> float:
        """Baseline time divided by our time."""
        return self.baseline_s / self.ours_s

    def cells(self) -> list[str]:
        """Return the row of the table."""
        saved = f"{self.ours_mib / self.baseline_mib:.3f}" if self.baseline_mib else "-"
        return [
            str(self.image_size), self.dtype, self.case, f"{self.baseline_s:.3f}", f"{self.ours_s:.3f}",
            f"**{self.ratio:.2f}**", f"{self.lowest_ratio:.2f}-{self.highest_ratio:.2f}",
            f"{self.baseline_mib:.0f}", f"{self.ours_mib:.0f}", saved,
        ]  # fmt: skip


HEADER = [
    "px", "type", "case", "baseline s", "ours s", "speed-up", "range", "baseline saved MiB", "ours saved MiB", "share",
]  # fmt: skip


def build(arch: str, image_size: int, depth: int | None, device: str) -> tuple[TokenDroppingEncoder, nn.Module]:
    """Build both encoders with the same random weights."""
    spec = arch_spec(arch)
    if depth is not None:
        assert isinstance(spec, ViTSpec), "--depth cuts windowed ViTs only"
        spec = replace(spec, depth=depth, global_blocks=tuple(i for i in spec.global_blocks if i < depth))
    ours = spec.build(image_size=image_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0))
    stock = HieraTwin(ours) if isinstance(ours, HieraEncoder) else plain_twin(ours)
    return ours.to(device), stock.to(device)


def backward(run: Run) -> None:
    run().float().pow(2).mean().backward()


def seconds(action: Callable[[], None], device: str) -> float:
    """Return wall time on a GPU and processor time on a CPU, which other work distorts less."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    action()
    return time.process_time() - start


def saved_mib(run: Run, module: nn.Module) -> float:
    """Return the MiB of distinct storages kept for the backward pass, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address must not be used again while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    total = sum(kept.values()) / 2**20
    del out
    alive.clear()
    gc.collect()
    return total


@dataclass(frozen=True, kw_only=True)
class Side:
    """One timed alternative."""

    name: str
    run: Run
    module: nn.Module


@dataclass(kw_only=True)
class Cost:
    """Seconds of each turn and MiB saved by one side."""

    seconds: list[float]
    mib: float


def measure(sides: list[Side], *, repeats: int, device: str) -> list[Cost]:
    """Time all sides in turn, the baseline first, ``repeats`` times."""
    costs = [Cost(seconds=[], mib=saved_mib(side.run, side.module)) for side in sides]  # also the warm-up
    for _ in range(repeats):
        for side, record in zip(sides, costs, strict=True):
            side.module.zero_grad(set_to_none=True)
            record.seconds.append(seconds(partial(backward, side.run), device))
            side.module.zero_grad(set_to_none=True)
    return costs


def full_sides(ours: TokenDroppingEncoder, stock: nn.Module, images: torch.Tensor, hidden: float) -> list[Side]:
    """Return sides that train every weight.

    The baseline of masked training is the same dense encoder with mask tokens in place.
    """
    ids = random_ids(ours, images, hidden)
    return [
        Side(name="original", run=partial(stock, images), module=stock),
        Side(name="dense", run=partial(plain, ours, images), module=ours),
        Side(name="dense, checkpointed", run=partial(checkpointed, ours, images), module=ours),
        Side(
            name=f"kept units of {ours.unit_px} px, {hidden:.0%} hidden",
            run=partial(visible, ours, images, ids),
            module=ours,
        ),
    ]


def lora_sides(ours: TokenDroppingEncoder, stock: nn.Module, images: torch.Tensor, num_blocks: int) -> list[Side]:
    """Add LoRA to qkv of the last blocks of both encoders through peft, and return sides that train it only."""
    from peft import LoraConfig, inject_adapter_in_model

    depth = len(ours.blocks)
    adapted = "|".join(str(i) for i in range(depth - num_blocks, depth))
    for module in (ours, stock):
        module.requires_grad_(requires_grad=False)
        config = LoraConfig(r=8, lora_alpha=8, target_modules=rf"blocks\.({adapted})\.attn\.qkv")
        inject_adapter_in_model(config, module)
        module.to(images.dtype)
    where = "all blocks" if num_blocks == depth else f"the last {num_blocks} blocks"
    return [
        Side(name="original", run=partial(stock, images), module=stock),
        Side(name=f"LoRA in {where}", run=partial(plain, ours, images), module=ours),
        Side(name=f"LoRA in {where}, checkpointed", run=partial(checkpointed, ours, images), module=ours),
    ]


def plain(encoder: TokenDroppingEncoder, images: torch.Tensor) -> torch.Tensor:
    encoder.activation_checkpointing = False
    return encoder(images)


def checkpointed(encoder: TokenDroppingEncoder, images: torch.Tensor) -> torch.Tensor:
    encoder.activation_checkpointing = True
    return encoder(images)


def visible(encoder: TokenDroppingEncoder, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    encoder.activation_checkpointing = False
    return encoder.forward_visible(images, ids)


def engine_sides(ours: TokenDroppingEncoder, images: torch.Tensor, ids: torch.Tensor | None) -> list[Side]:
    """Return both attention engines on the same weights, that of CPUs (the baseline) first."""

    def run(*, in_blocks: bool) -> torch.Tensor:
        ours._last_plan = None  # the stored plan may be that of the other engine
        with patch.object(attention, "computes_in_blocks", lambda device: in_blocks):
            return plain(ours, images) if ids is None else visible(ours, images, ids)

    what = "dense" if ids is None else f"{ids.shape[1]} of {ours.grid**2} tokens kept"
    return [
        Side(name=f"blocked engine, {what}", run=partial(run, in_blocks=True), module=ours),
        Side(name=f"fused engine against blocked, {what}", run=partial(run, in_blocks=False), module=ours),
    ]


def random_ids(ours: TokenDroppingEncoder, images: torch.Tensor, hidden: float) -> torch.Tensor:
    """Return raster numbers of the tokens that each image keeps."""
    total = ours.grid**2
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(total, generator=generator)[: round(total * (1 - hidden))] for _ in images]
    return torch.stack(kept).to(images.device)


def rows_of(sides: list[Side], costs: list[Cost], *, image_size: int, dtype: str) -> list[Row]:
    """Compare every side with the first one."""
    baseline = costs[0]
    rows = []
    for side, record in zip(sides[1:], costs[1:], strict=True):
        ratios = [a / b for a, b in zip(baseline.seconds, record.seconds, strict=True)]
        rows.append(
            Row(
                image_size=image_size,
                dtype=dtype,
                case=side.name,
                baseline_s=statistics.median(baseline.seconds),
                ours_s=statistics.median(record.seconds),
                lowest_ratio=min(ratios),
                highest_ratio=max(ratios),
                baseline_mib=baseline.mib,
                ours_mib=record.mib,
            )
        )
    return rows


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{name}, {os.cpu_count()} logical cores, {bf16} avx512_bf16"


def original_package(arch: str) -> str:
    name = "sam2" if arch.startswith("sam2") else "segment-anything"
    return f"{name} {version(name)}"


def table(rows: list[Row], arguments: argparse.Namespace, loads: list[float]) -> str:
    lines = [
        f"# Encoder speed, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"- {arguments.arch}, depth {arguments.depth or 'full'}, batch {arguments.batch}, forward + backward, "
        f"{arguments.repeats} interleaved turns after a warm-up; median, and the range of the ratio per turn",
        f"- {hardware(arguments.device)}; {torch.get_num_threads()} thread(s) used; load average during the run "
        f"{min(loads):.1f}-{max(loads):.1f} ",
        "- times are processor seconds on a CPU, wall seconds on a GPU; other work on a shared machine inflates both: "
        "read the ratios",
        f"- torch {version('torch')}, the original from {original_package(arguments.arch)}, "
        f"Python {platform.python_version()}",
        f"- `python benchmarks/encoder_speed.py {' '.join(sys.argv[1:])}`",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    archs = ["vit_b", "vit_l", "vit_h", "sam2_t", "sam2_s", "sam2_bp", "sam2_l"]
    parser.add_argument("--arch", default="vit_b", choices=archs)
    parser.add_argument("--depth", type=int, help="only the first blocks (a quick look; ratios are of these blocks)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--types", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--cases", nargs="+", default=["full"], choices=["full", "lora", "lora_last", "engines", "engines_kept"]
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--write", metavar="NAME", help="keep the table as benchmarks/results/encoder_speed-NAME-DATE.md"
    )
    return parser.parse_args()


def build_pair(arguments: argparse.Namespace, image_size: int, dtype: str) -> tuple[TokenDroppingEncoder, nn.Module]:
    ours, stock = build(arguments.arch, image_size, arguments.depth, arguments.device)
    return (ours.bfloat16(), stock.bfloat16()) if dtype == "bfloat16" else (ours, stock)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    retain_freed_memory()
    rows: list[Row] = []
    loads = [os.getloadavg()[0]]
    for image_size in arguments.sizes:
        for dtype in arguments.types:
            for case in arguments.cases:
                ours, stock = build_pair(arguments, image_size, dtype)
                shape = (arguments.batch, 3, image_size, image_size)
                images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(ours.parameters()))
                if dtype == "float32":
                    with torch.no_grad():
                        torch.testing.assert_close(ours(images), stock(images), atol=1e-4, rtol=1e-4)
                if case == "full":
                    sides = full_sides(ours, stock, images, arguments.hidden)
                elif case.startswith("engines"):
                    kept = random_ids(ours, images, arguments.hidden) if case == "engines_kept" else None
                    sides = engine_sides(ours, images, kept)
                else:
                    depth = len(ours.blocks)
                    sides = lora_sides(ours, stock, images, depth if case == "lora" else min(4, depth))
                costs = measure(sides, repeats=arguments.repeats, device=arguments.device)
                new = rows_of(sides, costs, image_size=image_size, dtype=dtype)
                loads.append(os.getloadavg()[0])
                rows += new
                for row in new:
                    print(" | ".join(row.cells()), flush=True)
                if arguments.write:  # after every case: a long run that is stopped keeps what it has
                    RESULTS.mkdir(parents=True, exist_ok=True)
                    path = RESULTS / f"encoder_speed-{arguments.write}-{datetime.now(UTC):%Y-%m-%d}.md"
                    path.write_text(table(rows, arguments, loads), encoding="utf-8")
    print(table(rows, arguments, loads))


if __name__ == "__main__":
    main()
