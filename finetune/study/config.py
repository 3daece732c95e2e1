"""What a study is: the axes of its grid, in one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

ALL = 0
"""In ``shots``: every training patient or slice."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One labelled slice store."""

    name: str
    """In tables."""
    store: str = ""
    """Path of the store; may be left out for ``synthetic_patients``."""
    split: str | None = None
    """Split file by patient. None takes <store>.split.json beside the store, else draws one with seed 0."""
    modality: str = "mri"
    """Kind of scan."""
    synthetic_patients: int = 0
    """Make the store, unless it is there, from this many made-up scans: shows that a study runs, proves nothing."""

    def __post_init__(self) -> None:
        if bool(self.store) == bool(self.synthetic_patients):
            raise ValueError(f"data set {self.name!r} must have exactly one of store and synthetic_patients.")


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """Where the weights of a fine-tuning come from."""

    name: str
    """In tables."""
    ckpt: dict[str, str]
    """Weights per architecture: a stage-1 run, a file, or an official name such as sam_vit_b."""
    base: dict[str, str] = field(default_factory=dict)
    """SAM that gives prompt encoder and mask decoder, per architecture; needed where ckpt is an encoder alone."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Further settings that are compared, e.g. automatic and box prompts."""

    name: str
    """In tables."""
    settings: list[str] = field(default_factory=list)
    """key=value of the fine-tuning's configuration."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A grid; every combination is one cell: fine-tune, evaluate."""

    name: str
    """Folder under studies/."""
    question: str = ""
    """What the study asks; printed at the top of its report."""
    data_sets: list[DataSet]
    initialisations: list[Initialisation]
    architectures: list[str]
    """Of vit_t, vit_b, vit_l, vit_h."""
    scopes: list[str] = field(default_factory=lambda: ["encoder_decoder"])
    """Values of adapter.scope."""
    methods: list[str] = field(default_factory=lambda: ["lora"])
    """Values of adapter.method."""
    variants: list[Variant] = field(default_factory=lambda: [Variant(name="automatic")])
    shots: list[int] = field(default_factory=lambda: [ALL])
    """Training patients or slices per cell; 0 takes all."""
    shot_unit: str = "patients"
    """patients or slices."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of training, and of the draw of the shots."""
    settings: list[str] = field(default_factory=list)
    """key=value for every cell."""
    method_settings: dict[str, list[str]] = field(default_factory=dict)
    """key=value for the cells of one method, e.g. a lower learning rate for full."""
    skip: list[dict[str, str]] = field(default_factory=list)
    """Combinations to leave out, by axis: {method: full, architecture: vit_h}."""
    preset: str = "auto"
    """A file of configs/finetune; auto takes cpu without a GPU."""
    part: str = "test"
    """Part of the split that is scored."""

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
        if self.shot_unit not in {"patients", "slices"} or min(self.shots) < 0:
            raise ValueError(f"shot_unit must be patients or slices and shots not negative, got {self.shot_unit!r}.")
        if self.part not in {"val", "test"}:
            raise ValueError(f"part must be val or test, got {self.part!r}.")
        if unknown := set(self.method_settings) - set(self.methods):
            raise ValueError(f"method_settings must be of methods of this study, got {sorted(unknown)}.")
        known = {"data_set", "initialisation", "architecture", "scope", "method", "variant", "shots", "seed"}
        if unknown := {key for rule in self.skip for key in rule} - known:
            raise ValueError(f"skip must name axes of {sorted(known)}, got {sorted(unknown)}.")
