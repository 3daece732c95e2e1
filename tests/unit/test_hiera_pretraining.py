"""Stage 1 on Hiera, whose mask units of 32 px are left out whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import randomise, tiny_hiera_spec
from process_pair import run_pair
from samgraft.shared.encoders.hiera import HieraEncoder
from samgraft.shared.errors import StoppedAndSaved, UsageError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import load_image_encoder, read_weights
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.objectives import OBJECTIVES, Objective
from samgraft.ssl.objectives.feature import FeatureConfig
from samgraft.ssl.objectives.mae import Layout, MAEConfig
from samgraft.ssl.scope import ADAPTER, Scope, ScopeConfig, apply_scope, lora_layers, merged_state
from samgraft.ssl.views.crops import CropConfig, local_size
from samgraft.ssl.views.masking import MaskKind
from tiny_encoders import slices
from tiny_pretrain import act_after, left_behind, make_lab, run

SIZE = 96
SMALL: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 16, "num_decoder_heads": 2},
    "masked_image": {"decoder_dim": 8},
    "dino": {"output_dim": 12, "head_hidden_dim": 8, "head_bottleneck_dim": 4},
    "lejepa": {"output_dim": 4, "head_hidden_dim": 8, "num_directions": 8},
    "feature": {"decoder_dim": 16, "num_decoder_heads": 2},
}


def encoder() -> HieraEncoder:
    built = tiny_hiera_spec().build(image_size=SIZE)
    randomise(built)
    return built.train()


def objective(name: str, built: HieraEncoder | None = None, **settings: Any) -> Objective:
    torch.manual_seed(0)
    kind = OBJECTIVES[name]
    config = kind.settings_type(**SMALL[name] | settings)
    return kind(built or encoder(), config, seed=0, max_steps=4)


def loss_of(built: Objective, images: torch.Tensor) -> torch.Tensor:
    return built.loss(images, sample_counters=range(len(images)), step=0).total


@pytest.mark.parametrize("name", sorted(SMALL))
def test_objective__trains_the_trunk_and_nothing_of_the_neck(name: str) -> None:
    built = objective(name)
    loss = loss_of(built, slices(2, SIZE))
    loss.backward()
    assert torch.isfinite(loss)
    without_gradient = {n for n, p in built.encoder.named_parameters() if p.grad is None}
    assert without_gradient == {n for n, _ in built.encoder.named_parameters() if n.startswith("neck.")}
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    assert {n for n, p in built.named_parameters() if p.grad is not None} == trained
    assert built.panel(slices(2, SIZE), sample_counters=[0, 1]).images_KBHW.shape[-2:] == (SIZE, SIZE)


@pytest.mark.parametrize("name", ["masked_image", "dino", "lejepa", "feature"])
def test_trained_neck__leaves_out_the_convolutions_of_the_finer_maps(name: str) -> None:
    """No objective runs them, and DDP would wait for their gradients."""
    built = objective(name, train_neck=True)
    loss_of(built, slices(2, SIZE)).backward()
    with_gradient = {n for n, p in built.encoder.neck.named_parameters() if p.grad is not None}
    assert with_gradient == {f"convs.{i}.conv.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert {n for n, p in built.encoder.neck.named_parameters() if p.requires_grad} == with_gradient


def test_mae__predicts_whole_mask_units_from_visible_pixels_only() -> None:
    built = objective("mae", mask_ratio=0.6)
    images = slices(2, SIZE)
    mask = built.draw_masks([0, 1], side=3)
    assert built.decoder.to_answer.out_features == 32 * 32
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    ids = mask.flatten(1).nonzero()[:, 1].view(2, -1)
    with torch.no_grad():
        first, _ = built._predict(images, mask, ids)
        second, _ = built._predict(torch.where(hidden, 1 - images, images), mask, ids)
        third, _ = built._predict(torch.where(hidden, images, 1 - images), mask, ids)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_mae__plain_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="layout must be sam for sam2_t, which has no relative positions"):
        OBJECTIVES["mae"](encoder(), MAEConfig(layout=Layout.PLAIN_VIT), seed=0)


def test_mae__per_window_masks_hide_the_same_share_of_every_window() -> None:
    built = objective("mae", mask_kind=MaskKind.PER_WINDOW, mask_ratio=0.5)
    assert built.encoder.attn_window_size == 7
    assert torch.isfinite(loss_of(built, slices(2, SIZE)))


def test_features__are_the_units_of_the_grid_in_another_order() -> None:
    built = encoder()
    features = built.forward_features(torch.randn(2, 3, SIZE, SIZE))
    units = built.features_to_units(features)
    assert units.shape == (2, 9, built.unit_dim)
    assert torch.equal(built.units_to_features(units), features)


def test_feature__mask_unit_must_be_whole_units() -> None:
    with pytest.raises(UsageError, match=r"mask_unit_px must be a multiple of 32 px for sam2_t and divide.*got 16"):
        OBJECTIVES["feature"](encoder(), FeatureConfig(mask_unit_px=16), seed=0)


def test_small_views__are_a_multiple_of_the_mask_unit() -> None:
    spec = tiny_hiera_spec()
    assert [local_size(spec, size, CropConfig()) for size in (32, 64, 256, 512, 1024)] == [32, 32, 128, 224, 448]
    with pytest.raises(UsageError, match="local_size_px must be a multiple of 32 px for sam2_t up to image_size 96"):
        local_size(spec, SIZE, CropConfig(local_size_px=48))


def test_lora__is_in_the_four_layers_of_every_block_and_merges_exactly() -> None:
    built = encoder()
    apply_scope(built, ScopeConfig(kind=Scope.LORA), num_frozen_depths=0)
    names = {name.split(".blocks.")[1].split(".", 1)[1] for name in lora_layers(built)}
    assert names == {"attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1"}
    assert len(lora_layers(built)) == 4 * sum(tiny_hiera_spec().depths)
    with torch.no_grad():
        for layer in lora_layers(built).values():
            layer.lora_B[ADAPTER].weight.normal_(std=0.1)
    merged = tiny_hiera_spec().build(image_size=SIZE)
    merged.load_state_dict(merged_state(built))
    images = torch.randn(1, 3, SIZE, SIZE)
    ids = torch.tensor([[0, 4, 8]])
    with torch.no_grad():
        for run_one in (lambda e: e(images), lambda e: e.forward_visible(images, ids)):
            out = run_one(built)
            torch.testing.assert_close(run_one(merged), out, atol=1e-5 * float(out.abs().max()), rtol=0)


def test_last_blocks__train_alone() -> None:
    built = encoder()
    trained = apply_scope(built, ScopeConfig(kind=Scope.LAST_BLOCKS, num_last_blocks=2), num_frozen_depths=0)
    assert {name.split(".")[2] for name in trained if name.startswith("trunk.")} == {"8", "9"}


@pytest.mark.parametrize("sparse", [False, True])
def test_checkpointing__gives_the_same_gradients_and_keeps_less(sparse: bool) -> None:
    images, ids = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[0, 4], [8, 1]])
    gradients, kept = [], []
    for checkpointing in (False, True):
        built = encoder()
        built.activation_checkpointing = checkpointing
        sizes: dict[int, int] = {}
        alive = []

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes, alive: list[Any] = alive) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = built.forward_visible(images, ids) if sparse else built.forward_features(images)
        kept.append(sum(sizes.values()))
        out.square().mean().backward()
        gradients.append({n: p.grad for n, p in built.trunk.named_parameters()})
    assert kept[1] < 0.5 * kept[0]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    card = Card(arch="sam2_t", image_size=64, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    save_encoder(encoder(), make_lab(tmp_path) / "hiera", card)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)  # two interpreters start, and train three times each
def test_two_processes__sharded_training_has_the_same_bytes_after_a_kill_and_equals_copies(lab: Path) -> None:
    for way in ("ddp", "fsdp"):
        for done in run_pair(lab, f"mae/{way}/hiera", worker="two_pretrainings.py", timeout_s=800):
            assert done.returncode == 0, done.stderr[-2000:]
            assert "same bytes: True" in done.stdout
    ddp, fsdp = (read_weights(lab / "runs" / f"pair-maehiera-whole-{way}").tensors for way in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name, tensor in ddp.items():
        torch.testing.assert_close(fsdp[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_run__killed_and_resumed_has_the_same_bytes(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (f"model.base={lab / 'hiera'}", "model.arch=sam2_t", "model.image_size=64")
    whole = left_behind(run(lab, "whole", "mae", *settings))
    with monkeypatch.context() as patch:
        act_after(3, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedAndSaved):
            run(lab, "stopped", "mae", *settings)
    resumed = run(lab, "stopped", "mae", *settings)
    assert left_behind(resumed) == whole
    base, learned = read_weights(lab / "hiera"), read_weights(resumed)
    assert learned.spec.has_shape_of(base.spec)
    changed = {name for name, tensor in base.tensors.items() if not torch.equal(tensor, learned.tensors[name])}
    assert changed == {name for name in base.tensors if ".trunk." in name}
    assert load_image_encoder(resumed)[0].image_size == 64
