"""Bijective map between the tensor names of two programs."""

from __future__ import annotations

import re
from collections.abc import Iterable


class NameMap:
    """Map between two sets of names, from pairs of templates.

    Args:
        templates: Pairs (ours, theirs), where {n} is a number and {rest} any ending. The first match counts.
    """

    # Whole names are matched and each template is used in both directions, which keeps the map bijective.
    # transformers' own converters replace substrings one after another, so that their result depends on the order.
    def __init__(self, templates: Iterable[tuple[str, str]]) -> None:
        pairs = list(templates)
        self._to = [_compile(ours, theirs) for ours, theirs in pairs]
        self._back = [_compile(theirs, ours) for ours, theirs in pairs]

    def translate(self, name: str) -> str | None:
        """Return the other program's name of one of ours, or None if it has none."""
        return _translate(name, self._to)

    def translate_back(self, name: str) -> str | None:
        """Return our name of one of the other program's, or None if it has none."""
        return _translate(name, self._back)


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    replacement = target.replace("{n}", r"\g<n>").replace("{rest}", r"\g<rest>")
    return re.compile(pattern), replacement


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None
