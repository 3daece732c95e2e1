"""Which device and precision to train with, and why; what makes the CPU faster."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from samgraft.shared.errors import UsageError
from samgraft.shared.runs.environment import local_rank, processes_expected, processes_per_node

log = logging.getLogger(__name__)


class Device(Enum):
    """What to train on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Precision(Enum):
    """Number format of the matrix products; weights and optimizer are always float32."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """What was chosen, in the terms of Lightning, and a line that says why."""

    accelerator: str
    devices: int
    num_nodes: int
    precision: str
    reason: str

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
    """Choose the device: a GPU where one works, else the CPU.

    Args:
        requested: ``auto`` takes CUDA if present, else the CPU (never MPS unasked: its results are not tested here).
        precision: ``auto`` takes bf16 where it is fast.
        devices: Processes on this machine; None takes what torchrun or SLURM announce, else 1.

    Raises:
        UsageError: If the requested device is not there, or the processes are not those that were started.
    """
    wanted = Device(requested)
    number_format = Precision(precision)
    accelerator, why = _accelerator(wanted)
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
    fast_bf16 = torch.cuda.is_bf16_supported() if accelerator == "cuda" else cpu_has_fast_bf16()
    use_bf16 = number_format is Precision.BF16 or (
        number_format is Precision.AUTO and accelerator != "mps" and fast_bf16
    )
    if number_format is Precision.BF16 and not fast_bf16:
        log.warning("bf16 was asked for, but this %s has no fast bf16: expect it to be slower.", accelerator)
    format_name, processes = "bf16" if use_bf16 else "float32", num_devices * num_nodes
    return DeviceChoice(
        accelerator=accelerator,
        devices=num_devices,
        num_nodes=num_nodes,
        precision="bf16-mixed" if use_bf16 else "32-true",
        reason=f"{why}, {format_name}" + (f", {processes} processes" if processes > 1 else ""),
    )


def cpu_has_fast_bf16() -> bool:
    """Tell whether matrix products in bf16 are faster than in float32 on this CPU."""
    if platform.machine() in {"arm64", "aarch64"}:
        return "bf16" in _cpu_flags()
    flags = _cpu_flags()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def retain_freed_memory() -> bool:
    """Let the allocator keep freed memory instead of returning it to the kernel after every step.

    Activations are larger than glibc's limits, so by default each step maps, zeroes and unmaps them again: about 30 %
    of a small model's step on a CPU. Memory in use does not grow, only what is given back.

    Returns:
        True if it was set (Linux with glibc).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3
    # 32 MiB is the largest mmap threshold that glibc takes; a larger one is refused without effect.
    set_all = mallopt(mmap_threshold, 32 * 2**20) == 1
    return bool(mallopt(trim_threshold, 2**31 - 1) == 1 and set_all)


def _accelerator(wanted: Device) -> tuple[str, str]:
    if wanted is Device.CPU:
        return "cpu", f"CPU as asked ({torch.get_num_threads()} threads)"
    if wanted is Device.MPS:
        if not torch.backends.mps.is_available():
            raise UsageError("device must be there, got mps on a machine without it. Use cpu.", where="trainer.device")
        return "mps", "Apple GPU as asked"
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name(0)
    if wanted is Device.CUDA:
        raise UsageError(
            f"device must be there, got cuda, but {_why_no_cuda()}. Use trainer.device=cpu.", where="trainer.device"
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
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
