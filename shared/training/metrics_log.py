"""``metrics.jsonl``: one line per step, in step order, without a gap or a duplicate after a resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsLog:
    """Append-only lines ``{"step": N, ...}``; floats keep every bit.

    A log that cannot be written (disk full) costs one warning, never the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def append(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line."""
        self.append_many([{"step": step, **values}])

    def append_many(self, lines: list[dict[str, Any]]) -> None:
        """Append several lines in one write."""
        if not lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as err:
            if not self._warned:
                log.warning("%s cannot be written (%s): training goes on without it.", self.path.name, err.strerror)
            self._warned = True

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the lines; a last line torn by a kill is left out."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line

    def truncate_after(self, step: int) -> dict[str, Any] | None:
        """Drop the lines of ``step`` and later ones; they are written again.

        Returns:
            The line of ``step`` itself, if there was one.
        """
        if not self.path.exists():
            return None
        lines = list(self.read())
        draft = self.path.with_name(f".{self.path.name}.tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] < step), encoding="utf-8")
        draft.rename(self.path)
        return next((line for line in lines if line["step"] == step), None)
