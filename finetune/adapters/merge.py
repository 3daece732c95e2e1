"""From an adapted model back to a plain SAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from segment_anything.modeling import Sam
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def merge_adapters(peft_model: PeftModel) -> Sam:
    """Fold every update into the weights beside it and return the SAM inside, under segment_anything's own names.

    peft's ``merge_and_unload`` cannot take out trained modules that hold others (the decoder's upscaling) with most of
    its methods, so layers are merged by peft and taken out here.

    Raises:
        TypeError: If the updates are not linear (bottleneck adapters).
    """
    tuner: Any = peft_model.base_model
    tuner.merge_adapter()
    return take_out(peft_model)


def take_out(peft_model: PeftModel) -> Sam:
    """Return the SAM inside without its wrappers: base weights as they are now, modules that trained whole trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

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
    assert isinstance(sam, Sam)
    return sam
