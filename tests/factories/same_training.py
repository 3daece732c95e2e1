"""Comparison of outputs and gradients between an encoder of ours and the original."""

import torch
from model_factory import randomise
from original_encoders import plain_twin
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.vit import ViTEncoder
from segment_anything.modeling import ImageEncoderViT
from torch import nn


def compute_outputs_and_gradients(
    model: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    images = images.clone().requires_grad_()
    out = model(images)
    weight = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype, device=out.device)[None, :, None, None]
    (out * weight).pow(2).mean().backward()
    return out.detach(), images.grad, {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_same_training(ours: nn.Module, stock: nn.Module, images: torch.Tensor, *, tolerance: float) -> None:
    out, grad_images, grads = compute_outputs_and_gradients(ours, images)
    expected, expected_images, expected_grads = compute_outputs_and_gradients(stock, images)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        grad_images, expected_images, atol=tolerance * expected_images.abs().max().item(), rtol=0
    )
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        scale = expected_grad.abs().max().item()
        assert scale > 0, f"{name} has no gradient, so the test would not notice an error in it"
        torch.testing.assert_close(
            grads[name], expected_grad, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def real_pair(arch: str, image_size: int) -> tuple[ViTEncoder, ImageEncoderViT]:
    ours = ViTEncoder(arch_spec(arch), image_size=image_size)
    randomise(ours, scale=0.02)
    return ours, plain_twin(ours)
