"""Stops before the update when the loss or the gradient is not finite, and clips the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from samgraft.shared.training.processes import gather_from_processes
from samgraft.shared.training.progress import StepLog
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class FiniteCheck(pl.Callback):
    """Checks every loss and the whole gradient before each update; logs the gradient norm.

    Args:
        clip_norm: Largest gradient norm; None does not clip.
        step_log: Takes ``train/grad_norm``.
        on_bad: Called on every process with (this process's losses by micro-step, gradient norm) before the update;
            must raise. The losses are those of the backward pass: each already divided by the number of micro-steps.
    """

    def __init__(
        self, *, clip_norm: float | None, step_log: StepLog, on_bad: Callable[[pl.Trainer, Tensor, float], None]
    ) -> None:
        self.clip_norm = clip_norm
        self.step_log = step_log
        self.on_bad = on_bad
        self._losses: list[Tensor] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss of a micro-step; it is read only once per step, so a GPU is not stalled twice."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check, then clip."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        losses = torch.stack(self._losses)
        self._losses.clear()
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        if trainer.world_size > 1:
            # A loss can be NaN on one process alone; all must stop, or the others wait for it forever.
            flag = bad.to(torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        if bool(bad):
            self.on_bad(trainer, losses.float(), float(norm))
        # Gradients exist, so this step's number is one more than the finished ones.
        self.step_log.record(trainer.global_step + 1, {"train/grad_norm": norm})
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)


def find_suspect_batch(batches: Sequence[Any], losses: Tensor, *, rank: int) -> tuple[dict[str, Tensor], str]:
    """Return what a step that was not finite should be looked at with: tensors, and in words which ones they are.

    All processes must call it; only what the first one gets is that of the whole group.

    Args:
        batches: This process's micro-batches of the step, in order.
        losses: Their losses.
        rank: Of this process.

    Returns:
        The micro-batch whose loss is not finite, of the first process that has one; if every loss is finite, so that
        only the gradient is not, all micro-batches of this process.
    """
    own = next((index for index, loss in enumerate(losses.tolist()) if not math.isfinite(loss)), None)
    found = gather_from_processes(own)
    culprit = next((process for process, index in enumerate(found) if index is not None), None)
    if culprit is None:
        whose = " of the first process" if len(found) > 1 else ""
        if len(batches) == 1:
            return batch_tensors(batches[0]), f"the batch{whose}"
        return batch_tensors(list(batches)), f"all {len(batches)} micro-batches{whose}"
    # Only the batch that is needed travels.
    tensors = gather_from_processes(
        {k: t.cpu() for k, t in batch_tensors(batches[own or 0]).items()} if rank == culprit else {}
    )
    places = [f"micro-step {(found[culprit] or 0) + 1} of {len(batches)}"] if len(batches) > 1 else []
    places += [f"process {culprit + 1} of {len(found)}"] if len(found) > 1 else []
    return tensors[culprit], "the batch whose loss is not finite" + (f" ({', '.join(places)})" if places else "")


def batch_tensors(batch: Any) -> dict[str, Tensor]:
    """Return every tensor of a nested batch by name."""
    found: dict[str, Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(item, f"{name}.{index}")

    collect(batch, "batch")
    return found
