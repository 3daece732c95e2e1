"""Errors that a user can act on, and their exit codes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command, on which scripts and schedulers may rely."""

    OK = 0
    """Everything was done."""
    USAGE = 2
    """Command line, configuration or make variable that cannot be carried out."""
    DATA = 3
    """Scans, labels, stores or splits that would corrupt a training run."""
    WEIGHTS = 4
    """Weights files that are incomplete, foreign, unsafe or of another architecture."""
    STORAGE = 5
    """Full disk, missing permission, failed drive or missing download."""
    NUMERICAL = 6
    """NaN or Inf in training. The last good state is kept."""
    INTERNAL = 7
    """Defect of samgraft. Please report it."""
    STOPPED_SAVED = 75
    """Stop with everything saved (``EX_TEMPFAIL``). The same command resumes the run."""
    INTERRUPTED = 130
    """Second Ctrl-C. Every verified state is kept."""


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of the system for a full disk or quota."""


class SamgraftError(Exception):
    """A refusal that a user can act on.

    Args:
        what: One or two sentences with what is wrong, the value, and what to do.
        where: File, key, series or tensor concerned, never an identifying path of a patient.
        kept: Files and results that stay valid.
        next_command: A command ready to paste.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(
        self, what: str, *, where: str | None = None, kept: str | None = None, next_command: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.kept = kept
        self.next_command = next_command

    def reword(self, change: Callable[[str], str]) -> None:
        """Change the wording of all texts, for a reader who types something else."""
        self.what = change(self.what)
        self.args = (self.what,)
        self.kept = change(self.kept) if self.kept else None
        self.next_command = change(self.next_command) if self.next_command else None

    def render(self) -> str:
        """Return the one-screen text that the command line prints."""
        lines = [f"error: {self.what}"]
        for name, text in (("where", self.where), ("kept", self.kept), ("next", self.next_command)):
            if text:
                lines.append(f"  {name:<6} {text}")
        return "\n".join(lines)


class UsageError(SamgraftError, ValueError):
    """Command line or configuration that cannot be carried out."""

    exit_code = ExitCode.USAGE


class DataError(SamgraftError, ValueError):
    """Scans, labels, stores or splits that would corrupt a training run."""

    exit_code = ExitCode.DATA


class WeightsError(SamgraftError, ValueError):
    """Weights files that are incomplete, foreign, unsafe or of another architecture."""

    exit_code = ExitCode.WEIGHTS


class StorageError(SamgraftError, OSError):
    """Full disk, missing permission, a run folder in use."""

    exit_code = ExitCode.STORAGE


class NumericalError(SamgraftError, ArithmeticError):
    """NaN or Inf in training."""

    exit_code = ExitCode.NUMERICAL


class StoppedAndSaved(SamgraftError):
    """A stop by a signal, after which everything is saved and the same command resumes."""

    exit_code = ExitCode.STOPPED_SAVED

    def render(self) -> str:
        """Return the text with the word stopped, because a requested stop is not an error."""
        return super().render().replace("error: ", "stopped: ", 1)
