"""Child processes that are forked from the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import forkserver


def start_child(act: Callable[[int], None]) -> tuple[int, bytes]:
    """Fork a child that runs ``act(pipe)`` and return its process id and its first message.

    The message is what the child first writes to the pipe, or b"" if it ends without one.
    """
    # A new interpreter would import everything again, which takes longer than most tests.
    read_end, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            forkserver._forkserver.__init__()  # The parent's fork server is not a child of this process.
            act(pipe)
        finally:
            os._exit(1)  # The child must not continue in pytest.
    os.close(pipe)
    message = os.read(read_end, 1000)
    os.close(read_end)
    return child, message
