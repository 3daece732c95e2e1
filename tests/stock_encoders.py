"""segment_anything's and timm's own encoders beside ours, and what it means that two train alike."""

from functools import partial

import torch
from model_factory import randomise
from samgraft.shared.models.architecture import Arch, ArchSpec, Stem, arch_spec
from samgraft.shared.models.image_encoder import ImageEncoder
from samgraft.shared.models.tiny_vit import TinyViTEncoder
from segment_anything.modeling import ImageEncoderViT
from timm.models.tiny_vit import TinyVit
from torch import nn


def stock_encoder(spec: ArchSpec, image_size: int) -> ImageEncoderViT:
    plain = spec.plain
    assert plain is not None
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=plain.embed_dim,
        depth=plain.depth,
        num_heads=plain.num_heads,
        out_chans=spec.neck_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=plain.attn_window_size,
        global_attn_indexes=plain.global_blocks,
    )


def outputs_and_gradients(
    model: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    images = images.clone().requires_grad_()
    out = model(images)
    weight = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype, device=out.device)[None, :, None, None]
    (out * weight).pow(2).mean().backward()
    return out.detach(), images.grad, {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_same_training(ours: nn.Module, stock: nn.Module, images: torch.Tensor, *, tolerance: float) -> None:
    out, grad_images, grads = outputs_and_gradients(ours, images)
    expected, expected_images, expected_grads = outputs_and_gradients(stock, images)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        grad_images, expected_images, atol=tolerance * expected_images.abs().max().item(), rtol=0
    )
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        scale = expected_grad.abs().max().item()
        assert scale > 0, f"{name} gets no gradient: the test would not see a fault in it"
        torch.testing.assert_close(
            grads[name], expected_grad, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def timm_tiny(spec: ArchSpec) -> nn.Module:
    """timm's own TinyVit with the two changes of the published vit_t."""
    tiny = spec.tiny
    assert tiny is not None
    model = TinyVit(
        num_classes=0,
        embed_dims=tiny.embed_dims,
        depths=tiny.depths,
        num_heads=tiny.num_heads,
        window_sizes=tiny.attn_window_sizes,
        drop_path_rate=0.0,
    )
    if tiny.stem is Stem.conv1x1:
        half = tiny.embed_dims[0] // 2
        model.patch_embed.conv1.conv = nn.Conv2d(3, half, 1, bias=False)
        model.patch_embed.conv2.conv = nn.Conv2d(half, tiny.embed_dims[0], 1, bias=False)
    model.stages[3].downsample.conv2.conv.stride = (1, 1)
    return model


def to_timm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published vit_t names to timm's: written apart from the code under test."""
    out = {}
    for key, value in tensors.items():
        name = key.replace(".c.weight", ".conv.weight")
        name = name.replace("patch_embed.seq.0", "patch_embed.conv1").replace("patch_embed.seq.2", "patch_embed.conv2")
        words = name.split(".")
        if words[0] == "layers":
            words[0] = "stages"
            if words[2] == "downsample":
                words[1] = str(int(words[1]) + 1)
        out[".".join(words)] = value
    return out


def timm_twin(ours: TinyViTEncoder) -> nn.Module:
    """timm's own TinyVit with the weights of ours: all of them but the neck, and none besides but its head."""
    twin = timm_tiny(ours.spec).to(next(ours.parameters()).dtype)
    tensors = {k: v for k, v in ours.state_dict().items() if not k.startswith("neck.")}
    missing, unexpected = twin.load_state_dict(to_timm_names(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    return twin


def real_pair(arch: Arch, image_size: int) -> tuple[ImageEncoder, ImageEncoderViT]:
    spec = arch_spec(arch)
    ours = ImageEncoder(spec, image_size=image_size)
    randomise(ours, scale=0.02)
    stock = stock_encoder(spec, image_size)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock
