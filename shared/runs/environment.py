"""Software, code revision and processes of a run.

User, host and path names are never recorded.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from samgraft.shared.errors import UsageError

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
"""Packages whose versions are recorded in every run."""

BITWISE_PACKAGES = ("torch", "numpy")
"""Packages whose change may change the last bits of a resumed run."""


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a run's numbers."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_revision() -> str | None:
    """Return the git revision of this package's checkout, or None outside of one.

    ``-dirty`` is appended if tracked files are changed.
    """
    folder = Path(__file__).resolve().parent
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        # An installed package may be inside the repository of another project.
        if not _git(folder, "ls-files", "--error-unmatch", Path(__file__).name):
            return None
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/shared", ":/ssl", ":/finetune")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def process_rank() -> int:
    """Return this process's rank, before the process group exists.

    It is set by torchrun, SLURM or Lightning's launcher.
    """
    # torchrun's variable comes first, because inside a SLURM job both sets exist.
    return _first_number("RANK", "SLURM_PROCID", "LOCAL_RANK", default=0)


def local_rank() -> int:
    """Return this process's rank on its machine, which is the index of its GPU."""
    return _first_number("LOCAL_RANK", "SLURM_LOCALID", default=0)


def processes_expected() -> int:
    """Return the number of processes that torchrun or SLURM started, else 1."""
    return _first_number("WORLD_SIZE", "SLURM_NTASKS", default=1)


def processes_per_node() -> int:
    """Return the number of processes per machine.

    Raises:
        UsageError: If SLURM's tasks are not spread evenly over its nodes.
    """
    if started_by_torchrun := _first_number("LOCAL_WORLD_SIZE", default=0):
        return started_by_torchrun
    num_tasks = processes_expected()
    if not slurm_starts_processes():
        return num_tasks
    per_node = _read_number("SLURM_NTASKS_PER_NODE")  # Set only if --ntasks-per-node was given.
    num_nodes = _read_number("SLURM_STEP_NUM_NODES") or _read_number("SLURM_NNODES")
    num_nodes = num_nodes or (num_tasks // per_node if per_node else 1) or 1
    spread = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # For example 2(x2) or 3,1.
    if num_nodes * (per_node or num_tasks // num_nodes) != num_tasks or "," in spread:
        raise UsageError(
            f"SLURM's tasks must be spread evenly over the nodes, got {num_tasks} tasks on {num_nodes} nodes"
            f"{f', {per_node} per node' if per_node else ''}{f' ({spread})' if spread else ''}. "
            "Start with srun --nodes=N --ntasks-per-node=M.",
            where="SLURM_NTASKS, SLURM_NNODES, SLURM_NTASKS_PER_NODE",
        )
    return num_tasks // num_nodes


def slurm_starts_processes() -> bool:
    """Return True if srun started this process as one of several tasks."""
    # A shell or a batch script inside an allocation has most of the same variables, and so has the single task in which
    # torchrun or Lightning start processes of their own.
    is_step = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in {"bash", "interactive"}
    return is_step and (_read_number("SLURM_NTASKS") or 0) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def thread_count() -> int:
    """Return the number of threads of one CPU operation.

    Sums change in the last bits with it.
    """
    return torch.get_num_threads()


def _first_number(*names: str, default: int) -> int:
    """Return the first of these variables, those of SLURM only if srun started the processes."""
    for name in names:
        number = _read_number(name)
        if number is not None and (not name.startswith("SLURM_") or slurm_starts_processes()):
            return number
    return default


def _read_number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


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
