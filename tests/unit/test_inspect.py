"""Output of ``samgraft inspect`` for people and scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_factory import make_sam, tiny_hiera_spec, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.cli import main
from samgraft.shared.weights import load as weights_module
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.sam2_format import to_sam2
from samgraft.shared.weights.save import save_encoder, save_sam


def test_inspect__counts_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sam(make_sam(tiny_plain_spec(), image_size=160), tmp_path / "w.pth")
    assert main(["inspect", str(tmp_path / "w.pth")]) == 0
    shown = capsys.readouterr().out
    assert "w.pth: SAM, ViT of unpublished shape (32x4), 160 px" in shown
    assert "image_encoder   65/65 keys" in shown
    assert "mask_decoder    120/120 keys" in shown


def test_inspect__lists_missing_and_unexpected_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = dict(make_sam(tiny_plain_spec(), image_size=160).state_dict())
    del tensors["mask_decoder.iou_token.weight"]
    torch.save({**tensors, "mask_decoder.odd": torch.ones(1)}, tmp_path / "w.pth")
    assert main(["inspect", str(tmp_path / "w.pth"), "--json"]) == 0
    decoder = json.loads(capsys.readouterr().out)["parts"]["mask_decoder"]
    assert (decoder["matched"], decoder["expected"]) == (119, 120)
    assert decoder["missing"] == ["mask_decoder.iou_token.weight"]
    assert decoder["unexpected"] == ["mask_decoder.odd"]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("mask_decoder.hf_token.weight", "weights are SAM-HQ."),
        ("image_encoder.blocks.0.Adapter.channel.0.weight", "weights are SAM-Med2D."),
        ("image_encoder.blocks.0.Space_Adapter.D_fc1.weight", "weights are a SAM with bottleneck adapters"),
        ("mask_decoder.odd", None),
    ],
)
def test_inspect__family_of_additional_tensors_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, words: str | None
) -> None:
    tensors = dict(make_sam(tiny_plain_spec(), image_size=160).state_dict())
    torch.save({**tensors, tensor: torch.ones(1)}, tmp_path / "w.pth")
    assert main(["inspect", str(tmp_path / "w.pth")]) == 0
    shown = capsys.readouterr().out
    notes = [line for line in shown.splitlines() if line.startswith("  note: weights are")]
    assert [words in note for note in notes] == ([True] if words else [])
    # Started by the command and not by make, so that options are named.
    assert "CKPT=" not in shown
    assert "BASE=" not in shown


def test_inspect__encoder_without_a_block_is_refused_with_its_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = to_sam2(make_sam(tiny_hiera_spec(), image_size=64).state_dict())
    kept = {key: value for key, value in model.items() if "trunk.blocks.0.attn" not in key}
    torch.save({"model": kept}, tmp_path / "w.pt")
    assert main(["inspect", str(tmp_path / "w.pt")]) == 4
    shown = capsys.readouterr()
    assert "It is of the family of sam2_t; use a file with all tensors of the model." in shown.out + shown.err


def test_inspect__run_folder_shows_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = make_sam(tiny_vit_t_spec(), image_size=64).image_encoder
    card = Card(
        arch="vit_t", stem="conv1x1", image_size=64, pixel_mean=[1.0] * 3, pixel_std=[2.0] * 3, stage="encoder",
        objective="masked_image", steps=12,
    )  # fmt: skip
    save_encoder(encoder, tmp_path / "encoder", card)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "TinyViT of unpublished shape (LiteMedSAM stem), 64 px" in shown
    assert "objective       masked_image" in shown
    assert "steps           12" in shown
    # The card decides the pixel statistics of the model.
    assert read_weights(tmp_path).spec.pixel_std == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("kind", ["published", "trainer"])
def test_inspect__medsam2_is_a_sam_2_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """MedSAM2 has the names of SAM 2.1, and its training program is that of SAM 2."""
    model = to_sam2(make_sam(tiny_hiera_spec(), image_size=64).state_dict())
    model["memory_attention.norm.weight"] = torch.ones(8)
    state = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4}]}
    trainer = {"optimizer": state, "epoch": 4, "loss": {}, "steps": {"train": 10, "val": 0}, "time_elapsed": 60}
    torch.save({"model": model, **(trainer if kind == "trainer" else {})}, tmp_path / "MedSAM2_latest.pt")
    assert main(["inspect", str(tmp_path / "MedSAM2_latest.pt")]) == 0
    shown = capsys.readouterr().out
    assert "MedSAM2_latest.pt: SAM 2, Hiera of unpublished shape" in shown
    assert "1 tensors of the memory of videos kept aside, for release" in shown
    assert "exp_avg" not in shown


def test_inspect__official_name_is_downloaded_unless_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_sam(make_sam(tiny_plain_spec(), image_size=160), tmp_path / "w.pth")
    monkeypatch.setattr(weights_module, "official_weights", lambda _: path)
    assert read_weights("sam_vit_b").name == "w.pth"
    monkeypatch.undo()
    monkeypatch.setenv("SAMGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAMGRAFT_OFFLINE", "")
    assert main(["inspect", "sam_vit_b", "--offline"]) == 5
    assert "is not in the cache folder" in capsys.readouterr().err
