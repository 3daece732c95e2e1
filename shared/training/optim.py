"""AdamW with its parameter groups, learning rate schedules, and the average of the weights.

Schedules are pure functions of the step, so that they have no state to save and a resume cannot shift them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegative, NonNegativeInt, PositiveShare, Share, ShareBelowOne
from samgraft.shared.errors import UsageError
from samgraft.shared.training.config import check_warmup
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

WRAPPERS = frozenset({"objective", "segmenter", "sam", "network", "base_model", "model", "module"})
"""Names of modules around the parts of a network."""
NO_DECAY_NAMES = ("pos_embed", "rel_pos_h", "rel_pos_w", "attention_biases", "mask_token", "cls_token")
"""Name endings of position tables and learned tokens. Weight decay would pull them to zero without benefit."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW and its schedule."""

    lr: PositiveShare = 1e-4
    """Peak learning rate of the last layer."""
    weight_decay: NonNegative = 0.05
    """Weight decay of matrices. Norms, biases, positions and tokens have none (MAE's value)."""
    beta1: ShareBelowOne = 0.9
    """Decay of the mean of gradients."""
    beta2: ShareBelowOne = 0.95
    """Decay of the mean of squared gradients. 0.95 is the value of MAE (arXiv 2111.06377, table 8)."""
    layer_decay: PositiveShare = 1.0
    """Factor on the learning rate per layer towards the input. 1 turns it off, 0.75 is usual for fine-tuning."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    final_lr_factor: Share = 0.0
    """Fraction of ``lr`` at the last step."""
    ema_decay: ShareBelowOne | None = None
    """Decay per step of an average of the weights, such as 0.99, which is validated and written instead of the last
    weights. null takes the weights as they are."""


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    *,
    layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]] = (),
) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters of ``module``.

    Args:
        module: Everything that trains.
        config: Rates and decay.
        layer_groups: Parameters with their depth from ``encoder.layer_groups()``, 0 next to the input. They are used
            with ``layer_decay`` below 1 only. Other parameters (decoder, heads) have the full rate.

    Raises:
        UsageError: If nothing is trainable.
    """
    groups = parameter_groups(module, config, layer_groups=layer_groups)
    if not groups:
        raise UsageError("at least one parameter must be trainable, got none.", where="model")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def describe_rates(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return the peak learning rates of the parts of a module, each with its trained parameters."""
    # An optimizer has no names, and the groups of a part differ in weight decay and depth.
    part_of = {id(parameter): _part(name) for name, parameter in module.named_parameters()}
    rates: dict[str, set[float]] = {}
    counts: Counter[str] = Counter()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = part_of.get(id(parameter), "other")
            rates.setdefault(part, set()).add(float(group.get("peak_lr", group["lr"])))
            counts[part] += parameter.numel()
    # With layer decay a part has many rates, of which the first and the last are enough.
    return ", ".join(
        f"{part} {' to '.join(f'{rate:.1e}' for rate in sorted({min(found), max(found)}))} "
        f"({counts[part] / 1e6:.2f} M parameters)"
        for part, found in rates.items()
    )


def _part(name: str) -> str:
    """Return the part of a network that a parameter belongs to, such as ``mask_decoder``."""
    words = name.split(".")
    return next((word for word in words[:-1] if word not in WRAPPERS), words[-1])


def parameter_groups(
    module: nn.Module, config: OptimizerConfig, *, layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]] = ()
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and depth.

    The schedule multiplies ``peak_lr`` of each group.
    """
    depth_of = _depths(layer_groups) if config.layer_decay < 1 else {}
    deepest = max(depth_of.values(), default=0)
    in_norm = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of.get(id(parameter), deepest)
        # Biases and most norms have one dimension. Norms that have more are found by the name of their type.
        decays = parameter.ndim > 1 and id(parameter) not in in_norm and not name.endswith(NO_DECAY_NAMES)
        rate = config.lr * config.layer_decay ** (deepest - depth)
        group = groups.setdefault(
            (depth, decays),
            {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    # The order is fixed, because a saved optimizer state numbers its parameters in it.
    return [groups[key] for key in sorted(groups)]


def _depths(layer_groups: Iterable[tuple[int, Iterable[nn.Parameter]]]) -> Mapping[int, int]:
    depth_of: dict[int, int] = {}
    for depth, parameters in layer_groups:
        for parameter in parameters:
            if depth_of.setdefault(id(parameter), depth) != depth:
                raise ValueError(f"a parameter must be in one layer group, got {depth} and {depth_of[id(parameter)]}.")
    return depth_of


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, final_factor: float = 0.0) -> float:
    """Return the factor on the peak learning rate for the update that follows ``step`` finished ones.

    It rises linearly to 1 over ``warmup_steps`` (the first update has 1/warmup_steps), then falls along half a cosine
    to ``final_factor`` at ``max_steps``.

    Source:
        Loshchilov and Hutter, SGDR, arXiv 1608.03983, eq. 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return cosine_value(step, start=1.0, end=final_factor, first_step=warmup_steps, last_step=max_steps)


def warmup_poly(step: int, *, warmup_steps: int, max_steps: int, power: float) -> float:
    """Return the factor of a linear warm-up and a polynomial decay.

    The decay is ``(1 - (step - warmup_steps) / max_steps) ** power``. It does not reach 0, because ``max_steps``
    includes the warm-up.

    Source:
        finetune-SAM at e41f732, SingleGPU_train_finetune_noprompt.py.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return float((1.0 - (step - warmup_steps) / max_steps) ** power)


def cosine_value(step: int, *, start: float, end: float, first_step: int = 0, last_step: int) -> float:
    """Return the value at ``step`` on half a cosine from ``start`` to ``end``.

    Outside of ``first_step`` to ``last_step`` it is constant.
    """
    share = min(max((step - first_step) / max(1, last_step - first_step), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(eq=False, kw_only=True)
class LearningRate(pl.Callback):
    """Callback that sets each group's learning rate to ``peak_lr * factor(step)``."""

    warmup_steps: int
    max_steps: int
    final_factor: float = 0.0
    """Fraction of the peak at the last step."""
    poly_power: float | None = None
    """Power of a polynomial decay, or None for the cosine."""

    def __post_init__(self) -> None:
        """Check that the warm-up ends before the run does."""
        check_warmup(self.warmup_steps, self.max_steps)

    def factor(self, step: int) -> float:
        """Return the factor for the update that follows ``step`` finished ones."""
        if self.poly_power is not None:
            return warmup_poly(step, warmup_steps=self.warmup_steps, max_steps=self.max_steps, power=self.poly_power)
        return warmup_cosine(
            step, warmup_steps=self.warmup_steps, max_steps=self.max_steps, final_factor=self.final_factor
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rates, which are the same in all micro-steps of a step."""
        factor = self.factor(trainer.global_step)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                peak = group.setdefault("peak_lr", group["lr"])
                group["lr"] = float(peak) * factor


class WeightAverage:
    """Exponential moving average of a module's trained parameters and batch norm statistics.

    Validation, linear probes and pictures use the average, and a finished training ends with it. The training itself
    never reads it. Statistics of batch norms belong to the weights that they were measured with.

    Source:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992). Tarvainen and Valpola, Mean
        teachers (arXiv 1703.01780). The smaller decay of the first steps is that of TensorFlow's moving average.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        """Start with the present weights.

        Args:
            module: Module that trains. Sharded parameters have a sharded average.
            decay: Share of the average that a step keeps, in [0, 1).
        """
        self.module = module
        self.decay = decay
        self._parameters = {name: p.detach().clone() for name, p in self._trained().items()}
        self._statistics = {name: b.detach().clone() for name, b in self._batch_statistics().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after ``step`` finished optimizer steps.

        The decay is at most (1 + step) / (10 + step), so that the initial weights do not dominate a short run.
        """
        # A function of the step, so that there is no counter to save and a resume continues exactly.
        move = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        # Two lists, because parameters may be sharded and statistics are not, and one call takes one kind.
        for average, present in ((self._parameters, self._trained()), (self._statistics, self._batch_statistics())):
            if average:
                move(list(average.values()), [present[name].detach() for name in average], step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights for a block, and its own weights after it."""
        # Copied and not exchanged by reference: optimizer and FSDP hold the parameters themselves.
        own = {name: tensor.detach().clone() for name, tensor in self._present().items()}
        self.copy_to_module()
        try:
            yield
        finally:
            self._copy(own)

    def copy_to_module(self) -> None:
        """Replace the module's weights by the averaged ones."""
        self._copy({**self._parameters, **self._statistics})

    def state(self) -> dict[str, Tensor]:
        """Return the averaged tensors by their name in the module."""
        return {**self._parameters, **self._statistics}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load complete tensors of ``state``, which are cut where parameters are sharded.

        Raises:
            ValueError: If the names are not those of the trained tensors.
        """
        own = self.state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(f"the average must have the trained tensors, {len(odd)} differ, e.g. {odd[0]}.")
        for name, tensor in own.items():
            new = state[name].to(tensor.device)
            # A state has complete tensors, so that it fits any number of processes.
            if isinstance(tensor, DTensor):
                new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
            tensor.copy_(new)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        present = self._present()
        for name, tensor in tensors.items():
            present[name].copy_(tensor)

    # Looked up at each use: moving a module to another device replaces its buffers.
    def _present(self) -> dict[str, Tensor]:
        return {**self._trained(), **self._batch_statistics()}

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _batch_statistics(self) -> dict[str, Tensor]:
        norms = [(name, m) for name, m in self.module.named_modules() if isinstance(m, _BatchNorm)]
        return {
            f"{name}.{statistic}": buffer
            for name, norm in norms
            for statistic in ("running_mean", "running_var")
            if (buffer := getattr(norm, statistic)) is not None
        }
