"""Check for non-finite losses and gradients, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from samgraft.shared.training.processes import gather_from_processes
from samgraft.shared.training.progress import StepLog
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@dataclass(eq=False, kw_only=True)
class FiniteCheck(pl.Callback):
    """Callback that checks losses and gradient before each update."""

    clip_norm: float | None
    """Largest gradient norm, or None to clip nothing."""
    step_log: StepLog
    """Log that receives ``train/grad_norm``."""
    on_bad: Callable[[pl.Trainer, Tensor, float], None]
    """Function that must raise. It is called in every process before the update, with this process's losses by
    micro-step and the gradient norm. The losses are those of the backward pass, each already divided by the number of
    micro-steps."""
    _losses: list[Tensor] = field(default_factory=list, init=False)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-step."""
        # The value is read only once per step, so that a GPU is not stalled twice.
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check losses and gradient, then clip the gradient."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        losses = torch.stack(self._losses)
        self._losses.clear()
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        if trainer.world_size > 1:
            # A loss can be NaN in one process alone. All must stop, or the others would wait for it without end.
            flag = bad.to(torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        if bool(bad):
            self.on_bad(trainer, losses.float(), float(norm))
        # global_step counts finished steps, and this one is not finished yet.
        self.step_log.record(trainer.global_step + 1, {"train/grad_norm": norm})
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)


def find_suspect_batch(batches: Sequence[Any], losses: Tensor, *, rank: int) -> tuple[dict[str, Tensor], str]:
    """Return the tensors to examine after a step that was not finite, and their description.

    All processes must call it. Only the result in the first process covers the whole group.

    Args:
        batches: This process's micro-batches of the step, in order.
        losses: Losses of these micro-batches.
        rank: Rank of this process.

    Returns:
        The micro-batch with the non-finite loss, of the first process that has one. If every loss is finite and only
        the gradient is not, all micro-batches of this process.
    """
    own = next((index for index, loss in enumerate(losses.tolist()) if not math.isfinite(loss)), None)
    found = gather_from_processes(own)
    culprit = next((process for process, index in enumerate(found) if index is not None), None)
    if culprit is None:
        whose = " of the first process" if len(found) > 1 else ""
        if len(batches) == 1:
            return batch_tensors(batches[0]), f"the batch{whose}"
        return batch_tensors(list(batches)), f"all {len(batches)} micro-batches{whose}"
    # The other processes send nothing, so that only one batch is transferred.
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
