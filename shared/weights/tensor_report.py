"""What happened to every tensor of a load: nothing is matched, resized or left out unseen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class ResizedTensor:
    """One position table brought to another grid."""

    name: str
    file_shape: list[int]
    model_shape: list[int]


@dataclass(kw_only=True)
class TensorReport:
    """Accounts for each tensor that was asked for and each one in the file."""

    source: str
    """File name, without its folder."""
    source_sha256: str
    format: str
    """Layout found in the file."""
    part: str
    """image_encoder or sam: what the caller asked for."""
    matched: list[str] = field(default_factory=list)
    """Loaded as they are."""
    resized: list[ResizedTensor] = field(default_factory=list)
    """Loaded after resizing to another grid."""
    missing: list[str] = field(default_factory=list)
    """Asked for, not in the file."""
    unexpected: list[str] = field(default_factory=list)
    """In the file under the part asked for, unknown to the model."""
    left_at_base: list[str] = field(default_factory=list)
    """Allowed to be missing by the caller: they keep the values the model had before."""
    not_asked: list[str] = field(default_factory=list)
    """In the file, outside of the part asked for."""
    notes: list[str] = field(default_factory=list)
    """Unwrapped dictionaries, stripped prefixes, converted types, dropped heads."""

    @property
    def num_asked(self) -> int:
        """Number of tensors the caller asked for."""
        return len(self.matched) + len(self.resized) + len(self.missing) + len(self.left_at_base)

    @property
    def num_loaded(self) -> int:
        """Number of tensors that came from the file."""
        return len(self.matched) + len(self.resized)

    @property
    def is_complete(self) -> bool:
        """True when everything asked for was loaded and nothing in that part was left over."""
        return not self.missing and not self.unexpected and self.num_loaded > 0

    def render(self) -> str:
        """Return the text printed for every load."""
        head = f"{self.part}: {self.num_loaded}/{self.num_asked} tensors from {self.source} ({self.format})"
        lines = [head]
        for name in ("missing", "unexpected", "left_at_base"):
            names: list[str] = getattr(self, name)
            if names:
                lines.append(f"  {name.replace('_', ' ')}: {len(names)} ({shorten(names)})")
        lines += [f"  resized: {r.name} {r.file_shape} -> {r.model_shape}" for r in self.resized]
        if self.not_asked:
            parts = Counter(name.split(".", 1)[0] for name in self.not_asked)
            lines.append("  not asked for: " + ", ".join(f"{part} {count}" for part, count in parts.items()))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``run.json`` or a report."""
        return {
            "source": self.source,
            "source_sha256": self.source_sha256,
            "format": self.format,
            "part": self.part,
            "num_asked": self.num_asked,
            "num_loaded": self.num_loaded,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "left_at_base": self.left_at_base,
            "num_not_asked": len(self.not_asked),
            "resized": [vars(r) for r in self.resized],
            "notes": self.notes,
        }


def shorten(names: list[str]) -> str:
    """Return the first few names and how many more there are."""
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"{shown}, ... {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else shown
