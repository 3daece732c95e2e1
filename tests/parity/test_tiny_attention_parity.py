"""Outputs and gradients of vit_t's window attention against timm's, which pads."""

import pytest
import torch
from samgraft.shared.encoders import tiny_vit_layers
from samgraft.shared.encoders.tiny_vit_layers import GridBlock
from timm.models.tiny_vit import TinyVitBlock


def pair(window_size):
    """Return our block and timm's with the same random weights, norms and biases."""
    torch.manual_seed(0)
    ours = GridBlock(16, 2, window_size=window_size).double().eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    timms = TinyVitBlock(16, 2, window_size=window_size).double().eval()
    timms.load_state_dict(ours.state_dict(), strict=True)
    # timm caches its biases in eval mode, which would cut them off from the gradient.
    timms.attn.train()
    return ours, timms


@pytest.mark.parametrize("in_strips", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (5, 5), (3, 2), (9, 6), (4, 7)], ids=lambda n: str(n))
def test_grid_block__equals_timms_padded_windows(height, width, in_strips, monkeypatch):
    monkeypatch.setattr(tiny_vit_layers, "splits_edges", lambda _device: in_strips)
    ours, timms = pair(4)
    features = torch.randn(2, height, width, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, height, width, 16, dtype=torch.float64)
    results = []
    for block in (ours, timms):
        features.grad = None
        out = block(features)
        (out * weights).sum().backward()
        results.append((out.detach(), features.grad, {n: p.grad for n, p in block.named_parameters()}))
    (out, grad, grads), (expected_out, expected_grad, expected_grads) = results
    torch.testing.assert_close(out, expected_out, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-9)
    assert set(grads) == set(expected_grads)
    for name, value in grads.items():
        torch.testing.assert_close(value, expected_grads[name], atol=1e-9, rtol=1e-9, msg=name)
    # Padding contributes to the softmax, so a change of what it contains changes the outputs.
    if height % 4 or width % 4:
        with torch.no_grad():
            ours.attn.norm.bias.add_(1.0)
            assert (ours(features) - expected_out).abs().max() > 1e-2


def test_grid_block__bf16_on_a_cpu_is_near_float32():
    """Check bf16, which has a code path of its own on a CPU."""
    ours, _ = pair(4)
    ours.float()
    features = torch.randn(2, 6, 7, 16)
    exact = ours(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = ours(features)
        with torch.no_grad():
            evaluated = ours(features)
    assert trained.requires_grad
    size = exact.abs().max()
    assert (trained - exact).abs().max() < 0.03 * size
    assert (evaluated - exact).abs().max() < 0.03 * size
