"""Signals only set a flag; the step loop looks at it at a boundary, where the state is whole."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from samgraft.shared.errors import ExitCode, StoppedAndSaved

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGUSR1 and SIGUSR2 are what SLURM and submitit send before the time limit."""


class StopRequest:
    """Whether somebody asked this process to stop, and how."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.kept: str = "what was saved before"
        """Named when a second Ctrl-C ends the process at once."""
        self._interrupts = 0

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal_name is not None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal: remember it; a second Ctrl-C ends the process at once with exit code 130."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 2:
                _say(f"\ninterrupted twice: ended at once.\n  kept   {self.kept}\n")
                end_data_workers()
                os._exit(int(ExitCode.INTERRUPTED))
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            again = " (Ctrl-C again ends at once)" if number == signal.SIGINT else ""
            _say(f"\n{self.signal_name}: stopping after this step, saving everything{again}\n")


@contextmanager
def listening(stop: StopRequest) -> Iterator[None]:
    """Route the stop signals to ``stop``; the former handlers come back afterwards.

    Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    listen(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def stopping_at_once(continue_command: str) -> Iterator[None]:
    """Outside of training, where ``listening`` holds, let the signals of schedulers end the command with exit code 75.

    Nothing there takes so long that it must be waited for, and every file is whole or not there: the same command does
    it again. Ctrl-C stays what it is.

    Raises:
        StoppedAndSaved: In the main thread, wherever it is, at the first signal; a second one ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT]

    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, lambda *_: os._exit(int(ExitCode.STOPPED_SAVED)))
        raise StoppedAndSaved(
            f"{signal.Signals(number).name} asked to stop while nothing was being trained.",
            kept="every verified training state, and results that were complete",
            next_command=continue_command,
        )

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)


def listen(stop: StopRequest) -> None:
    """Install the handlers; again after Lightning, which puts its own SIGTERM handler on top."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, stop.receive)


def ignore_stop_signals() -> None:
    """Let the parent decide: schedulers signal the whole process group, loader workers included."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_data_workers() -> None:
    """Kill loader workers that are still alive; they ignore the polite signals."""
    for process in multiprocessing.active_children():
        if isinstance(process, multiprocessing.process.BaseProcess) and process.daemon:
            process.kill()


def _say(text: str) -> None:
    # No logging in a signal handler: it may hold its own lock in the interrupted code.
    os.write(sys.stderr.fileno() if hasattr(sys.stderr, "fileno") else 2, text.encode())
