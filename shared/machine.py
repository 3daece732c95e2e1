"""Cores and memory that a scheduler or a container grants this job; the machine's own totals do not say.

SLURM pins cores and limits memory; Docker and Kubernetes limit both by quota. A process that sees 64 cores and may use
four starts 64 threads that wait for each other, and plans with memory that belongs to somebody else.

Source: Linux documentation, admin-guide/cgroup-v2 (cpu.max, memory.max) and cgroup-v1 (cpu.cfs_quota_us,
memory.limit_in_bytes). Elsewhere than on Linux there is nothing to read, and nothing is limited.

What every worker process does, whatever it works on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

NO_LIMIT_BYTES = 1 << 60
"""cgroup-v1 writes a number beyond any memory where there is no limit."""
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class ControlGroups:
    """Where the kernel says what a process may use."""

    mounted: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def folders(self, controller: str) -> Iterator[Path]:
        """Yield this process's group and all above it: the tightest limit counts.

        Inside a container the path is often the host's and does not exist; the mount itself is then the group.
        """
        for line in _read(self.membership).splitlines():
            _, names, path = line.split(":", 2)
            if names == "":
                root = self.mounted
            elif controller in names.split(","):
                root = self.mounted / controller
            else:
                continue
            group = root / path.lstrip("/")
            if ".." in group.parts:
                group = root
            yield group
            yield from (folder for folder in group.parents if folder.is_relative_to(root))


def granted_cores(groups: ControlGroups | None = None) -> int:
    """Return how many cores this process may keep busy: its affinity, and the quota of its groups, rounded up."""
    quotas = [math.ceil(quota) for quota in _quotas(groups or ControlGroups())]
    return max(1, min([_pinned_cores(), *quotas]))


def granted_memory(groups: ControlGroups | None = None) -> tuple[int, int] | None:
    """Return (limit, what is left of it) in bytes of the tightest group; None without a limit.

    Cached files count as left: the kernel gives them up first.
    """
    found: list[tuple[int, int]] = []
    for folder in (groups or ControlGroups()).folders("memory"):
        for limit_file, usage_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read(folder / limit_file), _read(folder / usage_file)
            if limit.isdigit() and usage.isdigit() and int(limit) < NO_LIMIT_BYTES:
                used = int(usage) - _statistic(folder / "memory.stat", cache)
                found.append((int(limit), max(0, int(limit) - used)))
    return min(found, key=lambda item: item[1], default=None)


def use_granted_cores(
    environment: MutableMapping[str, str] | None = None, groups: ControlGroups | None = None
) -> str | None:
    """Start as many threads as there are cores for them; must run before torch is imported.

    OpenMP sees by itself which cores it is pinned to, not what quota there is. A number that a user set is left alone.

    Returns:
        A line for the log where threads were limited.
    """
    environment = os.environ if environment is None else environment
    granted, seen = granted_cores(groups), _pinned_cores()
    if THREADS in environment or granted >= seen:
        return None
    environment[THREADS] = str(granted)
    return f"this job may use {granted} of the {seen} cores that it sees: {THREADS}={granted}"


def _pinned_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(groups: ControlGroups) -> Iterator[float]:
    for folder in groups.folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _statistic(path: Path, name: str) -> int:
    values = dict(line.split(" ", 1) for line in _read(path).splitlines() if " " in line)
    return int(values.get(name, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def exit_with_parent() -> None:
    """End this process when the one that asked for it has ended, killed or not.

    Workers of a fork server wait for it, and it for them: a trainer killed by SIGKILL would leave all of them, and
    their memory, for ever. torch's own watch looks at the fork server, pools have none.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
