"""Tests of the cores and memory granted to a job, and of OpenMP's settings."""

import os
import subprocess
import sys

import pytest
from samgraft.shared import machine as job_limits
from samgraft.shared.machine import (
    ControlGroups,
    configure_openmp,
    granted_cores,
    granted_memory,
    threads_per_process,
)

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Simulate 64 cores and return a function that writes control groups."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def write(membership, files):
        (tmp_path / "self").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return ControlGroups(mounted=tmp_path / "mounted", membership=tmp_path / "self")

    return write


def test_granted_cores__version_2_takes_the_tightest_group(groups):
    files = {"job/cpu.max": "350000 100000\n", "job/step/cpu.max": "max 100000\n", "cpu.max": "max 100000\n"}
    assert granted_cores(groups("0::/job/step\n", files)) == 4  # This is 3.5 cores, rounded up.


def test_granted_cores__version_1_inside_a_container_ignores_the_path_of_the_host(groups):
    files = {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    membership = "4:memory:/docker/a1\n3:cpu,cpuacct:/docker/a1\n0::/\n"
    assert granted_cores(groups(membership, files)) == 2
    unlimited = {"cpu/cpu.cfs_quota_us": "-1\n"}
    assert granted_cores(groups(membership, unlimited)) == 64


def test_granted_cores__with_a_group_outside_the_namespace_takes_the_mount(groups):
    assert granted_cores(groups("0::/../../other\n", {"cpu.max": "150000 100000\n"})) == 2


def test_granted_cores__without_groups_counts_pinned_cores(groups, monkeypatch, tmp_path):
    nothing = ControlGroups(mounted=tmp_path / "no", membership=tmp_path / "no")
    assert granted_cores(nothing) == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert granted_cores(nothing) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert granted_cores(nothing) == 64


@pytest.mark.parametrize(
    ("set_by_user", "num_processes", "num_threads"),
    [
        (None, 1, 6),
        (None, 2, 3),
        (None, 9, 1),
        (None, 0, 6),
        ("1", 1, 1),
        ("2", 2, 2),
        # Job scripts often set the number of all cores, which several processes cannot have each.
        ("6", 2, 3),
        ("2,1", 1, 2),
        ("0", 1, 6),
        ("many", 1, 6),
        ("", 1, 6),
    ],
)
def test_threads_per_process__is_a_share_of_the_cores_or_what_the_user_set(
    monkeypatch, set_by_user, num_processes, num_threads
):
    monkeypatch.setattr("samgraft.shared.machine.granted_cores", lambda _groups=None: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert threads_per_process(num_processes) == num_threads


def test_granted_memory__counts_cached_files_as_free(groups):
    files = {
        "job/memory.max": f"{8 * GIB}\n",
        "job/memory.current": f"{7 * GIB}\n",
        "job/memory.stat": f"anon {4 * GIB}\ninactive_file {3 * GIB}\n",
        "memory.max": f"{100 * GIB}\n",
        "memory.current": f"{20 * GIB}\n",
    }
    assert granted_memory(groups("0::/job\n", files)) == (8 * GIB, 4 * GIB)


def test_granted_memory__version_1_with_a_huge_number_has_no_limit(groups):
    at = "memory/slurm/job_7/memory"
    files = {f"{at}.limit_in_bytes": f"{6 * GIB}\n", f"{at}.usage_in_bytes": f"{GIB}\n"}
    files |= {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"}
    assert granted_memory(groups("4:memory:/slurm/job_7\n", files)) == (6 * GIB, 5 * GIB)
    assert granted_memory(groups("4:memory:/\n", {})) is None


def test_configure_openmp__with_a_quota_limits_the_threads(groups, monkeypatch):
    limited = groups("0::/\n", {"cpu.max": "400000 100000\n"})
    environment: dict[str, str] = {}
    assert "4 of 64 visible cores" in (configure_openmp(environment, limited) or "")
    assert environment == {job_limits.THREADS: "4", **job_limits.PASSIVE_WAIT}
    assert configure_openmp({job_limits.THREADS: "8"}, limited) is None
    unlimited = groups("0::/\n", {"cpu.max": "max 100000\n"})
    assert configure_openmp({}, unlimited) is None
    # OpenMP itself detects the cores that the process is pinned to.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert configure_openmp({}, unlimited) is None


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_configure_openmp__with_a_users_wait_policy_changes_nothing(groups, name):
    environment = {name: "7"}
    configure_openmp(environment, groups("0::/\n", {}))
    assert environment == {name: "7"}


def test_main__sets_the_wait_policy_before_torch_is_loaded():
    """OpenMP reads its variables once, when torch loads it."""
    code = (
        "import os, sys; from samgraft.shared.cli import main; main(['--version']); "
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in job_limits.PASSIVE_WAIT}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False PASSIVE"
