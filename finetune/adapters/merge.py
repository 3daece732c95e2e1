"""Conversion of an adapted model back to SAM's own tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel
    from segment_anything.modeling import Sam


def merge_adapters(peft_model: PeftModel) -> Sam:
    """Merge every update into its weights and return the SAM under segment_anything's own names.

    Raises:
        TypeError: If the updates are not linear (bottleneck adapters).
    """
    tuner: Any = peft_model.base_model
    tuner.merge_adapter()
    return _unwrap(peft_model)


def _unwrap(peft_model: PeftModel) -> Sam:
    """Return the SAM without peft's wrappers, with merged layers and the trained copies of whole modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    # With most methods peft's own merge_and_unload cannot unwrap a trained module that contains others, such as the
    # decoder's upscaling. So peft merges the layers, and they are unwrapped here.
    sam: Any = peft_model.base_model.model
    for name, module in list(sam.named_modules()):
        inner: nn.Module | None = None
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inner = module.modules_to_save[module.active_adapters[0]]
        if inner is not None:
            parent, _, child = name.rpartition(".")
            setattr(sam.get_submodule(parent), child, inner)
    if hasattr(sam, "peft_config"):
        del sam.peft_config
    merged: Sam = sam
    return merged


def base_tensors(sam: Sam) -> dict[str, Tensor]:
    """Return an adapted model's base weights under segment_anything's own names, as they were before tuning."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    added: list[str] = []
    for name, module in sam.named_modules():
        if isinstance(module, BaseTunerLayer):
            added += [f"{name}.{attribute}." for attribute in (*module.adapter_layer_names, *module.other_param_names)]
        elif isinstance(module, ModulesToSaveWrapper):
            # The trained copy. The untouched module stays under original_module.
            added.append(f"{name}.modules_to_save.")
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in sam.state_dict().items()
        if not name.startswith(tuple(added))
    }
