"""Settings of the training loop, the same in both stages."""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import Annotated

from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass
from samgraft.shared.config import MAY_CHANGE, Positive, PositiveInt
from samgraft.shared.errors import UsageError
from samgraft.shared.runs.trackers import Tracker
from samgraft.shared.training.device import Device, Precision


class Strategy(Enum):
    """Distribution of the work over several processes."""

    DDP = "ddp"
    """Every process has the whole model and computes its own slices, which is fastest if it fits in memory."""
    FSDP = "fsdp"
    """Weights, gradients and optimizer are sharded over the processes, for vit_h on small GPUs."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length, device and saving of a training."""

    max_steps: PositiveInt
    """Optimizer steps of the whole run."""
    accumulate: PositiveInt = 1
    """Micro-steps whose gradients make one step. The global batch is batch_size * accumulate * processes."""
    clip_grad_norm: Positive | None = 1.0
    """Largest gradient norm. null does not clip."""
    device: Device = Device.AUTO
    """Device to train on. auto takes a GPU if one works."""
    devices: PositiveInt | None = field(default=None, metadata=MAY_CHANGE)
    """Processes on this machine. null takes the number that torchrun or SLURM set, else 1. A resumed run needs the same
    number unless allow_resize is set."""
    precision: Precision = Precision.AUTO
    """Number format of matrix products. auto takes bf16 where it is fast."""
    channels_last: bool = False
    """Order of convolution weights in memory, which changes speed only. vit_t gains nothing on a CPU."""
    activation_checkpointing: bool = False
    """Recompute the image encoder's activations block by block in the backward pass. A step takes a third longer, and
    activations need 1/20 of the memory or less."""
    strategy: Strategy = Strategy.DDP
    """ddp or fsdp, without effect for one process. A run keeps its strategy."""
    find_unused_parameters: bool = False
    """Needed with several processes if a step leaves some trainable parameters without gradient."""
    num_workers: Annotated[int, Ge(0), Le(256)] = field(default=0, metadata=MAY_CHANGE)
    """Processes that load data. 0 loads in the training process. The numbers do not depend on it."""
    log_every_steps: PositiveInt = field(default=10, metadata=MAY_CHANGE)
    """Steps between points in TensorBoard. metrics.jsonl has every step."""
    trackers: list[Tracker] = field(default_factory=list, metadata=MAY_CHANGE)
    """wandb and mlflow, whose files are written into the run folder when a session ends. Nothing is uploaded."""
    save_every_steps: PositiveInt = field(default=500, metadata=MAY_CHANGE)
    """Steps between saved training states."""
    save_every_min: Positive = field(default=10.0, metadata=MAY_CHANGE)
    """Minutes without a saved state after which one is saved."""
    keep_last: Annotated[int, Ge(2)] = field(default=2, metadata=MAY_CHANGE)
    """Number of newest states to keep, at least 2 because one may be damaged."""
    keep_every_steps: PositiveInt | None = field(default=None, metadata=MAY_CHANGE)
    """Interval of states that are never deleted. null deletes them."""
    allow_resize: bool = field(default=False, metadata=MAY_CHANGE)
    """Resume with another number of processes, which is not bit-exact from that step on."""
    resume_from: str | None = field(default=None, metadata=MAY_CHANGE)
    """A kept state of this run to replay, e.g. nan-step-120. Ignored once the run has trained beyond it."""


def check_warmup(warmup_steps: int, max_steps: int) -> None:
    """Check that the warm-up ends before the run does.

    Raises:
        UsageError: If it does not.
    """
    if not 0 <= warmup_steps < max_steps:
        raise UsageError(
            f"warmup_steps must be at least 0 and below max_steps, got {warmup_steps} of {max_steps}. Shorten the "
            "warm-up or train longer.",
            where="optim.warmup_steps",
        )
