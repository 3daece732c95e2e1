"""The configuration of stage 2; every part lives next to the code it configures or below."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from samgraft.finetune.adapters import AdapterConfig, TuningScope
from samgraft.finetune.baselines.networks import BaselineConfig
from samgraft.finetune.embedding_cache import CacheConfig
from samgraft.finetune.few_shot import FewShotConfig
from samgraft.finetune.loss import LossConfig
from samgraft.finetune.prompting.prompt_sampling import PromptConfig
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.samples.dataset import check_neighbours
from samgraft.shared.samples.sampler import check_seed
from samgraft.shared.training.config import TrainerConfig
from samgraft.shared.training.optim import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled slices to learn from, and whole scans to validate on."""

    store: str
    """Labelled slice store (``*.zarr``)."""
    split: str | None = None
    """Split file by patient. None takes <store>.split.json beside the store, else draws one with seed 0."""
    classes: list[int] = field(default_factory=list)
    """Label ids to learn; empty takes every id of the store. All others count as background."""
    regions: dict[str, list[int]] = field(default_factory=dict)
    """Overlapping classes instead: name -> label ids that it joins, e.g. {whole: [1, 2], core: [2]}. Each gets a
    sigmoid of its own."""
    batch_size: int = 8
    """Slices per micro-step and process."""
    num_workers: int = 0
    """Reader processes. 0 reads in the training process, which keeps up with a CPU."""
    keep_aspect: bool = True
    """Pad to a square (right, bottom) instead of squashing."""
    min_foreground_fraction: float = 0.05
    """Leave training slices out whose share of non-air pixels is smaller; never slices of validation or test."""
    labelled_slices_only: bool = False
    """Leave training slices out that show no label at all, as the study did; never slices of validation or test."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    """Train on a drawn part of the training patients or slices."""
    foreground_fraction: float = 0.67
    """Share of training slices that show a class, reached by repeating them; 0 takes slices as they are."""
    num_neighbours: int | None = None
    """1 gives the encoder the slice before and the slice after as its other two channels (2.5D), 0 repeats the slice;
    None takes what the encoder was pretrained with."""
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(
            max_rotation_deg=30.0,
            min_scale=0.8,
            max_scale=1.25,
            max_shear=0.1,
            max_shift=0.1,
            max_log_gamma=0.3,
            max_log_contrast=0.25,
            blur_probability=0.2,
            noise_std=0.03,
        )
    )
    """Random geometry and intensity. A modality's preset may say otherwise."""
    allow_transductive: bool = False
    """Go on although validation or test patients were in the encoder's pretraining; the card then says so."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"data.batch_size must be at least 1 and data.num_workers at least 0, got {self.batch_size} and "
                f"{self.num_workers}."
            )
        check_neighbours(self.num_neighbours or 0)
        if not 0 <= self.foreground_fraction < 1 or not 0 <= self.min_foreground_fraction < 1:
            raise ValueError("data.foreground_fraction and data.min_foreground_fraction must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights are tuned."""

    ckpt: str | None = None
    """Stage-1 run, or any encoder or SAM weights; none for a baseline."""
    base: str | None = None
    """SAM that gives prompt encoder and mask decoder. None takes ``ckpt`` if it is a whole SAM, else the demo's."""
    arch: str | None = None
    """Expected architecture; None takes what the file holds. unet2d, unet3d, dynunet2d or dynunet3d trains that network
    from scratch instead of SAM, for comparison."""
    image_size: int | None = None
    """Side of the square input in pixels; None takes the encoder's."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"model.image_size must be positive or null, got {self.image_size}.")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Validation and what a run shows of itself."""

    validate_every_n_steps: int = 50
    """Dice on whole validation scans; always at the last step too. The best of these rounds is kept."""
    num_overlays: int = 6
    """Slices per scan in TensorBoard and the report."""
    log_images: bool = False
    """Write pictures of slices. They are patient images: only the demo scans, which are public, switch it on."""
    batch_size: int = 8
    """Slices per forward pass of validation."""
    patience_rounds: int | None = None
    """End when this many validation rounds in a row bring no higher foreground Dice; null trains to the last step."""
    min_steps: int = 0
    """No early end before this step, nor before warm-up is over and patience_rounds rounds have followed it."""

    def __post_init__(self) -> None:
        if (self.patience_rounds is not None and self.patience_rounds < 1) or self.min_steps < 0:
            raise ValueError(
                f"watch.patience_rounds must be at least 1 or null and watch.min_steps at least 0, got "
                f"{self.patience_rounds} and {self.min_steps}."
            )
        if self.validate_every_n_steps < 1 or self.batch_size < 1 or self.num_overlays < 1:
            raise ValueError("watch.validate_every_n_steps, num_overlays and batch_size must be at least 1.")


class Schedule(Enum):
    """How the learning rate falls after the warm-up."""

    COSINE = "cosine"
    """Half a cosine down to optim.final_lr_factor."""
    POLY = "poly"
    """The study's polynomial with power 0.9; optim.final_lr_factor is not read."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything a stage-2 run is decided by."""

    modality: str
    """Kind of scan."""
    seed: int = 0
    """Order of slices, augmentation, fresh adapter weights."""
    data: DataConfig
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Size of the network where model.arch is a baseline."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Automatic mode, or prompts and which."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-3, weight_decay=0.01, beta2=0.999, warmup_steps=20, final_lr_factor=0.02
        )
    )
    """For ``full`` use a tenth of the rate or less."""
    schedule: Schedule = Schedule.COSINE
    """How the learning rate falls."""
    trainer: TrainerConfig
    watch: WatchConfig = field(default_factory=WatchConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.prompt.is_prompted and self.loss.class_weights:
            raise ValueError(
                "loss.class_weights has no effect with prompts: every object is a mask of its own. Leave it out."
            )
        if self.cache.variants and not self.freezes_encoder:
            raise ValueError(
                f"cache.variants must go with adapter.scope=decoder, got {self.adapter.scope.value}: embeddings of an "
                "encoder that trains are stale after one step."
            )

    @property
    def freezes_encoder(self) -> bool:
        """True when no tensor of the encoder trains, so that embeddings stay what they are."""
        return self.adapter.scope is TuningScope.DECODER
