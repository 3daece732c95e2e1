"""Cores and memory that a scheduler or a container grants to this job, and OpenMP's settings.

SLURM pins cores and limits memory. Docker and Kubernetes limit both by quota. A process that sees 64 cores but may use
four would start 64 threads that wait for each other, and would plan with memory that belongs to other jobs. Only Linux
reports such limits; on other systems nothing is limited.

Source:
    Linux documentation, admin-guide/cgroup-v2 (cpu.max, memory.max) and cgroup-v1 (cpu.cfs_quota_us,
    memory.limit_in_bytes).
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
"""Memory limit in bytes above which there is no limit. cgroup-v1 has no other way to express it."""
THREADS = "OMP_NUM_THREADS"
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Variables that let idle OpenMP threads sleep. The second is libgomp's, the third that of Intel's and LLVM's."""


@dataclass(frozen=True, kw_only=True)
class ControlGroups:
    """Files in which the kernel publishes the limits of a process."""

    mounted: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def folders(self, controller: str) -> Iterator[Path]:
        """Yield this process's group and all groups above it.

        The tightest limit among them counts.
        """
        for line in _read_text(self.membership).splitlines():
            _, names, path = line.split(":", 2)
            if names == "":
                root = self.mounted
            elif controller in names.split(","):
                root = self.mounted / controller
            else:
                continue
            group = root / path.lstrip("/")
            # Inside a container the path is often that of the host and does not exist. The mount is then the group.
            if ".." in group.parts:
                group = root
            yield group
            yield from (folder for folder in group.parents if folder.is_relative_to(root))


def granted_cores(groups: ControlGroups | None = None) -> int:
    """Return the number of cores that this process may keep busy.

    It is the smaller of the process's affinity and the quota of its groups, rounded up.
    """
    quotas = [math.ceil(quota) for quota in _cpu_quotas(groups or ControlGroups())]
    return max(1, min([_pinned_cores(), *quotas]))


def threads_per_process(num_processes: int) -> int:
    """Return the number of OpenMP threads of each of several processes that run at a time.

    They share the granted cores, because processes with all cores each would slow each other down. A smaller number
    that the user has set is kept, because other work may have the remaining cores. A thread without a core of its own
    makes every operation wait for it.
    """
    share = max(1, granted_cores() // max(1, num_processes))
    # OpenMP also accepts one number per nesting level.
    wanted = os.environ.get(THREADS, "").partition(",")[0].strip()
    return min(share, int(wanted)) if wanted.isdecimal() and int(wanted) > 0 else share


def granted_memory(groups: ControlGroups | None = None) -> tuple[int, int] | None:
    """Return the limit and the free memory of the tightest group in bytes, or None without a limit.

    Cached files count as free, because the kernel drops them first.
    """
    found: list[tuple[int, int]] = []
    for folder in (groups or ControlGroups()).folders("memory"):
        for limit_file, usage_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read_text(folder / limit_file), _read_text(folder / usage_file)
            if limit.isdigit() and usage.isdigit() and int(limit) < NO_LIMIT_BYTES:
                used = int(usage) - _read_statistic(folder / "memory.stat", cache)
                found.append((int(limit), max(0, int(limit) - used)))
    return min(found, key=lambda item: item[1], default=None)


def configure_openmp(
    environment: MutableMapping[str, str] | None = None, groups: ControlGroups | None = None
) -> str | None:
    """Set OpenMP's waiting and its number of threads in the environment.

    It must run before torch is imported. Child processes inherit the settings. A variable that the user has set is not
    changed.

    Returns:
        A line for the log if the number of threads was limited.
    """
    environment = os.environ if environment is None else environment
    # By default a thread without work spins. With other processes on the same cores it takes their time and then waits
    # for its own siblings, which made a training step on a shared server twice as long. A user who sets any of the
    # variables has decided about waiting, so that the others are left out as well.
    if not any(name in environment for name in PASSIVE_WAIT):
        environment.update(PASSIVE_WAIT)
    granted, visible = granted_cores(groups), _pinned_cores()
    # OpenMP detects by itself to which cores it is pinned, but not a quota.
    if THREADS in environment or granted >= visible:
        return None
    environment[THREADS] = str(granted)
    return f"this job may use {granted} of {visible} visible cores: {THREADS}={granted}"


def exit_with_parent() -> None:
    """End this process when its parent has ended.

    The workers of a fork server and the server wait for each other. Without this, a trainer that is ended by SIGKILL
    would leave all of them running with their memory. torch watches only the fork server, and process pools watch
    nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _pinned_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quotas(groups: ControlGroups) -> Iterator[float]:
    for folder in groups.folders("cpu"):
        quota, _, period = _read_text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read_text(folder / "cpu.cfs_quota_us"), _read_text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _read_statistic(path: Path, name: str) -> int:
    values = dict(line.split(" ", 1) for line in _read_text(path).splitlines() if " " in line)
    return int(values.get(name, 0))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def format_duration(seconds: float) -> str:
    """Return ``45 s``, ``12 min``, ``3 h 20 min`` or ``2 d 4 h``."""
    minutes = int(seconds // 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
