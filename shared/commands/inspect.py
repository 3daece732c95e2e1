"""The command ``samgraft inspect``, which describes a weights file without running any of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from samgraft.shared.cli import Command
from samgraft.shared.invocation import for_terminal


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="weights file, run folder, transformers folder, official weights (sam_vit_b, sam2.1_hiera_tiny, "
        "...), or hf://OWNER/NAME[/FILE][@REVISION] of the Hugging Face Hub",
    )
    parser.add_argument("--offline", action="store_true", help="never download official weights")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--save-tensors",
        type=Path,
        metavar="OUT",
        help="write the tensors alone as safetensors (for a trusted file that also holds foreign objects)",
    )


def _run(arguments: argparse.Namespace) -> int:
    # Imported here, because `samgraft --help` must not wait for torch.
    from samgraft.shared.fetch import OFFLINE_VARIABLE
    from samgraft.shared.weights.inspection import describe, extract_tensors

    if arguments.offline:
        os.environ[OFFLINE_VARIABLE] = "1"
    if arguments.save_tensors is not None:
        count = extract_tensors(arguments.file, arguments.save_tensors)
        sys.stdout.write(f"{count} tensors written to {arguments.save_tensors}; no code of the file was run\n")
        return 0
    facts = describe(arguments.file)
    text = json.dumps(facts, indent=2) if arguments.json else for_terminal(_render(facts))
    sys.stdout.write(text + "\n")
    return 0


def _render(facts: dict[str, Any]) -> str:
    lines = [f"{facts['file']}: {facts['format']}, {facts['architecture']}, {facts['image_size']} px"]
    for name in ("stage", "objective", "steps", "slices_seen", "epochs", "intensity", "base", "license"):
        if facts.get(name):
            lines.append(f"  {name:<15} {facts[name]}")
    for part, counts in facts["parts"].items():
        problems = [
            f"{len(counts[w])} {w} ({', '.join(counts[w][:3])})" for w in ("missing", "unexpected") if counts[w]
        ]
        lines.append(
            f"  {part:<15} {counts['matched']}/{counts['expected']} keys" + "".join(f", {p}" for p in problems)
        )
    lines.append(f"  {'sha256':<15} {facts['sha256']}")
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(lines)


COMMAND = Command(
    help="describe a weights file (format, architecture, size, keys matched)", add_arguments=_add_arguments, run=_run
)
