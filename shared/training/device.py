"""Choice of device and precision, and memory settings of the CPU."""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from samgraft.shared.errors import UsageError
from samgraft.shared.files import write_json
from samgraft.shared.runs.environment import local_rank, processes_expected, processes_per_node
from torch import nn

log = logging.getLogger(__name__)

MIN_BF16_SPEEDUP = 1.1
"""Measured factor from which bf16 counts as faster than float32 on a CPU."""
NUM_SPEED_ROUNDS = 5


class Device(Enum):
    """Kind of device to train on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Precision(Enum):
    """Number format of matrix products. Weights and optimizer are always float32."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


Choice = TypeVar("Choice", Device, Precision)


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """Chosen device and precision, in the terms of Lightning."""

    accelerator: str
    devices: int
    """Number of processes per machine."""
    num_nodes: int
    precision: str
    reason: str
    """Line for the log with the device and the reason for it."""

    @property
    def world_size(self) -> int:
        """Number of processes on all machines together."""
        return self.devices * self.num_nodes

    @property
    def torch_device(self) -> torch.device:
        """Device of this process outside of a trainer."""
        if self.accelerator == "cuda":
            return torch.device("cuda", local_rank() % max(1, torch.cuda.device_count()))
        return torch.device(self.accelerator)


def choose_device(
    requested: Device | str = Device.AUTO, *, precision: Precision | str = Precision.AUTO, devices: int | None = None
) -> DeviceChoice:
    """Choose a GPU if one works, else the CPU.

    Args:
        requested: ``auto`` takes CUDA if available, else the CPU. MPS must be requested, because it is not tested here.
        precision: ``auto`` takes bf16 where it is fast.
        devices: Processes on this machine, or None for the number that torchrun or SLURM set, else 1.

    Raises:
        UsageError: If the device or precision has another name, the device does not exist, or other processes were
            started.
    """
    wanted = _member_of(Device, requested, name="device")
    number_format = _member_of(Precision, precision, name="precision")
    accelerator, why = _choose_accelerator(wanted)
    world = processes_expected()
    local = processes_per_node()
    if devices is not None and world > 1 and devices != local:
        raise UsageError(
            f"devices must be the {local} processes that torchrun or SLURM started on this machine, got {devices}. "
            "Leave it out.",
            where="trainer.devices",
        )
    num_devices, num_nodes = devices or local, max(1, world // local)
    if accelerator == "cuda" and num_devices > torch.cuda.device_count():
        raise UsageError(
            f"devices must be at most the {torch.cuda.device_count()} GPUs of this machine, got {num_devices}.",
            where="trainer.devices",
        )
    use_bf16 = number_format is Precision.BF16
    if number_format is not Precision.FP32 and accelerator != "mps":
        is_fast = torch.cuda.is_bf16_supported() if accelerator == "cuda" else cpu_has_fast_bf16()
        if use_bf16 and not is_fast:
            log.warning("trainer.precision=bf16 will be slow, because this %s has no fast bf16.", accelerator)
        use_bf16 = use_bf16 or is_fast
    format_name, processes = "bf16" if use_bf16 else "float32", num_devices * num_nodes
    return DeviceChoice(
        accelerator=accelerator,
        devices=num_devices,
        num_nodes=num_nodes,
        precision="bf16-mixed" if use_bf16 else "32-true",
        reason=f"{why}, {format_name}" + (f", {processes} processes" if processes > 1 else ""),
    )


def _member_of(kind: type[Choice], value: Choice | str, *, name: str) -> Choice:
    try:
        return kind(value)
    except ValueError as err:
        known = ", ".join(str(member.value) for member in kind)
        hint = " A GPU of NVIDIA is called cuda." if str(value).lower().startswith(("gpu", "cuda")) else ""
        raise UsageError(f"{name} must be one of {known}, got {value!r}.{hint}") from err


def cpu_has_fast_bf16() -> bool:
    """Return True if training steps in bf16 are faster than in float32 on this CPU.

    The instructions alone do not decide it. Of two CPUs with ``avx512_bf16`` one gained a factor of two and the other
    nothing, so that the speed is measured once per machine.
    """
    wanted = {"bf16"} if platform.machine() in {"arm64", "aarch64"} else {"amx_bf16", "avx512_bf16"}
    return bool(wanted & _cpu_flags()) and bf16_speedup() >= MIN_BF16_SPEEDUP


@functools.cache
def bf16_speedup() -> float:
    """Return how many times faster a bf16 step is than a float32 step on this CPU.

    The measurement takes about a second. Its result is kept in the user's cache folder, so that all sessions of a run
    use the same precision.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samgraft"
    path = folder / "bf16_speed.json"
    key = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        return float(known[key])
    except (OSError, ValueError, TypeError, KeyError) as err:
        known = known if isinstance(err, KeyError) else {}
    speedup = round(_measure_bf16_speedup(), 2)
    log.info("bf16 is %.2f times as fast as float32 on this CPU (%s)", speedup, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {**known, key: speedup})
    except OSError as err:
        log.info("the measurement of bf16 is not kept (%s)", err.strerror)
    return speedup


def _measure_bf16_speedup() -> float:
    # The shapes are those of a ViT-B block with 256 tokens. Constant values leave the random generators of a run alone.
    up = torch.full((3072, 768), 1e-3, requires_grad=True)
    down = torch.full((768, 3072), 1e-3, requires_grad=True)
    inputs = torch.full((256, 768), 0.5)

    def step(*, use_bf16: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16):
            loss = F.linear(F.gelu(F.linear(inputs, up)), down).float().square().mean()
        torch.autograd.grad(loss, (up, down))
        return time.perf_counter() - started

    # The formats alternate and the fastest round counts, so that other work on the machine hardly matters.
    times = [(step(use_bf16=False), step(use_bf16=True)) for _ in range(1 + NUM_SPEED_ROUNDS)][1:]
    return min(plain for plain, _ in times) / min(fast for _, fast in times)


def use_channels_last(module: nn.Module) -> None:
    """Set the memory layout of a module's convolutions, of slices or of volumes, in place."""
    has_volumes = any(parameter.ndim == 5 for parameter in module.parameters())
    module.to(memory_format=torch.channels_last_3d if has_volumes else torch.channels_last)


def release_memory(device: DeviceChoice) -> None:
    """Return unused GPU memory to the system, for another process."""
    if device.accelerator == "cuda":
        torch.cuda.empty_cache()


def retain_freed_memory() -> bool:
    """Let the allocator keep freed memory instead of returning it to the kernel.

    Returns:
        True if it was set (Linux with glibc).
    """
    # Activations are larger than glibc's limits. By default each step maps, zeroes and unmaps them again, which takes
    # about 30 % of a small model's step on a CPU. The peak of the memory in use does not grow.
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3
    # 32 MiB is the largest mmap threshold that glibc accepts. A larger one is refused without effect.
    set_all = mallopt(mmap_threshold, 32 * 2**20) == 1
    return bool(mallopt(trim_threshold, 2**31 - 1) == 1 and set_all)


def cpu_name() -> str:
    """Return the name of this machine's CPU, for speed tables."""
    return _read_cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _choose_accelerator(wanted: Device) -> tuple[str, str]:
    if wanted is Device.CPU:
        return "cpu", f"CPU as requested ({torch.get_num_threads()} threads)"
    if wanted is Device.MPS:
        if not torch.backends.mps.is_available():
            raise UsageError("device mps is not available on this machine. Use cpu.", where="trainer.device")
        return "mps", "Apple GPU as requested"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name(0)
    if wanted is Device.CUDA:
        raise UsageError(
            f"device cuda is not available: {_why_no_cuda()}. Use trainer.device=cpu.", where="trainer.device"
        )
    return "cpu", f"CPU, {torch.get_num_threads()} threads ({_why_no_cuda()})"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in {"", "-1"}:
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    if not Path("/proc/driver/nvidia").exists():
        return "no NVIDIA driver"
    return "the NVIDIA driver does not match this PyTorch"


def _cpu_flags() -> frozenset[str]:
    return frozenset(_read_cpuinfo("flags", "Features").split())


def _read_cpuinfo(*names: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        if line.startswith(names):
            return line.split(":", 1)[1].strip()
    return ""
