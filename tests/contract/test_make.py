"""The Makefile is the interface: misspelt variables stop, odd paths survive, every target explains itself."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from samgraft.shared.make_variables import KNOWN, check

ROOT = Path(__file__).resolve().parents[2]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def _make(
    *arguments: str, cwd: Path = ROOT, inherited: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    # A make that runs this suite passes its own flags and variables down; they are not what is tested here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in {*KNOWN, "MFLAGS"}}
    return subprocess.run(
        [str(MAKE), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**environment, **inherited},
    )


def test_make__misspelt_variable_is_an_error_with_a_hint() -> None:
    out = _make("pretrain", "CHKPT=x")
    assert out.returncode == 2
    assert "unknown make variable CHKPT. Did you mean CKPT?" in out.stderr


def test_check__every_known_variable_passes_and_case_is_hinted() -> None:
    assert check(list(KNOWN)) == []
    assert "Did you mean DATA?" in check(["data"])[0]


def test_make_help__lists_every_public_target_with_an_example() -> None:
    out = _make("help").stdout
    for target in (
        "pretrain",
        "finetune",
        "evaluate",
        "predict",
        "release",
        "test",
        "check",
        "doctor",
        "inspect",
        "demo-data",
    ):
        lines = [line for line in out.splitlines() if line.split()[:1] == [target]]
        assert len(lines) == 1, target
        assert f"make {target}" in lines[0]


@pytest.mark.parametrize("given", ["NAME=", "DATA="])
def test_make__empty_variable_is_an_error(given: str) -> None:
    out = _make("pretrain", given, "ARGS=")
    assert out.returncode == 2
    assert f"the make variable {given[:-1]} has an empty value" in out.stderr
    assert "ARGS" not in out.stderr


def _with_fake_command(folder: Path) -> str:
    """Return the variable of an environment whose command prints its arguments."""
    script = folder / "bin" / "samgraft"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    script.chmod(0o755)
    (folder / ".samgraft-installed").touch()
    os.utime(folder / ".samgraft-installed", (4e9, 4e9))
    return f"VENV={folder}"


def test_make__variables_of_the_environment_are_named_and_not_used(tmp_path: Path) -> None:
    """Windows' Linux sets NAME to the name of the computer."""
    inherited = {"NAME": "desktop-1", "DATA": "elsewhere", "ARGS": "seed=7", "MODEL": ""}
    out = _make("pretrain", _with_fake_command(tmp_path), "DATA=here", inherited=inherited)
    assert out.stdout == "[pretrain][--data][here]"
    assert "note: NAME ARGS of the environment is not used" in out.stderr


@pytest.mark.parametrize("value", ["plain", "with space", "dä ta/患者 1", "it's", 'say "hi"', "-dash", "semi;colon"])
def test_make__odd_values_reach_the_command_whole(tmp_path: Path, value: str) -> None:
    out = _make("pretrain", _with_fake_command(tmp_path), f"DATA={value}", "MODALITY=mri", "ARGS=optim.lr=1e-4 seed=1")
    assert out.stdout == f"[pretrain][--modality][mri][--data][{value}][optim.lr=1e-4][seed=1]"
