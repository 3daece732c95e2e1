"""Bottleneck adapters as a peft tuner: saved, loaded, switched off and removed by peft like its own methods.

    y = f(x) + g(f(x))          after a module f (attention)
    y = f(x + g(x))             before a norm f
    y = f(x) + s g(x)           beside a module f (MLP)        with g(x) = W2 gelu(W1 x)

They are not linear, so they cannot be merged into the weights beside them.

Source:
    Houlsby et al., arXiv 1902.00751; placement: Medical SAM Adapter, arXiv 2304.12620, as the study's code has it.

SSF as a peft tuner: every output channel of a linear layer is scaled and shifted. It merges exactly.

    y = s (W x + b) + t

Source:
    Lian et al., Scaling and Shifting Your Features, arXiv 2210.08823, eq. 3; merging: eq. 4.

Dealing with peft's ways: a tuner of our own among its types, and warnings that do not concern us.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

BOTTLENECK = "BOTTLENECK"


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Let ``get_peft_model`` and ``PeftModel.from_pretrained`` find a tuner by the type in its configuration.

    peft's list of types is closed to others, its tables take any text.
    """
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        table[name] = entry


@contextmanager
def without_warnings_of_peft() -> Iterator[None]:
    """Hide what peft says about layers and settings that are as they should be, and what is checked here instead."""
    with warnings.catch_warnings():
        for message in (
            "Unsupported layer type",  # a norm has no inputs and outputs of its own; ln_tuning does not ask
            "lora with eva initialization used",  # memory of language models
            "Found missing adapter keys",  # an error here
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


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
