"""Initial LoRA factors along the main directions of each layer's inputs on training slices (EVA).

peft computes these directions from every call of a layer. Our encoder also calls qkv on a zero token, the padding of
edge windows, which peft would count as a sample. So the directions are computed here and passed to peft.

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
"""Number of tokens kept per layer and forward pass, evenly spaced."""
OVERSAMPLING = 8
"""Number of additional directions of the randomised decomposition, for precision (Halko et al., arXiv 0909.4061)."""


def initialise_eva(peft_model: PeftModel, forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
    """Set every lora_A of a model made with ``eva`` from the inputs of its layer.

    lora_B stays 0, so the outputs do not change. The decompositions use the global random generator: seed it before.

    Args:
        peft_model: Model from ``adapt``.
        forward: Function that runs the model on one batch.
        batches: Inputs for ``forward``; a few are enough.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name: module for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)
    }
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [module.register_forward_pre_hook(_keep_rows(inputs[name])) for name, module in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    directions = {
        name: _main_directions(torch.cat(rows), number=module.lora_A["default"].weight.shape[0])
        for (name, rows), module in zip(inputs.items(), layers.values(), strict=True)
    }
    # A state dict with the directions of every layer keeps peft from running the model itself.
    peft.initialize_lora_eva_weights(peft_model, eva_state_dict=directions)
    num_tokens = max((sum(len(rows) for rows in kept) for kept in inputs.values()), default=0)
    log.info("eva: %d updates start along the main directions of %d tokens each", len(layers), num_tokens)


def _keep_rows(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: Tensor = inputs[0]
        # One-dimensional input is the single zero token that the encoder uses for padding, not data.
        if tokens.ndim < 2:
            return
        flat = tokens.detach().reshape(-1, tokens.shape[-1])
        # All tokens of all layers would need gigabytes; evenly spaced ones cover the whole slice.
        step = max(1, len(flat) // ROWS_PER_CALL)
        rows.append(flat[::step].float())

    return hook


def _main_directions(rows_NC: Tensor, *, number: int) -> Tensor:
    """Return the first right singular vectors of the centred rows, shape (number, C)."""
    centred_NC = rows_NC - rows_NC.mean(dim=0)
    _, _, v_Cq = torch.svd_lowrank(centred_NC, q=min(number + OVERSAMPLING, *centred_NC.shape), niter=4)
    return v_Cq.T[:number].contiguous()
