"""Which objective, and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from samgraft.ssl.objectives.dino import DINOConfig
from samgraft.ssl.objectives.feature import FeatureConfig
from samgraft.ssl.objectives.lejepa import LeJEPAConfig
from samgraft.ssl.objectives.mae import MAEConfig
from samgraft.ssl.objectives.masked_image import MaskedImageConfig


class Method(Enum):
    """Self-supervised objective, by the name users type as METHOD."""

    MASKED_IMAGE = "masked_image"
    MAE = "mae"
    DINO = "dino"
    LEJEPA = "lejepa"
    FEATURE = "feature"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which objective, and the settings of each."""

    name: Method
    """What the encoder learns from. Required: the presets under configs/pretrain say it."""
    masked_image: MaskedImageConfig = field(default_factory=MaskedImageConfig)
    """Settings of masked_image."""
    mae: MAEConfig = field(default_factory=MAEConfig)
    """Settings of mae."""
    dino: DINOConfig = field(default_factory=DINOConfig)
    """Settings of dino."""
    lejepa: LeJEPAConfig = field(default_factory=LeJEPAConfig)
    """Settings of lejepa."""
    feature: FeatureConfig = field(default_factory=FeatureConfig)
    """Settings of feature."""

    def __post_init__(self) -> None:
        for section in fields(self):
            if section.name in {"name", self.name.value}:
                continue
            settings = getattr(self, section.name)
            if settings != type(settings)():
                raise ValueError(
                    f"objective.{section.name} is set but objective.name is {self.name.value}: it would be ignored. "
                    f"Remove it, or choose METHOD={section.name}."
                )


def with_mirroring(config: ObjectiveConfig, probability: float) -> ObjectiveConfig:
    """Return the settings with the share of mirrored views filled in, if they left it open."""
    section = getattr(config, config.name.value)
    if not isinstance(section, DINOConfig | LeJEPAConfig) or section.crops.flip_probability is not None:
        return config
    filled: dict[str, Any] = {"crops": replace(section.crops, flip_probability=probability)}
    filled = {config.name.value: replace(section, **filled)}
    return replace(config, **filled)
