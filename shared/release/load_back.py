"""The load-back check, which compares every released file with the run's model in a fresh process.

    python -m samgraft.shared.release.load_back JOB.json

A stage with further clients runs its own module in the same way (``main(arguments, clients)``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from samgraft.shared.errors import WeightsError
from samgraft.shared.release.formats import Artefact
from torch import Tensor

log = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-4
"""Largest allowed difference between outputs of the run's model and of a released file, relative to their spread.

The spread is the largest range of values within one map. A large offset must not hide that the maps differ.
"""
ROUNDING = 1e-5
"""Difference that is always allowed, relative to the largest value. float32 has seven digits, and layers add up."""
MAX_OTHER_PIXELS = 1e-3
"""Largest share of pixels with another label id, because rounding decides where two classes are equally probable."""
MIN_CONTRAST = 20.0
"""Smallest difference between outputs of two images, relative to the allowed difference."""
THIS_MODULE = "samgraft.shared.release.load_back"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One artefact that was loaded back."""

    path: str
    loaded_by: str
    max_difference: float
    """Largest absolute difference over all outputs of the probe."""
    outputs: tuple[str, ...]
    """Names of the compared outputs."""


def load_back(
    folder: Path,
    artefacts: Sequence[Artefact],
    *,
    probe: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    module: str = THIS_MODULE,
) -> list[Checked]:
    """Load every artefact in a fresh process and compare its outputs.

    Args:
        folder: Release folder, possibly under a temporary name.
        artefacts: Files and folders that the formats wrote.
        probe: Inputs, from ``make_probe``.
        expected: Outputs of the run's model.
        module: Module to run, whose ``main`` has the clients of the artefacts.

    Raises:
        WeightsError: If an artefact does not load or gives other outputs, or the expected outputs are the same for
            every image.
    """
    _require_contrast(expected)
    scratch = folder.with_name(f"{folder.name}.check")
    scratch.mkdir()
    try:
        save_file({k: v.contiguous() for k, v in probe.items()}, scratch / "probe.safetensors")
        results = _in_fresh_process(folder, artefacts, scratch, module)
        return [
            _compare(artefact, loaded_by, load_file(scratch / f"{index}.safetensors"), expected)
            for index, (artefact, loaded_by) in enumerate(zip(artefacts, results, strict=True))
        ]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _in_fresh_process(folder: Path, artefacts: Sequence[Artefact], scratch: Path, module: str) -> list[str]:
    job = {
        "probe": str(scratch / "probe.safetensors"),
        "out": str(scratch),
        "artefacts": [{**dataclasses.asdict(a), "path": str(folder / a.path)} for a in artefacts],
    }
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # Offline, because transformers would otherwise fetch a missing file from the hub and hide that it is missing here.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", module, str(scratch / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    # Libraries print to stdout as well, so only the lines that main writes are read.
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"loaded_by"', '{"refused"'))]
    loaded = [str(line["loaded_by"]) for line in lines if "loaded_by" in line]
    if done.returncode != 0 or len(loaded) != len(artefacts):
        failed = artefacts[len(loaded)].path if len(loaded) < len(artefacts) else "the last file"
        reasons = [str(line["refused"]) for line in lines if "refused" in line]
        reasons += done.stderr.strip().splitlines()[-1:] or ["no message"]
        log.debug("%s", done.stderr)
        raise WeightsError(
            f"{failed} does not load strictly: {reasons[0].replace(str(folder), '')[:300]}",
            kept="the run; nothing was released",
        )
    return loaded


def _compare(artefact: Artefact, loaded_by: str, got: dict[str, Tensor], expected: Mapping[str, Tensor]) -> Checked:
    worst = 0.0
    for name, value in got.items():
        reference = expected[name]
        if value.shape != reference.shape:
            raise WeightsError(
                f"{artefact.path} gives {name} of another shape (got {tuple(value.shape)}, expected "
                f"{tuple(reference.shape)}).",
                kept="the run; nothing was released",
            )
        if not reference.is_floating_point():
            _compare_labels(artefact, name, value, reference)
            continue
        difference, allowed = float((value - reference).abs().max()), _allowed_difference(reference)
        # Written this way round, NaN is refused too.
        if not difference <= allowed:
            raise WeightsError(
                f"{artefact.path} does not give the run's outputs when loaded back ({name} differ by {difference:.2e}, "
                f"expected at most {allowed:.2e}).",
                kept="the run; nothing was released",
            )
        worst = max(worst, difference)
    return Checked(path=artefact.path, loaded_by=loaded_by, max_difference=worst, outputs=tuple(sorted(got)))


def _compare_labels(artefact: Artefact, name: str, value: Tensor, reference: Tensor) -> None:
    share = float((value != reference).float().mean())
    if share > MAX_OTHER_PIXELS:
        raise WeightsError(
            f"{artefact.path} does not give the run's outputs when loaded back ({name} differs in {share:.1%} of the "
            "pixels).",
            kept="the run; nothing was released",
        )


def _allowed_difference(reference: Tensor) -> float:
    maps = reference.flatten(2)
    spread = float((maps.amax(dim=2) - maps.amin(dim=2)).max())
    return max(MAX_DIFFERENCE * spread, ROUNDING * float(reference.abs().max()))


def _require_contrast(expected: Mapping[str, Tensor]) -> None:
    """Refuse expected outputs with which no wrong image would be found."""
    for name, reference in expected.items():
        if not reference.is_floating_point():
            continue
        contrast = float((reference[0] - reference[1]).abs().max())
        if not contrast >= MIN_CONTRAST * _allowed_difference(reference):
            raise WeightsError(
                f"the model gives the same {name} for different images (they differ by {contrast:.2e}, values reach "
                f"{float(reference.abs().max()):.1f}). Its training has collapsed. Release another run.",
                kept="the run; nothing was released",
            )


def main(arguments: Sequence[str], clients: Mapping[str, Any] | None = None) -> int:
    """Load every artefact of a job and write its outputs.

    The first failure ends the process with exit code 1 and one line with the reason.
    """
    from samgraft.shared.release.clients import CLIENTS

    known = {**CLIENTS, **(clients or {})}
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    probe = load_file(job["probe"])
    for index, artefact in enumerate(job["artefacts"]):
        try:
            with torch.no_grad():
                outputs, loaded_by = known[artefact["client"]](Path(artefact["path"]), probe, artefact["options"])
        except Exception as err:
            traceback.print_exc()
            sys.stdout.write(json.dumps({"refused": f"{type(err).__name__}: {_root_cause(err)}"}) + "\n")
            return 1
        save_file({k: v.contiguous() for k, v in outputs.items()}, Path(job["out"]) / f"{index}.safetensors")
        sys.stdout.write(json.dumps({"loaded_by": loaded_by}) + "\n")
        sys.stdout.flush()
    return 0


def _root_cause(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    return " ".join(str(err).split()) or type(err).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
