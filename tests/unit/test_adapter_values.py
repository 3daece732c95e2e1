"""Outputs of adapters against their formulas, with scales that are not 1."""

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from samgraft.finetune.adapters import AdapterConfig, adapt
from samgraft.finetune.adapters.layers import Bottleneck, BottleneckConfig, BottleneckLayer
from tiny_sams import tiny_sam
from torch import nn

CONFIG = BottleneckConfig(ratio=0.5, parallel_scale=0.3, init_zero=False)


def bottleneck(base, *, parallel):
    """Return a module with an adapter, and the adapter alone."""
    torch.manual_seed(3)
    adapter = Bottleneck(6, CONFIG)
    layer = BottleneckLayer(base, "default", config=CONFIG, parallel=parallel)
    layer.update_layer("default", adapter, inference_mode=False)
    return layer, adapter


@torch.no_grad()
def test_bottleneck__parallel_adapter_is_scaled_and_reads_the_input():
    base, x = nn.Linear(6, 6), torch.randn(2, 5, 6)
    layer, adapter = bottleneck(base, parallel=True)
    torch.testing.assert_close(layer(x), base(x) + 0.3 * adapter(x))
    hidden = F.gelu(x @ adapter.fc1.weight.T + adapter.fc1.bias)
    torch.testing.assert_close(adapter(x), hidden @ adapter.fc2.weight.T + adapter.fc2.bias)
    assert adapter.fc1.weight.shape == (3, 6)


@torch.no_grad()
def test_bottleneck__following_adapter_reads_the_output_and_a_norm_is_preceded():
    x = torch.randn(2, 5, 6)
    linear, norm = nn.Linear(6, 6), nn.LayerNorm(6)
    layer, adapter = bottleneck(linear, parallel=False)
    torch.testing.assert_close(layer(x), linear(x) + adapter(linear(x)))
    layer, adapter = bottleneck(norm, parallel=False)
    torch.testing.assert_close(layer(x), norm(x + adapter(x)))


@pytest.mark.parametrize("alpha", [2, 6])
def test_lora__merged_weights_differ_by_alpha_over_r_times_b_a(alpha):
    sam = tiny_sam("vit_b")
    model = adapt(sam, AdapterConfig(r=2, lora_alpha=alpha), num_classes=1)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert layers
    expected = {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(b, generator=torch.Generator().manual_seed(len(name)))
        # The encoder's qkv has rank 2r for queries and values, at the same scale.
        expected[name] = (layer.get_base_layer().weight + alpha / 2 * b @ a).detach()
    model.merge_adapter()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_base_layer().weight, expected[name], msg=name)
