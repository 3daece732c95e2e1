"""Settings of a study, the axes of its grid, in one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from samgraft.shared.config import NonNegativeInt

ALL = 0
"""Value in ``shots`` for every training patient or slice."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Labelled slice store."""

    name: str
    """Name in tables."""
    store: str = ""
    """Path of the store. Leave it out with ``synthetic_patients``."""
    split: str | None = None
    """Split file by patient. None uses <store>.split.json next to the store, or draws one with seed 0."""
    modality: str = "mri"
    """Modality of the scans."""
    synthetic_patients: NonNegativeInt = 0
    """Number of synthetic scans to make the store from. They show that a study runs and prove nothing."""

    def __post_init__(self) -> None:
        if bool(self.store) == bool(self.synthetic_patients):
            raise ValueError(f"data set {self.name!r} must have exactly one of store and synthetic_patients.")


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """Initial weights and base weights of a fine-tuning."""

    name: str
    """Name in tables."""
    ckpt: dict[str, str]
    """Initial weights per architecture, as a stage-1 run, a file or an official name such as sam_vit_b."""
    base: dict[str, str] = field(default_factory=dict)
    """Base SAM weights per architecture. They supply what ckpt lacks, e.g. the decoder if ckpt is an encoder alone."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Further settings to compare, e.g. automatic and box prompts."""

    name: str
    """Name in tables."""
    settings: list[str] = field(default_factory=list)
    """Settings of the fine-tuning as key=value."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Grid of fine-tunings. Every combination is one cell, a fine-tuning with its evaluation."""

    name: str
    """Name of the folder under studies/."""
    question: str = ""
    """Question of the study, printed at the top of its report."""
    data_sets: list[DataSet]
    """Data sets."""
    initialisations: list[Initialisation]
    """Initial weights."""
    architectures: list[str]
    """Architectures among vit_t, vit_b, vit_l, vit_h, sam2_t, sam2_s, sam2_bp and sam2_l."""
    scopes: list[str] = field(default_factory=lambda: ["encoder_decoder"])
    """Values of adapter.scope."""
    methods: list[str] = field(default_factory=lambda: ["lora"])
    """Values of adapter.method."""
    variants: list[Variant] = field(default_factory=lambda: [Variant(name="automatic")])
    """Named groups of further settings. Each is combined with all other axes."""
    shots: list[int] = field(default_factory=lambda: [ALL])
    """Numbers of training patients or slices, 0 for all."""
    shot_unit: str = "patients"
    """Unit of ``shots``, patients or slices."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of training and of the draw of the shots."""
    folds: list[NonNegativeInt] = field(default_factory=list)
    """Numbers of folds of a cross-validation, such as 0 to 4. Every data set needs a split with folds, and ``part`` is
    val. Scores are pooled over the folds."""
    settings: list[str] = field(default_factory=list)
    """Settings as key=value for every cell."""
    method_settings: dict[str, list[str]] = field(default_factory=dict)
    """Settings as key=value for the cells of one method, e.g. a lower learning rate for full."""
    skip: list[dict[str, str]] = field(default_factory=list)
    """Combinations to leave out, as values by axis such as method and architecture."""
    preset: str = "auto"
    """File of configs/finetune. ``auto`` uses cpu without a GPU."""
    part: str = "test"
    """Part of the split to score, val or test."""

    def __post_init__(self) -> None:
        axes = {
            "data_sets": [d.name for d in self.data_sets],
            "initialisations": [i.name for i in self.initialisations],
            "architectures": self.architectures,
            "scopes": self.scopes,
            "methods": self.methods,
            "variants": [v.name for v in self.variants],
            "shots": [str(s) for s in self.shots],
            "seeds": [str(s) for s in self.seeds],
        }
        for axis, values in axes.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{axis} must have at least one value and none twice, got {values}.")
        if len(set(self.folds)) != len(self.folds):
            raise ValueError(f"folds must be different numbers, got {self.folds}.")
        if self.folds and self.part != "val":
            raise ValueError(f"part must be val with folds, which score the patients left out, got {self.part!r}.")
        if self.shot_unit not in {"patients", "slices"} or min(self.shots) < 0:
            raise ValueError(f"shot_unit must be patients or slices and shots not negative, got {self.shot_unit!r}.")
        if self.part not in {"val", "test"}:
            raise ValueError(f"part must be val or test, got {self.part!r}.")
        if unknown := set(self.method_settings) - set(self.methods):
            raise ValueError(f"method_settings must be for methods of this study, got {sorted(unknown)}.")
        known = {"data_set", "initialisation", "architecture", "scope", "method", "variant", "shots", "seed"}
        if unknown := {key for rule in self.skip for key in rule} - known:
            raise ValueError(f"skip must name axes of {sorted(known)}, got {sorted(unknown)}.")
