"""Is this machine ready: environment, disk, devices, data, weights; findings in words, nothing is changed."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from samgraft.shared.errors import ExitCode, SamgraftError
from samgraft.shared.machine import granted_cores, granted_memory
from samgraft.shared.runs.environment import code_revision, software_versions, thread_count
from samgraft.shared.scans.header_check import check_headers
from samgraft.shared.scans.privacy import BURNED_IN
from samgraft.shared.store.files import is_scans
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.device import choose_device, cpu_has_fast_bf16
from samgraft.shared.weights.inspection import describe

SHOWN_PACKAGES = ("torch", "torchvision", "numpy", "pytorch-lightning")

ENOUGH_DISK_BYTES = 10 * 10**9
ENOUGH_SHARED_MEMORY_BYTES = 10**9
ENOUGH_MEMORY_BYTES = 6 * 10**9


class Status(Enum):
    """How a finding bears on the work."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    area: str
    name: str
    status: Status = Status.OK
    text: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {**vars(self), "status": self.status.value}


EXIT_CODES: Mapping[str, ExitCode] = {
    "environment": ExitCode.USAGE,
    "disk": ExitCode.STORAGE,
    "device": ExitCode.USAGE,
    "data": ExitCode.DATA,
    "weights": ExitCode.WEIGHTS,
}

ENVIRONMENT_NOTES: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_VISIBLE_DEVICES": (lambda v: v.strip() in {"", "-1"}, "hides every GPU; unset it to use one"),
    "OMP_NUM_THREADS": (lambda v: v == "1", "limits the CPU to one thread; unset it unless several runs share it"),
    "PYTHONPATH": (bool, "may put other code before the installed packages; unset it if imports go wrong"),
    "MONAI_ALLOW_PICKLE": (bool, "would allow pickles; every command drops it"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (bool, "would allow pickles; every command drops it"),
    "WORLD_SIZE": (lambda v: v != "1", "makes a run wait for other processes; unset it outside of torchrun"),
    "SLURM_NTASKS": (lambda v: v != "1", "announces several tasks; start runs with srun"),
}


def diagnose(root: Path, *, data: Sequence[Path | str] = (), weights: Sequence[Path] = ()) -> list[Finding]:
    """Look at everything that a run needs.

    Args:
        root: Where ``runs/`` and ``data/`` are or will be.
        data: Stores to open, and scans whose headers are looked at; the stores in ``root/data`` if none are given.
        weights: Weights files to inspect; those in ``root/data/weights`` if none are given.

    Returns:
        Findings without user, host or absolute path names.
    """
    stores: list[Path | str] = list(data) or sorted((root / "data").glob("**/*.zarr"))
    files = list(weights) or sorted(p for p in (root / "data" / "weights").glob("*") if p.is_file())
    return [
        *_environment(),
        *_disk(root),
        *_devices(),
        *[finding for path in stores for finding in (_scans(path) if is_scans(path) else [_store(path)])],
        *([] if stores else [_nothing("data", "no store in data/", "samgraft demo-data, or samgraft store build")]),
        *[_weights(path) for path in files],
        *([] if files else [_nothing("weights", "no file in data/weights/", "samgraft demo-data fetches LiteMedSAM")]),
    ]


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the code of the first problem, or OK; warnings do not count."""
    return next((EXIT_CODES[f.area] for f in findings if f.status is Status.PROBLEM), ExitCode.OK)


def _environment() -> list[Finding]:
    versions = software_versions()
    revision = code_revision()
    findings = [
        Finding(
            area="environment",
            name="samgraft",
            text=f"{versions['samgraft']}" + (f", revision {revision[:12]}" if revision else ""),
        ),
        _python(),
        *_requirements(),
        Finding(
            area="environment",
            name="packages",
            text=", ".join(
                f"{name} {versions[name]}" for name in ("torch", "torchvision", "numpy", "pytorch-lightning")
            ),
        ),
    ]
    for name, (matters, advice) in ENVIRONMENT_NOTES.items():
        if name in os.environ and matters(os.environ[name]):
            findings.append(Finding(area="environment", name=name, status=Status.WARNING, text="is set", advice=advice))
    return findings


def _python() -> Finding:
    found = sys.version_info[:2]
    good = (3, 11) <= found <= (3, 13)
    return Finding(
        area="environment",
        name="python",
        status=Status.OK if good else Status.PROBLEM,
        text=".".join(map(str, sys.version_info[:3])),
        advice="" if good else "use Python 3.11 to 3.13",
    )


def _requirements() -> list[Finding]:
    """Compare what is installed with what the package declares."""
    findings = []
    for text in requires("samgraft") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            findings.append(
                Finding(
                    area="environment",
                    name=requirement.name,
                    status=Status.PROBLEM,
                    text=f"{found}, needed: {requirement.specifier or 'any version'}",
                    advice="make install",
                )
            )
    return findings


def _disk(root: Path) -> list[Finding]:
    findings = [_space("working folder", root, enough=ENOUGH_DISK_BYTES, advice="free space before a long run")]
    findings.append(_space("temporary folder", Path(tempfile.gettempdir()), enough=10**9, advice="set TMPDIR"))
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        advice = "trainer.num_workers=0, or mount a larger /dev/shm"
        findings.append(_space("shared memory", shared_memory, enough=ENOUGH_SHARED_MEMORY_BYTES, advice=advice))
    return findings


def _space(name: str, path: Path, *, enough: int, advice: str) -> Finding:
    if not os.access(path, os.W_OK):
        return Finding(
            area="disk", name=name, status=Status.PROBLEM, text="cannot be written", advice="check permissions"
        )
    free = shutil.disk_usage(path).free
    status = Status.OK if free >= enough else Status.WARNING
    return Finding(
        area="disk", name=name, status=status, text=f"{free / 1e9:.1f} GB free", advice="" if free >= enough else advice
    )


def _devices() -> list[Finding]:
    choice = choose_device()
    findings = [Finding(area="device", name="chosen", text=choice.reason)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.8 * total
        findings.append(
            Finding(
                area="device",
                name=f"GPU {index}",
                status=Status.WARNING if busy else Status.OK,
                text=f"{torch.cuda.get_device_name(index)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free",
                advice="somebody else uses it; choose another with CUDA_VISIBLE_DEVICES" if busy else "",
            )
        )
    bf16 = "fast" if cpu_has_fast_bf16() else "slow, float32 is used"
    findings.append(
        Finding(
            area="device",
            name="CPU",
            text=f"{granted_cores()} of {os.cpu_count()} cores, {thread_count()} threads, bf16 {bf16}",
        )
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if granted := granted_memory():
        memory = min(memory, granted[0]) if memory else granted[0]
    if memory:
        small = memory < ENOUGH_MEMORY_BYTES
        findings.append(
            Finding(
                area="device",
                name="memory",
                status=Status.WARNING if small else Status.OK,
                text=f"{memory / 1e9:.0f} GB",
                advice="use a smaller batch_size" if small else "",
            )
        )
    return findings


def _store(path: Path | str) -> Finding:
    try:
        store = SliceStore.open(path)
    except SamgraftError as err:
        return _refused("data", Path(path), err, advice="samgraft store check shows more; build it again")
    slices = sum(record.shape_zyx[0] for record in store.series)
    labelled = sum(record.has_label for record in store.series)
    text = (
        f"{store.modality.value}, {len(store.patient_ids)} patients, {len(store.series)} series "
        f"({labelled} labelled), {slices} slices"
    )
    return Finding(area="data", name=store.path.name, text=text)


def _scans(path: Path | str) -> list[Finding]:
    """Say what could identify a person. Scans go unnamed: folders and files may be named after one."""
    try:
        report = check_headers(Path(path))
    except SamgraftError:
        text, advice = "cannot be sorted into scans", "samgraft store check FOLDER says why"
        return [Finding(area="data", name="scans", status=Status.PROBLEM, text=text, advice=advice)]
    reasons = ", ".join(f"{number} x {reason}" for reason, number in report.left_out.most_common())
    findings = [
        Finding(
            area="data",
            name="scans",
            text=f"{report.num_scans} in {report.num_files} files ({report.layout})"
            + (f"; left out: {reasons}" if reasons else "")
            + ("" if report.kinds else "; nothing in headers and names points to a person"),
        )
    ]
    for kind, count in report.kinds.most_common():
        burned_in = kind == BURNED_IN
        findings.append(
            Finding(
                area="data",
                name="privacy",
                status=Status.PROBLEM if burned_in else Status.WARNING,
                text=f"{count} of {report.num_scans} scans: {kind}",
                advice="look at them; store build refuses them unless --accept-burned-in is given"
                if burned_in
                else "stays out of stores, pixels do not; de-identify before the scans go anywhere else",
            )
        )
    for reason, count in report.refused.most_common():
        findings.append(
            Finding(
                area="data",
                name="scans",
                status=Status.PROBLEM,
                text=f"{count} of {report.num_scans} scans: {reason}",
                advice="store build refuses them; samgraft store check FOLDER names them",
            )
        )
    return findings


def _weights(path: Path) -> Finding:
    try:
        facts: Mapping[str, Any] = describe(path)
    except SamgraftError as err:
        return _refused("weights", path, err, advice="samgraft inspect shows more")
    parts = ", ".join(f"{part} {n['matched']}/{n['expected']}" for part, n in facts["parts"].items())
    return Finding(area="weights", name=path.name, text=f"{facts['architecture']}, {facts['image_size']} px, {parts}")


def _refused(area: str, path: Path, err: SamgraftError, *, advice: str) -> Finding:
    return Finding(area=area, name=path.name, status=Status.PROBLEM, text=err.what, advice=err.next_command or advice)


def _nothing(area: str, text: str, advice: str) -> Finding:
    return Finding(area=area, name="none", status=Status.WARNING, text=text, advice=advice)
