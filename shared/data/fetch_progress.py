"""What a person sees of a download: nothing is fetched in silence."""

from __future__ import annotations

import logging
import sys

from samgraft.shared.data.fetch import OnBytes

log = logging.getLogger(__name__)


def fetch_progress(name: str) -> OnBytes:
    """Return a callback that shows a download: a rewritten line on a terminal, every tenth elsewhere."""
    shown = -1

    def show(received: int, expected: int) -> None:
        nonlocal shown
        tenth = min(10, 10 * received // max(1, expected))
        if sys.stderr.isatty():
            end = "\n" if received >= expected else ""
            sys.stderr.write(f"\rfetching {name}: {received / 1e6:.0f} of {expected / 1e6:.0f} MB{end}")
            sys.stderr.flush()
        elif tenth != shown:
            shown = tenth
            log.info("fetching %s: %.0f of %.0f MB", name, received / 1e6, expected / 1e6)

    return show
