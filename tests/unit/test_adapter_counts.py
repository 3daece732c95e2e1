"""Parameter counts of the study's 18 combinations, as measured on its released code (millions, rounded as there)."""

import dataclasses

import pytest
import torch
from samgraft.finetune.adapters import TuningScope, adapt
from samgraft.finetune.adapters.table import num_free, trainable_groups
from samgraft.finetune.config import FinetuneConfig
from samgraft.shared.config import load_config, packaged_config
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.encoders.tiny_vit import Stem

UNUSED_HEAD = 2 * 320 + 320 * 1000 + 1000
"""mobile_sam builds TinyViT with its ImageNet head, which nothing uses; ours has none."""
DEAD_DEPTH_ADAPTER = {
    arch: depth * (2 * dim * (dim // 4) + dim // 4 + dim)
    for arch, depth, dim in (("vit_b", 12, 768), ("vit_h", 32, 1280))
}
"""The released code builds a third adapter per ViT block that only its 3D mode uses; ours has none."""
NUM_CLS = 2
"""The released code's default: background and one class, two outputs beside SAM's first."""


def build(arch, method, scope, **options):
    """Build an adapted SAM on the meta device, which has shapes but no values."""
    with torch.device("meta"):
        stem = Stem.conv3x3 if arch == "vit_t" else None
        sam = build_sam(arch, stem=stem, num_multimask_outputs=NUM_CLS)
    required = {"modality": "mri", "data": {"store": "a.zarr"}, "model": {"ckpt": "a.pth"}}
    recipe = load_config(FinetuneConfig, layers=[packaged_config("finetune/paper.yaml"), required]).adapter
    config = dataclasses.replace(recipe, method=method, scope=scope, **options)
    adapt(sam, config, num_classes=1)
    return sam


def millions(sam):
    counts = {"image_encoder": 0, "prompt_encoder": 0, "mask_decoder": 0}
    for group in trainable_groups(sam):
        counts[group.name.split(".")[0]] += group.parameters
    total = sum(num_free(p) for n, p in sam.named_parameters() if ".original_module." not in n)
    return counts, total


@pytest.mark.parametrize(
    ("arch", "method", "total", "encoder", "prompt", "decoder"),
    [
        ("vit_t", "full", 9.990, 6.066, 0.006, 3.918),
        ("vit_b", "full", 93.595, 89.671, 0.006, 3.918),
        ("vit_h", "full", 640.95, 637.03, 0.006, 3.918),
        ("vit_t", "adapter", 10.518, 0.396, 0.0, 0.132),
        ("vit_b", "adapter", 104.379, 10.651, 0.0, 0.132),
        ("vit_h", "adapter", 719.88, 78.80, 0.0, 0.132),
        ("vit_t", "lora", None, 0.129, 0.006, 0.650),
        ("vit_b", "lora", None, 0.1475, 0.006, 0.650),
        ("vit_h", "lora", None, 0.655, 0.006, 0.650),
    ],
)
def test_parameter_counts__encoder_and_decoder_equal_the_studys(arch, method, total, encoder, prompt, decoder):
    counts, everything = millions(build(arch, method, TuningScope.ENCODER_DECODER))
    if arch == "vit_t":  # counted there although no gradient ever reaches it
        everything += UNUSED_HEAD
        counts["image_encoder"] += UNUSED_HEAD if method == "full" else 0
    elif method == "adapter":
        assert counts["image_encoder"] / 1e6 == pytest.approx({"vit_b": 7.10, "vit_h": 52.5}[arch], abs=0.05)
        counts["image_encoder"] += DEAD_DEPTH_ADAPTER[arch]
        everything += DEAD_DEPTH_ADAPTER[arch]
    assert counts["image_encoder"] / 1e6 == pytest.approx(encoder, abs=0.005 if encoder > 50 else 0.0005)
    assert counts["prompt_encoder"] / 1e6 == pytest.approx(prompt, abs=0.0005)
    assert counts["mask_decoder"] / 1e6 == pytest.approx(decoder, abs=0.0005)
    if total is not None:
        assert everything / 1e6 == pytest.approx(total, abs=0.005 if total > 500 else 0.001)


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "vit_h"])
@pytest.mark.parametrize(
    ("method", "prompt", "decoder"),
    [("full", 0.006, 3.918), ("adapter", 0.0, 0.132), ("lora", 0.006, 0.650)],
)
def test_parameter_counts__decoder_alone_equals_the_studys(arch, method, prompt, decoder):
    counts, _ = millions(build(arch, method, TuningScope.DECODER))
    assert counts["image_encoder"] == 0
    assert counts["prompt_encoder"] / 1e6 == pytest.approx(prompt, abs=0.0005)
    assert counts["mask_decoder"] / 1e6 == pytest.approx(decoder, abs=0.0005)


@pytest.mark.parametrize(
    ("arch", "method", "blocks", "encoder"),
    [
        ("vit_b", "adapter", [0, 1, 10, 11], 3.551),
        ("vit_h", "adapter", [0, 1, 10, 11], 9.85),
        ("vit_t", "adapter", [0, 1, 2, 3, 4, 5, 6, 7], 0.189),
        ("vit_b", "lora", [0, 1, 10, 11], 0.0492),
        ("vit_h", "lora", [0, 1, 10, 11], 0.0819),
        ("vit_t", "lora", [0, 1, 2, 3, 4, 5, 6, 7], 0.118),
    ],
)
def test_parameter_counts__default_blocks_equal_the_released_codes(arch, method, blocks, encoder):
    """The released code adapts four blocks of a ViT, or the first two attention stages of TinyViT, by default."""
    counts, _ = millions(build(arch, method, TuningScope.ENCODER_DECODER, blocks=blocks))
    dead = 4 * DEAD_DEPTH_ADAPTER[arch] // {"vit_b": 12, "vit_h": 32}[arch] if arch != "vit_t" else 0
    total = counts["image_encoder"] + (dead if method == "adapter" else 0)
    assert total / 1e6 == pytest.approx(encoder, abs=0.0006 if encoder < 9 else 0.005)
