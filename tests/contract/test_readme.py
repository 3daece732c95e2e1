"""README commands reach the real parsers: a renamed flag, target or variable turns this red."""

import argparse
import os
import re
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = {"<name>": "name"}


def _make_commands() -> list[str]:
    """Every `make ...` line in a fenced block of the README."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("make ")]


def test_readme__shows_the_two_commands_first() -> None:
    assert _make_commands()[:2] == ["make pretrain MODALITY=mri", "make test"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [c for c in _make_commands() if c != "make test"])
def test_readme__command_is_understood(tmp_path: Path, command: str) -> None:
    for old, new in PLACEHOLDERS.items():
        command = command.replace(old, new)
    fake = tmp_path / "bin"
    fake.mkdir()
    script = fake / "samgraft"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    (tmp_path / ".samgraft-installed").touch()
    os.utime(tmp_path / ".samgraft-installed", (4e9, 4e9))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    out = subprocess.run(
        [*command.split(), f"VENV={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    name, *arguments = out.stdout.splitlines()
    points = {point.name: point for point in entry_points(group="samgraft.commands")}
    parser = argparse.ArgumentParser(prog=name, exit_on_error=False)
    points[name].load().add_arguments(parser)
    assert vars(parser.parse_args(arguments))
