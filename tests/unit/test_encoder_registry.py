"""Encoder shapes by name, by tensors and from stored dictionaries."""

import json

import pytest
import torch
from model_factory import make_sam, tiny_hiera_spec, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.encoders.base import freeze_batch_norm
from samgraft.shared.encoders.hiera import HieraSpec
from samgraft.shared.encoders.registry import arch_names, arch_spec, encoder_anchors, spec_from_dict, spec_from_tensors
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.shared.errors import UsageError, WeightsError

SPECS = [tiny_plain_spec(), tiny_vit_t_spec(), tiny_hiera_spec()]
VIT_B = (
    '{"arch": "vit_b", "native_image_size": 1024, "plain": {"embed_dim": 768, "depth": 12, "num_heads": 12, '
    '"global_blocks": [2, 5, 8, 11], "patch_size": 16, "attn_window_size": 14}, "tiny": null, "neck_dim": 256, '
    '"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}'
)
LITE_MEDSAM = (
    '{"arch": "vit_t", "native_image_size": 256, "plain": null, "tiny": {"stem": "conv1x1", '
    '"embed_dims": [64, 128, 160, 320], "depths": [2, 2, 6, 2], "num_heads": [2, 4, 5, 10], '
    '"attn_window_sizes": [7, 7, 14, 7]}, "neck_dim": 256, "pixel_mean": [0.0, 0.0, 0.0], '
    '"pixel_std": [255.0, 255.0, 255.0]}'
)
"""Shapes as the first released bundles store them."""


@pytest.mark.parametrize(("arch", "stored"), [("vit_b", VIT_B), ("vit_t", LITE_MEDSAM)])
def test_stored_shape__bytes_are_those_of_the_first_releases(arch: str, stored: str) -> None:
    assert json.dumps(arch_spec(arch).to_dict()) == stored
    assert spec_from_dict(json.loads(stored)) == arch_spec(arch)


def test_stored_shape__unknown_family_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"unknown family \(expected one of tiny, plain, hiera\). Update samgraft"):
        spec_from_dict({"arch": "fern", "plain": None, "tiny": None, "fern": {"depth": 3}})


def test_arch_spec__returns_the_default_variant_or_the_named_one() -> None:
    assert arch_names() == ["vit_t", "vit_b", "vit_l", "vit_h", "sam2_t", "sam2_s", "sam2_bp", "sam2_l"]
    assert arch_spec("vit_t").variant == Stem.conv1x1
    assert arch_spec("vit_t", "conv3x3").variant == Stem.conv3x3
    assert arch_spec("vit_b").variant is None
    with pytest.raises(UsageError, match="stem must be one of conv1x1, conv3x3 for vit_t, got 'conv5x5'"):
        arch_spec("vit_t", "conv5x5")


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "vit_t", "hiera"])
def test_spec_from_tensors__missing_anchor_is_refused_by_name(spec: object) -> None:
    encoder = spec.build(image_size=96)
    tensors = {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    assert spec_from_tensors(tensors).has_shape_of(spec)
    assert set(spec.anchors) <= set(encoder_anchors())
    # The shape is not read from the norm, which the strict loader reports later.
    for anchor in {anchor for anchor in spec.anchors if not anchor.endswith("blocks.0.norm1.weight")}:
        without = {name: tensor for name, tensor in tensors.items() if name != f"image_encoder.{anchor}"}
        with pytest.raises(WeightsError, match=f"image_encoder.{anchor} is missing"):
            spec_from_tensors(without)


def test_spec_from_tensors__flat_tensor_is_refused() -> None:
    tensors = dict(make_sam(tiny_plain_spec(), image_size=64).state_dict())
    tensors["image_encoder.pos_embed"] = torch.zeros(3)
    with pytest.raises(WeightsError, match="too few dimensions"):
        spec_from_tensors(tensors)


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "vit_t", "hiera"])
def test_declared_names__exist_in_the_encoder(spec: object) -> None:
    """A name that matches nothing would leave a layer without an adapter, silently."""
    encoder = spec.build(image_size=64)
    modules = dict(encoder.named_modules())
    assert set(spec.block_names()) | set(spec.convolution_stage()) <= set(modules)
    units = {id(part) for unit in encoder.units() for part in unit.modules()}
    assert {id(modules[name]) for name in spec.block_names()} <= units
    assert all(hasattr(encoder, name) for name in encoder.entry_points)
    assert encoder.forward_features(torch.zeros(1, 3, 64, 64)).shape[1] == spec.feature_dim


def test_freeze_batch_norm__survives_a_change_of_mode() -> None:
    encoder = tiny_vit_t_spec().build(image_size=64)
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(norm.training for norm in [encoder.train(), *norms][1:])
    freeze_batch_norm(encoder, frozen=False)
    assert all(norm.training for norm in norms)


@pytest.mark.parametrize("arch", ["sam2_t", "sam2_s", "sam2_bp", "sam2_l"])
def test_hiera_shape__is_read_from_tensors_and_stored(arch: str) -> None:
    spec = arch_spec(arch)
    with torch.device("meta"):
        tensors = spec.build(image_size=64).state_dict()
    found = spec_from_tensors({f"image_encoder.{name}": tensor for name, tensor in tensors.items()})
    assert found == spec
    assert found.assumptions is None
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("spec", HieraSpec.published(), ids=lambda spec: spec.arch)
def test_hiera_shape__rule_for_unpublished_shapes_gives_the_published_ones(
    spec: HieraSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads, global blocks and windows are not in the tensors; the rule must at least agree where they are known."""
    with torch.device("meta"):
        tensors = spec.build(image_size=64).state_dict()
    monkeypatch.setattr(HieraSpec, "published", classmethod(lambda cls: ()))
    found = HieraSpec.from_tensors(tensors)
    assert found.shape == spec.shape
    assert "unpublished shape" in found.title
    assert f"heads ({spec.num_heads})" in str(found.assumptions)


def test_hiera_shape__file_without_its_last_blocks_is_refused() -> None:
    with torch.device("meta"):
        state = arch_spec("sam2_t").build(image_size=64).state_dict()
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("trunk.blocks.11.")}
    assert HieraSpec.from_tensors(tensors).find_missing_end() == "1 blocks in the last stage, expected 2"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("trunk.blocks.10.")}
    with pytest.raises(WeightsError, match=r"has 3 stages in 10 blocks, expected 4. Save all"):
        HieraSpec.from_tensors(tensors)


def test_image_size__must_be_a_multiple_of_the_mask_unit() -> None:
    with pytest.raises(UsageError, match=r"multiple of 32 for sam2_t, got 80\. Use 64"):
        arch_spec("sam2_t").build(image_size=80)
