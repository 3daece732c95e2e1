"""What every worker process does, whatever it works on."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """End this process when the one that asked for it has ended, killed or not.

    Workers of a fork server wait for it, and it for them: a trainer killed by SIGKILL would leave all of them, and
    their memory, for ever. torch's own watch looks at the fork server, pools have none.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
