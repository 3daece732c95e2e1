"""Random damage to weights files of every supported layout, and foreign families.

A file is either loaded with the right values or refused with a reason. Other errors would end a command with exit
code 7, as a defect of the program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from safetensors.torch import save_file
from samgraft.shared.cli import main
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.shared.encoders.vit import ViTSpec
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.load import load_image_encoder, load_sam, read_weights
from samgraft.shared.weights.save import save_sam
from samgraft.shared.weights.transformers_format import to_transformers
from torch import nn

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return dict(make_sam(tiny_plain_spec(depth=2, image_size=96), image_size=96).state_dict())


def encoder_of(tensors: Tensors) -> Tensors:
    head = "image_encoder."
    return {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}


def plain_vit_of(tensors: Tensors, *, names: str = "fc") -> Tensors:
    """Return the encoder under the names of timm, without relative positions and neck."""
    out = {
        k.replace("mlp.lin", f"mlp.{names}"): v
        for k, v in encoder_of(tensors).items()
        if "rel_pos" not in k and not k.startswith("neck.")
    }
    positions = torch.cat([torch.ones(1, 1, 32), out["pos_embed"].flatten(1, 2)], 1)
    return {**out, "pos_embed": positions, "cls_token": torch.ones(1, 1, 32), "norm.weight": torch.ones(32)}


def with_lora(tensors: Tensors) -> Tensors:
    out = dict(tensors)
    base = "image_encoder.blocks.0.attn.qkv."
    out |= {f"{base}qkv.{kind}": out.pop(f"{base}{kind}") for kind in ("weight", "bias")}
    for letter in "qv":
        out |= {
            f"{base}linear_a_{letter}.weight": torch.ones(2, 32),
            f"{base}linear_b_{letter}.weight": torch.ones(32, 2),
        }
    return out


def with_layer_scale(tensors: Tensors) -> Tensors:
    return {**plain_vit_of(tensors), "blocks.1.ls1.gamma": torch.ones(32), "blocks.1.ls2.gamma": torch.ones(32)}


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "sam": lambda t: t,
    "transformers": to_transformers,
    "encoder": encoder_of,
    "timm SAM": lambda t: {k.replace("mlp.lin", "mlp.fc"): v for k, v in encoder_of(t).items()},
    "plain ViT": plain_vit_of,
    "DINOv2": lambda t: {f"teacher.backbone.{k}": v for k, v in with_layer_scale(t).items()},
    "MRI-CORE in a SAM": lambda t: {f"image_encoder.{k}": v for k, v in plain_vit_of(t, names="lin").items()},
    "finetune-SAM": with_lora,
}
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda t: t.flatten(),
    "one more row": lambda t: torch.cat([t, t[:1]]) if t.ndim else t[None],
    "half": lambda t: t[: max(1, len(t) // 2)] if t.ndim else t,
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t.flatten()[:0],
    "one more dimension": lambda t: t[None],
    "swapped": lambda t: t.transpose(0, -1).contiguous() if t.ndim else t,
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t != 0,
}


def load(path: Path, base: Path) -> nn.Module:
    """Load a file as the commands do."""
    weights = read_weights(path)
    if weights.is_partial:
        return load_image_encoder(path, image_size=96, base=base)[0]
    return load_sam(path) if len(weights.parts) == 3 else load_image_encoder(path)[0]


def one_of_each_kind(tensors: Tensors) -> list[str]:
    """Return the name of one tensor of each kind, block and layer numbers aside."""
    kinds = {"".join("#" if c.isdigit() else c for c in name): name for name in tensors}
    return sorted(kinds.values())


def damaged_copies(tensors: Tensors, name: str, changes: list[str]) -> dict[str, Tensors]:
    """Return copies of a file in which one tensor is dropped, renamed or changed, by what was done."""
    others = {k: v for k, v in tensors.items() if k != name}
    copies = {"dropped": others, "renamed": {**others, f"{name}.x": tensors[name]}}
    copies = {kind: copies[kind] for kind in copies if kind in changes}
    for kind in changes:
        if kind in copies:
            continue
        changed = CHANGES[kind](tensors[name])
        if (changed.shape, changed.dtype) != (tensors[name].shape, tensors[name].dtype):
            copies[kind] = {**others, name: changed}
    return copies


# Tensors that SAM has no place for, and the second copy of a matrix, may be missing or changed.
SPARE = ("cls_token", "norm.", "shared_image_embedding", "shared_embedding")


def assert_damage_is_found(tensors: Tensors, folder: Path, *, changes_per_tensor: int, decoder_step: int) -> None:
    """Damage one tensor of each kind. Only WeightsError may be raised, and nothing wrong may be loaded."""
    base = save_sam(make_sam(tiny_plain_spec(depth=2, image_size=96), image_size=96), folder / "base.safetensors")
    path = folder / "w.safetensors"
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, path)
    load(path, base)
    names = one_of_each_kind(tensors)
    encoder = [name for name in names if not name.startswith(("mask_decoder", "prompt_encoder"))]
    names = encoder + [name for name in names if name not in encoder][::decoder_step]
    kinds = ["dropped", "renamed", *CHANGES]
    accepted = []
    for i, name in enumerate(names):
        changes = [kinds[(5 * i + j) % len(kinds)] for j in range(changes_per_tensor)]
        for what, content in damaged_copies(tensors, name, changes).items():
            save_file({k: v.contiguous().clone() for k, v in content.items()}, path)
            try:
                load(path, base)
            except WeightsError:
                continue
            accepted.append(f"{what} {name}")
    assert [line for line in accepted if not any(word in line for word in SPARE)] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage__of_any_tensor_is_refused(layout: str, tmp_path: Path, plain: Tensors) -> None:
    assert_damage_is_found(LAYOUTS[layout](plain), tmp_path, changes_per_tensor=2, decoder_step=8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage__every_change_of_any_tensor_is_refused(layout: str, tmp_path: Path, plain: Tensors) -> None:
    assert_damage_is_found(LAYOUTS[layout](plain), tmp_path, changes_per_tensor=len(CHANGES) + 2, decoder_step=4)


@pytest.mark.parametrize(
    ("layout", "name", "change"),
    [
        ("plain ViT", "pos_embed", "swapped"),
        ("DINOv2", "teacher.backbone.blocks.1.attn.proj.bias", "scalar"),
        ("DINOv2", "teacher.backbone.blocks.1.ls1.gamma", "scalar"),
        ("transformers", "shared_image_embedding.positional_embedding", "complex"),
        ("finetune-SAM", "image_encoder.blocks.0.attn.qkv.linear_b_v.weight", "half"),
    ],
)
def test_damage__that_a_conversion_would_conceal_is_refused(
    layout: str, name: str, change: str, tmp_path: Path, plain: Tensors
) -> None:
    """Products and reshapes turn some wrong shapes into right ones, with wrong values."""
    tensors = LAYOUTS[layout](plain)
    save_file(
        {k: v.contiguous().clone() for k, v in {**tensors, name: CHANGES[change](tensors[name])}.items()},
        tmp_path / "w",
    )
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize("stem", list(Stem))
def test_damage__of_vit_t_is_refused(stem: Stem, tmp_path: Path) -> None:
    sam = make_sam(tiny_vit_t_spec(stem=stem), image_size=64)
    tensors = {
        f"image_encoder.{k}": v
        for k, v in sam.image_encoder.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    counters = {f"image_encoder.{k}": v for k, v in sam.image_encoder.state_dict().items() if k.endswith("_tracked")}
    path = tmp_path / "w.safetensors"
    for i, name in enumerate(one_of_each_kind(tensors)):
        change = ["dropped", "renamed", *CHANGES][i % (2 + len(CHANGES))]
        for content in damaged_copies(tensors, name, [change]).values():
            save_file({k: v.contiguous().clone() for k, v in {**content, **counters}.items()}, path)
            with pytest.raises(WeightsError):
                load_image_encoder(path)


PEFT = "base_model.model.image_encoder.blocks.0.attn.qkv.lora_A.weight"
FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "SAM-HQ": (
        lambda t: {**t, "mask_decoder.hf_token.weight": torch.ones(1, 32)},
        r"weights are SAM-HQ.*give this file as CKPT=, and SAM's own file of the same size as BASE=",
    ),
    "SAM 2 without blocks": (
        lambda _: {"image_encoder.trunk.patch_embed.proj.weight": torch.ones(8, 3, 7, 7)},
        r"0 stages in 0 blocks, expected 4",
    ),
    "SAM 2 of transformers without blocks": (
        lambda _: {"vision_encoder.backbone.patch_embed.projection.weight": torch.ones(8, 3, 7, 7)},
        r"0 stages in 0 blocks, expected 4",
    ),
    "SAM 3": (
        lambda _: {
            "detector.backbone.vision_backbone.trunk.pos_embed": torch.ones(1, 5, 8),
            "tracker.sam_mask_decoder.iou_token.weight": torch.ones(1, 8),
        },
        "weights are SAM 3",
    ),
    "SAM-Med2D": (
        lambda t: {**t, "image_encoder.blocks.0.Adapter.channel.0.weight": torch.ones(8, 32)},
        "weights are SAM-Med2D.*BASE=medsam_vit_b",
    ),
    "SAMed": (
        lambda t: {"w_a_000": torch.ones(4, 32), **{k: v for k, v in t.items() if k.startswith("mask_decoder")}},
        "LoRA factors of SAMed.*save the state_dict",
    ),
    "peft": (lambda _: {PEFT: torch.ones(4, 32)}, "an adapter alone.*merge_and_unload"),
    "peft beside a SAM": (lambda t: {**t, PEFT: torch.ones(4, 32)}, "LoRA factors beside its layers"),
    "DINOv3": (
        lambda t: {**plain_vit_of(t), "rope_embed.periods": torch.ones(4)},
        "weights are DINOv3. It has rotary positions",
    ),
    "MAE without positions": (
        lambda t: {k: v for k, v in plain_vit_of(t).items() if k != "pos_embed"},
        r"no position table \(pos_embed\).*Add it",
    ),
    "transformers' ViT": (
        lambda _: {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 16, 16)},
        "transformers' ViT.*Use the original file",
    ),
    "Swin": (
        lambda _: {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(4, 2)},
        "weights are Swin transformer",
    ),
    "SAM without relative positions": (
        lambda t: {k: v for k, v in t.items() if "rel_pos" not in k},
        "no relative positions.*Add tables of zeros",
    ),
    "gray images": (
        lambda t: {**t, "image_encoder.patch_embed.proj.weight": torch.ones(32, 1, 16, 16)},
        r"expected \(C, 3, patch, patch\)",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_family__is_refused_by_name_with_a_way_in(
    kind: str, tmp_path: Path, plain: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = FOREIGN[kind]
    torch.save(make(plain), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_sam(tmp_path / "w.pth")
    assert main(["inspect", str(tmp_path / "w.pth")]) in {0, 4}
    assert "internal error" not in capsys.readouterr().err


def test_sam_hq__its_encoder_is_that_of_sam(tmp_path: Path, plain: Tensors) -> None:
    torch.save({**plain, "mask_decoder.hf_token.weight": torch.ones(1, 32)}, tmp_path / "w.pth")
    found = load_image_encoder(tmp_path / "w.pth")[0].state_dict()
    assert all(torch.equal(found[k], v) for k, v in encoder_of(plain).items())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image_encoder.pos_embed", lambda t: t.to("meta"), "has a shape and no values"),
        ("image_encoder.neck.0.weight", lambda t: t.expand(2, *t.shape), "contradict each other"),
    ],
)
def test_tensor__that_only_torch_can_save_is_refused(name, change, message, tmp_path: Path, plain: Tensors) -> None:
    torch.save({**plain, name: change(plain[name])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pth")


def test_whole_module__is_refused_with_the_line_that_saves_its_tensors(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"whole pickled module \(torch.nn.modules.container.Sequential\).*state_dict"
    ):
        read_weights(tmp_path / "w.pth")


def test_missing_end__of_a_file_is_refused(tmp_path: Path) -> None:
    tensors = make_sam(tiny_plain_spec(), image_size=160).state_dict()
    torch.save({k: v for k, v in tensors.items() if "blocks.3." not in k}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"ends early \(the last of 3 blocks attends within windows"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("depth", "global_blocks", "message"),
    [(11, (2, 5, 8), "11 blocks, expected 12 at a width of 768"), (3, (1,), "last of 3 blocks attends within windows")],
)
def test_missing_end__is_seen_by_width_or_by_the_last_block(
    depth: int, global_blocks: tuple[int, ...], message: str
) -> None:
    spec = ViTSpec(
        arch="vit_b", native_image_size=1024, embed_dim=768, depth=depth, num_heads=12 if depth == 11 else 8,
        global_blocks=global_blocks,
    )  # fmt: skip
    assert message in str(spec.find_missing_end())


def test_missing_end__published_shapes_are_complete() -> None:
    assert [arch_spec(arch).find_missing_end() for arch in ("vit_b", "vit_l", "vit_h", "vit_t")] == [None] * 4
    spec = arch_spec("vit_t")
    assert "expected (2, 2, 6, 2)" in str(type(spec)(**{**vars(spec), "depths": (2, 2, 5, 2)}).find_missing_end())


def write_shards(folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_folder__is_read_as_one_file(tmp_path: Path, plain: Tensors) -> None:
    write_shards(tmp_path, to_transformers(plain))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert all(torch.equal(v, plain[k]) for k, v in load_sam(path).state_dict().items())
    first = read_weights(tmp_path).sha256
    write_shards(tmp_path, {**to_transformers(plain), "mask_decoder.iou_token.weight": torch.ones(1, 32)})
    assert read_weights(tmp_path).sha256 != first
    with pytest.raises(WeightsError, match=r"one of 2 shards\. Give the whole folder"):
        read_weights(tmp_path / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index of a sharded model is damaged"),
        ('{"weight_map": [1]}', "damaged"),
        ('{"weight_map": {}}', "lists files outside"),
        ('{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}', "lists files outside of its folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', r"one of 2|1 of 1 tensors .*missing \(a"),
        ('{"weight_map": {"a": "other.safetensors"}}', "existing file"),
    ],
)
def test_sharded_folder__damaged_index_is_refused(tmp_path: Path, plain: Tensors, index: str, message: str) -> None:
    write_shards(tmp_path, to_transformers(plain))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_sharded_folder__tensor_in_two_files_is_refused(tmp_path: Path, plain: Tensors) -> None:
    write_shards(tmp_path, to_transformers(plain))
    save_file(
        {k: v.contiguous() for k, v in to_transformers(plain).items()}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(WeightsError, match="is in two files"):
        read_weights(tmp_path)
