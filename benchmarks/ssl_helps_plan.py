"""What ``ssl_helps.py`` compares and at what length; its settings, one place for the runs and for the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BASE = "base"
NUM_HELD_OUT, NUM_PROBE_TRAIN, NUM_PROBE_TEST = 12, 8, 16
"""Training subjects kept out of pretraining: for the held-out loss (four of them validate stage 2), and the probe."""
NUM_STAGE_2_VAL = 4
FEW = 5
STAGE_1 = (
    "data.num_held_out_slices=24",
    "trainer.channels_last=true",
    "trainer.save_every_steps=100",
    "watch.every_n_steps=250",
    "watch.log_images=false",
    "probe.every_n_steps=250",
    "probe.num_train_slices=64",
    "probe.num_test_slices=96",
)
STAGE_2 = (
    "data.batch_size=8",
    "data.min_foreground_fraction=0.0",
    "trainer.channels_last=true",
    "trainer.save_every_steps=100",
)
GEOMETRY = {
    "mild": (),
    "strong": (
        "data.augment.max_rotation_deg=180",
        "data.augment.min_scale=0.7",
        "data.augment.max_scale=1.6",
        "data.augment.max_shear=0.3",
        "data.augment.max_shift=0.2",
        "data.augment.max_log_gamma=0.4",
        "data.augment.max_log_contrast=0.35",
    ),
}
"""Augmentation of stage 2: the presets' own, or turned by any angle: anterior and posterior then look alike."""

METHOD = {"masked_image_skip": "masked_image"}
"""Where a line of the table is not an objective of its own but another setting of one."""
PAST_THE_ENCODER = ("objective.masked_image.decoder_sees_pixels=true",)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the comparison: pixels, what stage 1 sets for all objectives and what single ones need besides."""

    image_size: int
    stage_1: tuple[str, ...]
    own: dict[str, tuple[str, ...]]
    says: str


SCALES = {
    # The crops are about 35 x 50 pixels; vit_t's attention windows fit 56 px exactly.
    56: Scale(
        image_size=56,
        stage_1=("data.batch_size=2", "optim.lr=3e-5", "trainer.num_workers=0"),
        own={
            "masked_image": ("objective.masked_image.mask_unit_px=8", "optim.head_lr_factor=33.0"),
            "masked_image_skip": (
                *PAST_THE_ENCODER,
                "objective.masked_image.mask_unit_px=8",
                "optim.head_lr_factor=33.0",
            ),
            # Its Gaussian term compares the slices of a batch: two would be no sample.
            "lejepa": ("data.batch_size=4",),
        },
        says="2 slices a step (`lejepa` 4), the stem and the first stage frozen",
    ),
    # LiteMedSAM's native size, for a GPU.
    256: Scale(
        image_size=256,
        stage_1=(
            "data.batch_size=8",
            "optim.lr=3e-5",
            # A worker process takes longer to start than it saves in so short a run.
            "trainer.num_workers=0",
        ),
        own={
            "masked_image": ("objective.masked_image.mask_unit_px=16", "optim.head_lr_factor=33.0"),
            "masked_image_skip": (
                *PAST_THE_ENCODER,
                "objective.masked_image.mask_unit_px=16",
                "optim.head_lr_factor=33.0",
            ),
            "lejepa": ("data.batch_size=16", "objective.lejepa.crops.local_size_px=112"),
            "dino": ("objective.dino.crops.local_size_px=112",),
        },
        says="8 slices a step (`lejepa` 16), the stem and the first stage frozen",
    ),
}
"""The sizes that can be compared."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared and at what length."""

    work: Path
    base: Path
    objectives: tuple[str, ...]
    stage_1_steps: int
    few_steps: int
    full_steps: int
    few_seeds: int
    full_seeds: int
    scale: Scale
    geometry: str
    device: str

    @property
    def store(self) -> Path:
        """The store of all subjects."""
        return self.work / "hippocampus.zarr"

    def steps(self, size: str) -> int:
        """Steps of a fine-tuning."""
        return self.few_steps if size == "few" else self.full_steps

    def seeds(self, size: str) -> range:
        """Seeds of a fine-tuning: they draw the few subjects, and everything that a training draws."""
        return range(self.few_seeds if size == "few" else self.full_seeds)
