"""Checks of the machine, its environment, disk, devices, data and weights, which change nothing."""

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
from samgraft.shared.counting import counted
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
ENOUGH_TEMPORARY_BYTES = 10**9
ENOUGH_SHARED_MEMORY_BYTES = 10**9
ENOUGH_MEMORY_BYTES = 6 * 10**9
NO_STORE = "samgraft demo-data, or samgraft store build FOLDER --out STORE.zarr"


class Status(Enum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True)
class DoctorFinding:
    """Result of one check."""

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
    "PYTHONPATH": (bool, "may put other code before the installed packages; unset it if imports fail"),
    "MONAI_ALLOW_PICKLE": (bool, "would allow pickles; every command drops it"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (bool, "would allow pickles; every command drops it"),
    "WORLD_SIZE": (lambda v: v != "1", "makes a run wait for other processes; unset it outside of torchrun"),
    "SLURM_NTASKS": (lambda v: v != "1", "announces several tasks; start runs with srun"),
}
"""Condition on a variable's value that deserves a warning, and the advice."""


def diagnose(root: Path, *, data: Sequence[Path | str] = (), weights: Sequence[Path] = ()) -> list[DoctorFinding]:
    """Check everything that a run needs.

    Args:
        root: Folder in which ``runs/`` and ``data/`` are or will be.
        data: Stores to open, and scans whose headers are checked. Empty takes the stores in ``root/data``.
        weights: Weights files to inspect. Empty takes those in ``root/data/weights``.

    Returns:
        Findings without user, host or absolute path names.
    """
    stores: list[Path | str] = list(data) or sorted((root / "data").glob("**/*.zarr"))
    files = list(weights) or sorted(p for p in (root / "data" / "weights").glob("*") if p.is_file())
    return [
        *_check_environment(),
        *_check_disk(root),
        *_check_devices(),
        *[finding for path in stores for finding in (_check_scans(path) if is_scans(path) else [_check_store(path)])],
        *([] if stores else [_missing("data", "no store in data/", NO_STORE)]),
        *[_check_weights(path) for path in files],
        *([] if files else [_missing("weights", "no file in data/weights/", "samgraft demo-data fetches LiteMedSAM")]),
    ]


def exit_code(findings: Sequence[DoctorFinding]) -> ExitCode:
    """Return the exit code of the first problem, or OK. Warnings do not count."""
    return next((EXIT_CODES[f.area] for f in findings if f.status is Status.PROBLEM), ExitCode.OK)


def _check_environment() -> list[DoctorFinding]:
    versions = software_versions()
    revision = code_revision()
    own = f"{versions['samgraft']}" + (f", revision {revision[:12]}" if revision else "")
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return [
        DoctorFinding(area="environment", name="samgraft", text=own),
        DoctorFinding(
            area="environment",
            name="python",
            status=Status.OK if good else Status.PROBLEM,
            text=".".join(map(str, sys.version_info[:3])),
            advice="" if good else "use Python 3.11 to 3.13",
        ),
        *_check_requirements(),
        DoctorFinding(
            area="environment", name="packages", text=", ".join(f"{name} {versions[name]}" for name in SHOWN_PACKAGES)
        ),
        *(
            DoctorFinding(area="environment", name=name, status=Status.WARNING, text="is set", advice=advice)
            for name, (matters, advice) in ENVIRONMENT_NOTES.items()
            if name in os.environ and matters(os.environ[name])
        ),
    ]


def _check_requirements() -> list[DoctorFinding]:
    """Compare the installed packages with the requirements of this one."""
    findings = []
    for text in requires("samgraft") or []:
        # Extras are optional, so their requirements are skipped.
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            findings.append(
                DoctorFinding(
                    area="environment",
                    name=requirement.name,
                    status=Status.PROBLEM,
                    text=f"{found}, needed: {requirement.specifier or 'any version'}",
                    advice="make install",
                )
            )
    return findings


def _check_disk(root: Path) -> list[DoctorFinding]:
    places = [
        ("working folder", root, ENOUGH_DISK_BYTES, "free space before a long run"),
        ("temporary folder", Path(tempfile.gettempdir()), ENOUGH_TEMPORARY_BYTES, "set TMPDIR"),
        # Loader workers pass their batches through shared memory. Containers often get 64 MB of it.
        ("shared memory", Path("/dev/shm"), ENOUGH_SHARED_MEMORY_BYTES, "trainer.num_workers=0, or enlarge /dev/shm"),
    ]
    findings = []
    for name, path, enough, advice in places:
        if name == "shared memory" and not path.is_dir():
            continue
        if os.access(path, os.W_OK):
            free = shutil.disk_usage(path).free
            status = Status.OK if free >= enough else Status.WARNING
            text, advice = f"{free / 1e9:.1f} GB free", "" if free >= enough else advice
        else:
            status, text, advice = Status.PROBLEM, "cannot be written", "check permissions"
        findings.append(DoctorFinding(area="disk", name=name, status=status, text=text, advice=advice))
    return findings


def _check_devices() -> list[DoctorFinding]:
    findings = [DoctorFinding(area="device", name="chosen", text=choose_device().reason)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        busy = free < 0.8 * total
        findings.append(
            DoctorFinding(
                area="device",
                name=f"GPU {index}",
                status=Status.WARNING if busy else Status.OK,
                text=f"{torch.cuda.get_device_name(index)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free",
                advice="another process uses it; choose a free one with CUDA_VISIBLE_DEVICES" if busy else "",
            )
        )
    bf16 = "fast" if cpu_has_fast_bf16() else "slow, float32 is used"
    cores = f"{granted_cores()} of {os.cpu_count()} cores, {counted(thread_count(), 'thread')}, bf16 {bf16}"
    findings.append(DoctorFinding(area="device", name="CPU", text=cores))
    # Inside a container the machine's memory is visible, but only the granted part may be used.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if granted := granted_memory():
        memory = min(memory, granted[0]) if memory else granted[0]
    if memory:
        small = memory < ENOUGH_MEMORY_BYTES
        status, advice = (Status.WARNING, "use a smaller batch_size") if small else (Status.OK, "")
        text = f"{memory / 1e9:.0f} GB"
        findings.append(DoctorFinding(area="device", name="memory", status=status, text=text, advice=advice))
    return findings


def _check_store(path: Path | str) -> DoctorFinding:
    try:
        store = SliceStore.open(path)
    except SamgraftError as err:
        return _refused("data", Path(path), err, advice="samgraft store check shows more; build it again")
    slices = sum(record.shape_zyx[0] for record in store.series)
    labelled = sum(record.has_label for record in store.series)
    text = (
        f"{store.modality.value}, {counted(len(store.patient_ids), 'patient')}, {len(store.series)} series "
        f"({labelled} labelled), {counted(slices, 'slice')}"
    )
    return DoctorFinding(area="data", name=store.path.name, text=text)


def _check_scans(path: Path | str) -> list[DoctorFinding]:
    """Report what could identify a person. Names of scans are left out, because they may be names of patients."""
    try:
        report = check_headers(Path(path))
    except SamgraftError:
        text, advice = "cannot be read as scans", "samgraft store check FOLDER shows the reason"
        return [DoctorFinding(area="data", name="scans", status=Status.PROBLEM, text=text, advice=advice)]
    reasons = ", ".join(f"{number} x {reason}" for reason, number in report.left_out.most_common())
    text = f"{report.num_scans} in {counted(report.num_files, 'file')} ({report.layout})"
    text += f"; left out: {reasons}" if reasons else ""
    text += "" if report.kinds else "; no personal data found in headers and names"
    findings = [DoctorFinding(area="data", name="scans", text=text)]
    for kind, count in report.kinds.most_common():
        if kind == BURNED_IN:
            status = Status.PROBLEM
            advice = "check their pixels; store build refuses them unless --accept-burned-in is given"
        else:
            status = Status.WARNING
            advice = "stays out of stores, pixels do not; de-identify before the scans leave this machine"
        text = f"{count} of {counted(report.num_scans, 'scan')}: {kind}"
        findings.append(DoctorFinding(area="data", name="privacy", status=status, text=text, advice=advice))
    for reason, count in report.refused.most_common():
        text = f"{count} of {counted(report.num_scans, 'scan')}: {reason}"
        advice = "store build refuses them; samgraft store check FOLDER names them"
        findings.append(DoctorFinding(area="data", name="scans", status=Status.PROBLEM, text=text, advice=advice))
    return findings


def _check_weights(path: Path) -> DoctorFinding:
    try:
        facts: Mapping[str, Any] = describe(path)
    except SamgraftError as err:
        return _refused("weights", path, err, advice="samgraft inspect shows more")
    parts = ", ".join(f"{part} {n['matched']}/{n['expected']}" for part, n in facts["parts"].items())
    text = f"{facts['architecture']}, {facts['image_size']} px, {parts}"
    return DoctorFinding(area="weights", name=path.name, text=text)


def _refused(area: str, path: Path, err: SamgraftError, *, advice: str) -> DoctorFinding:
    advice = err.next_command or advice
    return DoctorFinding(area=area, name=path.name, status=Status.PROBLEM, text=err.what, advice=advice)


def _missing(area: str, text: str, advice: str) -> DoctorFinding:
    return DoctorFinding(area=area, name="none", status=Status.WARNING, text=text, advice=advice)
