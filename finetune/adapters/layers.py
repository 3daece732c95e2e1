"""Two tuners that peft does not have, bottleneck adapters and SSF, and their registration with peft.

peft saves, loads, switches off and removes them like its own methods.

Bottleneck adapters, with g(x) = W2 gelu(W1 x):

    y = f(x) + g(f(x))          after a module f (attention)
    y = f(x + g(x))             before a norm f
    y = f(x) + s g(x)           parallel to a module f (MLP)

They are not linear, so they cannot be merged into the weights.

SSF scales and shifts every output channel of a linear layer. It merges exactly:

    y = s (W x + b) + t

Source:
    Houlsby et al., arXiv 1902.00751; placement: Medical SAM Adapter, arXiv 2304.12620, as in the study's code.
    Lian et al., Scaling and Shifting Your Features, arXiv 2210.08823, eq. 3; merging: eq. 4.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft.tuners.boft.layer
import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

BOTTLENECK = "BOTTLENECK"
SCALE_SHIFT = "SCALE_SHIFT"

# Otherwise every boft layer tries to compile a CUDA extension when it is made. One butterfly factor needs none.
setattr(peft.tuners.boft.layer, "_FBD_CUDA", False)  # noqa: B010  # typed as None there


def register_tuner(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make a tuner available to ``get_peft_model`` and ``PeftModel.from_pretrained``."""
    # peft's PeftType is a closed enumeration, but these tables accept any text as a type.
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        table[name] = entry


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Suppress warnings of peft that do not apply here."""
    with warnings.catch_warnings():
        for message in (
            "Unsupported layer type",  # a norm has no input and output size, and ln_tuning needs none
            "lora with eva initialization used",  # advice about the memory of language models
            "Found missing adapter keys",  # an error in load_adapter
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters, which peft saves as ``adapter_config.json``."""

    target_modules: str | None = field(default=None)
    """Full regular expression of all modules that get an adapter."""
    parallel_modules: str | None = field(default=None)
    """Full regular expression of the modules whose adapter is parallel. Other adapters follow their module, or precede
    it when it is a norm."""
    ratio: float = field(default=0.25)
    """Hidden width relative to the module's width."""
    parallel_scale: float = field(default=0.5)
    """Factor s of parallel adapters."""
    init_zero: bool = field(default=True)
    """True when adapters start as a no-op."""
    modules_to_save: list[str] | None = field(default=None)
    """Modules that train whole."""
    exclude_modules: list[str] | None = field(default=None)
    """Modules without an update. peft reads this field of every configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


class Bottleneck(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, config: BottleneckConfig) -> None:
        super().__init__()
        hidden = max(1, int(dim * config.ratio))
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        if config.init_zero:
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the update, in the shape of ``x``."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Module with its bottleneck adapter."""

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
        """Add an adapter under a name and make it the active one."""
        self.bottleneck_[adapter_name] = adapter
        self.set_adapter(adapter_name, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the module's output with the adapter's update."""
        active = [name for name in self.active_adapters if name in self.bottleneck_]
        adapter = self.bottleneck_[active[0]] if active and not self.disable_adapters else None
        if adapter is None:
            unchanged: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return unchanged
        if not self.parallel and isinstance(self.base_layer, nn.LayerNorm):
            before_norm: torch.Tensor = self.base_layer(x + adapter(x), *args, **kwargs)
            return before_norm
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        update: torch.Tensor = self.parallel_scale * adapter(x) if self.parallel else adapter(out)
        return out + update

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse the merge, because an adapter with a GELU is not a matrix.

        Raises:
            TypeError: Always.
        """
        raise TypeError("bottleneck adapters cannot be merged into the weights. Keep base weights and adapter.")

    def unmerge(self) -> None:
        """Do nothing, because bottleneck adapters are never merged."""


class BottleneckModel(BaseTuner):
    """Tuner of peft that adds bottleneck adapters.

    The sequential adapters of one block share their weights, as in the study's decoder.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft reads defaults of language models here

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
            raise TypeError("a module can have one bottleneck adapter only. Load the second one into another model.")
        parallel = bool(peft_config.parallel_modules and re.fullmatch(peft_config.parallel_modules, current_key))
        layer = BottleneckLayer(target, adapter_name, config=peft_config, parallel=parallel)
        # The study's decoder calls one adapter at two places of a block. Both layers here must hold the same module, or
        # the parameters would be counted and trained twice.
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
    """Return the number of output channels of a module that ends in a linear layer, or of a norm."""
    linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if linear:
        return int(linear[-1].out_features)
    assert isinstance(module, nn.LayerNorm)
    return int(module.normalized_shape[0])


register_tuner(BOTTLENECK, BottleneckConfig, BottleneckModel)


@dataclass
class ScaleShiftConfig(PeftConfig):
    """Configuration of SSF, which peft saves as ``adapter_config.json``."""

    target_modules: str | None = field(default=None)
    """Full regular expression of linear layers."""
    modules_to_save: list[str] | None = field(default=None)
    """Modules that train whole."""
    exclude_modules: list[str] | None = field(default=None)
    """Modules without an update. peft reads this field of every configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCALE_SHIFT


class ScaleShiftLayer(nn.Module, BaseTunerLayer):
    """Linear layer with one factor and one offset per output channel."""

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
        """Return the layer's output, scaled and shifted."""
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.ssf_scale:
                out = out * self.ssf_scale[name].to(out.dtype) + self.ssf_shift[name].to(out.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the rows of the weight, and scale and shift the bias."""
        for name in check_adapters_to_merge(self, adapter_names):
            scale, shift = self.ssf_scale[name], self.ssf_shift[name]
            with torch.no_grad():
                self.base_layer.weight.mul_(scale[:, None])
                if self.base_layer.bias is None:
                    raise TypeError("ssf merges its shift into the bias, and this layer has none.")
                self.base_layer.bias.mul_(scale).add_(shift)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo ``merge`` up to rounding."""
        # In reverse order of merging, because scales and shifts of several adapters do not commute.
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            with torch.no_grad():
                self.base_layer.weight.div_(self.ssf_scale[name][:, None])
                self.base_layer.bias.sub_(self.ssf_shift[name]).div_(self.ssf_scale[name])


class ScaleShiftModel(BaseTuner):
    """Tuner of peft that adds the factors and offsets of SSF."""

    prefix = "ssf_"
    tuner_layer_cls = ScaleShiftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft reads defaults of language models here

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
        # peft calls this again for a second adapter of the same model.
        if isinstance(target, ScaleShiftLayer):
            target.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
            return
        assert isinstance(target, nn.Linear)
        layer = ScaleShiftLayer(target, adapter_name)
        layer.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)


register_tuner(SCALE_SHIFT, ScaleShiftConfig, ScaleShiftModel)
