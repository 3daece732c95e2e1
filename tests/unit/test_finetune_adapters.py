"""LoRA and whole tensors in a SAM, and classes beyond SAM's mask tokens."""

import os
import re

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.finetune.adapters import (
    AdapterConfig,
    Targets,
    TuningScope,
    adapt,
    head_names,
    save_adapter,
    target_pattern,
    trainable_tensors,
)
from samgraft.finetune.adapters.saving import keep_base_sha256
from samgraft.finetune.loss import SegmentationLoss
from samgraft.finetune.segmenter import Segmenter, add_class_tokens
from torch import nn

SPECS = {"vit_t": (tiny_vit_t_spec(), 32), "plain": (tiny_plain_spec(), 160)}


def make_segmenter(family, config, *, num_classes=1):
    spec, size = SPECS[family]
    sam = make_sam(spec, image_size=size)
    add_class_tokens(sam, num_classes=num_classes)
    torch.manual_seed(1)
    peft_model = adapt(sam, config, num_classes=num_classes)
    return Segmenter(sam, num_classes=num_classes), peft_model


def one_step(segmenter, *, num_classes=1, lr=0.1):
    """Do two updates, because LoRA's A gets a gradient only when B is not 0 any more."""
    size = segmenter.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, size, size, generator=generator)
    channels = torch.randint(0, num_classes + 1, (2, size, size), generator=generator)
    segmenter.train()
    optimizer = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        SegmentationLoss()(segmenter(images), channels).backward()
        optimizer.step()


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("scope", [TuningScope.ENCODER_DECODER, TuningScope.DECODER])
@pytest.mark.parametrize("targets", Targets)
def test_adapt__lora_changes_exactly_the_expected_tensors(family, scope, targets):
    config = AdapterConfig(scope=scope, targets=targets, r=2, lora_alpha=2)
    segmenter, _ = make_segmenter(family, config)
    before = {name: tensor.clone() for name, tensor in segmenter.sam.state_dict().items()}
    one_step(segmenter)
    pattern = target_pattern(SPECS[family][0], config)
    moved = changed(before, segmenter.sam)
    adapted = {name.split(".lora_")[0] for name in moved if ".lora_" in name}
    layers = {
        name.removesuffix(".base_layer")
        for name, module in segmenter.sam.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }
    assert adapted == {name for name in layers if re.fullmatch(pattern, name)}
    others = {name for name in moved if ".lora_" not in name}
    # The mask tokens train through the first hypernetwork and the transformer.
    expected = {n for n in trainable_tensors(segmenter.sam) if ".modules_to_save." in n}
    assert others == expected
    assert {re.sub(r"\.modules_to_save\.default.*", "", name) for name in others} == set(head_names(1))
    assert any(name.startswith("image_encoder.") for name in moved) is (scope is TuningScope.ENCODER_DECODER)
    assert not any(name.startswith("prompt_encoder.") for name in moved)
    assert not any("running_" in name or "num_batches_tracked" in name for name in moved)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("scope", [TuningScope.ENCODER_DECODER, TuningScope.DECODER])
def test_adapt__full_changes_all_tensors_that_the_loss_reaches(family, scope):
    segmenter, peft_model = make_segmenter(family, AdapterConfig(method="full", scope=scope))
    assert peft_model is None
    before = {name: tensor.clone() for name, tensor in segmenter.sam.state_dict().items()}
    one_step(segmenter)
    moved = changed(before, segmenter.sam)
    trainable = set(trainable_tensors(segmenter.sam))
    assert moved <= trainable
    # Softmax does not see a bias that is the same for every key: its gradient is 0 up to rounding.
    still = {n for n, p in segmenter.sam.named_parameters() if p.requires_grad and not p.grad.any()}
    assert all(n.endswith("k_proj.bias") for n in still)
    unreached = {n for n in before if n.startswith("mask_decoder.") and n not in trainable}
    assert {n.split(".")[1] for n in unreached} == {"iou_prediction_head", "output_hypernetworks_mlps"}
    assert not any("hypernetworks_mlps.0." in n for n in unreached)
    assert any(n.startswith("image_encoder.") for n in moved) is (scope is TuningScope.ENCODER_DECODER)


@pytest.mark.parametrize("family", SPECS)
def test_adapt__lora_is_a_no_op_before_training(family):
    spec, size = SPECS[family]
    images = torch.rand(2, 1, size, size)
    plain = Segmenter(make_sam(spec, image_size=size), num_classes=1)
    segmenter, _ = make_segmenter(family, AdapterConfig(r=2))
    with torch.no_grad():
        assert torch.equal(plain(images), segmenter.eval()(images))


@pytest.mark.parametrize("family", SPECS)
def test_merge__lora_gives_equal_outputs_under_sams_own_names(family):
    spec, size = SPECS[family]
    segmenter, peft_model = make_segmenter(family, AdapterConfig(r=2))
    one_step(segmenter, lr=0.05)
    images = torch.rand(2, 1, size, size)
    segmenter.eval()
    with torch.no_grad():
        unmerged = segmenter(images)
        merged_sam = peft_model.merge_and_unload()
        merged = Segmenter(merged_sam, num_classes=1).eval()(images)
    torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=1e-4)
    original = make_sam(spec, image_size=size)
    assert set(merged_sam.state_dict()) == set(original.state_dict())
    with torch.no_grad():
        start = Segmenter(original, num_classes=1)(images)
    assert (merged - start).abs().max() > 1e-3


def test_qkv_rows__tiny_vit_has_keys_in_every_head():
    spec, _ = SPECS["vit_t"]
    # Two heads of three wide: head 0 is rows 0-8 (q 0-2, k 3-5, v 6-8), head 1 rows 9-17.
    assert spec.qkv_rows(1, out_features=18, num_heads=2).tolist() == [3, 4, 5, 12, 13, 14]


def test_qkv_rows__plain_vit_has_keys_in_the_middle_third():
    spec, _ = SPECS["plain"]
    assert spec.qkv_rows(1, out_features=18, num_heads=2).tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("family", SPECS)
def test_adapt__qv_leaves_keys_unchanged(family):
    config = AdapterConfig(targets=Targets.QV, r=2)
    segmenter, _ = make_segmenter(family, config)
    one_step(segmenter)
    spec = SPECS[family][0]
    found = 0
    for name, module in segmenter.sam.named_modules():
        if name.startswith("image_encoder") and name.endswith(".attn") and hasattr(module.qkv, "lora_B"):
            weight = module.qkv.lora_B["default"].weight
            rows = spec.qkv_rows(1, out_features=weight.shape[0], num_heads=module.num_heads)
            rest = torch.ones(len(weight), dtype=torch.bool)
            rest[rows] = False
            assert torch.count_nonzero(weight[rows]) == 0
            assert (weight[rest].abs().sum(dim=1) > 0).all()
            # Each row uses the factors of the queries (first half) or of the values, never both.
            halves = weight.unflatten(1, (2, -1)).abs().sum(dim=2) > 0
            assert (halves[rest].sum(dim=1) == 1).all()
            assert halves.any(dim=0).all()
            found += 1
    assert found > 0


def test_adapt__decoder_scope_needs_no_gradient_in_the_encoder():
    """Below the first trainable tensor nothing is kept for the backward pass."""
    segmenter, _ = make_segmenter("vit_t", AdapterConfig(scope=TuningScope.DECODER, r=2))
    images = torch.rand(1, 1, 32, 32)
    embeddings = segmenter.sam.image_encoder(images.repeat(1, 3, 1, 1))
    assert not embeddings.requires_grad
    assert segmenter(images).requires_grad


@pytest.mark.parametrize("num_classes", [1, 3])
def test_add_class_tokens__three_classes_keep_sams_shape(num_classes):
    spec, size = SPECS["vit_t"]
    sam = make_sam(spec, image_size=size)
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    add_class_tokens(sam, num_classes=num_classes)
    assert all(torch.equal(before[k], v) for k, v in sam.state_dict().items())
    assert Segmenter(sam, num_classes=num_classes)(torch.rand(1, 1, size, size)).shape[1] == num_classes


def test_add_class_tokens__further_tokens_are_copies():
    spec, size = SPECS["vit_t"]
    sam = make_sam(spec, image_size=size)
    images = torch.rand(2, 1, size, size)
    with torch.no_grad():
        old = Segmenter(sam, num_classes=3)(images)
    old_tokens = sam.mask_decoder.mask_tokens.weight.detach().clone()
    add_class_tokens(sam, num_classes=5)
    tokens = sam.mask_decoder.mask_tokens.weight
    assert torch.equal(tokens[:4], old_tokens)
    assert torch.equal(tokens[4:], old_tokens[1:3])
    with torch.no_grad():
        assert Segmenter(sam, num_classes=5)(images).shape[1] == 5
    assert old.shape[1] == 3
    segmenter = Segmenter(sam, num_classes=5)
    adapt(sam, AdapterConfig(r=2), num_classes=5)
    one_step(segmenter, num_classes=5)
    trained = sam.mask_decoder.output_hypernetworks_mlps
    assert not torch.equal(
        trained[1].modules_to_save["default"].layers[0].weight, trained[4].modules_to_save["default"].layers[0].weight
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"r\n  Input should be gr"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_alpha": 0}, "lora_alpha"),
    ],
)
def test_adapter_config__bad_value_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**values)


@pytest.mark.parametrize("method", ["lora", "pissa"])  # peft writes the first, samgraft the second
def test_save_adapter__files_follow_the_umask(method, tmp_path):
    _, peft_model = make_segmenter("plain", AdapterConfig(method=method, r=2, lora_alpha=2))
    keep_base_sha256(peft_model, "0" * 64)
    before = os.umask(0o007)
    try:
        save_adapter(peft_model, tmp_path, method=method)
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir() if "adapter_" in p.name} == {
        "adapter_base.json": "0o660",
        "adapter_config.json": "0o660",
        "adapter_model.safetensors": "0o660",
    }
