"""Process of a study that runs one ``samgraft`` command and stops with the study.

    python -m samgraft.finetune.study.child COMMAND ...

A killed study cannot send a signal to its children. It holds the other end of their standard input, which the system
closes with the study, and the child then saves and ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from samgraft.shared.cli import main


def stop_with_parent() -> None:
    """Send SIGTERM to this process when its standard input ends, as a scheduler would."""

    # A thread, because the main thread trains. It only reads; the handler of SIGTERM does the rest.
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    stop_with_parent()
    sys.exit(main(sys.argv[1:]))
