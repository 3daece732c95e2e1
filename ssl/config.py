"""The configuration of stage 1; every part lives next to the code it configures or below."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from samgraft.shared.encoders.registry import DEFAULT_ARCH, arch_names
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.samples.dataset import check_neighbours
from samgraft.shared.samples.sampler import check_seed
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.training.config import Strategy, TrainerConfig
from samgraft.shared.training.optim import OptimizerConfig
from samgraft.ssl.objectives import ObjectiveConfig, set_flip_probability
from samgraft.ssl.objectives.mae import Layout, MAEConfig
from samgraft.ssl.scope import ScopeConfig
from samgraft.ssl.ssl_state import StateUse


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Slices to learn from."""

    store: str
    """Slice store (``*.zarr``)."""
    split: str | None = None
    """Split file by patient. None takes <store>.split.json beside the store, else holds out every fourth patient."""
    batch_size: int = 8
    """Slices per micro-step and process."""
    min_foreground_fraction: float | None = None
    """Leave out slices with a smaller share of non-air pixels. None takes the modality's preset."""
    keep_aspect: bool = True
    """Pad to a square (right, bottom) instead of squashing."""
    planes: list[str] = field(default_factory=list)
    """axial, coronal, sagittal: learn from these planes of every series that was stored with them (``store build
    --planes``). Empty takes each series in the plane it was acquired in."""
    num_neighbours: int = 0
    """1 gives the encoder the slices before and after as its other two channels (2.5D); 0 repeats the slice."""
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(min_crop_fraction=0.6, max_log_gamma=math.log(1.3))
    )
    """Views: random crop, flip and contrast. A modality's preset may say otherwise."""
    num_held_out_slices: int = 16
    """Slices of held-out patients for the held-out loss and the pictures, evenly spread; 0 switches both off."""
    test_stores: list[str] = field(default_factory=list)
    """Labelled stores whose validation and test patients must not be among the training slices (leak check)."""
    allow_transductive: bool = False
    """Go on although patients of ``test_stores`` leak; the card then says so."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_held_out_slices < 0:
            raise ValueError(
                "data.batch_size must be at least 1 and data.num_held_out_slices at least 0, got "
                f"{self.batch_size} and {self.num_held_out_slices}."
            )
        if self.min_foreground_fraction is not None and not 0 <= self.min_foreground_fraction < 1:
            raise ValueError(f"data.min_foreground_fraction must lie in [0, 1), got {self.min_foreground_fraction}.")
        check_neighbours(self.num_neighbours)
        if unknown := sorted(set(self.planes) - {plane.value for plane in Plane}):
            raise ValueError(f"data.planes must be among axial, coronal, sagittal, got {', '.join(unknown)}.")

    def least_foreground(self, preset: ModalityPreset) -> float:
        """Return the smallest share of non-air pixels that a slice must have."""
        return preset.min_foreground_fraction if self.min_foreground_fraction is None else self.min_foreground_fraction


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and what it starts from."""

    arch: str = DEFAULT_ARCH
    """Architecture of the encoder: vit_t, vit_b, vit_l or vit_h."""
    base: str
    """Weights file or run folder to start from, or ``random``."""
    rest: str | None = None
    """SAM weights that give what the base lacks by nature: a plain ViT (MAE, DINO, MRI-CORE) has no relative positions
    and no neck."""
    ssl_state: StateUse = StateUse.AUTO
    """auto, require or ignore: whether decoder, heads, teacher and AdamW's running means of the run that is the base
    are taken up too."""
    image_size: int = 256
    """Side of the square input in pixels."""
    num_frozen_depths: int = 0
    """Depths, counted from the stem, that keep their weights: nothing is saved for backward below the first trained
    one. 0 trains everything; 3 freezes stem, first stage and the step to the second of vit_t."""
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    """All weights, the last blocks, or LoRA that is merged when handed over."""

    def __post_init__(self) -> None:
        if self.arch not in arch_names():
            raise ValueError(f"model.arch must be one of {', '.join(arch_names())}, got {self.arch!r}.")
        if self.num_frozen_depths < 0:
            raise ValueError(f"model.num_frozen_depths must be at least 0, got {self.num_frozen_depths}.")
        if self.image_size < 1:
            raise ValueError(f"model.image_size must be positive, got {self.image_size}.")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule, with a rate of its own for what is thrown away afterwards."""

    head_lr_factor: float = 10.0
    """Learning rate of decoder, heads and mask token as a multiple of ``lr``: they start from random weights, the
    encoder does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_lr_factor > 0:
            raise ValueError(f"optim.head_lr_factor must be positive, got {self.head_lr_factor}.")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What a run shows of itself while it learns."""

    every_n_steps: int = 50
    """Held-out loss, health measures and pictures; always at the start and at the end too."""
    num_panel_rows: int = 6
    """Slices in the pictures."""
    log_images: bool = False
    """Write pictures of slices to TensorBoard and the report. They are patient images: only the demo scans, which are
    public, switch it on by themselves."""

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "num_panel_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"watch.{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Labelled slices that tell, while the encoder learns without labels, whether it gets better for segmentation."""

    store: str | None = None
    """Labelled store (``*.zarr``); null switches probe and drift gauge off."""
    split: str | None = None
    """Its split by patient: the head is fitted on ``train`` and scored on ``val``; ``test`` is never looked at. None
    takes <store>.split.json beside the store, else draws one with seed 0, as stage 2 does."""
    every_n_steps: int = 100
    """Steps between two looks; always at the start, the value to beat, and at the end too."""
    num_train_slices: int = 32
    """Slices that show a label, spread evenly over the training patients. More steadies the value and costs a forward
    pass each."""
    num_test_slices: int = 32
    """The same for the patients that are scored."""
    ridge: float = 0.01
    """Weight of the penalty on the linear head, as a share of the features' variance."""
    decoder: str | None = None
    """SAM whose untouched decoder the drift gauge asks; None takes ``model.base`` where that is a whole SAM."""
    num_boxes: int = 32
    """Boxes of the drift gauge; 0 switches it off."""

    def __post_init__(self) -> None:
        counts = ("every_n_steps", "num_train_slices", "num_test_slices")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"probe.{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_boxes < 0:
            raise ValueError(f"probe.num_boxes must be at least 0, got {self.num_boxes}.")
        if not self.ridge > 0:
            raise ValueError(f"probe.ridge must be positive, got {self.ridge}.")
        if self.store is None and (self.split is not None or self.decoder is not None):
            raise ValueError("probe.split and probe.decoder would be ignored without probe.store. Name the store too.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything a stage-1 run is decided by."""

    modality: str
    """Name of a preset under configs/modality."""
    seed: int = 0
    """Order of slices, views, masks and fresh weights."""
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    trainer: TrainerConfig
    optim: PretrainOptimizerConfig = field(default_factory=PretrainOptimizerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        # Here, so that the configuration of every run holds the number that it used.
        filled = set_flip_probability(self.objective, self.data.augment.flip_columns_probability)
        object.__setattr__(self, "objective", filled)
        settings = self.objective.settings
        is_plain = isinstance(settings, MAEConfig) and settings.layout is Layout.PLAIN_VIT
        if is_plain and self.trainer.strategy is Strategy.FSDP:
            raise ValueError(
                "objective.mae.layout=plain_vit must not be combined with trainer.strategy=fsdp: it runs the parts of "
                "a block one by one, which are not whole then. Use ddp."
            )
