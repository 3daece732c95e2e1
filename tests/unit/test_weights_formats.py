"""Layouts of weights files, their conversion to SAM's names, and strict loading."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from safetensors.torch import save_file
from samgraft.shared.encoders.registry import arch_names, arch_spec, spec_from_tensors
from samgraft.shared.encoders.sam import build_sam, to_pixels
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.shared.encoders.vit import ViTEncoder, ViTSpec
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights import load
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import (
    absent_by_nature,
    card_of,
    load_image_encoder,
    load_into,
    load_sam,
    read_weights,
)
from samgraft.shared.weights.positions import resize_positions
from samgraft.shared.weights.save import save_encoder, save_sam
from samgraft.shared.weights.transformers_format import save_transformers
from segment_anything.modeling.image_encoder import get_rel_pos

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return dict(make_sam(tiny_plain_spec(), image_size=160).state_dict())


def encoder_part(tensors: Tensors, prefix: str = "") -> Tensors:
    head = "image_encoder."
    return {prefix + k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("ending", ["pth", "safetensors", "txt"])
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_container__is_recognised_by_content_not_by_name(
    tmp_path: Path, plain: Tensors, container: str, ending: str
) -> None:
    path = tmp_path / f"w.{ending}"
    (torch.save if container == "torch" else save_file)(plain, path)
    assert same(load_sam(path).state_dict(), plain)


WRAPPED = {
    "flat": lambda t: t,
    "ordered": OrderedDict,
    "medsam": lambda t: {"model": t, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 7},
    "lightning": lambda t: {
        "state_dict": {f"sam.{k}": v for k, v in t.items()},
        "_instantiator": "os.system",
        "epoch": 1,
    },
    "beside numbers": lambda t: {"model": t, 0: 7},
    "ddp": lambda t: {f"module.{k}": v for k, v in t.items()},
    "compiled": lambda t: {f"_orig_mod.{k}": v for k, v in t.items()},
    "compiled inside ddp": lambda t: {f"module._orig_mod.{k}": v for k, v in t.items()},
    "compiled encoder": lambda t: {k.replace("image_encoder.", "image_encoder._orig_mod."): v for k, v in t.items()},
    "pixel statistics": lambda t: {**t, "pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapping__is_removed_with_a_note(tmp_path: Path, plain: Tensors, kind: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(WRAPPED[kind](plain), path)
    weights = read_weights(path)
    assert same(weights.tensors, plain)
    assert bool(weights.notes) == (kind not in {"flat", "ordered"})


@pytest.mark.parametrize("stem", list(Stem))
def test_vit_t__stem_is_recognised_by_shape(tmp_path: Path, stem: Stem) -> None:
    sam = make_sam(tiny_vit_t_spec(stem=stem), image_size=64)
    tensors = dict(sam.state_dict())
    # MobileSAM's file also holds the classification head of its backbone.
    head = {"image_encoder.norm_head.weight": torch.ones(32), "image_encoder.head.weight": torch.ones(10, 32)}
    torch.save({**tensors, **head}, tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert weights.spec.stem is stem
    assert weights.spec == sam.image_encoder.spec
    assert any("norm_head" in note for note in weights.notes)
    loaded = load_sam(tmp_path / "w.pt", image_size=64)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.image_encoder(image), sam.image_encoder(image))


@pytest.mark.parametrize("prefix", ["", "image_encoder.", "module.", "encoder."])
def test_encoder_only__with_or_without_prefix(tmp_path: Path, plain: Tensors, prefix: str) -> None:
    torch.save({"model": encoder_part(plain, prefix)}, tmp_path / "sslsam.pth")
    encoder, card = load_image_encoder(tmp_path / "sslsam.pth")
    assert same(dict(encoder.state_dict()), encoder_part(plain))
    assert (card.image_size, card.base_name) == (160, "sslsam.pth")
    with pytest.raises(WeightsError, match=r"missing \(prompt_encoder"):
        load_sam(tmp_path / "sslsam.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types__become_float32_with_a_note(tmp_path: Path, plain: Tensors, dtype: torch.dtype) -> None:
    torch.save({k: v.to(dtype) for k, v in plain.items()}, tmp_path / "w.pth")
    weights = read_weights(tmp_path / "w.pth")
    assert {v.dtype for v in weights.tensors.values()} == {torch.float32}
    assert f"{len(plain)} tensors converted from {str(dtype)[6:]} to float32" in weights.notes


def test_constant_tensor__gives_a_warning(tmp_path: Path, plain: Tensors) -> None:
    torch.save({**plain, "image_encoder.neck.0.weight": torch.zeros(32, 32, 1, 1)}, tmp_path / "w.pth")
    assert "warning: image_encoder.neck.0.weight is constant (0)" in read_weights(tmp_path / "w.pth").notes


def as_plain_vit(tensors: Tensors, *, chunked: bool = False, class_token: bool = True) -> Tensors:
    """Return SAM's blocks under timm's names, without the tensors that a plain ViT lacks."""
    out: Tensors = {}
    for key, value in encoder_part(tensors).items():
        if "rel_pos" in key or key.startswith("neck."):
            continue
        name = key.replace("mlp.lin1", "mlp.fc1").replace("mlp.lin2", "mlp.fc2")
        if chunked and name.startswith("blocks."):
            words = name.split(".")
            name = ".".join(["blocks", str(int(words[1]) // 2), *words[1:]])
        out[name] = value
    positions = out["pos_embed"].flatten(1, 2)
    out["pos_embed"] = torch.cat([torch.full((1, 1, 32), 9.0), positions], 1) if class_token else positions
    out |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    return out | ({"cls_token": torch.ones(1, 1, 32)} if class_token else {})


PLAIN_VITS = {
    "mae": lambda t: {"model": as_plain_vit(t) | {"decoder_pred.weight": torch.ones(4), "mask_token": torch.ones(4)}},
    "mae without class token": lambda t: {"model": as_plain_vit(t, class_token=False)},
    "dino": lambda t: {
        "student": {f"module.backbone.{k}": v + 1 for k, v in as_plain_vit(t).items()},
        "teacher": {f"backbone.{k}": v for k, v in as_plain_vit(t).items()} | {"head.mlp.0.weight": torch.ones(2)},
    },
    "mri-core": lambda t: {"teacher": {f"backbone.{k}": v for k, v in as_plain_vit(t, chunked=True).items()}},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN_VITS)
def test_plain_vit__gets_relative_positions_and_neck_from_the_base(tmp_path: Path, plain: Tensors, kind: str) -> None:
    base, path = tmp_path / "base.pth", tmp_path / "ssl.pth"
    torch.save({k: v + 1 for k, v in plain.items()}, base)
    torch.save(PLAIN_VITS[kind](plain), path)
    with pytest.raises(WeightsError, match=r"without SAM's relative positions and neck.*BASE="):
        load_image_encoder(path)
    encoder, _ = load_image_encoder(path, base=base)
    absent = absent_by_nature(encoder)
    for name, value in encoder.state_dict().items():
        offset = 1 if f"image_encoder.{name}" in absent else 0
        torch.testing.assert_close(value, plain[f"image_encoder.{name}"] + offset)
    report = load_into(encoder, read_weights(path), allow_missing=absent)
    assert len(report.left_at_base) == 4 * 2 + 6
    assert report.num_loaded == report.num_requested - len(report.left_at_base)


def test_dino__teacher_is_read_with_a_note(tmp_path: Path, plain: Tensors) -> None:
    torch.save(PLAIN_VITS["dino"](plain), tmp_path / "w.pth")
    assert any("teacher" in note and "student" in note for note in read_weights(tmp_path / "w.pth").notes)


def test_layer_scale__is_merged_exactly(tmp_path: Path, plain: Tensors) -> None:
    tensors = as_plain_vit(plain)
    gamma = torch.rand(32)
    scaled = {**tensors, "blocks.1.ls1.gamma": gamma, "blocks.1.ls2.gamma": 2 * gamma}
    torch.save({"teacher": {f"backbone.{k}": v for k, v in scaled.items()}}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth").tensors
    x = torch.randn(5, 32)
    weight, bias = (plain[f"image_encoder.blocks.1.attn.proj.{n}"] for n in ("weight", "bias"))
    folded = x @ found["image_encoder.blocks.1.attn.proj.weight"].T + found["image_encoder.blocks.1.attn.proj.bias"]
    torch.testing.assert_close(folded, gamma * (x @ weight.T + bias))
    assert torch.equal(
        found["image_encoder.blocks.1.mlp.lin2.bias"], plain["image_encoder.blocks.1.mlp.lin2.bias"] * 2 * gamma
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": torch.ones(32, 3, 14, 14)}, "patches of 14 px, expected 16"),
        ({"blocks.0.mlp.w12.weight": torch.ones(4, 4)}, "gated"),
        ({"pos_embed": torch.ones(1, 7, 32)}, "square grid"),
    ],
)
def test_plain_vit__that_does_not_fit_sam_is_refused(
    tmp_path: Path, plain: Tensors, change: Tensors, message: str
) -> None:
    torch.save({"model": {**as_plain_vit(plain), **change}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pth")


def test_finetune_sam_lora__is_merged_exactly(tmp_path: Path, plain: Tensors) -> None:
    """finetune-SAM wraps each layer and adds one low-rank term to the queries and one to the values."""
    out = dict(plain)
    base = "image_encoder.blocks.2.attn.qkv."
    weight, bias = out.pop(f"{base}weight"), out.pop(f"{base}bias")
    low = {f"linear_{half}_{x}": torch.randn((4, 32) if half == "a" else (32, 4)) for half in "ab" for x in "qv"}
    out |= {f"{base}qkv.weight": weight, f"{base}qkv.bias": bias}
    out |= {f"{base}{name}.weight": value for name, value in low.items()}
    decoder = "mask_decoder.transformer.layers.0.self_attn.q_proj."
    decoder_weight, decoder_bias = out.pop(f"{decoder}weight"), out.pop(f"{decoder}bias")
    w_a, w_b = torch.randn(4, 32), torch.randn(32, 4)
    out |= {f"{decoder}proj.weight": decoder_weight, f"{decoder}proj.bias": decoder_bias}
    out |= {f"{decoder}w_a.weight": w_a, f"{decoder}w_b.weight": w_b}
    torch.save(out, tmp_path / "checkpoint_best.pth")
    weights = read_weights(tmp_path / "checkpoint_best.pth")
    assert weights.format == "finetune-SAM with LoRA"
    assert weights.tensors.keys() == plain.keys()
    x = torch.randn(3, 32)
    expected = x @ weight.T + bias
    expected[:, :32] += x @ low["linear_a_q"].T @ low["linear_b_q"].T
    expected[:, -32:] += x @ low["linear_a_v"].T @ low["linear_b_v"].T
    torch.testing.assert_close(x @ weights.tensors[f"{base}weight"].T + bias, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        x @ weights.tensors[f"{decoder}weight"].T, x @ (decoder_weight + w_b @ w_a).T, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("outputs", [1, 5])
def test_mask_tokens__their_number_comes_from_the_file(tmp_path: Path, outputs: int) -> None:
    sam = make_sam(tiny_plain_spec(), image_size=64, num_multimask_outputs=outputs)
    save_sam(sam, tmp_path / "w.pth")
    loaded = load_sam(tmp_path / "w.pth")
    assert loaded.mask_decoder.num_mask_tokens == outputs + 1
    with pytest.raises(WeightsError, match=r"of another shape \(mask_decoder.mask_tokens.weight"):
        load_into(make_sam(tiny_plain_spec(), image_size=64), read_weights(tmp_path / "w.pth"), part="sam")


def test_another_architecture__is_named(tmp_path: Path, plain: Tensors) -> None:
    torch.save(plain, tmp_path / "w.pth")
    with torch.device("meta"):
        model = build_sam("vit_b")
    with pytest.raises(
        WeightsError, match=r"\(ViT of unpublished shape \(32x4\), expected ViT-B \(768x12\)\). Use MODEL="
    ):
        load_into(model, read_weights(tmp_path / "w.pth"))


def test_published_shapes__are_recognised() -> None:
    for arch in arch_names():
        for stem in Stem if arch == "vit_t" else [None]:
            with torch.device("meta"):
                tensors = build_sam(arch, stem=stem).state_dict()
            assert spec_from_tensors(tensors) == arch_spec(arch, stem)


def test_another_size__is_refused_or_resized_with_a_report(tmp_path: Path, plain: Tensors) -> None:
    torch.save(plain, tmp_path / "w.pth")
    weights, model = read_weights(tmp_path / "w.pth"), make_sam(tiny_plain_spec(), image_size=64, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"The file is for 160 px: use image_size=160 or allow resizing"):
        load_into(model, weights)
    assert same(dict(model.state_dict()), before)
    report = load_into(model, weights, resize_positions=True)
    resized = {r.name for r in report.resized}
    tables = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3) for axis in "hw"}
    assert resized == tables | {"image_encoder.pos_embed"}
    assert report.num_loaded == report.num_requested
    line = "resized: image_encoder.pos_embed [1, 10, 10, 32] -> [1, 4, 4, 32]"
    assert line in report.render(is_detailed=True)
    assert line not in report.render()
    assert "resized: 5 (" in report.render()


def test_resize_positions__relative_as_segment_anything_absolute_smooth_native_untouched() -> None:
    table = torch.randn(19, 8)
    resized = resize_positions(table, 4)
    expected = get_rel_pos(4, 4, table)  # (query, key): entry 0,3 is distance -3
    index = torch.arange(4)[:, None] - torch.arange(4) + 3
    torch.testing.assert_close(resized[index], expected)
    assert resize_positions(table, 10) is table
    ramp = torch.linspace(0, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 3).contiguous()
    assert resize_positions(ramp, 16) is ramp
    smaller = resize_positions(ramp, 8)
    torch.testing.assert_close(smaller[0, :, 0, 0], ramp[0, :, 0, 0].view(8, 2).mean(1), atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match=r"table must have shape"):
        resize_positions(torch.zeros(3), 4)


def test_windowed_table__of_another_size_is_refused_and_not_resized(tmp_path: Path, plain: Tensors) -> None:
    """The window has one size at every image size, so that another table belongs to a damaged file."""
    torch.save(plain, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    spec = weights.spec
    assert isinstance(spec, ViTSpec)
    name = f"image_encoder.blocks.{next(i for i in range(spec.depth) if i not in spec.global_blocks)}.attn.rel_pos_h"
    damaged = dataclasses.replace(weights, tensors={**weights.tensors, name: weights.tensors[name][:-2]})
    encoder = spec.build(image_size=weights.image_size)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match="1 of another shape"):
        load_into(encoder, damaged, resize_positions=True)
    assert same(dict(encoder.state_dict()), before)


def test_medsam__its_own_file_takes_images_from_0_to_1(
    tmp_path: Path, plain: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are those of SAM, so that only the hash of the file shows it."""
    torch.save(plain, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").spec.pixel_mean == pytest.approx((123.675, 116.28, 103.53))
    monkeypatch.setattr(load, "MEDSAM_SHA256", read_weights(tmp_path / "a.pth").sha256)
    weights = read_weights(tmp_path / "a.pth")
    assert (weights.spec.pixel_mean, weights.spec.pixel_std) == ((0.0,) * 3, (255.0,) * 3)
    image = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(to_pixels(image, weights.spec), image.expand(-1, 3, -1, -1))


def test_save_transformers__settings_are_those_of_the_encoder(tmp_path: Path, plain: Tensors) -> None:
    """ImageNet's mean and deviation on the scale from 0 to 1, and segment_anything's own epsilon."""
    torch.save(plain, tmp_path / "a.pth")
    spec = read_weights(tmp_path / "a.pth").spec
    assert isinstance(spec, ViTSpec)
    save_transformers(plain, tmp_path / "folder", spec, image_size=160)
    processor, config = (
        json.loads((tmp_path / "folder" / name).read_text()) for name in ("preprocessor_config.json", "config.json")
    )
    assert processor["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert processor["image_std"] == pytest.approx([0.229, 0.224, 0.225])
    assert processor["size"] == {"longest_edge": 160}
    assert processor["pad_size"] == {"height": 160, "width": 160}
    vision = config["vision_config"]
    assert vision["layer_norm_eps"] == 1e-6
    assert tuple(vision["global_attn_indexes"]) == spec.global_blocks != ()
    assert (vision["num_hidden_layers"], vision["window_size"]) == (spec.depth, spec.attn_window_size)


def test_allow_missing__named_tensors_only(tmp_path: Path, plain: Tensors) -> None:
    name = "image_encoder.blocks.0.attn.rel_pos_h"
    torch.save({k: v for k, v in plain.items() if k != name}, tmp_path / "w.pth")
    model = ViTEncoder(tiny_plain_spec(), image_size=160)
    with pytest.raises(WeightsError, match=name):
        read_weights(tmp_path / "w.pth")
    torch.save({k: v for k, v in plain.items() if k != "image_encoder.neck.1.bias"}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(image_encoder.neck.1.bias\)"):
        load_into(model, read_weights(tmp_path / "w.pth"))
    report = load_into(model, read_weights(tmp_path / "w.pth"), allow_missing=["image_encoder.neck.1.bias"])
    assert report.left_at_base == ["image_encoder.neck.1.bias"]


@pytest.mark.parametrize("spec", [tiny_plain_spec(), tiny_vit_t_spec()], ids=["plain", "vit_t"])
def test_save_encoder__reads_back_with_its_card_and_equal_bytes(tmp_path: Path, spec: object) -> None:
    sam = make_sam(spec, image_size=64)
    encoder = sam.image_encoder.to(memory_format=torch.channels_last)
    card = Card(
        arch=sam.image_encoder.arch, image_size=64, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3, stage="encoder",
        objective="masked_image", steps=3, intensity={"name": "mri"},
    )  # fmt: skip
    for run in ("a", "b"):
        path = save_encoder(encoder, tmp_path / run / "encoder", card)
        assert path.name == "encoder.safetensors"
    assert (tmp_path / "a/encoder/encoder.safetensors").read_bytes() == path.read_bytes()
    for where in (tmp_path / "a", tmp_path / "a/encoder", path):
        loaded, found = load_image_encoder(where)
        assert same(dict(loaded.state_dict()), dict(encoder.state_dict()))
        assert (found.objective, found.steps, found.intensity, found.image_size) == (
            "masked_image",
            3,
            {"name": "mri"},
            64,
        )
    assert load_image_encoder(tmp_path / "a", image_size=128)[1].image_size == 128


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_save_sam__loads_strictly_in_stock_code(tmp_path: Path, plain: Tensors, ending: str) -> None:
    sam = make_sam(tiny_plain_spec(), image_size=160)
    path = save_sam(sam, tmp_path / f"sam{ending}")
    if ending == ".pth":
        tensors = torch.load(path, weights_only=True)
        sam.load_state_dict(tensors, strict=True)
        assert same(tensors, plain)
    assert same(dict(load_sam(path).state_dict()), plain)
    with pytest.raises(WeightsError, match=r"unknown ending \('.bin', expected .pth or .safetensors\)"):
        save_sam(sam, tmp_path / "sam.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, r"unknown \['sed'\]"),
        ({"schema": 99}, "schema must be 1, got 99"),
        ({"arch": 3}, "field arch must be"),
        ({"steps": "many"}, "field steps must be"),
        ({"image_size": True}, "field image_size must be"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"pixel_std": [255.0, 0.0, 255.0]}, "pixel_std must be three finite positive numbers"),
        ({"pixel_std": [255.0, -1.0, 255.0]}, "pixel_std must be three finite positive numbers"),
        ({"pixel_std": [255.0, float("nan"), 255.0]}, "pixel_std must be three finite positive numbers"),
        ({"pixel_std": [255.0, 255.0]}, "pixel_std must be three finite positive numbers"),
        ({"pixel_mean": [0.0, float("inf"), 0.0]}, "pixel_mean must be three finite numbers"),
        ({"pixel_mean": ["0", 0.0, 0.0]}, "pixel_mean must be three finite numbers"),
    ],
)
def test_card__is_read_strictly(tmp_path: Path, change: dict[str, object], message: str) -> None:
    card = Card(arch="vit_t", image_size=64, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    card.write(tmp_path / "card.json")
    assert Card.read(tmp_path / "card.json") == card
    (tmp_path / "card.json").write_text(json.dumps(card.to_dict() | change))
    with pytest.raises(WeightsError, match=message):
        Card.read(tmp_path / "card.json")


def test_card_of__file_without_a_card_gets_one_from_its_tensors(tmp_path: Path, plain: Tensors) -> None:
    torch.save(plain, tmp_path / "w.pth")
    card = card_of(read_weights(tmp_path / "w.pth"))
    assert (card.arch, card.image_size, card.stem) == ("vit_b", 160, None)
    assert card.base_sha256
    assert card.pixel_mean[0] == pytest.approx(123.675)
