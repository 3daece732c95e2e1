"""The check of the variables given to ``make``.

The Makefile runs it before anything is installed, so that it needs only the standard library and Python 3.9. The names
arrive through the environment, where quoting cannot change them.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection

KNOWN = (
    "MODALITY",
    "DATA",
    "LABELLED",
    "UNLABELLED",
    "MODEL",
    "METHOD",
    "BASE",
    "CKPT",
    "NAME",
    "PRESET",
    "ARGS",
    "OUT",
    "SPLIT",
    "LICENSE",
    "RUN",
    "FILE",
    "VENV",
    "PYTHON",
)


def check(given: list[str], empty: Collection[str] = ()) -> list[str]:
    """Return one message for each name that no target reads, or whose value is empty."""
    messages = []
    for name in given:
        if name in KNOWN:
            # ARGS is a list of words, which may have none.
            if name in empty and name != "ARGS":
                messages.append(f"error: the make variable {name} has an empty value. Write one, or leave it out.")
            continue
        close = difflib.get_close_matches(name.upper(), KNOWN, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        messages.append(f"error: unknown make variable {name}.{hint} Known: {', '.join(KNOWN)}.")
    return messages


def main() -> int:
    """Print the messages and the next command, and return the exit code."""
    given, empty = (os.environ.get(f"SAMGRAFT_MAKE_{which}", "").split() for which in ("VARIABLES", "EMPTY"))
    messages = check(given, empty)
    for message in messages:
        sys.stderr.write(message + "\n")
    if messages:
        sys.stderr.write("  kept   nothing was started\n  next   make help\n")
    return 2 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
