"""What a run was made with: package versions, code revision, threads; never user, host or path names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RECORDED_PACKAGES = (
    "samgraft",
    "torch",
    "torchvision",
    "numpy",
    "pytorch-lightning",
    "safetensors",
    "segment-anything",
    "timm",
    "peft",
    "lightly",
    "monai",
    "zarr",
)

BITWISE_PACKAGES = ("torch", "numpy")
"""A change of these may change the last bits of a resumed run."""


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_revision() -> str | None:
    """Return the git revision of this package's checkout, ``-dirty`` appended if changed, or None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        # An installed package may lie inside somebody else's repository.
        if not _git(folder, "ls-files", "--error-unmatch", Path(__file__).name):
            return None
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/shared", ":/ssl", ":/finetune")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def process_rank() -> int:
    """Return this process's rank before the process group exists: from torchrun, SLURM or Lightning's launcher."""
    for name in ("RANK", *(("SLURM_PROCID",) if _in_slurm_step() else ()), "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def processes_expected() -> int:
    """Return the world size that torchrun or SLURM announce, else 1."""
    for name in ("WORLD_SIZE", *(("SLURM_NTASKS",) if _in_slurm_step() else ())):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def thread_count() -> int:
    """Return the number of threads of one CPU operation; sums change in the last bits with it."""
    return torch.get_num_threads()


def _in_slurm_step() -> bool:
    """Tell a task started by srun from a shell inside an allocation, where the same variables are set."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in {"bash", "interactive"}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()
