"""Data sets and arms of ``unlabelled_pays.py``, one place for the runs and for the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Data set, its split, and what its arms share."""

    title: str
    short: str
    """Name in the figure."""
    build: tuple[str, ...]
    """Options of ``store build``."""
    num_val: int
    """Training patients that validate, once, at the end."""
    num_test: int | None
    """Test patients to draw. None takes the validation list of the folder's ``dataset.json``."""
    image_size: int
    sam: tuple[str, ...]
    """Settings of SAM."""
    unet: tuple[str, ...]
    """Settings of the U-Net."""
    student: tuple[str, ...]
    """Settings of self-training."""
    stage_1: tuple[str, ...]
    """Settings of stage 1, on all training patients."""
    steps: dict[str, int]
    """Steps by network, which an arm may multiply."""
    unit: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, on a number of labelled patients."""

    title: str
    network: str
    """``sam``, LoRA on LiteMedSAM's ViT-T, or ``unet`` or ``unet3d``, nnU-Net's networks from random weights."""
    command: str = "finetune"
    settings: tuple[str, ...] = ()
    """Further settings, in which ``{seed}`` stands for the seed."""
    times_steps: int = 1
    """Factor on the steps of the network."""
    baseline: str | None = None
    """Arm of the same network and steps without unlabelled scans, which it is compared with."""
    short: str = ""
    """Name in the figure, which shows the arms that have one."""
    stage_1: bool = False
    """True for an encoder that stage 1 has trained before."""
    teacher_of: str | None = None
    """Arm whose teacher this is, so that it is not trained twice."""
    teacher: str = "dynunet2d"
    """Name of that teacher."""
    teachers: tuple[str, ...] = ()
    """Arms whose finished models are the teachers. Networks in 2D and 3D make different errors."""
    pseudo_labels_of: str | None = None
    """Arm whose pseudo-labels it trains on."""
    once: bool = False
    """True for an arm with all labels, which is trained with one seed."""


EMA = ("optim.ema_decay=0.99", "optim.warmup_steps=20", "trainer.save_every_steps=100")
UNET = (
    "baseline.base_channels=16",
    "data.batch_size=16",
    "optim.lr=3e-3",
    "optim.weight_decay=1e-4",
    "data.min_foreground_fraction=0",
    *EMA,
)
# About 30 epochs, without an anchor: LoRA trains encoder and decoder afterwards, so that they may grow apart.
STAGE_1 = (
    "--method=masked_image",
    "data.batch_size=8",
    "optim.lr=5e-5",
    "optim.head_lr_factor=20",
    "optim.warmup_steps=50",
)
# A batch of two whole scans. Their networks are as wide as those on slices.
UNET_3D = ("baseline.base_channels=16", "data.batch_size=2", "optim.lr=3e-3", "optim.weight_decay=1e-4", *EMA)
SAM = ("data.batch_size=4", "data.min_foreground_fraction=0", *EMA)

CELL_KIND, STAGE_1_KIND = "pays", "pays_stage_1"
"""Kinds of records, of a cell and of a stage-1 run."""
DATA_SETS = {
    "hc18": DataSet(
        title="HC18 (ultrasound, head of the fetus)",
        short="fetal head ultrasound",
        build=("--modality", "ultrasound", "--patient-pattern", "([0-9]+)_[0-9]*HC", "--accept-burned-in"),
        num_val=10,
        num_test=150,
        image_size=64,
        sam=SAM,
        # Five fetuses have five to eight images, and labels alone cannot fill a larger batch.
        unet=(*UNET, "data.batch_size=4"),
        student=(),
        stage_1=(*STAGE_1, "trainer.max_steps=2500"),
        steps={"sam": 400, "unet": 600},
        unit="fetuses",
    ),
    "hippocampus": DataSet(
        title="Medical Segmentation Decathlon, hippocampus (T1 MRI, 2 classes)",
        short="hippocampus MRI",
        build=("--modality", "mri", "--planes", "axial,coronal,sagittal"),
        num_val=4,
        num_test=None,
        # The crops are about 35 x 50 pixels; vit_t's attention windows fit 56 px exactly.
        image_size=56,
        sam=("data.planes=[axial,coronal,sagittal]", *SAM),
        unet=("data.planes=[axial,coronal,sagittal]", *UNET),
        # Many unlabelled slices for each labelled one.
        student=("data.pseudo_fraction=0.75",),
        stage_1=(*STAGE_1, "trainer.max_steps=4000", "data.planes=[axial,coronal,sagittal]"),
        steps={"sam": 600, "unet": 800, "unet3d": 1200},
        unit="subjects",
    ),
}

# Two teachers that differ in their random draws make different errors. The first is the U-Net of labels alone.
TEACHERS = (
    "selftrain.teachers=[dynunet2d,second]",
    # The preset gives this teacher more steps than the others.
    "selftrain.teacher_settings.dynunet2d=[]",
    "selftrain.flips=false",
    "selftrain.teacher_settings.second=[model.arch=dynunet2d,model.ckpt=null,model.base=null,seed=1000{seed}]",
)
# Borders are what a student must learn. With the default of 0.8 the teachers of a short run leave most of them out.
ALL_VOXELS = ("selftrain.min_agreement=0.5", "selftrain.min_slice_agreement=0")
ARMS = {
    "unet_unlabelled": Arm(
        title="U-Net, labels and unlabelled scans",
        short="U-Net, self-training",
        network="unet",
        command="selftrain",
        settings=(*TEACHERS, *ALL_VOXELS),
        baseline="unet",
    ),
    "unet_online": Arm(
        title="U-Net, labels and unlabelled scans, one run",
        short="U-Net, online",
        network="unet",
        command="selftrain",
        settings=("selftrain.mode=online", "data.pseudo_fraction=0.5"),
        baseline="unet",
    ),
    "unet": Arm(title="U-Net, labels alone", network="unet", teacher_of="unet_unlabelled"),
    "sam": Arm(title="SAM (LoRA), labels alone", network="sam"),
    "sam_unlabelled": Arm(
        title="SAM (LoRA), labels and unlabelled scans",
        short="SAM, self-training",
        network="sam",
        pseudo_labels_of="unet_unlabelled",
        baseline="sam",
    ),
    "sam_stage_1": Arm(
        title="SAM (LoRA) after stage 1, labels alone",
        short="SAM, stage 1",
        network="sam",
        stage_1=True,
        baseline="sam",
    ),
    "sam_stage_1_unlabelled": Arm(
        title="SAM (LoRA) after stage 1, labels and unlabelled scans",
        short="SAM, stage 1 and self-training",
        network="sam",
        stage_1=True,
        pseudo_labels_of="unet_unlabelled",
        baseline="sam",
    ),
    "unet_all": Arm(title="U-Net, all labels", network="unet", once=True),
    # Many slices need more steps than few. These arms tell what the steps above leave unlearned.
    "unet_converged": Arm(
        title="U-Net, labels and unlabelled scans, three times the steps",
        short="U-Net, self-training, long",
        network="unet",
        command="selftrain",
        settings=(*TEACHERS, *ALL_VOXELS),
        times_steps=3,
        baseline="unet_long",
    ),
    "unet_long": Arm(
        title="U-Net, labels alone, three times the steps",
        network="unet",
        times_steps=3,
        teacher_of="unet_converged",
    ),
    "unet_long_online": Arm(
        title="U-Net, labels and unlabelled scans, one run of three times the steps",
        short="U-Net, online, long",
        network="unet",
        command="selftrain",
        settings=("selftrain.mode=online", "data.pseudo_fraction=0.5"),
        times_steps=3,
        baseline="unet_long",
    ),
    "sam_converged": Arm(
        title="SAM (LoRA), labels and pseudo-labels of the long U-Nets",
        short="SAM, self-training",
        network="sam",
        pseudo_labels_of="unet_converged",
        baseline="sam",
    ),
    "sam_long": Arm(title="SAM (LoRA), labels alone, three times the steps", network="sam", times_steps=3),
    "sam_long_converged": Arm(
        title="SAM (LoRA), labels and pseudo-labels of the long U-Nets, three times the steps",
        short="SAM, self-training, long",
        network="sam",
        times_steps=3,
        pseudo_labels_of="unet_converged",
        baseline="sam_long",
    ),
    "unet_long_unlabelled": Arm(
        title="U-Net, labels and pseudo-labels of the short teachers, three times the steps",
        network="unet",
        times_steps=3,
        pseudo_labels_of="unet_unlabelled",
        baseline="unet_long",
    ),
    "unet3d": Arm(title="3D U-Net, labels alone", network="unet3d"),
    "unet3d_mixed": Arm(
        title="3D U-Net, labels and unlabelled scans, teachers in 2D and 3D",
        short="3D U-Net, self-training",
        network="unet3d",
        command="selftrain",
        # One scan with labels and one with pseudo-labels in a batch.
        settings=("selftrain.flips=false", *ALL_VOXELS, "data.pseudo_fraction=0.5"),
        teachers=("unet3d", "unet_long"),
        baseline="unet3d",
    ),
    "unet3d_all": Arm(title="3D U-Net, all labels", network="unet3d", once=True),
    "unet_long_all": Arm(
        title="U-Net, all labels, three times the steps",
        network="unet",
        times_steps=3,
        once=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Place, data set and device of a comparison."""

    work: Path
    data: str
    base: Path | None
    numbers: tuple[int, ...]
    device: str

    @property
    def store(self) -> Path:
        """Store of all patients."""
        return self.work / f"{self.data}.zarr"

    @property
    def split(self) -> Path:
        """Split file of the data set."""
        return self.work / f"{self.data}.split.json"

    @property
    def stage_1(self) -> Path:
        """Run of the encoder that is trained on all training patients."""
        return self.work / "runs" / f"{self.data}-stage_1"

    def cell(self, arm: str, num: int | None, seed: int) -> str:
        """Return the name of a cell and of its run."""
        return f"{self.data}-{arm}-{'all' if num is None else num}-{seed}"
