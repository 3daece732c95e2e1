"""Every artefact of a release, loaded in one fresh process and compared with the run's own model.

    python -m samgraft.shared.release.load_back JOB.json

A stage with clients of its own runs its own module in the same way (``main(arguments, clients)``).
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
"""Largest difference of an output between the run's model and a released file loaded back, relative to the largest
expected value if that is above 1: logits span tens, and float32 keeps seven digits."""
THIS_MODULE = "samgraft.shared.release.load_back"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One artefact, loaded back in a fresh process."""

    path: str
    loaded_by: str
    max_difference: float
    """Absolute, over all outputs of the probe."""
    outputs: tuple[str, ...]
    """Which outputs were compared."""


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
        folder: The release, not yet in place.
        artefacts: What its formats wrote.
        probe: Inputs.
        expected: Outputs of the run's model.
        module: Module whose ``main`` knows the clients.

    Raises:
        WeightsError: If one does not load or gives other outputs.
    """
    scratch = folder.with_name(f"{folder.name}.check")
    scratch.mkdir()
    try:
        save_file({k: v.contiguous() for k, v in probe.items()}, scratch / "probe.safetensors")
        results = _in_fresh_process(folder, artefacts, scratch, module)
        return [
            _compare(artefact, said, load_file(scratch / f"{index}.safetensors"), expected)
            for index, (artefact, said) in enumerate(zip(artefacts, results, strict=True))
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
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", module, str(scratch / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('{"loaded_by"', '{"refused"'))]
    loaded = [str(line["loaded_by"]) for line in lines if "loaded_by" in line]
    if done.returncode != 0 or len(loaded) != len(artefacts):
        failed = artefacts[len(loaded)].path if len(loaded) < len(artefacts) else "the last file"
        reasons = [str(line["refused"]) for line in lines if "refused" in line]
        reasons += done.stderr.strip().splitlines()[-1:] or ["no message"]
        log.debug("%s", done.stderr)
        raise WeightsError(
            f"a released file must load strictly, {failed} does not: {reasons[0].replace(str(folder), '')[:300]}",
            kept="the run; nothing was released",
        )
    return loaded


def _compare(artefact: Artefact, loaded_by: str, got: dict[str, Tensor], expected: Mapping[str, Tensor]) -> Checked:
    worst = 0.0
    for name, value in got.items():
        reference = expected[name]
        if value.shape != reference.shape:
            raise WeightsError(
                f"{artefact.path} must give {name} of shape {tuple(reference.shape)}, got {tuple(value.shape)}.",
                kept="the run; nothing was released",
            )
        difference = float((value - reference).abs().max())
        scale = max(1.0, float(reference.abs().max()))
        if not difference <= MAX_DIFFERENCE * scale:
            raise WeightsError(
                f"{artefact.path} must give the run's outputs when loaded back, {name} differ by {difference:.2e} "
                f"(values reach {scale:.1f}).",
                kept="the run; nothing was released",
            )
        worst = max(worst, difference)
    return Checked(path=artefact.path, loaded_by=loaded_by, max_difference=worst, outputs=tuple(sorted(got)))


def main(arguments: Sequence[str], clients: Mapping[str, Any] | None = None) -> int:
    """Load, compute, write; the first failure ends it with its reason and an exit code that is not 0."""
    from samgraft.shared.release.clients import CLIENTS

    known = {**CLIENTS, **(clients or {})}
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    probe = load_file(job["probe"])
    for index, artefact in enumerate(job["artefacts"]):
        try:
            with torch.no_grad():
                outputs, said = known[artefact["client"]](Path(artefact["path"]), probe, artefact["options"])
        except Exception as err:
            traceback.print_exc()
            sys.stdout.write(json.dumps({"refused": f"{type(err).__name__}: {_root_cause(err)}"}) + "\n")
            return 1
        save_file({k: v.contiguous() for k, v in outputs.items()}, Path(job["out"]) / f"{index}.safetensors")
        sys.stdout.write(json.dumps({"loaded_by": said}) + "\n")
        sys.stdout.flush()
    return 0


def _root_cause(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    return " ".join(str(err).split()) or type(err).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
