"""Saved bytes and gradients with activation checkpointing, and its switch in both stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_factory import make_sam, randomise, tiny_plain_spec, tiny_vit_t_spec
from samgraft.finetune.training import preparation, train
from samgraft.shared.cli import main
from samgraft.shared.encoders import base
from samgraft.shared.encoders.tiny_vit import TinyViTEncoder
from samgraft.shared.encoders.vit import ViTEncoder
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder, save_sam
from store_factory import make_store
from tiny_encoders import plain_encoder
from torch import nn


class SavedBytes:
    """Counter of the bytes that autograd keeps in distinct storages, without parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.kept: dict[int, torch.Tensor] = {}

    def __enter__(self) -> SavedBytes:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.weights:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: an address is not used again
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def dense(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return encoder(images)


def visible(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return encoder.forward_visible(images, torch.arange(0, 100, 3).repeat(len(images), 1))


def plain_layout(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    ids_keep = torch.arange(0, 100, 3).repeat(len(images), 1)
    return encoder.forward_visible(images, ids_keep, relative_positions=False)


CASES = {
    "dense": (lambda: ViTEncoder(tiny_plain_spec(), image_size=160), dense),
    "kept tokens": (lambda: ViTEncoder(tiny_plain_spec(), image_size=160), visible),
    "plain layout": (lambda: ViTEncoder(tiny_plain_spec(), image_size=160), plain_layout),
    "vit_t": (lambda: TinyViTEncoder(tiny_vit_t_spec(), image_size=64), dense),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_checkpointing__fewer_saved_bytes_and_the_same_gradients(case: str) -> None:
    build, run = CASES[case]
    encoder = build()
    randomise(encoder)
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    sizes, grads = [], []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        with SavedBytes(encoder) as saved:
            out = run(encoder, images)
        out.pow(2).sum().backward()
        sizes.append(saved.num_bytes)
        grads.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert sizes[1] < 0.5 * sizes[0]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_checkpointing__batch_norm_counts_each_batch_once() -> None:
    plain = TinyViTEncoder(tiny_vit_t_spec(), image_size=64)
    plain.batch_norm_frozen = False
    plain.train()
    randomise(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing = True
    images = torch.randn(3, 3, 64, 64)
    for encoder in (plain, checkpointed):
        encoder(images).pow(2).sum().backward()
    wanted, found = dict(plain.named_buffers()), dict(checkpointed.named_buffers())
    counts = {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")}
    assert counts == {1}
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert all(m.momentum == 0.1 for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d))


def test_frozen_blocks__nothing_saved_below_the_first_trainable_block() -> None:
    """Check that frozen blocks below the last one add nothing to what is kept."""
    sizes = []
    for depth in (2, 6):
        encoder = ViTEncoder(tiny_plain_spec(depth=depth), image_size=160)
        randomise(encoder)
        encoder.requires_grad_(requires_grad=False)
        encoder.blocks[-1].requires_grad_()
        with SavedBytes(encoder) as saved:
            encoder(torch.randn(1, 3, 160, 160))
        sizes.append(saved.num_bytes)
    assert sizes[0] == sizes[1] > 0
    encoder.requires_grad_(requires_grad=False)
    with SavedBytes(encoder) as saved:
        encoder(torch.randn(1, 3, 160, 160))
    assert saved.num_bytes == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record the modules whose activations were recomputed."""
    calls: list[object] = []
    original: Callable[..., torch.Tensor] = base.checkpoint

    def counting(function: object, *given: object, **settings: object) -> object:
        calls.append(function)
        return original(function, *given, **settings)

    monkeypatch.setattr(base, "checkpoint", counting)
    return calls


@pytest.mark.parametrize("wanted", [False, True])
def test_pretrain__trainer_switch_reaches_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[object], wanted: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path, num_patients=3, shape_zyx=(3, 20, 20), labelled=False)
    card = Card(arch="vit_b", image_size=96, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    save_encoder(plain_encoder(), tmp_path / "plain", card)
    arguments = ["--data", "store.zarr", "--base", "plain", "--model", "vit_b", "--dry-run"]
    settings = [f"trainer.activation_checkpointing={str(wanted).lower()}", "data.batch_size=2"]
    assert main(["pretrain", *arguments, *settings]) == 0
    assert bool(counted) is wanted


@pytest.mark.parametrize("wanted", [False, True])
def test_finetune__trainer_switch_reaches_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path, num_patients=5, shape_zyx=(4, 32, 32))
    save_sam(make_sam(tiny_vit_t_spec(), image_size=32), tmp_path / "base.pth")
    prepared: list[preparation.Prepared] = []
    original = train.prepare_seeded
    monkeypatch.setattr(train, "prepare_seeded", lambda c, **g: prepared.append(original(c, **g)) or prepared[0])
    arguments = ["--ckpt", "base.pth", "--data", "store.zarr", "--dry-run", "data.batch_size=2"]
    assert main(["finetune", *arguments, f"trainer.activation_checkpointing={str(wanted).lower()}"]) == 0
    assert prepared[0].segmenter.sam.image_encoder.activation_checkpointing is wanted
