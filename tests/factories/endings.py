"""Commands that the end of another command prints, ready to be executed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from doc_commands import arguments_of
from samgraft.shared.cli import main

_WORD = r"(?:'[^']*'|[^\s';,`(])+"
_PROSE = r"(?!(?:or|and|then|shows|fetches|with)\b)"
# Names of commands inside a sentence are in backticks.
_COMMAND = re.compile(rf"(?<![`\w])(?:samgraft|make) (?!help)[a-z][a-z-]*(?: {_PROSE}{_WORD})*")
PLACEHOLDERS = {
    "FOLDER": "scans",
    "STORE.zarr": "store.zarr",
    "STORE": "store.zarr",
    "RUN": "runs/seg",
    "RUN=RUN": "RUN=runs/seg",
    "LICENSE=...": "LICENSE=cc-by-4.0",
    "...": "cc-by-4.0",
}
"""Words of a printed command that the user replaces."""


@dataclass(frozen=True)
class Ending:
    """End of one command."""

    code: int
    text: str
    """Text of the terminal."""
    commands: tuple[list[str], ...]
    """Arguments of ``samgraft`` for every command in the text, with the user's words filled in."""


def run_to_end(arguments: list[str], capfd: pytest.CaptureFixture[str], venv: Path) -> Ending:
    """Run a command as the terminal does and read the commands that it prints.

    ``venv`` is a ``fake_environment``.
    """
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        # A stopped run prints the command line that repeats it.
        patch.setattr("sys.argv", ["samgraft", *arguments])
        code = main(arguments)
    shown = capfd.readouterr()
    text = shown.out + shown.err
    # A full stop belongs to the sentence, three of them are a placeholder.
    printed = [re.sub(r"(?<!\.)\.$", "", match[0]) for match in _COMMAND.finditer(text)]
    return Ending(code, text, tuple(arguments_of(_filled(command), venv) for command in dict.fromkeys(printed)))


def _filled(command: str) -> str:
    return " ".join(PLACEHOLDERS.get(word, word) for word in command.split(" "))
