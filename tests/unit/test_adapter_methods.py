"""Fine-tuning methods on small models, from the tensors that change to merging, saving and loading."""

import re

import pytest
import torch
from samgraft.finetune.adapters import (
    METHODS,
    AdapterConfig,
    RankUpdates,
    Targets,
    TuningScope,
    adapt,
    base_tensors,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from samgraft.finetune.adapters.eva import initialise_eva
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.load import read_weights
from tiny_sams import SPECS, images_for, logits_of, take_steps, tiny_sam

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYERS = [f"mask_decoder.transformer.layers.{i}" for i in (0, 1)]
DECODER_ATTENTION = [
    *(
        f"{layer}.{attention}.{name}"
        for layer in LAYERS
        for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        for name in ATTENTION
    ),
    *(f"mask_decoder.transformer.final_attn_token_to_image.{name}" for name in ATTENTION),
]
PROJECTIONS = tuple(f"mask_decoder.conv_s{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias"))
BLOCKS = {
    "vit_t": [f"image_encoder.layers.{name}" for name in ("1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")],
    "vit_b": [f"image_encoder.blocks.{i}" for i in range(3)],
    "vit_h": [f"image_encoder.blocks.{i}" for i in range(5)],
    "sam2_t": [f"image_encoder.trunk.blocks.{i}" for i in range(5)],
}
IN_BLOCK = {
    "vit_t": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "vit_b": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "sam2_t": ("attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1"),
}
NORMS = {"vit_t": ("attn.norm", "mlp.norm"), "vit_b": ("norm1", "norm2"), "sam2_t": ("norm1", "norm2")}
NECK = {"vit_t": ("neck.0", "neck.2"), "vit_b": ("neck.0", "neck.2"), "sam2_t": ("neck.convs.1.conv",)}
DECODER_NORMS = [
    *(f"{layer}.norm{i}" for layer in LAYERS for i in (1, 2, 3, 4)),
    "mask_decoder.transformer.norm_final_attn",
]
# What a method adds to each targeted layer.
ADDED = {
    "lora": ("lora_A.default.weight", "lora_B.default.weight"),
    "rslora": ("lora_A.default.weight", "lora_B.default.weight"),
    "pissa": ("lora_A.default.weight", "lora_B.default.weight"),
    "eva": ("lora_A.default.weight", "lora_B.default.weight"),
    "dora": ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
    "adalora": ("lora_A.default", "lora_B.default", "lora_E.default"),
    "loha": tuple(f"hada_{name}.default" for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
    "ia3": ("ia3_l.default",),
    "vera": ("vera_lambda_b.default", "vera_lambda_d.default"),
    "hra": ("hra_u.default",),
    "boft": ("boft_R.default", "boft_s.default"),
    "ssf": ("ssf_scale.default", "ssf_shift.default"),
}
NOT_EXACT = {"pissa", "hra", "boft"}
"""Methods that compute the same function from other factors, so that outputs are equal up to rounding only."""
PEFT_METHODS = [name for name, method in METHODS.items() if method.build is not None]


def config_of(method, **options):
    return AdapterConfig(method=method, **{"r": 2, "lora_alpha": 4, "vera_r": 16, **options})


def adapted(arch, config, *, num_classes=1):
    sam = tiny_sam(arch)
    torch.manual_seed(1)
    peft_model = adapt(sam, config, num_classes=num_classes, max_steps=100)
    return Segmenter(sam, num_classes=num_classes), peft_model


def parameters_of(sam):
    """Return copies of all tensors by name. A shared tensor occurs under each of its names."""
    return {name: tensor.detach().clone() for name, tensor in sam.state_dict().items()}


def changed_tensors(before, sam):
    return {name for name, tensor in sam.state_dict().items() if not torch.equal(before[name], tensor)}


def encoder_layers(arch, names):
    return [f"{block}.{name}" for block in BLOCKS[arch] for name in names[arch if arch in names else "vit_b"]]


def decoder_linear(arch):
    mlp = ("layers.0", "layers.1") if arch == "sam2_t" else ("lin1", "lin2")
    return [*DECODER_ATTENTION, *(f"{layer}.mlp.{name}" for layer in LAYERS for name in mlp)]


def heads():
    """Return the tensors that train whole for one class, of mask tokens, upscaling and the first hypernetwork."""
    names = ["mask_tokens.modules_to_save.default.weight"]
    for index in (0, 1, 3):
        names += [f"output_upscaling.modules_to_save.default.{index}.{kind}" for kind in ("weight", "bias")]
    for index in range(3):
        layer = f"output_hypernetworks_mlps.0.modules_to_save.default.layers.{index}"
        names += [f"{layer}.{kind}" for kind in ("weight", "bias")]
    return {f"mask_decoder.{name}" for name in names}


def expected_tensors(arch, method, scope):
    in_encoder = scope is TuningScope.ENCODER_DECODER
    if method == "adapter":
        places = [f"{layer}.{name}" for layer in LAYERS for name in ("norm2", "norm4", "mlp")]
        places += [f"{block}.{name}" for block in BLOCKS[arch] for name in ("attn", "mlp")] if in_encoder else []
        inner = [f"{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
        return heads() | {f"{place}.bottleneck_.default.{name}" for place in places for name in inner}
    if method == "ln_tuning":
        places = [*DECODER_NORMS]
        places += encoder_layers(arch, NORMS) if in_encoder else []
        places += ["image_encoder.neck.1", "image_encoder.neck.3"] if in_encoder and arch != "sam2_t" else []
        return heads() | {f"{p}.ln_tuning_layers.default.{kind}" for p in places for kind in ("weight", "bias")}
    places = [*decoder_linear(arch), *(encoder_layers(arch, IN_BLOCK) if in_encoder else [])]
    return heads() | {f"{place}.{name}" for place in places for name in ADDED[method]}


def drop_key_shifts(names):
    """Drop shifts and biases of keys. A softmax does not depend on them, so they change by rounding at most."""
    return {n for n in names if not re.search(r"k_proj\.(bias|ssf_shift\.default)$", n)}


@pytest.mark.parametrize("arch", SPECS)
@pytest.mark.parametrize("scope", [TuningScope.ENCODER_DECODER, TuningScope.DECODER])
@pytest.mark.parametrize("method", ["full", "adapter", "lora"])
def test_adapt__study_combinations_change_exactly_the_expected_tensors(arch, scope, method):
    segmenter, _ = adapted(arch, config_of(method))  if scope is TuningScope.ENCODER_DECODER else adapted(
        arch, config_of(method, scope=scope)
    )  # fmt: skip
    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = drop_key_shifts(changed_tensors(before, segmenter.sam))
    if method != "full":
        assert moved == expected_tensors(arch, method, scope)
        return
    parts = ["mask_decoder."] + ["image_encoder."] * (scope is TuningScope.ENCODER_DECODER)
    unreached = (
        "mask_decoder.iou_prediction_head.",
        "mask_decoder.pred_obj_score_head.",
        *(PROJECTIONS if scope is TuningScope.DECODER else ()),
        *(f"mask_decoder.output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
    )
    parameters = {name for name, _ in segmenter.sam.named_parameters()}
    expected = {n for n in parameters if n.startswith(tuple(parts)) and not n.startswith(unreached)}
    assert moved == drop_key_shifts(expected)


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "sam2_t"])
@pytest.mark.parametrize("method", [m for m in PEFT_METHODS if m != "eva"])
def test_adapt__every_method_starts_as_a_no_op_and_survives_merging_and_loading(arch, method, tmp_path):
    segmenter, peft_model = adapted(arch, config_of(method))
    start = logits_of(tiny_sam(arch), arch)
    first = logits_of(segmenter.sam, arch)
    # Matrix products depend on the alignment of their operands in the last bits: close, not equal.
    bound = 1e-4 if method in NOT_EXACT else 2e-6
    torch.testing.assert_close(first, start, atol=bound, rtol=bound)

    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = drop_key_shifts(changed_tensors(before, segmenter.sam))
    if method == "lokr":  # which of its factors are split depends on the shape
        added = {n for n in moved if ".lokr_w" in n}
        assert {n.split(".lokr_w")[0] for n in added} == {*decoder_linear(arch), *encoder_layers(arch, IN_BLOCK)}
        assert moved - added == heads()
        assert added == {n for n, _ in segmenter.sam.named_parameters() if ".lokr_w" in n}
    else:
        assert moved == drop_key_shifts(expected_tensors(arch, method, TuningScope.ENCODER_DECODER))

    trained = logits_of(segmenter.sam, arch)
    assert (trained - start).abs().max() > 1e-3
    save_adapter(peft_model, tmp_path, method=method)
    loaded = load_adapter(tiny_sam(arch), tmp_path)
    if method != "pissa":  # written as the LoRA that it amounts to
        stored, again = peft_model.state_dict(), loaded.state_dict()
        assert set(stored) == set(again)
        assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
        base = base_tensors(segmenter.sam)
        assert set(base) == set(tiny_sam(arch).state_dict())
        assert all(torch.equal(tensor, base[name]) for name, tensor in tiny_sam(arch).state_dict().items())
    bound = 1e-4 if method == "pissa" else 2e-6
    torch.testing.assert_close(logits_of(loaded.base_model.model, arch), trained, atol=bound, rtol=bound)

    if not METHODS[method].is_mergeable:
        with pytest.raises(TypeError, match="cannot be merged"):
            merge_adapters(peft_model)
        return
    merged = merge_adapters(peft_model)
    torch.testing.assert_close(logits_of(merged, arch), trained, atol=1e-5, rtol=1e-5)
    assert set(merged.state_dict()) == set(tiny_sam(arch).state_dict())


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "sam2_t"])
def test_adapt__bitfit_changes_biases_and_heads_only(arch):
    segmenter, peft_model = adapted(arch, config_of("bitfit"))
    assert peft_model is None
    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = changed_tensors(before, segmenter.sam)
    weights = {n for n in moved if not n.endswith(".bias")}
    assert weights == {n.replace(".modules_to_save.default", "") for n in heads() if n.endswith(".weight")}
    biases = {n for n, p in segmenter.sam.named_parameters() if n.endswith(".bias") and p.requires_grad}
    assert drop_key_shifts(moved - weights) == drop_key_shifts(biases)
    assert any(n.startswith("image_encoder.") for n in biases)


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "sam2_t"])
@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_adapt__last_blocks_leave_the_blocks_below_unchanged(arch, method):
    segmenter, _ = adapted(arch, config_of(method, last_blocks=1))
    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = {n for n in changed_tensors(before, segmenter.sam) if n.startswith("image_encoder.")}
    last = BLOCKS[arch][-1]
    allowed = (f"{last}.", "image_encoder.neck.") if method == "full" else (f"{last}.",)
    assert moved
    assert all(n.startswith(allowed) for n in moved)


def test_adapt__blocks_are_chosen_by_number():
    segmenter, _ = adapted("vit_h", config_of("lora", blocks=[0, 3]))
    adapted_blocks = {n.split(".attn")[0] for n, _ in segmenter.sam.named_parameters() if ".attn.qkv.lora_A" in n}
    assert adapted_blocks == {"image_encoder.blocks.0", "image_encoder.blocks.3"}


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "sam2_t"])
def test_adapt__neck_scope_trains_the_whole_neck_and_merges(arch):
    segmenter, peft_model = adapted(arch, config_of("lora", scope=TuningScope.NECK_DECODER))
    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = changed_tensors(before, segmenter.sam)
    neck = {n for n in before if n.startswith("image_encoder.neck.modules_to_save.")}
    assert {n for n in moved if n.startswith("image_encoder.")} == neck
    assert len(neck) == (8 if arch == "sam2_t" else 6)
    projections = {n for n in before if n.startswith("mask_decoder.conv_s") and "modules_to_save" in n}
    assert {n for n in moved if n.startswith("mask_decoder.conv_s")} == projections
    assert len(projections) == (4 if arch == "sam2_t" else 0)
    trained = logits_of(segmenter.sam, arch)
    torch.testing.assert_close(logits_of(merge_adapters(peft_model), arch), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["vit_t", "vit_b", "sam2_t"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "ia3", "hra"])
def test_adapt__linear_conv_adapts_convolutions_and_merges(arch, method):
    segmenter, peft_model = adapted(arch, config_of(method, targets=Targets.LINEAR_CONV))
    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = changed_tensors(before, segmenter.sam)
    for place in (f"image_encoder.{name}" for name in NECK[arch]):
        assert any(n.startswith(f"{place}.") for n in moved), place
    if arch == "sam2_t":
        assert any(n.startswith("mask_decoder.conv_s0.") for n in moved)
    if arch == "vit_t":
        for place in ("layers.0.blocks.0.conv1.c", "layers.0.blocks.0.conv3.c", "layers.1.downsample.conv1.c"):
            assert any(n.startswith(f"image_encoder.{place}.") for n in moved), place
    trained = logits_of(segmenter.sam, arch)
    merged = merge_adapters(peft_model)
    torch.testing.assert_close(logits_of(merged, arch), trained, atol=2e-5, rtol=2e-5)


def test_initialise_eva__factors_are_the_main_directions_of_the_inputs():
    arch = "vit_b"
    segmenter, peft_model = adapted(arch, config_of("eva"))
    start = logits_of(tiny_sam(arch), arch)
    torch.manual_seed(3)
    initialise_eva(peft_model, segmenter.eval(), [images_for(arch)])
    torch.testing.assert_close(logits_of(segmenter.sam, arch), start, atol=2e-6, rtol=2e-6)

    layer = segmenter.sam.image_encoder.blocks[0].mlp.lin1
    rows = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), atol=1e-4, rtol=1e-4)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].reshape(-1, 16)))
    logits_of(segmenter.sam, arch)
    handle.remove()
    centred = torch.cat(seen) - torch.cat(seen).mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    kept = (centred @ rows.T).pow(2).sum() / (centred @ directions.T).pow(2).sum()
    assert kept > 0.99

    before = parameters_of(segmenter.sam)
    take_steps(segmenter, arch)
    moved = drop_key_shifts(changed_tensors(before, segmenter.sam))
    assert moved == expected_tensors(arch, "eva", TuningScope.ENCODER_DECODER)


def test_rank_updates__penalty_is_the_mean_distance_of_the_factors_from_orthogonal_ones():
    """Factors A have one row per rank and factors B one column."""
    _, peft_model = adapted("vit_t", config_of("adalora"))
    config, distances = peft_model.peft_config["default"], []
    for name, factor in peft_model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            with torch.no_grad():
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(distances))))
            rows = factor.detach() if ".lora_A." in name else factor.detach().T
            assert len(rows) == config.init_r
            distances.append((rows @ rows.T - torch.eye(config.init_r)).square().sum().sqrt())
    expected = config.orth_reg_weight * torch.stack(distances).mean()
    assert config.orth_reg_weight != 1
    torch.testing.assert_close(RankUpdates.of(peft_model).penalty(), expected)


@pytest.mark.parametrize(("stop", "last"), [(37, 50), (65, 70)], ids=["while ranks move", "once they are fixed"])
def test_rank_updates__resumed_run_moves_the_same_ranks(tmp_path, stop, last):
    arch = "vit_t"

    def train(segmenter, peft_model, *, first, last, state=None):
        updates = RankUpdates.of(peft_model)
        if state is not None:
            updates.load(state)
        segmenter.train()
        parameters = [p for p in segmenter.parameters() if p.requires_grad]
        for step in range(first, last):
            for parameter in parameters:
                parameter.grad = None
            (segmenter(images_for(arch)).square().mean() + updates.penalty()).backward()
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
            updates.after_update(step + 1)
        return updates.state()

    whole, whole_model = adapted(arch, config_of("adalora"))
    ended = train(whole, whole_model, first=0, last=last)
    part, part_model = adapted(arch, config_of("adalora"))
    state = train(part, part_model, first=0, last=stop)
    rest, rest_model = adapted(arch, config_of("adalora"))
    rest.load_state_dict(part.state_dict())
    resumed = train(rest, rest_model, first=stop, last=last, state=state)
    for (name, expected), tensor in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(expected, tensor), name
    assert resumed["rank_pattern"] == ended["rank_pattern"]
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        assert set(resumed[name]) == set(ended[name])
        assert all(torch.equal(tensor, ended[name][key]) for key, tensor in resumed[name].items()), name
    if last < 60:
        return
    pattern = whole_model.peft_config["default"].rank_pattern
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 2 * len(ranks)  # down to rank 2 on average, from 3
    assert len(set(ranks)) > 1
    trained = logits_of(whole.sam, arch)
    save_adapter(whole_model, tmp_path, method="adalora")
    loaded = load_adapter(tiny_sam(arch), tmp_path)
    torch.testing.assert_close(logits_of(loaded.base_model.model, arch), trained, atol=2e-6, rtol=2e-6)
    assert RankUpdates.of(adapted(arch, config_of("lora"))[1]) is None
    assert RankUpdates.of(None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "last_blocks": 4}, r"last_blocks must be at most the 3 transformer blocks"),
        ({"method": "full", "blocks": [0, 7]}, r"blocks must be numbers below the 3 .*got \[7\]"),
        ({"method": "lora", "r": 9}, r"r must be at most 8, the smaller side of mask_decoder"),
        ({"method": "boft", "boft_block_size": 3}, r"boft_block_size must divide .* 3 does not"),
        ({"method": "adalora"}, r"needs trainer.max_steps"),
    ],
)
def test_adapt__setting_that_does_not_fit_is_refused_and_the_model_unchanged(options, message):
    sam = tiny_sam("vit_b")
    names, flags = set(sam.state_dict()), [p.requires_grad for p in sam.parameters()]
    with pytest.raises(UsageError, match=message):
        adapt(sam, AdapterConfig(**options), num_classes=1)
    assert (set(sam.state_dict()), [p.requires_grad for p in sam.parameters()]) == (names, flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hra", "r": 3}, "must be a multiple of 2 for hra"),
        ({"method": "vera", "targets": Targets.QV}, "targets=qv needs one of lora, dora, rslora"),
        ({"method": "vera", "targets": Targets.LINEAR_CONV}, "linear_conv needs one of"),
        ({"scope": TuningScope.DECODER, "last_blocks": 2}, "scope=encoder_decoder"),
        ({"last_blocks": 0}, r"last_blocks\n  Input should be greater than or equal to 1"),
        ({"last_blocks": 1, "blocks": [0]}, "must not both be given"),
        ({"blocks": [1, 1]}, "different numbers"),
        ({"bottleneck_ratio": 0.0}, "bottleneck_ratio"),
        ({"vera_r": 0}, "vera_r"),
    ],
)
def test_adapter_config__contradiction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


def test_load_adapter__another_architecture_or_missing_file_is_refused(tmp_path):
    _, peft_model = adapted("vit_b", config_of("lora"))
    save_adapter(peft_model, tmp_path, method="lora")
    with pytest.raises(WeightsError, match="does not fit its base weights"):
        load_adapter(tiny_sam("vit_t"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(tiny_sam("vit_b"), tmp_path)


def test_adapt__unread_option_gives_a_warning(caplog):
    caplog.set_level("WARNING")
    adapt(tiny_sam("vit_b"), AdapterConfig(method="ia3", r=4), num_classes=1)
    assert "adapter.r is not read by adapter.method=ia3" in caplog.text


def test_load_adapter__other_base_weights_of_equal_shape_are_refused(tmp_path):
    _, peft_model = adapted("vit_t", config_of("lora"))
    save_adapter(peft_model, tmp_path, method="lora")
    other = tiny_sam("vit_t")
    with torch.no_grad():
        other.image_encoder.neck[0].weight[0, 0] += 1e-3
    with pytest.raises(WeightsError, match=r"trained on other base weights"):
        load_adapter(other, tmp_path)
    with pytest.raises(WeightsError, match=r"adapter alone, for the base weights with tensors_sha256 [0-9a-f]{16}"):
        read_weights(tmp_path)
    load_adapter(tiny_sam("vit_t"), tmp_path)
    (tmp_path / "adapter_base.json").write_text("{}")
    with pytest.raises(WeightsError, match="is damaged"):
        load_adapter(tiny_sam("vit_t"), tmp_path)
    (tmp_path / "adapter_base.json").unlink()  # an adapter of stock peft names no base
    load_adapter(tiny_sam("vit_t"), tmp_path)
