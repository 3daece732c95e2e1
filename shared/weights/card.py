"""card.json: what a weights file is, where it comes from, and what images it expects."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samgraft.shared.errors import WeightsError
from samgraft.shared.files import write_text

CARD_SCHEMA = 1
MAX_CARD_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts that travel with a weights file. No time, host, user or path: equal runs write equal cards."""

    arch: str
    """vit_t, vit_b, vit_l or vit_h."""
    image_size: int
    """Side of the input in pixels for which positions and statistics were made."""
    pixel_mean: list[float]
    """Subtracted from pixels on the 0..255 scale."""
    pixel_std: list[float]
    """Divides pixels on the 0..255 scale."""
    stem: str | None = None
    """vit_t only: conv1x1 (LiteMedSAM) or conv3x3 (MobileSAM)."""
    stage: str = "base"
    """base (as published), encoder (after stage 1) or model (after stage 2)."""
    objective: str | None = None
    """Self-supervised objective of stage 1."""
    steps: int = 0
    """Optimizer steps of the last stage."""
    slices_seen: int = 0
    """Slices drawn in the last stage, repeats counted."""
    intensity: dict[str, Any] = field(default_factory=dict)
    """Intensity preset under which slices became [0, 1]."""
    num_neighbours: int = 0
    """Slices on each side that were the encoder's other channels (2.5D); 0: the slice three times."""
    base_name: str | None = None
    """What the weights started from, for people."""
    base_sha256: str | None = None
    """Hash of the file they started from."""
    data_manifest: dict[str, Any] = field(default_factory=dict)
    """Store fingerprint, hashed patient ids and content hashes of what was trained on: leaks are found by them."""
    config_sha256: str | None = None
    """Hash of the resolved configuration, without the settings that may change when a run is resumed."""
    code_revision: str | None = None
    """Git revision of the code."""
    license: str | None = None
    """Licence of the weights, as far as known."""
    weights_sha256: str | None = None
    """Hash of the weights file beside the card; set when it is written."""
    notes: list[str] = field(default_factory=list)
    """Everything a user should know that has no field."""
    schema: int = CARD_SCHEMA
    """Version of this layout."""

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
            WeightsError: If a key is unknown or missing, a type is wrong, or the schema is newer than this code.
        """
        schema = values.get("schema")
        if schema != CARD_SCHEMA:
            raise WeightsError(
                f"card schema must be {CARD_SCHEMA}, got {schema!r}. Update samgraft to read it.", where=where
            )
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        missing = sorted({"arch", "image_size", "pixel_mean", "pixel_std"} - set(values))
        if unknown or missing:
            raise WeightsError(
                f"card must have exactly its fields, got unknown {unknown}, missing {missing}.", where=where
            )
        for name, kind in _FIELD_TYPES.items():
            if name in values and not isinstance(values[name], kind):
                raise WeightsError(f"card field {name} must be {kind}, got {values[name]!r}.", where=where)
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card file."""
        if path.stat().st_size > MAX_CARD_BYTES:
            raise WeightsError(
                f"card must be at most {MAX_CARD_BYTES} bytes, got {path.stat().st_size}.", where=path.name
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as err:
            raise WeightsError("card must be JSON, and is not.", where=path.name) from err
        if not isinstance(values, dict):
            raise WeightsError("card must be a JSON object.", where=path.name)
        return cls.from_dict(values, where=path.name)

    def write(self, path: Path) -> None:
        """Write the card atomically."""
        write_text(path, self.to_json())


_FIELD_TYPES: dict[str, Any] = {
    "arch": str,
    "image_size": int,
    "pixel_mean": list,
    "pixel_std": list,
    "stage": str,
    "steps": int,
    "slices_seen": int,
    "intensity": dict,
    "num_neighbours": int,
    "data_manifest": dict,
    "notes": list,
}
