"""``samgraft`` as a child of a study: it saves and ends when the study is gone.

    python -m samgraft.finetune.study.child COMMAND ...

A killed study cannot tell its children to stop. It holds the other end of their standard input, so they see it end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from samgraft.shared.cli import main


def stop_with_parent() -> None:
    """Send this process SIGTERM, as a scheduler would, when standard input ends."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    stop_with_parent()
    sys.exit(main(sys.argv[1:]))
