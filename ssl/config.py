"""Configuration of stage 1."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field

from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegativeInt, Positive, PositiveInt, PositiveShare, ShareBelowOne
from samgraft.shared.encoders.registry import DEFAULT_ARCH, arch_names
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.samples.dataset import check_neighbours
from samgraft.shared.samples.sampler import check_seed
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.training.config import Strategy, TrainerConfig
from samgraft.shared.training.optim import OptimizerConfig
from samgraft.ssl.objectives import ObjectiveConfig, set_flip_probability
from samgraft.ssl.objectives.anchor import AnchorConfig, AnchorKind
from samgraft.ssl.objectives.mae import Layout, MAEConfig
from samgraft.ssl.scope import Scope, ScopeConfig
from samgraft.ssl.ssl_state import StateUse

RANDOM = "random"
"""Value of ``model.base`` for an encoder with random weights."""
OFF = "off"
"""Value of ``probe.store`` without linear probe."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Unlabelled slices to train on."""

    store: str
    """Path or address of a slice store (``*.zarr``)."""
    split: str | None = None
    """Split file by patient. None takes <store>.split.json next to the store, or holds out every fourth patient."""
    batch_size: PositiveInt = 8
    """Number of slices per micro-step and process."""
    min_foreground_fraction: ShareBelowOne | None = None
    """Smallest share of non-air pixels that a slice must have. None takes the modality's preset."""
    keep_aspect: bool = True
    """True pads to a square (right, bottom), False stretches."""
    planes: list[str] = field(default_factory=list)
    """Planes to train on, among axial, coronal and sagittal, of every series that was stored with them (``store build
    --planes``). Empty takes each series in the plane in which it was acquired."""
    num_neighbours: int = 0
    """Neighbour slices per side. 1 puts the slices before and after into the other two channels (2.5D). 0 repeats the
    slice."""
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(min_crop_fraction=0.6, max_log_gamma=math.log(1.3))
    )
    """Random crop, flip and contrast of the slices. The preset of a modality may change them."""
    num_held_out_slices: NonNegativeInt = 16
    """Number of slices of held-out patients for the held-out loss and the pictures. 0 switches both off."""
    test_stores: list[str] = field(default_factory=list)
    """Labelled stores whose validation and test patients must not be among the training slices."""
    labelled: list[str] = field(default_factory=list)
    """Labelled stores, or scans with labels, whose validation and test patients are left out of the training slices."""
    allow_transductive: bool = False
    """True trains although patients of ``test_stores`` leak, and the card then records it."""

    def __post_init__(self) -> None:
        check_neighbours(self.num_neighbours)
        if unknown := sorted(set(self.planes) - {plane.value for plane in Plane}):
            raise ValueError(f"data.planes must be among axial, coronal, sagittal, got {', '.join(unknown)}.")

    def minimum_foreground(self, preset: ModalityPreset) -> float:
        """Return the smallest share of non-air pixels that a slice must have."""
        return preset.min_foreground_fraction if self.min_foreground_fraction is None else self.min_foreground_fraction


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and its weights."""

    arch: str = DEFAULT_ARCH
    """Architecture of the encoder, vit_t, vit_b, vit_l, vit_h, sam2_t, sam2_s, sam2_bp or sam2_l."""
    ckpt: str | None = None
    """Initial encoder weights, a stage-1 run or any encoder or SAM file. None takes the encoder of ``base``."""
    base: str | None = None
    """Base SAM weights, a full SAM file. They supply what ``ckpt`` lacks (a plain ViT such as MAE, DINO or MRI-CORE has
    no relative positions and no neck) and the decoder of the box-prompt check. ``random`` gives random weights."""
    ssl_state: StateUse = StateUse.AUTO
    """Use of decoder, heads, teacher and optimizer state of the run that the initial weights are from, auto, require or
    ignore, see ``StateUse``."""
    image_size: PositiveInt = 256
    """Side of the square input in pixels."""
    num_frozen_depths: NonNegativeInt = 0
    """Number of frozen depths, counted from the stem. Below the first trained depth nothing is saved for backward. 0
    trains everything; 3 freezes stem, first stage and the downsampling to the second of vit_t."""
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    """Trained weights, which are all, the last blocks, or LoRA that is merged at export."""

    @property
    def has_random_weights(self) -> bool:
        """True for an encoder with random initial weights."""
        return self.base == RANDOM

    @property
    def initial_weights(self) -> str:
        """Name of the initial encoder weights, or ``random``."""
        return self.ckpt or self.base or RANDOM

    def __post_init__(self) -> None:
        if self.arch not in arch_names():
            raise ValueError(f"model.arch must be one of {', '.join(arch_names())}, got {self.arch!r}.")
        if self.ckpt is None and self.base is None:
            raise ValueError("model.ckpt or model.base must be given. Pass CKPT=FILE, BASE=FILE or BASE=random.")
        if self.ckpt is not None and self.base == RANDOM:
            raise ValueError("model.base must be SAM weights when model.ckpt is given, got random. Remove one of them.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule, with a separate learning rate for decoder and heads."""

    head_lr_factor: Positive = 10.0
    """Learning rate of decoder, heads and mask token as a multiple of ``lr``. It is higher because they start from
    random weights."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Monitoring rounds on held-out slices."""

    every_n_steps: PositiveInt = 50
    """Number of steps between two rounds of held-out loss, health measures and pictures. There is always one at the
    start and one at the end."""
    num_panel_rows: PositiveInt = 6
    """Number of slices in the pictures."""
    log_images: bool = False
    """True writes pictures of slices to TensorBoard and the report. They are patient images, so that only the demo
    settings switch them on, because the demo scans are public."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe and box-prompt check, which measure segmentation on labelled slices during training."""

    store: str | None = None
    """Path of a labelled store (``*.zarr``). null takes the first of ``data.labelled`` in which training and validation
    patients have labels. ``off`` or no such store switches linear probe and box-prompt check off."""
    split: str | None = None
    """Split of that store by patient. The head is fitted on ``train`` and scored on ``val``. ``test`` is never used.
    None takes <store>.split.json next to the store, or else draws one with seed 0, as stage 2 does."""
    every_n_steps: PositiveInt = 100
    """Number of steps between two rounds. There is always one at the start, as the reference, and one at the end."""
    num_train_slices: PositiveInt = 32
    """Number of labelled slices for fitting, spread evenly over the training patients. More slices give a steadier
    value and cost a forward pass each."""
    num_test_slices: PositiveInt = 32
    """Number of labelled slices for scoring, spread evenly over the validation patients."""
    ridge: Positive = 0.01
    """Weight of the penalty on the linear head, as a share of the features' variance."""
    num_boxes: NonNegativeInt = 32
    """Number of boxes of the box-prompt check. 0 switches it off."""

    def __post_init__(self) -> None:
        if self.store in {None, OFF} and self.split is not None:
            raise ValueError("probe.split would be ignored without probe.store. Set probe.store too.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The exported encoder."""

    interpolate: list[PositiveShare] = field(default_factory=lambda: [1.0])
    """Shares of the way from the initial to the trained weights, of which one is exported. 1 is the trained encoder. Of
    several, the one with the best change of linear probe and box-prompt check is exported, or the one nearest to 0.5
    without labels."""

    def __post_init__(self) -> None:
        if not self.interpolate or len(set(self.interpolate)) < len(self.interpolate):
            raise ValueError(
                f"export.interpolate must be a list of different shares, got {self.interpolate}. Use [1.0] for the "
                "trained encoder."
            )


# A plain dataclass, so that the sections are resolved when a configuration is loaded: ``ObjectiveConfig`` is generated.
@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All settings of a stage-1 run."""

    modality: str
    """Name of a preset under configs/modality."""
    seed: int = 0
    """Seed of the order of slices, the views, the masks and new weights."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    trainer: TrainerConfig
    optim: PretrainOptimizerConfig = field(default_factory=PretrainOptimizerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        # Filled in here, so that the stored configuration of a run contains the values that were used.
        filled = set_flip_probability(self.objective, self.data.augment.flip_columns_probability)
        if self.model.has_random_weights:
            # Random weights contain nothing to keep. The presets have both, and must work with BASE=random too.
            filled = dataclasses.replace(filled, anchor=AnchorConfig())
            object.__setattr__(self, "export", ExportConfig())
        object.__setattr__(self, "objective", filled)
        settings = self.objective.settings
        is_plain = isinstance(settings, MAEConfig) and settings.layout is Layout.PLAIN_VIT
        if is_plain and self.trainer.strategy is Strategy.FSDP:
            raise ValueError(
                "objective.mae.layout=plain_vit must not be combined with trainer.strategy=fsdp, because it runs the "
                "parts of a block one by one, and FSDP gathers whole blocks. Use ddp."
            )
        self._check_anchor()

    def _check_anchor(self) -> None:
        if self.objective.anchor.kind is not AnchorKind.WEIGHTS:
            return
        if self.trainer.strategy is Strategy.FSDP:
            raise ValueError(
                "objective.anchor.kind=weights must not be combined with trainer.strategy=fsdp, because no process has "
                "the whole weights. Use features, relations, or ddp."
            )
        if self.model.scope.kind is Scope.LORA:
            raise ValueError(
                "objective.anchor.kind=weights must not be combined with model.scope.kind=lora, which keeps the "
                "initial weights and trains small updates. Use features or relations, or remove the anchor."
            )
