"""Encoders on a GPU against those on a CPU and against the originals on the same GPU.

``make test-gpu`` runs these tests.
"""

import copy

import pytest
import torch
from model_factory import randomise
from original_encoders import tiny_twin
from same_training import assert_same_training, real_pair
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTEncoder

pytestmark = pytest.mark.gpu
GPU = "cuda"


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """Switch TensorFloat-32 off, which would hide errors below 1e-3."""
    if not torch.cuda.is_available():
        pytest.fail("no GPU that torch can use. Run samgraft doctor for the reason.", pytrace=False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("arch", "image_size"), [("vit_b", 224), ("vit_b", 512), ("vit_b", 1024), ("vit_h", 256)])
def test_plain_vit__same_gradients_as_segment_anything(arch, image_size):
    ours, stock = (model.to(GPU) for model in real_pair(arch, image_size))
    assert_same_training(ours, stock, torch.randn(2, 3, image_size, image_size).to(GPU), tolerance=1e-4)


@pytest.mark.parametrize("image_size", [224, 512])
def test_plain_vit__error_of_bf16_no_larger_than_segment_anything(image_size):
    ours, stock = (model.to(GPU) for model in real_pair("vit_b", image_size))
    images = torch.randn(2, 3, image_size, image_size).to(GPU)
    with torch.no_grad():
        exact = stock(images)
        with torch.autocast(GPU, dtype=torch.bfloat16):
            error, stock_error = ((model(images).float() - exact).abs().mean() for model in (ours, stock))
    assert 0 < error < 1.2 * stock_error


@pytest.mark.parametrize("image_size", [224, 512])
@pytest.mark.parametrize("ragged", [False, True])
def test_kept_tokens__equal_those_on_a_cpu(image_size, ragged):
    ours, _ = real_pair("vit_b", image_size)
    on_gpu = copy.deepcopy(ours).to(GPU)
    images = torch.randn(2, 3, image_size, image_size)
    ids = torch.stack([torch.randperm(ours.grid**2)[: ours.grid**2 // 4] for _ in range(2)])
    if ragged:
        ids[1, 20:] = -1
    results = []
    for encoder, device in ((ours, "cpu"), (on_gpu, GPU)):
        out = encoder.forward_visible(images.to(device), ids.to(device))[ids.to(device) >= 0]
        out.pow(2).mean().backward()
        results.append(
            (out.detach().cpu(), {n: p.grad.cpu() for n, p in encoder.named_parameters() if p.grad is not None})
        )
    (expected, expected_grads), (got, grads) = results
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-4 * float(grad.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("image_size", [224, 256])
def test_vit_t__equals_timm(image_size):
    ours = TinyViTEncoder(arch_spec("vit_t", Stem.conv1x1), image_size=image_size)
    randomise(ours, scale=0.05)
    reference = tiny_twin(ours)
    images = torch.randn(2, 3, image_size, image_size).to(GPU)
    with torch.no_grad():
        expected = reference.to(GPU).eval().forward_features(images)
        got = ours.to(GPU).eval().forward_features(images)
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
