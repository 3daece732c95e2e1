"""``metrics.jsonl``: one line per step, in step order, without a gap or a duplicate after a resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from samgraft.shared.training.tensor_file import replace_text

log = logging.getLogger(__name__)

TORN_CHUNK_BYTES = 1 << 16
"""Read at a time when looking for the end of the last whole line."""


class MetricsLog:
    """Append-only lines ``{"step": N, ...}``; floats keep every bit.

    A log that cannot be written (disk full) costs one warning, never the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        self._last: dict[str, Any] | None = None
        """The line that ``truncate_after`` ended with: the next write may replace it."""

    def append(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one line."""
        self.append_many([{"step": step, **values}])

    def append_many(self, lines: list[dict[str, Any]]) -> None:
        """Append several lines in one write; the first replaces a line of its step that ``truncate_after`` kept."""
        if not lines:
            return
        last, self._last = self._last, None
        try:
            if last is not None and lines[0]["step"] == last["step"]:
                if _text(lines[:1]) != _text([last]):
                    before = [line for line in self.read() if line["step"] < last["step"]]
                    replace_text(self.path, _text([*before, lines[0]]))
                lines = lines[1:]
            with self.path.open("a+b") as file:
                _cut_torn_end(file)
                file.write(_text(lines).encode())
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
        """Drop the lines of steps after ``step``; they are written again.

        The line of ``step`` itself stays on disk, because a kill may come before it is written again; the next write
        replaces it if it begins with that step.

        Returns:
            The line of ``step``, if there is one.
        """
        if not self.path.exists():
            return None
        lines = [line for line in self.read() if line["step"] <= step]
        replace_text(self.path, _text(lines))
        self._last = next((line for line in lines if line["step"] == step), None)
        return self._last


def _text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _cut_torn_end(file: BinaryIO) -> None:
    """Cut the part of a line that a full disk left, or the next line would be glued to it and lost as well."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - TORN_CHUNK_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
