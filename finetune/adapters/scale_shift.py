"""SSF as a peft tuner: every output channel of a linear layer is scaled and shifted. It merges exactly.

    y = s (W x + b) + t

Source:
    Lian et al., Scaling and Shifting Your Features, arXiv 2210.08823, eq. 3; merging: eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from samgraft.finetune.adapters.own_types import register
from torch import nn

SCALE_SHIFT = "SCALE_SHIFT"


@dataclass
class ScaleShiftConfig(PeftConfig):
    """Saved by peft as ``adapter_config.json``."""

    target_modules: str | None = field(default=None)
    """Full regular expression of linear layers."""
    modules_to_save: list[str] | None = field(default=None)
    """Modules that train whole."""
    exclude_modules: list[str] | None = field(default=None)
    """Asked for by peft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALE_SHIFT


class ScaleShiftLayer(nn.Module, BaseTunerLayer):
    """A linear layer with one factor and one offset per output channel."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")

    def __init__(self, base_layer: nn.Linear, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ssf_scale = nn.ParameterDict()
        self.ssf_shift = nn.ParameterDict()
        self.merged_adapters = []
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, *, inference_mode: bool) -> None:
        """Add a no-op under a name and make it the active one."""
        weight = self.base_layer.weight
        self.ssf_scale[adapter_name] = nn.Parameter(weight.new_ones(weight.shape[0]))
        self.ssf_shift[adapter_name] = nn.Parameter(weight.new_zeros(weight.shape[0]))
        self.set_adapter(adapter_name, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer, scale and shift."""
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.ssf_scale:
                out = out * self.ssf_scale[name].to(out.dtype) + self.ssf_shift[name].to(out.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the weight's rows and move the bias."""
        for name in check_adapters_to_merge(self, adapter_names):
            scale, shift = self.ssf_scale[name], self.ssf_shift[name]
            with torch.no_grad():
                self.base_layer.weight.mul_(scale[:, None])
                if self.base_layer.bias is None:
                    raise TypeError("ssf must merge its shift into a bias, the layer has none.")
                self.base_layer.bias.mul_(scale).add_(shift)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo ``merge`` up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            with torch.no_grad():
                self.base_layer.weight.div_(self.ssf_scale[name][:, None])
                self.base_layer.bias.sub_(self.ssf_shift[name]).div_(self.ssf_scale[name])


class ScaleShiftModel(BaseTuner):
    """Puts factors and offsets in."""

    prefix = "ssf_"
    tuner_layer_cls = ScaleShiftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft's attribute: defaults of language models

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ScaleShiftLayer):
            target.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
            return
        assert isinstance(target, nn.Linear)
        layer = ScaleShiftLayer(target, adapter_name)
        layer.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)


register(SCALE_SHIFT, ScaleShiftConfig, ScaleShiftModel)
