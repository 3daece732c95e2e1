"""A child of the test's own process: importing everything in a new interpreter takes longer than most tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import forkserver


def start_child(act: Callable[[int], None]) -> tuple[int, bytes]:
    """Fork a child that runs ``act(tell)``; return its number and what it first wrote to ``tell``, b"" if it ended."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            forkserver._forkserver.__init__()  # the parent's is not a child of this process
            act(tell)
        finally:
            os._exit(1)  # never back into pytest
    os.close(tell)
    said = os.read(ready, 1000)
    os.close(ready)
    return child, said
