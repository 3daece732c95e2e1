"""Hidden pixels, BatchNorm, attention biases and layer groups of vit_t."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.encoders.base import freeze_batch_norm
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.sam import build_sam, decode_boxes, encode_images, to_pixels
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTEncoder
from samgraft.shared.errors import UsageError
from samgraft.shared.weights.load import load_sam


def encoder_of(stem: Stem = Stem.conv1x1, image_size: int = 64) -> TinyViTEncoder:
    return make_sam(tiny_vit_t_spec(stem=stem), image_size=image_size).image_encoder


@pytest.mark.parametrize("stem", list(Stem))
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("grid", [4, 16])
def test_masked__no_output_depends_on_hidden_pixels(stem: Stem, mode: bool, grid: int) -> None:
    encoder = encoder_of(stem)
    freeze_batch_norm(encoder, frozen=False)
    encoder.train(mode)
    hidden = torch.rand(2, grid, grid) > 0.4
    images, token = torch.randn(2, 3, 64, 64), torch.randn(8)
    pixels = F.interpolate(hidden[:, None].float(), scale_factor=64 // grid) > 0
    changed = torch.where(pixels, torch.randn_like(images), images)
    out = encoder.forward_features(images, token_mask_Bhw=hidden, mask_token=token)
    assert torch.equal(out, encoder.forward_features(changed, token_mask_Bhw=hidden, mask_token=token))
    visible = torch.where(pixels, images, images + 1)
    assert not torch.equal(out, encoder.forward_features(visible, token_mask_Bhw=hidden, mask_token=token))
    assert not torch.equal(out, encoder.forward_features(images, token_mask_Bhw=hidden, mask_token=token + 1))


def test_masked__nothing_hidden_equals_the_encoder() -> None:
    encoder, images = encoder_of(), torch.randn(1, 3, 64, 64)
    hidden = torch.zeros(1, 16, 16, dtype=torch.bool)
    masked, plain = (encoder.forward_features(images, token_mask_Bhw=mask) for mask in (hidden, None))
    # The features of random weights are large, so that rounding is measured by their spread.
    torch.testing.assert_close(masked, plain, atol=1e-5 * plain.std().item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 16, 16), "must be bool"),
        (torch.zeros(1, 7, 7, dtype=torch.bool), "divide the image side 64, got 7x7"),
    ],
)
def test_masked__wrong_mask_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_of().forward_features(torch.zeros(1, 3, 64, 64), token_mask_Bhw=mask)


def test_batch_norm__frozen_by_default_and_updated_on_request() -> None:
    sam = make_sam(tiny_vit_t_spec(), image_size=64)
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    sam.train()
    sam.image_encoder(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in sam.state_dict().items())
    freeze_batch_norm(sam, frozen=False)
    sam.image_encoder(torch.randn(2, 3, 64, 64))
    assert not torch.equal(sam.state_dict()["image_encoder.patch_embed.seq.0.bn.running_mean"],
                           before["image_encoder.patch_embed.seq.0.bn.running_mean"])  # fmt: skip


def test_attention_biases__never_stale_after_an_update_in_place() -> None:
    """Check that biases are not cached as in timm, where an EMA teacher would never change."""
    teacher = encoder_of().eval()
    images = torch.randn(1, 3, 64, 64)
    before = teacher(images)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("attention_biases"):
                parameter.add_(torch.randn_like(parameter))
    fresh = copy.deepcopy(teacher)
    assert not torch.equal(teacher(images), before)
    assert torch.equal(teacher(images), fresh(images))


def test_eval_mode__can_be_trained_twice() -> None:
    """Check a second backward pass in eval mode, which fails in timm because its cache keeps a freed graph."""
    encoder = encoder_of().eval()
    for _ in range(2):
        encoder(torch.randn(1, 3, 64, 64)).sum().backward()
    assert encoder.layers[1].blocks[0].attn.attention_biases.grad.abs().sum() > 0


@pytest.mark.parametrize("spec", [tiny_vit_t_spec(), tiny_plain_spec()], ids=["vit_t", "plain"])
def test_layer_groups__every_parameter_once_in_order(spec: object) -> None:
    encoder = make_sam(spec, image_size=64).image_encoder
    groups = list(encoder.layer_groups())
    depths = [depth for depth, _ in groups]
    assert depths == sorted(depths)
    ids = [id(p) for _, parameters in groups for p in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in encoder.parameters()}


def test_checkpointing__same_gradient() -> None:
    encoder, images = encoder_of(), torch.randn(1, 3, 64, 64)
    grads = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(images).pow(2).sum().backward()
        grads.append(encoder.patch_embed.seq[0].c.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(("arch", "size", "use"), [("vit_b", 500, 496), ("vit_t", 127, 128), ("vit_h", 8, 16)])
def test_image_size__must_fit_the_grid(arch: str, size: int, use: int) -> None:
    with pytest.raises(UsageError, match=rf"got {size}. Use {use}"):
        build_sam(arch, image_size=size)


def test_arch__unknown_name_and_needless_stem_refused() -> None:
    with pytest.raises(
        UsageError,
        match="model must be one of vit_t, vit_b, vit_l, vit_h, sam2_t, sam2_s, sam2_bp, sam2_l, got 'vit_x'",
    ):
        arch_spec("vit_x")
    with pytest.raises(UsageError, match="stem must be left out for vit_b"):
        arch_spec("vit_b", Stem.conv1x1)


def test_to_pixels__statistics_of_each_architecture() -> None:
    slices = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    assert torch.equal(to_pixels(slices, arch_spec("vit_t")), slices.expand(1, 3, 1, 3))
    red = to_pixels(slices, arch_spec("vit_b"))[0, 0, 0]
    torch.testing.assert_close(red, (slices.flatten() * 255 - 123.675) / 58.395)


@pytest.mark.weights
def test_lite_medsam__finds_a_tumour_from_its_box() -> None:
    """Segment a real scan with real weights.

    Wrong loading, size or pixel scale would give at most the 0.76 of a filled box.
    """
    nibabel = pytest.importorskip("nibabel")
    root = Path(os.environ.get("SAMGRAFT_DEMO", "data/demo"))
    weights, scan = root.parent / "weights/lite_medsam.pth", root / "scans/MRBrainTumor1.nii.gz"
    if not weights.exists() or not scan.exists():
        pytest.skip("needs the demo data: make demo-data")
    volume = nibabel.load(scan).get_fdata()
    label = nibabel.load(root / "scans/MRBrainTumor1_label.nii.gz").get_fdata() == 9
    plane = int(label.sum((0, 1)).argmax())
    low, high = torch.quantile(
        torch.tensor(volume[volume > 0][::97]), torch.tensor([0.005, 0.995], dtype=torch.float64)
    )
    image = torch.tensor((volume[:, :, plane] - float(low)) / float(high - low)).clamp(0, 1).float()[None, None]
    truth = torch.tensor(label[:, :, plane])
    rows, cols = truth.nonzero(as_tuple=True)
    box = torch.tensor([[cols.min(), rows.min(), cols.max(), rows.max()]]).float()
    assert image.shape[-2:] == (256, 256)
    sam = load_sam(weights)
    with torch.no_grad():
        features = encode_images(sam, to_pixels(image, sam.image_encoder.spec))
        logits, _ = decode_boxes(sam, features, box, multimask=False)
    found = logits[0, 0] > 0
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.9
