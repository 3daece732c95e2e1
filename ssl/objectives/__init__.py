"""Self-supervised objectives by name, and the configuration section that selects one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from samgraft.ssl.objectives.anchor import AnchorConfig
from samgraft.ssl.objectives.dino import DINO
from samgraft.ssl.objectives.feature import Feature
from samgraft.ssl.objectives.lejepa import LeJEPA
from samgraft.ssl.objectives.mae import MAE
from samgraft.ssl.objectives.masked_image import MaskedImage
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss
from samgraft.ssl.objectives.panels import Panel
from samgraft.ssl.views.crops import CropConfig

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "ObjectiveLoss", "Panel", "build_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "masked_image": MaskedImage,
    "mae": MAE,
    "dino": DINO,
    "lejepa": LeJEPA,
    "feature": Feature,
}
"""Class of each objective by the name that users type as METHOD."""


@dataclass(frozen=True, kw_only=True)
class SelectedObjective:
    """Name of the objective of a run. A subclass adds one section of settings per objective."""

    name: str
    """Name of the objective. The presets in configs/pretrain set it."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    """Penalty that keeps the encoder near its initial weights, with any objective."""

    def __post_init__(self) -> None:
        sections = [section.name for section in fields(self) if section.name not in {"name", "anchor"}]
        if self.name not in sections:
            raise ValueError(f"objective.name must be one of {', '.join(sections)}, got {self.name!r}.")
        # Ignored settings are an error, because a user who sets one believes that it has an effect.
        for section in sections:
            settings = getattr(self, section)
            if section != self.name and settings != type(settings)():
                raise ValueError(
                    f"objective.{section} is set but objective.name is {self.name}, so it would be ignored. "
                    f"Remove it, or use METHOD={section}."
                )

    @property
    def settings(self) -> Any:
        """Settings of the selected objective."""
        return getattr(self, self.name)


def objective_config(objectives: Mapping[str, type[Objective]]) -> type[SelectedObjective]:
    """Return the dataclass of the section ``objective``, with a name and the settings of every objective."""
    sections = [
        (name, objective.settings_type, field(default_factory=objective.settings_type))
        for name, objective in objectives.items()
    ]
    return make_dataclass(
        "ObjectiveConfig",
        sections,
        bases=(SelectedObjective,),
        frozen=True,
        kw_only=True,
        namespace={"__module__": __name__},
    )


# A type checker cannot follow ``make_dataclass``, so it sees a class with the same constructor.
if TYPE_CHECKING:

    class ObjectiveConfig(SelectedObjective):
        """The section ``objective``, made from ``OBJECTIVES``, as a type checker sees it."""

        def __init__(self, *, name: str, **settings: object) -> None: ...

else:
    ObjectiveConfig = objective_config(OBJECTIVES)


def build_objective(encoder: Any, config: SelectedObjective, *, seed: int, max_steps: int) -> Objective:
    """Build the selected objective around an encoder."""
    objective = OBJECTIVES[config.name](encoder, config.settings, seed=seed, max_steps=max_steps)
    objective.set_anchor(config.anchor)
    return objective


def set_flip_probability(config: ObjectiveConfig, probability: float) -> ObjectiveConfig:
    """Return the configuration with the probability of flipped views filled in where it was left open."""
    crops = getattr(config.settings, "crops", None)
    if not isinstance(crops, CropConfig) or crops.flip_probability is not None:
        return config
    settings = replace(config.settings, crops=replace(crops, flip_probability=probability))
    sections: dict[str, Any] = {config.name: settings}
    return replace(config, **sections)
