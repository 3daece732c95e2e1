"""Handling of stop signals.

During training a signal only sets a flag. The training loop reads it at the next step boundary, where the state is
complete.
"""

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
from samgraft.shared.invocation import is_library_call, repeat_command

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that request a stop. SLURM and submitit send SIGUSR1 or SIGUSR2 before the time limit."""


class StopRequest:
    """Flag that a stop signal sets in this process."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.kept: str = "what was saved before"
        """Newest saved state, printed when a second Ctrl-C ends the process at once."""
        self._interrupts = 0

    @property
    def requested(self) -> bool:
        """True after the first signal."""
        return self.signal_name is not None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Handle a signal. A second Ctrl-C ends the process at once with exit code 130."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 2:
                _write_to_stderr(f"\ninterrupted twice: ended at once.\n  kept   {self.kept}\n")
                end_data_workers()
                # Not sys.exit, because the interrupted code may catch SystemExit or hold a lock.
                os._exit(int(ExitCode.INTERRUPTED))
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            again = " (Ctrl-C again ends at once)" if number == signal.SIGINT else ""
            _write_to_stderr(f"\n{self.signal_name}: stopping after this step, saving everything{again}\n")


@contextmanager
def handle_stop_signals(stop: StopRequest) -> Iterator[None]:
    """Route the stop signals to ``stop`` and restore the former handlers on exit.

    Nothing changes outside of the main thread, where Python does not allow handlers. A call from Python only restores,
    because Lightning ignores Ctrl-C after the first one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install_stop_handlers(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def exit_on_stop_signals() -> Iterator[None]:
    """End the command with exit code 75 when a scheduler's stop signal arrives outside of training.

    No work outside of training takes so long that it must be finished first, and every file is written atomically, so
    that the same command repeats the work. Ctrl-C keeps its usual effect.

    Raises:
        StoppedAndSaved: In the main thread at the first signal. A second signal ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGINT]

    # A second signal must end the process even if the first one interrupted a handler that never returns.
    def stop(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, lambda *_: os._exit(int(ExitCode.STOPPED_SAVED)))
        raise StoppedAndSaved(
            f"{signal.Signals(number).name} requested a stop outside of training.",
            kept="every verified training state, and all complete results",
            next_command=repeat_command(),
        )

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)


def install_stop_handlers(stop: StopRequest) -> None:
    """Install the handlers of all stop signals, in the main thread of a command only.

    A Python program that calls samgraft has its own handlers.
    """
    if threading.current_thread() is threading.main_thread() and not is_library_call():
        for number in STOP_SIGNALS:
            signal.signal(number, stop.receive)


def ignore_stop_signals() -> None:
    """Ignore all stop signals in a worker process.

    Schedulers signal the whole process group, including loader workers. The training process decides when they end.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_data_workers() -> None:
    """Kill the loader workers that are still alive, which ignore stop signals."""
    for process in multiprocessing.active_children():
        if isinstance(process, multiprocessing.process.BaseProcess) and process.daemon:
            process.kill()


def _write_to_stderr(text: str) -> None:
    # Logging is not safe in a signal handler, because the interrupted code may hold its lock.
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError):  # a notebook or an editor replaces it
        descriptor = 2
    os.write(descriptor, text.encode())
