"""Sections of result files that people write, which a new table must keep."""

from __future__ import annotations

from pathlib import Path


def words_of(path: Path) -> str:
    """Return the section that people write below the tables of a result file, empty without one."""
    text = path.read_text() if path.is_file() else ""
    return "".join(text.partition("\n## In words\n")[1:])
