"""Presets per modality: ``configs/modality/*.yaml`` as a typed object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.volume import Modality


@dataclass(frozen=True, kw_only=True)
class ModalityPreset:
    """What suits one kind of scan."""

    modality: Modality
    """Kind of scan."""
    intensity: IntensityPreset = field(default_factory=IntensityPreset)
    """How native units become [0, 1]."""
    min_foreground_fraction: float = 0.05
    """Slices with a smaller share of non-air pixels are left out of pretraining."""
    augment: dict[str, Any] = field(default_factory=dict)
    """Keys of ``data.augment`` in which this modality differs from the defaults of a stage: what may be changed at
    random without leaving what scanners and patients do. See ``AugmentConfig``."""

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
    """Return what a modality says about a stage's configuration, as its first layer: presets and users come after it.

    Raises:
        UsageError: For an unknown modality.
    """
    return {"data": {"augment": dict(load_preset(modality).augment)}}
