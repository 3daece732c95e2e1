"""Commands in the form in which the user started this one, for messages.

The Makefile sets an environment variable, so that a message names ``make TARGET VARIABLE=...`` after a make target and
a ``samgraft`` command with its options after a command. A Python program that calls samgraft has no such command, and
keeps its own signal handlers.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FRONT_END = "SAMGRAFT_FRONT_END"
"""Environment variable that the Makefile sets to ``make``."""
POSITIONAL = {
    "store": ("DATA",),
    "evaluate": ("RUN",),
    "predict": ("RUN", "DATA"),
    "release": ("RUN",),
    "study": ("FILE",),
    "inspect": ("FILE",),
}
"""Variables of make that are arguments without an option name, by command."""
DIFFERENT_NAMES = {"store": "store build"}
"""Targets of make whose command has another name."""
_IS_LIBRARY: ContextVar[bool] = ContextVar("samgraft_is_library", default=False)


@contextmanager
def called_from_python() -> Iterator[None]:
    """Mark the work inside as called by a Python program."""
    token = _IS_LIBRARY.set(True)
    try:
        yield
    finally:
        _IS_LIBRARY.reset(token)


def is_library_call() -> bool:
    """Return True inside of ``called_from_python``."""
    return _IS_LIBRARY.get()


def repeat_command() -> str:
    """Return what repeats the current work, as a command ready to paste where there is one."""
    # The arguments of a notebook's kernel contain a path of the user's home.
    return "the same call" if is_library_call() else shlex.join(["samgraft", *sys.argv[1:]])


def is_from_make() -> bool:
    """Return whether a make target started this program."""
    return os.environ.get(FRONT_END) == "make"


def suggest(target: str, *arguments: str, **variables: object) -> str:
    """Return a command that can be pasted.

    Args:
        target: Target of make, such as ``pretrain``.
        arguments: Further words such as ``data.fold=0`` or ``--dry-run``, which make takes as ``ARGS``.
        variables: Variables of make with their values. None leaves one out.
    """
    given = {name: str(value) for name, value in variables.items() if value is not None}
    if is_from_make():
        words = ["make", target, *(f"{name}={shlex.quote(value)}" for name, value in given.items())]
        # Make passes ARGS to a shell, which splits and unquotes it once more.
        return " ".join([*words, *([f"ARGS={shlex.quote(shlex.join(arguments))}"] if arguments else [])])
    positional = POSITIONAL.get(target, ())
    words = ["samgraft", DIFFERENT_NAMES.get(target, target)]
    words += [shlex.quote(given[name]) for name in positional if name in given]
    for name, value in given.items():
        words += [] if name in positional else [f"--{name.lower()}", shlex.quote(value)]
    return " ".join([*words, *map(shlex.quote, arguments)])


def name_option(variable: str) -> str:
    """Return a variable of make or the option of the command, e.g. ``LABELLED=`` or ``--labelled``."""
    return f"{variable}=" if is_from_make() else f"--{variable.lower()}"
