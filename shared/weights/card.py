"""Card of a weights file (``card.json``) with its origin and the images that it expects."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samgraft.shared.encoders.registry import arch_names
from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_text

CARD_SCHEMA = 1
MAX_CARD_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts about a weights file. Without times, hosts, users and paths, so that equal runs write equal cards."""

    arch: str
    """Architecture, such as vit_b, see ``registry.arch_names``."""
    image_size: int
    """Side of the input in pixels for which positions and statistics were made."""
    pixel_mean: list[float]
    """Mean per channel that is subtracted from pixels on the 0..255 scale."""
    pixel_std: list[float]
    """Standard deviation per channel that divides pixels on the 0..255 scale."""
    stem: str | None = None
    """Stem of vit_t, conv1x1 (LiteMedSAM) or conv3x3 (MobileSAM)."""
    stage: str = "base"
    """Stage that wrote the weights, one of base (as published), encoder (stage 1) and model (stage 2)."""
    objective: str | None = None
    """Self-supervised objective of stage 1."""
    steps: int = 0
    """Optimizer steps of the last stage."""
    slices_seen: int = 0
    """Slices drawn in the last stage, repeats counted."""
    slices_available: int = 0
    """Different slices of the training data of the last stage. Cards of earlier versions have 0."""
    intensity: dict[str, Any] = field(default_factory=dict)
    """Intensity preset under which slices became [0, 1]."""
    num_neighbours: int = 0
    """Slices on each side that were the encoder's other channels (2.5D). With 0 the slice fills all three channels."""
    base_name: str | None = None
    """Name of the initial weights, for people."""
    base_sha256: str | None = None
    """Hash of the file of the initial weights."""
    data_manifest: dict[str, Any] = field(default_factory=dict)
    """Store fingerprint, hashed patient ids and content hashes of the training data, by which leaks are found."""
    config_sha256: str | None = None
    """Hash of the resolved configuration, without the settings that may change when a run is resumed."""
    code_revision: str | None = None
    """Git revision of the code."""
    license: str | None = None
    """Licence of the weights, if it is recorded."""
    weights_sha256: str | None = None
    """Hash of the weights file in the same folder, set when it is written."""
    notes: list[str] = field(default_factory=list)
    """Sentences for users about facts that have no field."""
    schema: int = CARD_SCHEMA
    """Version of this layout."""

    @property
    def epochs(self) -> float | None:
        """Number of times that each slice was drawn on average, or None for a card of an earlier version."""
        return self.slices_seen / self.slices_available if self.slices_available else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return stable, readable JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "card.json") -> Card:
        """Read a card strictly.

        Raises:
            WeightsError: If a field is unknown or missing, a value is of the wrong type or impossible, or the schema is
                newer than this code.
        """
        schema = values.get("schema")
        if schema != CARD_SCHEMA:
            raise WeightsError(
                f"card schema must be {CARD_SCHEMA}, got {schema!r}. Update samgraft to read it.", where=where
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"arch", "image_size", "pixel_mean", "pixel_std"} - set(values))
        if unknown or missing:
            raise WeightsError(
                f"card must have exactly its fields, got unknown {unknown}, missing {missing}.", where=where
            )
        for name, kind in _FIELD_TYPES.items():
            # bool is a subclass of int in Python, but true is no number of steps.
            if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
                raise WeightsError(f"card field {name} must be {kind}, got {values[name]!r}.", where=where)
        if values["image_size"] <= 0:
            raise WeightsError(f"card field image_size must be positive, got {values['image_size']}.", where=where)
        # A baseline network has no encoder, so its card has two empty lists.
        is_baseline = values["arch"] not in arch_names() and values["pixel_mean"] == values["pixel_std"] == []
        for name, smallest in (("pixel_mean", -math.inf), ("pixel_std", 0.0)):
            if not is_baseline and not _are_statistics(values[name], larger_than=smallest):
                sign = "positive " if name == "pixel_std" else ""
                raise WeightsError(
                    f"card field {name} must be three finite {sign}numbers, got {values[name]!r}. Take them from the "
                    "program that trained the weights.",
                    where=where,
                )
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card file.

        Raises:
            WeightsError: If it is no card, or as ``from_dict``.
        """
        # The size is checked first, because a foreign folder may have a file of this name with any content.
        if path.stat().st_size > MAX_CARD_BYTES:
            raise WeightsError(
                f"card must be at most {MAX_CARD_BYTES} bytes, got {path.stat().st_size}.", where=path.name
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as err:
            raise WeightsError("the card is not JSON. Copy it again.", where=path.name) from err
        if not isinstance(values, dict):
            raise WeightsError("card must be a JSON object.", where=path.name)
        return cls.from_dict(values, where=path.name)

    def write(self, path: Path) -> None:
        """Write the card atomically."""
        write_text(path, self.to_json())


_OPTIONAL_TEXT = str | None
_FIELD_TYPES: dict[str, Any] = {
    "arch": str,
    "image_size": int,
    "pixel_mean": list,
    "pixel_std": list,
    "stem": _OPTIONAL_TEXT,
    "stage": str,
    "objective": _OPTIONAL_TEXT,
    "steps": int,
    "slices_seen": int,
    "slices_available": int,
    "intensity": dict,
    "num_neighbours": int,
    "base_name": _OPTIONAL_TEXT,
    "base_sha256": _OPTIONAL_TEXT,
    "data_manifest": dict,
    "license": _OPTIONAL_TEXT,
    "weights_sha256": _OPTIONAL_TEXT,
    "notes": list,
}


def _are_statistics(values: list[Any], *, larger_than: float) -> bool:
    return len(values) == 3 and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > larger_than for v in values
    )
