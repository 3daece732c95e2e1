"""The shell commands that documentation shows, and whether the real programs would understand them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from samgraft.finetune.config import FinetuneConfig
from samgraft.shared.config import dotted_keys
from samgraft.ssl.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = {"<name>": "name"}
SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "selftrain": FinetuneConfig}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Programs in front of samgraft, up to the word before its command.
WRAPPERS = re.compile(
    r"^(?:conda run --name samgraft|torchrun --no-python --nproc-per-node \d+|docker run .*?) (?=samgraft )"
)
SAMGRAFT = re.compile(r"^\S*\bsamgraft (?=[a-z])")
INSTALLERS = re.compile(r"^(?:\S*pip|docker build|conda env create|python3 -m venv|export) ")
NO_COMMAND = {"install", "test", "check", "site", "wheel", "docs", "test-slow"}
"""Targets of make that do not run samgraft."""


def shell_commands(page: Path) -> list[str]:
    """Return every line of the fenced shell blocks, and inline commands with arguments, of a page."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for tag, block in fences if tag in {"", "sh", "bash", "console"}]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines += [code for code in inline if re.match(r"(make|samgraft) \S+ (.* )?-", code)]
    return [line for line in lines if line and not line.startswith("#")]


def check_command(command: str, venv: Path) -> None:
    """Check a command with the real Makefile, parsers and files, without running it.

    Raises:
        AssertionError: If a program, target, file, extra or setting does not exist.
        ArgumentError: If the command has no such option. SystemExit is raised for a missing one.
    """
    command = re.sub(r"^STAGE=\w+ ", "", command)
    if command.startswith("sbatch "):
        check_batch_script(shlex.split(command)[1:])
    elif INSTALLERS.match(command):
        check_installer(command)
    else:
        arguments = arguments_of(WRAPPERS.sub("", command), venv)
        if arguments:
            check_arguments(arguments)


def check_batch_script(words: list[str]) -> None:
    """Check the file of an sbatch command, and that the Makefile has its variables."""
    script, *variables = words
    assert (ROOT / script).is_file()
    named = {word.split("=")[0] for word in variables}
    assert named
    assert named <= {f"{option.upper()}" for option in options_of("pretrain") | options_of("finetune")}


def check_installer(command: str) -> None:
    """Check files, extras and environment variables of a command that installs samgraft."""
    for extras in re.findall(r"\.\[([^\]]+)\]", command):
        assert set(extras.split(",")) <= set(EXTRAS)
    for name in re.findall(r"(?:--constraint|--file) (\S+)", command):
        assert (ROOT / name).is_file(), name
    if command.startswith("docker build"):
        assert (ROOT / "Dockerfile").is_file()
    for variable in re.findall(r"^export (\w+)=", command):
        assert f'"{variable}"' in (ROOT / "shared" / "fetch.py").read_text(encoding="utf-8")


def check_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse with the command's own parser and check the keys of settings."""
    parsed = parse(arguments)
    if schema := SCHEMAS.get(arguments[0]):
        keys = dotted_keys(schema)
        for setting in getattr(parsed, "settings", None) or getattr(parsed, "overrides", None) or ():
            key = setting.partition("=")[0]
            assert key in keys or any(known.startswith(f"{key}.") for known in keys), key
    return parsed


def fake_environment(folder: Path) -> Path:
    """A VENV whose samgraft prints its arguments, and which make thinks installed."""
    (folder / "bin").mkdir()
    for name in ("samgraft", "python", "mkdocs", "ruff"):
        script = folder / "bin" / name
        script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n' if name == "samgraft" else "#!/bin/sh\n")
        script.chmod(0o755)
    (folder / ".samgraft-installed").touch()
    os.utime(folder / ".samgraft-installed", (4e9, 4e9))
    return folder


def arguments_of(command: str, venv: Path) -> list[str]:
    """What reaches ``samgraft``, through make where the command is one of make's."""
    for old, new in PLACEHOLDERS.items():
        command = command.replace(old, new)
    if (match := SAMGRAFT.match(command)) is not None:
        return shlex.split(command[match.end() :])
    program, target, *words = shlex.split(command)
    assert program == "make", f"not a command that this test understands: {command}"
    words = [word for word in words if not word.startswith("PYTHON=")]
    if target in NO_COMMAND:
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
        return []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    out = subprocess.run(
        ["make", target, *words, f"VENV={venv}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return out.stdout.splitlines()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse with the command's own parser; an unknown command or flag is an exception."""
    return parser_of(arguments[0]).parse_args(arguments[1:])


def options_of(command: str) -> set[str]:
    """Return the names of a command's options, without dashes."""
    return {option.lstrip("-") for action in parser_of(command)._actions for option in action.option_strings}


def parser_of(command: str) -> argparse.ArgumentParser:
    points = {point.name: point for point in entry_points(group="samgraft.commands")}
    parser = argparse.ArgumentParser(prog=command, exit_on_error=False, allow_abbrev=False)
    points[command].load().add_arguments(parser)
    return parser
