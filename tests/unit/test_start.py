"""What stage 1 can start from, each kind of file in small: strictly, with its own account."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_factory import make_sam, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.encoders.base import freeze_batch_norm
from samgraft.shared.encoders.tiny_vit import Stem
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl import module as batch_norm
from samgraft.ssl import start
from samgraft.ssl.config import ModelConfig
from samgraft.ssl.scope import Scope, ScopeConfig
from samgraft.ssl.start import load_start
from tiny_encoders import TINY_VIT

Tensors = dict[str, torch.Tensor]
SIZES = {"vit_b": 160, "vit_t": 64}


def plain_vit(tensors: Tensors) -> Tensors:
    """SAM's blocks as official MAE and DINOv2 code has them: timm's names, class token, nothing of SAM's own."""
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
def test_start__takes_the_whole_encoder(tmp_path: Path, kind: str) -> None:
    shape, wrap = KINDS[kind]
    tensors, path = sam_of(shape), tmp_path / "base.pth"
    torch.save(wrap(tensors), path)
    encoder, card = load_start(model_config(path, "vit_b" if shape == "vit_b" else "vit_t"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, tensors[f"image_encoder.{name}"])
    assert (card.base_name, card.stem) == ("base.pth", None if shape == "vit_b" else shape)
    assert encoder.training


@pytest.mark.parametrize("kind", PARTIAL)
def test_start__a_plain_vit_takes_the_rest_from_a_named_sam(tmp_path: Path, kind: str) -> None:
    tensors = sam_of("vit_b")
    torch.save(PARTIAL[kind](tensors), tmp_path / "ssl.pth")
    torch.save({key: value + 1 for key, value in tensors.items()}, tmp_path / "sam.pth")
    with pytest.raises(WeightsError, match=r"without SAM's relative positions and neck: model.rest must name the SAM"):
        load_start(model_config(tmp_path / "ssl.pth", "vit_b"))
    encoder, card = load_start(model_config(tmp_path / "ssl.pth", "vit_b", rest=str(tmp_path / "sam.pth")))
    for name, value in encoder.state_dict().items():
        offset = 1 if "rel_pos" in name or name.startswith("neck.") else 0
        torch.testing.assert_close(value, tensors[f"image_encoder.{name}"] + offset)
    assert "relative positions and neck from sam.pth" in card.notes
    assert card.base_name == "ssl.pth"


def test_start__a_rest_that_is_not_needed_is_refused(tmp_path: Path) -> None:
    torch.save(sam_of("vit_b"), tmp_path / "sam.pth")
    with pytest.raises(UsageError, match=r"model.rest would be ignored: sam.pth has everything itself"):
        load_start(model_config(tmp_path / "sam.pth", "vit_b", rest=str(tmp_path / "sam.pth")))
    with pytest.raises(UsageError, match=r"model.rest would be ignored: random weights"):
        load_start(model_config("random", "vit_t", rest=str(tmp_path / "sam.pth")))


def test_start__from_an_earlier_run_and_at_another_size(tmp_path: Path) -> None:
    sam = make_sam(tiny_plain_spec(), image_size=160)
    card = Card(arch="vit_b", image_size=160, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3, notes=["first"])
    save_encoder(sam.image_encoder, tmp_path / "run" / "encoder", card)
    config = ModelConfig(arch="vit_b", base=str(tmp_path / "run"), image_size=96)
    encoder, found = load_start(config)
    assert encoder.pos_embed.shape == (1, 6, 6, 32)
    assert torch.equal(encoder.blocks[0].mlp.lin1.weight, sam.image_encoder.blocks[0].mlp.lin1.weight)
    assert found.image_size == 96
    assert found.pixel_std == [255.0] * 3
    assert "first" in found.notes


def test_start__scope_reaches_the_encoder(tmp_path: Path) -> None:
    torch.save(sam_of("vit_b"), tmp_path / "sam.pth")
    scope = ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=1)
    encoder, _ = load_start(model_config(tmp_path / "sam.pth", "vit_b", scope=scope))
    trained = {name.rsplit(".", 3)[0] for name, p in encoder.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("pos_embed", "patch_embed", "blocks.0", "blocks.2")) for name in trained)


def test_average_statistics__of_all_processes_where_they_move(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(3).eval())
    monkeypatch.setattr(batch_norm, "in_group", lambda: True)
    monkeypatch.setattr(batch_norm.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm.dist, "all_reduce", lambda own: own.add_(torch.tensor([2.0, 4.0, 3.0, 5.0])))
    batch_norm.average_statistics(norms)
    assert (norms[0].running_mean.tolist(), norms[0].running_var.tolist()) == ([1.0, 2.0], [2.0, 3.0])
    assert (norms[1].running_mean.tolist(), norms[1].running_var.tolist()) == ([0.0] * 3, [1.0] * 3)


def test_start__random_vit_t_keeps_slices_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With batch norm at mean 0 and variance 1 for ever, fresh features of different slices are the same."""
    monkeypatch.setattr(start, "arch_spec", lambda _: TINY_VIT)
    config = ModelConfig(arch="vit_t", base="random", image_size=32, num_frozen_depths=2)
    torch.manual_seed(0)
    with caplog.at_level("INFO"):
        encoder, card = load_start(config)
    assert "these depths keep their random weights; 0 trains them" in caplog.text
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
