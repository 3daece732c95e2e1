"""Calls from Python of the functions behind the commands."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from samgraft.shared.errors import UsageError
from samgraft.shared.invocation import called_from_python

P = ParamSpec("P")
Result = TypeVar("Result")


def as_call(function: Callable[P, Result]) -> Callable[P, Result]:
    """Return the function for callers from Python.

    It leaves the signal handlers of the program alone and shows messages in a notebook. Errors name the arguments of
    functions.
    """

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> Result:
        _show_messages()
        with called_from_python():
            _refuse_empty(inspect.signature(function).bind(*arguments, **keywords))
            return function(*arguments, **keywords)

    return call


def _refuse_empty(bound: inspect.BoundArguments) -> None:
    """Refuse an empty text, which would otherwise count as not given or as the current folder."""
    given = {**bound.arguments, **bound.arguments.get("options", {})}
    if empty := [name for name, value in given.items() if isinstance(value, str) and not value]:
        raise UsageError(f"{empty[0]} has an empty value. Write one, or leave it out if it has a default.")


def _show_messages() -> None:
    """Show the messages of samgraft in an interactive session without logging of its own."""
    log = logging.getLogger("samgraft")
    is_interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    # With a handler of the program every message would be shown twice.
    if not is_interactive or log.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
