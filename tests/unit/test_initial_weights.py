"""Initial weights of stage 1, from every kind of file in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.config import load_config, read_stored_config
from samgraft.shared.encoders.base import freeze_batch_norm
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl import initial_weights
from samgraft.ssl import module as batch_norm
from samgraft.ssl.config import ModelConfig, PretrainConfig
from samgraft.ssl.initial_weights import load_initial_encoder
from samgraft.ssl.scope import Scope, ScopeConfig
from tiny_encoders import TINY_VIT

Tensors = dict[str, torch.Tensor]
SIZES = {"vit_b": 160, "vit_t": 64}


def plain_vit(tensors: Tensors) -> Tensors:
    """Return SAM's blocks as in official MAE and DINOv2 code, with timm's names and a class token."""
    out = {
        key.removeprefix("image_encoder.").replace("mlp.lin", "mlp.fc"): value
        for key, value in tensors.items()
        if key.startswith("image_encoder.") and "rel_pos" not in key and ".neck." not in key
    }
    out["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), out["pos_embed"].flatten(1, 2)], 1)
    return out | {"cls_token": torch.ones(1, 1, 32), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}


def encoder_only(tensors: Tensors, prefix: str) -> Tensors:
    head = "image_encoder."
    return {prefix + key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)}


KINDS = {
    "SAM": ("vit_b", lambda t: t),
    "MedSAM with its optimizer": ("vit_b", lambda t: {"model": t, "optimizer": {"state": {}}, "epoch": 7}),
    "SSLSAM, encoder only": ("vit_b", lambda t: {"model": encoder_only(t, "")}),
    "SSLSAM, encoder under SAM's prefix": ("vit_b", lambda t: encoder_only(t, "image_encoder.")),
    "trained with DDP": ("vit_b", lambda t: {f"module.{key}": value for key, value in t.items()}),
    "LiteMedSAM": ("conv1x1", lambda t: {"model": t}),
    "MobileSAM": ("conv3x3", lambda t: t),
}
PARTIAL = {
    "MAE": lambda t: {"model": plain_vit(t) | {"decoder_pred.weight": torch.ones(4), "mask_token": torch.ones(4)}},
    "MRI-CORE": lambda t: {"teacher": {f"backbone.{key}": value for key, value in plain_vit(t).items()}},
}


def sam_of(kind: str) -> Tensors:
    if kind == "vit_b":
        return dict(make_sam(tiny_plain_spec(), image_size=160).state_dict())
    return dict(make_sam(tiny_vit_t_spec(stem=Stem(kind)), image_size=64).state_dict())


def model_config(base: Path | str, arch: str, **settings: object) -> ModelConfig:
    return ModelConfig(arch=arch, base=str(base), image_size=SIZES[arch], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_load_initial_encoder__complete_file_is_loaded(tmp_path: Path, kind: str) -> None:
    shape, wrap = KINDS[kind]
    tensors, path = sam_of(shape), tmp_path / "base.pth"
    torch.save(wrap(tensors), path)
    encoder, card = load_initial_encoder(model_config(path, "vit_b" if shape == "vit_b" else "vit_t"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, tensors[f"image_encoder.{name}"])
    assert (card.base_name, card.stem) == ("base.pth", None if shape == "vit_b" else shape)
    assert encoder.training


@pytest.mark.parametrize("kind", PARTIAL)
def test_load_initial_encoder__plain_vit_is_completed_by_base(tmp_path: Path, kind: str) -> None:
    tensors = sam_of("vit_b")
    torch.save(PARTIAL[kind](tensors), tmp_path / "ssl.pth")
    torch.save({key: value + 1 for key, value in tensors.items()}, tmp_path / "sam.pth")
    with pytest.raises(WeightsError, match=r"without SAM's relative positions and neck, and no base SAM weights"):
        load_initial_encoder(model_config(tmp_path / "ssl.pth", "vit_b"))
    encoder, card = load_initial_encoder(model_config(tmp_path / "sam.pth", "vit_b", ckpt=str(tmp_path / "ssl.pth")))
    for name, value in encoder.state_dict().items():
        offset = 1 if "rel_pos" in name or name.startswith("neck.") else 0
        torch.testing.assert_close(value, tensors[f"image_encoder.{name}"] + offset)
    assert "relative positions and neck from sam.pth" in card.notes
    assert card.base_name == "ssl.pth"


def test_load_initial_encoder__complete_ckpt_takes_nothing_from_base(tmp_path: Path) -> None:
    tensors = sam_of("vit_b")
    torch.save(tensors, tmp_path / "ckpt.pth")
    torch.save({key: value + 1 for key, value in tensors.items()}, tmp_path / "sam.pth")
    config = model_config(tmp_path / "sam.pth", "vit_b", ckpt=str(tmp_path / "ckpt.pth"))
    encoder, card = load_initial_encoder(config)
    assert all(torch.equal(value, tensors[f"image_encoder.{name}"]) for name, value in encoder.state_dict().items())
    assert card.base_name == "ckpt.pth"


def test_model_config__weights_must_be_given_once() -> None:
    with pytest.raises(ValueError, match=r"model.ckpt or model.base must be given"):
        ModelConfig()
    with pytest.raises(ValueError, match=r"model.base must be SAM weights when model.ckpt is given, got random"):
        ModelConfig(ckpt="encoder.pth", base="random")


def test_earlier_names__are_refused_with_the_new_one() -> None:
    for old in ("model.rest", "probe.decoder"):
        with pytest.raises(UsageError, match=rf"{old} is now called model.base.*weights are model.ckpt"):
            load_config(PretrainConfig, overrides=[f"{old}=sam.pth"])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"base": "sam.pth", "rest": None}, {"base": "sam.pth"}),
        ({"base": "mae.pth", "rest": "sam.pth"}, {"base": "sam.pth", "ckpt": "mae.pth"}),
        ({"base": "random", "rest": None}, {"base": "random"}),
    ],
)
def test_stored_config__of_an_earlier_version_is_translated(tmp_path: Path, stored: Any, expected: Any) -> None:
    content = {"model": stored, "probe": {"decoder": None, "num_boxes": 4}, "data": {"planes": ["axial"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    layer = read_stored_config(tmp_path / "config.yaml")
    assert layer == {"model": expected, "probe": {"num_boxes": 4}, "data": {"planes": ["axial"]}}


def test_stored_config__decoder_of_the_box_prompts_becomes_the_base(tmp_path: Path) -> None:
    content = {"model": {"base": "run", "rest": None}, "probe": {"decoder": "sam.pth"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert read_stored_config(tmp_path / "config.yaml") == {"model": {"ckpt": "run", "base": "sam.pth"}}


def test_load_initial_encoder__earlier_run_at_another_size_is_loaded(tmp_path: Path) -> None:
    sam = make_sam(tiny_plain_spec(), image_size=160)
    card = Card(arch="vit_b", image_size=160, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3, notes=["first"])
    save_encoder(sam.image_encoder, tmp_path / "run" / "encoder", card)
    config = ModelConfig(arch="vit_b", base=str(tmp_path / "run"), image_size=96)
    encoder, found = load_initial_encoder(config)
    assert encoder.pos_embed.shape == (1, 6, 6, 32)
    assert torch.equal(encoder.blocks[0].mlp.lin1.weight, sam.image_encoder.blocks[0].mlp.lin1.weight)
    assert found.image_size == 96
    assert found.pixel_std == [255.0] * 3
    assert "first" in found.notes


def test_load_initial_encoder__scope_is_applied(tmp_path: Path) -> None:
    torch.save(sam_of("vit_b"), tmp_path / "sam.pth")
    scope = ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=1)
    encoder, _ = load_initial_encoder(model_config(tmp_path / "sam.pth", "vit_b", scope=scope))
    trained = {name.rsplit(".", 3)[0] for name, p in encoder.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("pos_embed", "patch_embed", "blocks.0", "blocks.2")) for name in trained)


def test_average_statistics__trained_batch_norms_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(3).eval())
    monkeypatch.setattr(batch_norm, "is_distributed", lambda: True)
    monkeypatch.setattr(batch_norm.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm.dist, "all_reduce", lambda own: own.add_(torch.tensor([2.0, 4.0, 3.0, 5.0])))
    batch_norm.average_statistics(norms)
    assert (norms[0].running_mean.tolist(), norms[0].running_var.tolist()) == ([1.0, 2.0], [2.0, 3.0])
    assert (norms[1].running_mean.tolist(), norms[1].running_var.tolist()) == ([0.0] * 3, [1.0] * 3)


def test_random_encoder__features_of_vit_t_differ_between_slices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With fixed statistics of mean 0 and variance 1, new features of different slices would be the same."""
    monkeypatch.setattr(initial_weights, "arch_spec", lambda _: TINY_VIT)
    config = ModelConfig(arch="vit_t", base="random", image_size=32, num_frozen_depths=2)
    torch.manual_seed(0)
    with caplog.at_level("INFO"):
        encoder, card = load_initial_encoder(config)
    assert "these depths keep random weights; 0 trains them" in caplog.text
    assert "batch norms learn their statistics too" in caplog.text
    assert card.base_name == "random"
    images = torch.rand(4, 3, 1, 1) * torch.rand(4, 3, 32, 32) * 2
    with torch.no_grad():
        for _ in range(30):
            encoder(images)
        moved = encoder.eval().forward_features(images)
        freeze_batch_norm(encoder.train())
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        still = encoder.forward_features(images)
    assert moved.mean((2, 3)).std(0).mean() > 3 * still.mean((2, 3)).std(0).mean()
