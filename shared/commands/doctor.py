"""The command ``samgraft doctor``."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.shared.cli import Command
from samgraft.shared.errors import UsageError
from samgraft.shared.invocation import for_terminal, is_from_make

if TYPE_CHECKING:
    from samgraft.shared.diagnosis import DoctorFinding

MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        help="store, or scans whose headers and names are searched for personal data; default: the stores in data/",
    )
    parser.add_argument(
        "--weights", type=Path, action="append", default=[], help="weights file; default: those in data/weights/"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, without user, host or path names")


def _run(arguments: argparse.Namespace) -> int:
    try:
        # Imported here, because `samgraft --help` must not wait for torch, and a broken installation is a finding.
        importlib.import_module("torchvision")  # fails with a torch that it was not built for
        from samgraft.shared.diagnosis import diagnose, exit_code
    except (ImportError, OSError, RuntimeError) as err:
        raise UsageError(
            f"the installation is broken ({str(err).splitlines()[0]}). Install it again.",
            next_command="rm -r .venv && make install"
            if is_from_make()
            else "pip check, which names what does not fit",
        ) from err
    findings = diagnose(Path(), data=arguments.data, weights=arguments.weights)
    code = exit_code(findings)
    if arguments.json:
        content = {"ready": int(code) == 0, "findings": [finding.as_dict() for finding in findings]}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
    else:
        sys.stdout.write(for_terminal(_render(findings) + f"  next     {next_command(findings, arguments.data)}\n"))
    return int(code)


def _render(findings: Sequence[DoctorFinding]) -> str:
    lines: list[str] = []
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            lines += [*([""] if lines else []), area]
        lines.append(f"  {MARKS[finding.status.value]}  {finding.name}: {finding.text}")
        if finding.advice:
            lines.append(f"           -> {finding.advice}")
    problems = sum(finding.status.value == "problem" for finding in findings)
    warnings = sum(finding.status.value == "warning" for finding in findings)
    summary = f"{problems} problem{'s' * (problems != 1)}" if problems else "ready"
    lines += ["", summary + (f", {warnings} warning{'s' * (warnings != 1)}" if warnings else "")]
    return "\n".join(lines) + "\n"


def next_command(findings: Sequence[DoctorFinding], data: Sequence[str]) -> str:
    """Return what to do after these findings."""
    if any(finding.status.value == "problem" for finding in findings):
        return "follow the advice above, then: make doctor"
    # Scans become a store on the way. Without --data the stores in data/ were checked.
    given = [*data, *map(str, sorted(Path("data").glob("**/*.zarr")))]
    return f"make pretrain DATA={shlex.quote(given[0])}" if given else "make pretrain MODALITY=mri"


COMMAND = Command(
    help="check whether this machine is ready for a run (environment, disk, devices, data, weights)",
    add_arguments=_add_arguments,
    run=_run,
)
