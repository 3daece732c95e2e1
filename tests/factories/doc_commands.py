"""The shell commands that documentation shows, and whether the real parsers understand them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = {"<name>": "name"}


def shell_commands(page: Path) -> list[str]:
    """Every `make ...` and `samgraft ...` line in fenced blocks and in inline code with arguments."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash|)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += [
        code for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) if " -" in code
    ]
    return [line for line in lines if re.match(r"(make|samgraft) \S", line)]


def fake_environment(folder: Path) -> Path:
    """A VENV whose samgraft prints its arguments, and which make thinks installed."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "samgraft"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    (folder / ".samgraft-installed").touch()
    os.utime(folder / ".samgraft-installed", (4e9, 4e9))
    return folder


def arguments_of(command: str, venv: Path) -> list[str]:
    """What reaches ``samgraft``, through make where the command is one of make's."""
    for old, new in PLACEHOLDERS.items():
        command = command.replace(old, new)
    words = shlex.split(command)
    if words[0] == "samgraft":
        return words[1:]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    out = subprocess.run(
        [*words, f"VENV={venv}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return out.stdout.splitlines()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse with the command's own parser; an unknown command or flag is an exception."""
    points = {point.name: point for point in entry_points(group="samgraft.commands")}
    parser = argparse.ArgumentParser(prog=arguments[0], exit_on_error=False, allow_abbrev=False)
    points[arguments[0]].load().add_arguments(parser)
    return parser.parse_args(arguments[1:])
