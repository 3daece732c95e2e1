"""The small models of the tests depend on their image, so that a test of a mask can find a wrong image."""

import pytest
import torch
import torch.nn.functional as F
from finished_factory import IMAGE_SIZE, SPEC
from model_factory import make_sam, tiny_hiera_spec, tiny_plain_spec, tiny_vit_t_spec
from release_factory import finished_model
from samgraft.finetune.loss import with_background
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.tiny_vit import Stem
from tiny_sams import SPECS

MODELS = {
    "plain 160": (tiny_plain_spec(), 160),
    "plain 96": (tiny_plain_spec(depth=2, image_size=96), 96),
    "vit_t 64": (tiny_vit_t_spec(), 64),
    "vit_t of MobileSAM": (tiny_vit_t_spec(stem=Stem.conv3x3), 64),
    "hiera": (tiny_hiera_spec(), 64),
    "lab": (SPEC, IMAGE_SIZE),
    **SPECS,
}
SHARE = 0.05


def slices(size):
    """Return six smooth slices (6, 1, S, S) in [0, 1] without any symmetry."""
    coarse = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(11))
    return F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)


@torch.no_grad()
def changed_shares(segmenter):
    images = slices(segmenter.image_size)
    others = {
        "mirrored left and right": images.flip(-1),
        "mirrored up and down": images.flip(-2),
        "exchanged axes": images.transpose(-1, -2),
        "next slice": images.roll(1, 0),
        "darker": 0.5 * images,
        "inverted": 1 - images,
        "empty": torch.zeros_like(images),
    }
    classes = with_background(segmenter(images)).argmax(1)
    return {
        name: float((with_background(segmenter(x)).argmax(1) != classes).float().mean()) for name, x in others.items()
    }


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_model_fixture__another_image_gives_other_classes(name, num_classes):
    spec, size = MODELS[name]
    shares = changed_shares(Segmenter(make_sam(spec, image_size=size), num_classes=num_classes).eval())
    assert min(shares.values()) >= SHARE, shares


def test_finished_model__another_image_gives_other_classes(tmp_path):
    run = finished_model(tmp_path, tiny_vit_t_spec(), image_size=64, num_classes=2)
    segmenter = read_model(run).segmenter
    assert not any(module.training for module in segmenter.modules())
    shares = changed_shares(segmenter)
    assert min(shares.values()) >= SHARE, shares
