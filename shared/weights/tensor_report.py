"""Report of what happened to every tensor of a file and of the model it was loaded into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class ResizedTensor:
    """Position table that was resized to another grid."""

    name: str
    file_shape: list[int]
    model_shape: list[int]


@dataclass(kw_only=True)
class TensorReport:
    """Names of the requested tensors and of those in the file, by what happened to them."""

    source: str
    """File name, without its folder."""
    source_sha256: str
    format: str
    """Layout of the file."""
    part: str
    """Requested part, image_encoder or sam."""
    matched: list[str] = field(default_factory=list)
    """Tensors that were loaded unchanged."""
    resized: list[ResizedTensor] = field(default_factory=list)
    """Position tables that were loaded after resizing."""
    missing: list[str] = field(default_factory=list)
    """Requested tensors that the file lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the requested part in the file that the model lacks."""
    left_at_base: list[str] = field(default_factory=list)
    """Tensors that the file may lack and that keep the values of the model."""
    not_requested: list[str] = field(default_factory=list)
    """Tensors in the file outside of the requested part."""
    notes: list[str] = field(default_factory=list)
    """Unwrapped dictionaries, stripped prefixes, converted types, dropped heads."""

    @property
    def num_requested(self) -> int:
        """Number of requested tensors."""
        return len(self.matched) + len(self.resized) + len(self.missing) + len(self.left_at_base)

    @property
    def num_loaded(self) -> int:
        """Number of tensors that came from the file."""
        return len(self.matched) + len(self.resized)

    @property
    def is_complete(self) -> bool:
        """True if every requested tensor was loaded and no other one of that part is in the file."""
        return not self.missing and not self.unexpected and self.num_loaded > 0

    def render(self, *, is_detailed: bool = False) -> str:
        """Return the text that is logged for every load, and with ``is_detailed`` a line per resized tensor."""
        head = f"{self.part}: {self.num_loaded}/{self.num_requested} tensors from {self.source} ({self.format})"
        lines = [head]
        for name in ("missing", "unexpected", "left_at_base"):
            names: list[str] = getattr(self, name)
            if names:
                lines.append(f"  {name.replace('_', ' ')}: {len(names)} ({shorten(names)})")
        if is_detailed:
            lines += [f"  resized: {r.name} {r.file_shape} -> {r.model_shape}" for r in self.resized]
        elif self.resized:
            lines.append(f"  resized: {len(self.resized)} ({shorten([r.name for r in self.resized])})")
        if self.not_requested:
            parts = Counter(name.split(".", 1)[0] for name in self.not_requested)
            lines.append("  not requested: " + ", ".join(f"{part} {count}" for part, count in parts.items()))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``run.json`` or a report."""
        return {
            "source": self.source,
            "source_sha256": self.source_sha256,
            "format": self.format,
            "part": self.part,
            # The keys are those of run.json since the first version.
            "num_asked": self.num_requested,
            "num_loaded": self.num_loaded,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "left_at_base": self.left_at_base,
            "num_not_asked": len(self.not_requested),
            "resized": [vars(r) for r in self.resized],
            "notes": self.notes,
        }


def shorten(names: list[str]) -> str:
    """Return the first few names and the number of further ones."""
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"{shown}, ... {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else shown
