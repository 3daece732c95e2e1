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

from samgraft.shared.errors import ExitCode

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
