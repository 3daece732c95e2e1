"""Settings of stage 2. Each part is here or next to the code that reads it."""

from __future__ import annotations

from dataclasses import field
from enum import Enum

from pydantic.dataclasses import dataclass
from samgraft.finetune.adapters import AdapterConfig, TuningScope
from samgraft.finetune.baselines.networks import BaselineConfig, as_baseline
from samgraft.finetune.embedding_cache import CacheConfig
from samgraft.finetune.few_shot import FewShotConfig
from samgraft.finetune.loss import LossConfig
from samgraft.finetune.prompting.prompt_sampling import PromptConfig
from samgraft.shared.config import NonNegative, NonNegativeInt, PositiveInt, Share, ShareBelowOne
from samgraft.shared.samples.augment import AugmentConfig
from samgraft.shared.samples.dataset import check_neighbours
from samgraft.shared.samples.sampler import check_seed
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.training.config import Strategy, TrainerConfig
from samgraft.shared.training.optim import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training slices and validation scans."""

    store: str
    """Path or address of the labelled slice store (``*.zarr``)."""
    unlabelled: str | None = None
    """Store of the scans that a self-training labels itself. null takes ``store``, whose scans without a label and
    training patients outside of the few-shot draw are unlabelled."""
    pseudo_labels: str | None = None
    """Store of pseudo-labels, which ``samgraft selftrain`` writes into its run and sets here."""
    pseudo_fraction: ShareBelowOne = 0.5
    """Share of slices without labels of their own in every batch. The others have labels."""
    split: str | None = None
    """Split file by patient. null takes <store>.split.json next to the store, or else draws a split with seed 0."""
    fold: NonNegativeInt | None = None
    """Number of the fold, 0 or more, of a split with folds. Null is for a split without folds."""
    classes: list[int] = field(default_factory=list)
    """Label ids to train. Empty takes every id of the store. All others count as background."""
    regions: dict[str, list[int]] = field(default_factory=dict)
    """Overlapping classes as label ids by name, instead of ``classes``, e.g. ``whole`` with 1 and 2. Each has its
    own sigmoid."""
    batch_size: PositiveInt = 8
    """Slices per micro-step and process."""
    keep_aspect: bool = True
    """True pads slices to a square (right, bottom), False changes their aspect ratio."""
    min_foreground_fraction: ShareBelowOne = 0.05
    """Smallest share of non-air pixels of a training slice. Validation and test use all slices."""
    labelled_slices_only: bool = False
    """True trains on slices with a label only, as the study did. Validation and test use all slices."""
    planes: list[Plane] = field(default_factory=list)
    """Planes of the training slices, e.g. [axial, coronal, sagittal], which gives up to three times as many. The store
    must have them (``store build --planes``, up to three times its size). Validation and the model then average the
    probabilities of these planes, except with prompts. Empty takes every scan in the plane in which it was acquired."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    """Random part of the training patients or slices."""
    foreground_fraction: ShareBelowOne = 0.67
    """Share of training slices that show a class, reached by repeating them. 0 repeats none."""
    num_neighbours: int | None = None
    """Neighbours on each side as further channels. 1 uses the slices before and after (2.5D), 0 repeats the slice. null
    takes the value of the encoder's pretraining."""
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
    """Random geometry and intensity. The preset of a modality may change them."""
    allow_transductive: bool = False
    """True allows validation or test patients in the encoder's pretraining and among the scans with pseudo-labels. The
    card of the model reports it."""

    def __post_init__(self) -> None:
        check_neighbours(self.num_neighbours or 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Weights that are tuned."""

    ckpt: str | None = None
    """Initial encoder weights, as a stage-1 run or any encoder or SAM file. null takes the encoder of ``base``."""
    base: str | None = None
    """Base SAM weights, which supply prompt encoder and mask decoder. null takes ``ckpt`` if it is a full SAM, or else
    the demo's."""
    arch: str | None = None
    """Expected architecture. null takes that of the weights. unet2d, unet3d, dynunet2d or dynunet3d trains a baseline
    from scratch instead of SAM."""
    image_size: PositiveInt | None = None
    """Side of the square input in pixels. null takes the encoder's."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Validation rounds, pictures and the early end."""

    validate_every_n_steps: PositiveInt = 50
    """Steps between validation rounds on whole scans. There is always one at the last step. The best one is kept."""
    num_overlays: PositiveInt = 6
    """Number of slices per scan in TensorBoard and the report."""
    log_images: bool = False
    """True writes pictures of slices, which are patient images. Only the public demo scans set it."""
    batch_size: PositiveInt = 8
    """Number of slices per forward pass of validation."""
    patience_rounds: PositiveInt | None = None
    """Number of successive validation rounds without a higher foreground Dice that end the run. null trains to the last
    step."""
    min_steps: NonNegativeInt = 0
    """First step at which the run may end early. It never ends before warm-up and patience_rounds rounds after it."""


class Schedule(Enum):
    """Decrease of the learning rate after the warm-up."""

    COSINE = "cosine"
    """Half a cosine, down to optim.final_lr_factor."""
    POLY = "poly"
    """Polynomial of the study with power 0.9. Optim.final_lr_factor is not read."""


class SelftrainMode(Enum):
    """Use of unlabelled scans in stage 2."""

    OFF = "off"
    OFFLINE = "offline"
    """Teachers are trained first and label the scans once per round. ``samgraft selftrain`` runs all parts."""
    ONLINE = "online"
    """The averaged weights (``optim.ema_decay``) label the slices of every batch while the model trains, in one run."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Self-training in one run, read with ``selftrain.mode=online`` only."""

    weight: NonNegative = 1.0
    """Weight of the loss on pseudo-labels after the ramp."""
    ramp_up_steps: NonNegativeInt | None = None
    """Steps in which that weight rises from nearly 0, as exp(-5 (1 - t)^2) (Laine and Aila, ICLR 2017). null takes all
    steps of the run, because a network that learns wrong labels early does not recover."""
    paste_probability: Share = 0.0
    """Probability that a rectangle of a slice is replaced by that of a slice of the same plane from the other half of
    the batch (Bai et al., CVPR 2023). It lowered the Dice on both of our data sets (docs/unlabelled.md)."""
    intensity_strength: NonNegative = 2.0
    """Factor on the strengths of intensity changes in ``data.augment`` for the student's view of unlabelled slices. The
    teacher gets the view without them."""


@dataclass(frozen=True, kw_only=True)
class SelftrainConfig:
    """Self-training on scans without labels."""

    mode: SelftrainMode = SelftrainMode.OFF
    """Off, offline or online. The preset of ``samgraft selftrain`` sets offline."""
    min_agreement: Share = 0.8
    """Smallest agreement of a pixel, which is the averaged probability of its class. Other pixels are ignored."""
    min_slice_agreement: Share = 0.7
    """Smallest agreement of a slice, which is the mean over the pixels that any teacher labels as a class. Slices below
    it are ignored. Read with ``mode=offline`` only, as are the following settings."""
    teachers: list[str] = field(default_factory=list)
    """Teachers of the first round. A name is a fine-tuning method such as lora, a baseline such as dynunet2d,
    neighbours (2.5D input), or any name with settings in ``teacher_settings``. A path with a slash, such as runs/mine,
    is a finished run with the same validation and test patients."""
    every_teacher: list[str] = field(default_factory=list)
    """Settings as key=value in which the teachers differ from the student, e.g. trainer.max_steps=600."""
    teacher_settings: dict[str, list[str]] = field(default_factory=dict)
    """Settings as key=value of single teachers, e.g. a lower learning rate for full."""
    rounds: PositiveInt = 1
    """Number of rounds. From the second round on, the student of the round before is a teacher."""
    keep_teachers: bool = True
    """True keeps the teachers of the first round next to the student in later rounds. False uses the student alone."""
    flips: bool = True
    """True also averages over left-right flips, in planes and for data in which the augmentation flips too."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Self-training in one run."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All settings of a stage-2 run."""

    modality: str
    """Modality of the scans, e.g. mri."""
    seed: int = 0
    """Seed of the order of slices, the augmentation and the initial adapter weights."""
    data: DataConfig
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Size of the network when model.arch is a baseline."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Automatic mode, or the kind of prompts."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-3, weight_decay=0.01, beta2=0.999, warmup_steps=20, final_lr_factor=0.02
        )
    )
    """Optimizer. For ``full`` use a tenth of the learning rate or less."""
    schedule: Schedule = Schedule.COSINE
    """Decrease of the learning rate after the warm-up."""
    trainer: TrainerConfig
    watch: WatchConfig = field(default_factory=WatchConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    selftrain: SelftrainConfig = field(default_factory=SelftrainConfig)
    """Self-training on scans without labels."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.prompt.is_prompted and self.loss.class_weights:
            raise ValueError(
                "loss.class_weights has no effect with prompts, because every object is a separate mask. Remove it."
            )
        if self.data.pseudo_labels or self.selftrain.mode is not SelftrainMode.OFF:
            self._check_pseudo_labels()
        if self.cache.variants and not self.freezes_encoder:
            raise ValueError(
                f"cache.variants needs adapter.scope=decoder, got {self.adapter.scope.value}: embeddings of an encoder "
                "that trains are out of date after one step."
            )

        if self.optim.layer_decay < 1 and (self.freezes_encoder or as_baseline(self.model.arch)):
            raise ValueError(
                "optim.layer_decay has no effect, because no layers of SAM's encoder train (adapter.scope=decoder or a "
                "baseline). Remove it."
            )

    def _check_pseudo_labels(self) -> None:
        if self.prompt.is_prompted or self.data.regions:
            raise ValueError(
                "pseudo-labels need exclusive classes without prompts. Remove prompt.mode and data.regions."
            )
        if self.cache.variants:
            raise ValueError("cached embeddings and pseudo-labels cannot be combined. Remove cache.variants.")
        if self.selftrain.mode is SelftrainMode.ONLINE:
            if self.trainer.strategy is Strategy.FSDP:
                raise ValueError("selftrain.mode=online changes weights in every step. Use trainer.strategy=ddp.")
            if self.optim.ema_decay is None:
                raise ValueError("selftrain.mode=online labels with averaged weights. Set optim.ema_decay, e.g. 0.99.")
        if not 1 <= self.num_pseudo_per_batch < self.data.batch_size:
            raise ValueError(
                "data.pseudo_fraction must leave places for slices with labels and with pseudo-labels in a batch, got "
                f"{self.data.pseudo_fraction} of data.batch_size {self.data.batch_size}."
            )

    @property
    def num_pseudo_per_batch(self) -> int:
        """Number of slices with pseudo-labels in the batch of each process."""
        return round(self.data.pseudo_fraction * self.data.batch_size)

    @property
    def freezes_encoder(self) -> bool:
        """True when no tensor of the encoder trains, so that embeddings do not change."""
        return self.adapter.scope is TuningScope.DECODER
