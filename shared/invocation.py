"""Commands and options in the grammar that the user typed, for messages and reports.

Messages are written in the grammar of make, such as ``make finetune CKPT=runs/a ARGS=seed=1`` or "choose another
NAME=". After a ``samgraft`` command they are shown as ``samgraft finetune --ckpt runs/a seed=1`` and "choose another
--name", and in an error of a call from Python as "choose another name=". Commands without a make target are written as
``samgraft`` commands, and are shown with the path of the program where it is not on PATH. The Makefile sets the
environment variable by which the first two are distinguished. A Python program that calls samgraft has no command, and
keeps its own signal handlers.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from samgraft.shared.errors import SamgraftError
from samgraft.shared.make_variables import KNOWN

FRONT_END, GIVEN = "SAMGRAFT_FRONT_END", "SAMGRAFT_MAKE_GIVEN"
"""Environment variables of the Makefile with ``make TARGET``, and with the names of the variables that were given."""
COMMANDS = {
    "store": "store build",
    **{name: name for name in ("demo-data", "doctor", "inspect", "pretrain", "finetune", "selftrain", "evaluate")},
    **{name: name for name in ("predict", "study", "release")},
}
"""Command by target of make."""
POSITIONAL = {
    "store": ("DATA",),
    "evaluate": ("RUN",),
    "predict": ("RUN", "DATA"),
    "release": ("RUN",),
    "study": ("FILE",),
    "inspect": ("FILE",),
}
"""Variables of make that are arguments without an option name, by target."""
VARIABLES = tuple(name for name in KNOWN if name not in {"VENV", "PYTHON", "ARGS"})
# A word of a shell command, which may be quoted in parts. A full stop at its end belongs to the sentence.
_WORD = r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",;)`])+?(?=[\s,;)`]|(?<!\.)\.(?:\s|$)|$)"
_MAKE = re.compile(rf"\bmake (?P<target>{'|'.join(COMMANDS)})(?![\w-])(?P<given>(?: [A-Z]+={_WORD})*)")
_GIVEN = re.compile(rf"([A-Z]+)=({_WORD})")
_VARIABLE = re.compile(rf"(?<![\w/$.-])(?P<name>{'|'.join(VARIABLES)})=(?P<value>\.\.\.|[^\s,;.)`]|\.(?=[\w/]))?")
# Only these two are named without a value, as in "CKPT and BASE are both missing".
_BARE = re.compile(r"(?<![\w/$.-])(CKPT|BASE)(?![\w=.-]|'s)")
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")
_ARGUMENTS = re.compile(r"(?<![\w/$.-])ARGS='([^']*)'")
# Targets of make and the commands without one.
_NAMES = "|".join([*COMMANDS, "compare", "average", "demo"])
_PROGRAM = re.compile(rf"(?<![\w/.-])samgraft (?=(?:{_NAMES}) |--help)")

# Not an argument: the functions between a command and the training loop have nothing to do with it. Threads of a
# program each have their own value.
_IS_LIBRARY: ContextVar[bool] = ContextVar("samgraft_is_library", default=False)


@contextmanager
def called_from_python() -> Iterator[None]:
    """Mark the work inside as called by a Python program, whose errors name the arguments of functions."""
    token = _IS_LIBRARY.set(True)
    try:
        yield
    except SamgraftError as error:
        error.reword(in_typed_grammar)
        raise
    finally:
        _IS_LIBRARY.reset(token)


def is_library_call() -> bool:
    """Return True inside of ``called_from_python``."""
    return _IS_LIBRARY.get()


def is_from_make() -> bool:
    """Return whether a target of make started this program."""
    return os.environ.get(FRONT_END, "").startswith("make")


def in_typed_grammar(text: str) -> str:
    """Return a message with its commands and options in the grammar of the command that the user typed."""
    if is_from_make() and not is_library_call():
        return text
    # Whole commands come first, because their variables may become arguments without an option name.
    text = _MAKE.sub(lambda match: _as_command(match["target"], match["given"]), text)
    text = text.replace("make help", "samgraft --help")
    text = _ARGUMENTS.sub(lambda match: match[1], text)
    if is_library_call():
        return _as_keywords(text)
    text = _VARIABLE.sub(lambda m: f"--{m['name'].lower()}" + (f" {m['value']}" if m["value"] else ""), text)
    return _BARE.sub(lambda match: f"--{match[1].lower()}", text)


def _as_keywords(text: str) -> str:
    """Return a message with variables and options as the arguments of a function."""
    text = _VARIABLE.sub(lambda m: f"{m['name'].lower()}={m['value'] or ''}", text)
    # Options of whole commands stay, because they are for a shell.
    text = _BARE.sub(lambda match: match[1].lower(), text)
    return text if "samgraft " in text else _OPTION.sub(lambda m: m[1].replace("-", "_"), text)


def for_terminal(text: str) -> str:
    """Return a message as ``in_typed_grammar`` does, with the path of a program that is not on PATH."""
    text = in_typed_grammar(text)
    program = typed_program()
    return text if program == "samgraft" else _PROGRAM.sub(f"{program} ", text)


def log_next(log: logging.Logger, commands: Sequence[str]) -> None:
    """Log the commands that follow a result, in the order of their use."""
    for number, command in enumerate(commands):
        log.info("  %-8s %s", "then" if number else "next", command)


def typed_program() -> str:
    """Return the name or path of this program as the user can type it."""
    program = sys.argv[0]
    if Path(program).name != "samgraft" or shutil.which("samgraft") == program:
        return "samgraft"
    return shlex.quote(program)


def typed_argument(option: str, *, place: int | None) -> str:
    """Return the name of an argument as the user can type it, a variable after a target of make.

    Args:
        option: Option such as ``--out``, or the name that the help gives to an argument without one.
        place: Place of an argument without an option, from 0. None for an option.
    """
    if not is_from_make():
        return option
    target = (os.environ[FRONT_END].split()[1:] or [""])[0]
    places = POSITIONAL.get(target, ())
    if place is not None:
        return places[place] if place < len(places) else option
    name = option.lstrip("-").upper()
    return name if name in VARIABLES else option


def repeat_command(*settings: str) -> str:
    """Return what repeats the current work, as a command ready to paste where there is one.

    Args:
        settings: Further settings ``key=value`` of the repetition.
    """
    # The arguments of a notebook's kernel contain a path of the user's home.
    if is_library_call():
        return " with ".join(["the same call", *settings])
    if not is_from_make():
        # A replay that ends in the same way has its setting already.
        added = [setting for setting in settings if setting not in sys.argv]
        return " ".join([typed_program(), shlex.join([*sys.argv[1:], *added])]).rstrip()
    given = {name: os.environ.get(name, "") for name in os.environ.get(GIVEN, "").split()}
    if added := [setting for setting in settings if setting not in given.get("ARGS", "").split()]:
        given["ARGS"] = " ".join([given.get("ARGS", ""), *added]).strip()
    return " ".join([os.environ[FRONT_END], *(f"{name}={shlex.quote(value)}" for name, value in given.items())])


def _as_command(target: str, given: str) -> str:
    """Return a target of make with its variables as a command."""
    values = dict(_GIVEN.findall(given))
    # Make passes ARGS to a shell, which unquotes it a second time.
    arguments = " ".join(shlex.split(values.pop("ARGS", "")))
    positional = POSITIONAL.get(target, ())
    words = ["samgraft", COMMANDS[target], *(values[name] for name in positional if name in values)]
    words += [f"--{name.lower()} {value}" for name, value in values.items() if name not in positional]
    return " ".join([*words, *([arguments] if arguments else [])])
