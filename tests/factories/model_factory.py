"""Small SAMs with every kind of block (global, windowed, padded edge windows) and random weights."""

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.base import SAM_PIXEL_MEAN, SAM_PIXEL_STD, EncoderSpec, ImageEncoder
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.sam import build_sam, decode_automatic, encode_images, to_pixels
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTSpec
from samgraft.shared.encoders.vit import ViTSpec
from segment_anything.modeling import Sam
from torch import nn


def tiny_plain_spec(*, attn_window_size: int = 4, depth: int = 4, image_size: int = 160) -> ViTSpec:
    """Return a windowed ViT of 32 channels, whose window of 4 does not divide its 10x10 grid."""
    return ViTSpec(
        arch="vit_b",
        native_image_size=image_size,
        embed_dim=32,
        depth=depth,
        num_heads=2,
        global_blocks=tuple(range(1, depth, 2)),
        attn_window_size=attn_window_size,
        neck_dim=32,
    )


def tiny_vit_t_spec(*, stem: Stem = Stem.conv1x1) -> TinyViTSpec:
    """Return a narrow vit_t, which turns 64 px into 16x16 (LiteMedSAM's stem) or 4x4 (MobileSAM's)."""
    lite = stem is Stem.conv1x1
    return TinyViTSpec(
        arch="vit_t",
        native_image_size=256 if lite else 1024,
        stem=stem,
        embed_dims=(8, 16, 16, 32),
        depths=(1, 1, 2, 1),
        num_heads=(2, 2, 2, 4),
        attn_window_sizes=(7, 3, 5, 3),
        neck_dim=32,
        pixel_mean=(0.0, 0.0, 0.0) if lite else SAM_PIXEL_MEAN,
        pixel_std=(255.0, 255.0, 255.0) if lite else SAM_PIXEL_STD,
    )


def tiny_hiera_spec() -> HieraSpec:
    """Return a narrow Hiera with pooling, padded windows and global blocks, which its tensors reproduce."""
    return HieraSpec(
        arch="sam2_t",
        native_image_size=1024,
        embed_dim=8,
        depths=(1, 1, 6, 2),
        num_heads=1,
        global_blocks=(3, 5, 7),
        neck_dim=32,
    )


def randomise(module: torch.nn.Module, *, seed: int = 0, scale: float = 0.2) -> None:
    """Fill every parameter (zero-initialised positions too) and BatchNorm statistic with seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or "gaussian" in name or name.startswith("pixel_"):
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            else:
                tensor.copy_(scale * noise + (1.0 if name.endswith("weight") and tensor.ndim == 1 else 0.0))


def make_sam(spec: EncoderSpec, *, image_size: int, seed: int = 0, num_multimask_outputs: int = 3) -> Sam:
    """Return a small SAM whose tensors are all random and depend on the seed only."""
    torch.manual_seed(seed)
    sam = build_sam(spec, image_size=image_size, num_multimask_outputs=num_multimask_outputs)
    randomise(sam, seed=seed)
    make_sensitive(sam)
    return sam


@torch.enable_grad()
def make_sensitive(sam: Sam) -> None:
    """Change a random SAM until its classes depend on the image.

    Random BatchNorm statistics shrink an image to nothing, and the mean of random logits is far from 0, so that a
    mirrored or an empty image would be segmented in the same way.
    """
    was_training = sam.training
    sam.eval()
    pixels = set_statistics(sam.image_encoder)
    with torch.no_grad():
        features = encode_images(sam, pixels)
    logits = torch.cat([decode_automatic(sam, features, multimask=multimask)[0] for multimask in (False, True)], dim=1)
    for channel, hypernetwork in zip(logits.unbind(1), sam.mask_decoder.output_hypernetworks_mlps, strict=True):
        last = hypernetwork.layers[-1]
        # A logit is a product with this bias, so that its gradient is the mean of the upscaled embedding.
        [slope] = torch.autograd.grad(channel.mean(), last.bias, retain_graph=True)
        with torch.no_grad():
            last.bias -= channel.mean() / slope.square().sum() * slope
            for tensor in (last.weight, last.bias):
                tensor /= channel.std()
    sam.train(was_training)


@torch.no_grad()
def set_statistics(encoder: ImageEncoder) -> torch.Tensor:
    """Set the BatchNorm statistics of an encoder to those of smooth images, and return their pixels."""
    coarse = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=encoder.image_size, mode="bilinear")
    pixels = to_pixels(images, encoder.spec).expand(-1, 3, -1, -1)
    norms = [(m, m.momentum, m.training) for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, _, _ in norms:
        norm.train()
        norm.momentum = 1.0
    encoder(pixels)
    for norm, momentum, was_training in norms:
        norm.train(was_training)
        norm.momentum = momentum
    return pixels
