"""SAMs small enough that one of each fine-tuning method trains in a fraction of a second."""

import torch
from model_factory import make_sam
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTSpec
from samgraft.shared.encoders.vit import ViTSpec

PLAIN = ViTSpec(
    arch="vit_b",
    native_image_size=96,
    # A windowed and a global block, and a grid that the window does not divide.
    embed_dim=16,
    depth=3,
    num_heads=2,
    global_blocks=(2,),
    attn_window_size=4,
    neck_dim=16,
)
DEEP = ViTSpec(
    arch="vit_h",
    native_image_size=96,
    embed_dim=24,
    depth=5,
    num_heads=3,
    global_blocks=(2, 4),
    attn_window_size=4,
    neck_dim=16,
)
TINY = TinyViTSpec(
    arch="vit_t",
    native_image_size=32,
    stem=Stem.conv1x1,
    embed_dims=(8, 8, 16, 16),
    depths=(1, 1, 2, 1),
    num_heads=(1, 1, 2, 2),
    attn_window_sizes=(4, 4, 4, 4),
    neck_dim=16,
    pixel_mean=(0.0, 0.0, 0.0),
    pixel_std=(255.0, 255.0, 255.0),
)
HIERA = HieraSpec(
    arch="sam2_t",
    native_image_size=1024,
    # Pooling, padded windows of the third stage and a global block.
    embed_dim=8,
    depths=(1, 1, 2, 1),
    num_heads=1,
    global_blocks=(3,),
    neck_dim=16,
)
SPECS = {"vit_t": (TINY, 32), "vit_b": (PLAIN, 96), "vit_h": (DEEP, 96), "sam2_t": (HIERA, 64)}


def tiny_sam(arch):
    spec, size = SPECS[arch]
    return make_sam(spec, image_size=size)


def images_for(arch, count=2):
    size = SPECS[arch][1]
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def take_steps(segmenter, arch, *, steps=2, lr=0.01):
    """Train with Adam, which changes every tensor that has a gradient.

    Two steps are needed because LoRA's A has a gradient only once B is not 0.
    """
    images = images_for(arch)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, segmenter.num_classes + 1, (2, *images.shape[-2:]), generator=generator)
    segmenter.train()
    optimizer = torch.optim.Adam([p for p in segmenter.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        SegmentationLoss()(segmenter(images), labels).backward()
        optimizer.step()
    segmenter.eval()


def logits_of(sam, arch, *, num_classes=1):
    with torch.no_grad():
        return Segmenter(sam, num_classes=num_classes).eval()(images_for(arch))
