"""Bottleneck adapters as a peft tuner: saved, loaded, switched off and removed by peft like its own methods.

    y = f(x) + g(f(x))          after a module f (attention)
    y = f(x + g(x))             before a norm f
    y = f(x) + s g(x)           beside a module f (MLP)        with g(x) = W2 gelu(W1 x)

They are not linear, so they cannot be merged into the weights beside them.

Source:
    Houlsby et al., arXiv 1902.00751; placement: Medical SAM Adapter, arXiv 2304.12620, as the study's code has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from samgraft.finetune.adapters.own_types import register
from torch import nn

BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Saved by peft as ``adapter_config.json``."""

    target_modules: str | None = field(default=None)
    """Full regular expression of all modules that get an adapter."""
    parallel_modules: str | None = field(default=None)
    """Those of them whose adapter runs beside; the others' follows (before a norm: precedes)."""
    ratio: float = field(default=0.25)
    """Hidden width over the module's own."""
    parallel_scale: float = field(default=0.5)
    """Factor s."""
    init_zero: bool = field(default=True)
    """Start as a no-op."""
    modules_to_save: list[str] | None = field(default=None)
    """Modules that train whole."""
    exclude_modules: list[str] | None = field(default=None)
    """Asked for by peft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


class Bottleneck(nn.Module):
    """Down, GELU, up."""

    def __init__(self, dim: int, config: BottleneckConfig) -> None:
        super().__init__()
        hidden = max(1, int(dim * config.ratio))
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        if config.init_zero:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the update, the shape of ``x``."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module and its adapter."""

    adapter_layer_names = ("bottleneck_",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: BottleneckConfig, parallel: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parallel = parallel
        self.parallel_scale = config.parallel_scale
        self.bottleneck_ = nn.ModuleDict()
        self.merged_adapters = []
        self._active_adapter = adapter_name

    def update_layer(self, adapter_name: str, adapter: Bottleneck, *, inference_mode: bool) -> None:
        """Take an adapter under a name and make it the active one."""
        self.bottleneck_[adapter_name] = adapter
        self.set_adapter(adapter_name, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run module and adapter."""
        active = [name for name in self.active_adapters if name in self.bottleneck_]
        adapter = self.bottleneck_[active[0]] if active and not self.disable_adapters else None
        if adapter is not None and not self.parallel and isinstance(self.base_layer, nn.LayerNorm):
            x = x + adapter(x)
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if adapter is None or (not self.parallel and isinstance(self.base_layer, nn.LayerNorm)):
            return out
        update: torch.Tensor = self.parallel_scale * adapter(x) if self.parallel else adapter(out)
        return out + update

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: an adapter with a GELU inside is no matrix.

        Raises:
            TypeError: Always.
        """
        raise TypeError("bottleneck adapters cannot be merged into the weights; keep base weights and adapter.")

    def unmerge(self) -> None:
        """Do nothing: they are never merged."""


class BottleneckModel(BaseTuner):
    """Puts the adapters in. Sequential adapters of one block are one and the same, as in the study's decoder."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
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
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            raise TypeError("one bottleneck adapter per module: load a second one into a model of its own.")
        parallel = bool(peft_config.parallel_modules and re.fullmatch(peft_config.parallel_modules, current_key))
        layer = BottleneckLayer(target, adapter_name, config=peft_config, parallel=parallel)
        shared = None if parallel else _sequential_of(parent, adapter_name)
        adapter = shared or Bottleneck(_width(target), peft_config)
        layer.update_layer(adapter_name, adapter, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)


def _sequential_of(parent: nn.Module, adapter_name: str) -> Bottleneck | None:
    for child in parent.children():
        if isinstance(child, BottleneckLayer) and not child.parallel:
            found = child.bottleneck_[adapter_name]
            assert isinstance(found, Bottleneck)
            return found
    return None


def _width(module: nn.Module) -> int:
    """Channels of a module's output: those of its last linear layer, or of the norm that it is."""
    linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if linear:
        return int(linear[-1].out_features)
    assert isinstance(module, nn.LayerNorm)
    return int(module.normalized_shape[0])


register(BOTTLENECK, BottleneckConfig, BottleneckModel)
