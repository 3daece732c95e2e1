"""Presets per modality, from ``configs/modality/*.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality


@dataclass(frozen=True, kw_only=True)
class ModalityPreset:
    """Settings that suit one kind of scan."""

    modality: Modality
    """Kind of scan."""
    intensity: IntensityPreset = field(default_factory=IntensityPreset)
    """Rule by which native units become [0, 1]."""
    min_foreground_fraction: float = 0.05
    """Share of non-air pixels below which a slice is left out of pretraining."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Values of ``data.augment`` that differ from the defaults of a stage, so that random changes stay within what
    scanners and patients produce. See ``AugmentConfig``."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_foreground_fraction < 1:
            raise ValueError(f"min_foreground_fraction must lie in [0, 1), got {self.min_foreground_fraction}.")


def load_preset(modality: str | Modality) -> ModalityPreset:
    """Return the preset of a modality, by name in any case.

    Raises:
        UsageError: If there is none of this name; the message lists those that exist.
    """
    name = modality.value if isinstance(modality, Modality) else modality.strip().lower()
    return load_config(ModalityPreset, layers=[packaged_config(f"modality/{name}.yaml")])


def modality_layer(modality: str | Modality) -> dict[str, Any]:
    """Return the settings of a modality as the first layer of a stage's configuration.

    Presets and users override it.

    Raises:
        UsageError: For an unknown modality.
    """
    return {"data": {"augment": dict(load_preset(modality).augment)}}
