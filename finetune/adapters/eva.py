"""EVA: LoRA factors that start along the main directions of what each layer sees on the training slices.

peft computes these directions from every call of a layer. Our encoder also calls qkv on a zero token (the padding of
edge windows), which peft would take for a sample; so they are computed here and handed to peft.

Source:
    Paischer et al., One Initialization to Rule them All, arXiv 2410.07170, algorithm 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

ROWS_PER_CALL = 256
"""Tokens that a layer keeps of one forward pass, evenly spaced."""
OVERSAMPLING = 8
"""Further directions that the randomised decomposition follows, for precision (Halko et al., arXiv 0909.4061)."""


def initialise_eva(peft_model: PeftModel, forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
    """Set every lora_A of a model made with ``eva`` from the inputs of its layer; lora_B stays 0.

    Args:
        peft_model: From ``adapt``.
        forward: Runs the model on one batch.
        batches: What to run it on; a few are enough.

    The global generator decides the random start of the decompositions: seed it before.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [module.register_forward_pre_hook(_keep_rows(seen[name])) for name, module in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    directions = {
        name: _main_directions(torch.cat(rows), number=module.lora_A["default"].weight.shape[0])
        for (name, rows), module in zip(seen.items(), layers.values(), strict=True)
    }
    peft.initialize_lora_eva_weights(peft_model, eva_state_dict=directions)
    log.info("eva: %d updates start along the main directions of %d tokens each", len(layers), _most(seen))


def _keep_rows(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: Tensor = inputs[0]
        if tokens.ndim < 2:  # the zero token that stands for padding
            return
        flat = tokens.detach().reshape(-1, tokens.shape[-1])
        step = max(1, len(flat) // ROWS_PER_CALL)
        rows.append(flat[::step].float())

    return hook


def _main_directions(rows_NC: Tensor, *, number: int) -> Tensor:
    """Return the first right singular vectors of the centred rows, shape (number, C)."""
    centred = rows_NC - rows_NC.mean(dim=0)
    follow = min(number + OVERSAMPLING, *centred.shape)
    _, _, v_Cq = torch.svd_lowrank(centred, q=follow, niter=4)
    return v_Cq.T[:number].contiguous()


def _most(seen: dict[str, list[Tensor]]) -> int:
    return max((sum(len(rows) for rows in kept) for kept in seen.values()), default=0)
