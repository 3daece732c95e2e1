"""Encoders with the kinds of blocks of real ones, small enough that a step takes milliseconds."""

import torch
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTSpec
from samgraft.shared.encoders.vit import ViTSpec

TINY_VIT = TinyViTSpec(
    arch="vit_t",
    native_image_size=32,
    stem=Stem.conv1x1,
    embed_dims=(8, 8, 16, 16),
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    attn_window_sizes=(4, 4, 4, 4),
    neck_dim=8,
    pixel_mean=(0.0, 0.0, 0.0),
    pixel_std=(255.0, 255.0, 255.0),
)
PLAIN_VIT = ViTSpec(
    arch="vit_b",
    native_image_size=96,
    # One windowed and one global block, and a 6 x 6 grid that the window of 4 does not divide.
    embed_dim=16,
    depth=2,
    num_heads=2,
    global_blocks=(1,),
    patch_size=16,
    attn_window_size=4,
    neck_dim=8,
)


def tiny_encoder(seed=0):
    """Return a TinyViT of 32 px and stride 4 in training mode."""
    torch.manual_seed(seed)
    encoder = TINY_VIT.build(image_size=32).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # A fresh TinyViT scales the last convolution of a block by 0, so nothing before it would get a gradient.
            torch.nn.init.ones_(module.weight)
    return encoder


def lively_encoder(seed=0):
    """Return a TinyViT whose features are of order 1.

    Those of fresh weights are of order 1e-6, where a layer norm amplifies rounding.
    """
    encoder = tiny_encoder(seed)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return encoder


def plain_encoder(seed=0):
    """Return a windowed ViT of 96 px and stride 16 in training mode, with positions that are not zero."""
    torch.manual_seed(seed)
    encoder = PLAIN_VIT.build(image_size=96).train()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.1)
    return encoder


def slices(count=2, size=32, seed=0):
    """Return smooth random slices in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
