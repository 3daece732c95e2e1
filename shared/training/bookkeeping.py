"""Where a run stands, in plain numbers; saved with every training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Bookkeeping:
    """Position and history of a run."""

    seed: int
    batch_size: int
    accumulate: int
    samples_seen: int = 0
    best: dict[str, float] | None = None
    """``{"step": ..., "value": ...}`` of the monitored value."""
    pending: list[str] = field(default_factory=list)
    """Periodic tasks of this step that a stop dropped; they run first after the resume."""
    data_fingerprint: str | None = None
    ended: str | None = None
    """Why training ended before its last step; None while it goes on."""

    def take_up(self, record: Mapping[str, Any]) -> None:
        """Go on from a training state's record."""
        self.samples_seen = int(record["samples_seen"])
        self.best = record["best"]
        self.pending = list(record["pending"])
        self.ended = record.get("ended")
