"""Outputs and gradients of the encoders against segment_anything and timm, on small shapes."""

import pytest
import torch
from model_factory import make_sam, randomise, tiny_plain_spec, tiny_vit_t_spec
from original_encoders import plain_twin, tiny_twin, to_timm_names
from same_training import assert_same_training, real_pair
from samgraft.shared.encoders import attention, blocked_attention
from samgraft.shared.encoders.registry import arch_spec
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.encoders.tiny_vit import Stem, TinyViTEncoder
from samgraft.shared.encoders.vit import ViTEncoder
from segment_anything.modeling import ImageEncoderViT

# Grids 3 (smaller than the window of 4), 4 (one window), 10 and 11 (full, edge and corner windows).
SIZES = (48, 64, 160, 176)


def pair(image_size: int, dtype: torch.dtype) -> tuple[ViTEncoder, ImageEncoderViT]:
    ours = ViTEncoder(tiny_plain_spec(), image_size=image_size).to(dtype)
    randomise(ours)
    return ours, plain_twin(ours)


@pytest.mark.parametrize("image_size", SIZES)
def test_dense__equals_segment_anything_in_float32(image_size: int) -> None:
    ours, stock = pair(image_size, torch.float32)
    images = torch.randn(2, 3, image_size, image_size)
    assert_same_training(ours, stock, images, tolerance=1e-5)


@pytest.mark.parametrize("image_size", SIZES)
def test_dense__equals_segment_anything_to_rounding_in_float64(image_size: int) -> None:
    ours, stock = pair(image_size, torch.float64)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    assert_same_training(ours, stock, images, tolerance=1e-12)


def test_dense__any_block_size_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 logits per block cut both windows and heads and the queries of global attention.
    monkeypatch.setattr(blocked_attention, "BLOCK_ELEMENTS", 300)
    ours, stock = pair(160, torch.float64)
    assert_same_training(ours, stock, torch.randn(1, 3, 160, 160, dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize("image_size", SIZES)
def test_fused__equals_segment_anything(image_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the engine of GPUs on a CPU."""
    monkeypatch.setattr(attention, "computes_in_blocks", lambda _device: False)
    ours, stock = pair(image_size, torch.float64)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    assert_same_training(ours, stock, images, tolerance=1e-12)


def test_checkpointing__same_gradients() -> None:
    ours, stock = pair(160, torch.float64)
    ours.activation_checkpointing = True
    assert_same_training(ours, stock, torch.randn(1, 3, 160, 160, dtype=torch.float64), tolerance=1e-12)


def test_bfloat16_autocast__error_no_larger_than_segment_anything() -> None:
    ours, stock = pair(160, torch.float32)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        exact = stock(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error = (ours(images).float() - exact).abs().mean()
            stock_error = (stock(images).float() - exact).abs().mean()
    assert 0 < error < 1.2 * stock_error


def test_compile__traces_dense_encoder_as_one_graph() -> None:
    ours, stock = pair(160, torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    images = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    torch.testing.assert_close(compiled(images), stock(images), atol=1e-12, rtol=0)


def test_frozen_blocks__save_nothing_below_the_first_trainable_one() -> None:
    ours, _ = pair(160, torch.float32)
    ours.requires_grad_(requires_grad=False)
    ours.blocks[-1].attn.qkv.weight.requires_grad_()
    ours.neck.requires_grad_()
    needs_grad: list[bool] = []
    for block in ours.blocks:
        block.register_forward_hook(lambda _m, _i, out: needs_grad.append(out.requires_grad))
    ours(torch.randn(1, 3, 160, 160))
    assert needs_grad == [False, False, False, True]


def test_dense__refuses_another_size() -> None:
    ours, _ = pair(160, torch.float32)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 160, 160\), got \(1, 3, 176, 176\)"):
        ours(torch.zeros(1, 3, 176, 176))


@pytest.mark.parametrize(("stem", "image_size"), [(Stem.conv1x1, 48), (Stem.conv3x3, 112)])
def test_vit_t__equals_timm(stem: Stem, image_size: int) -> None:
    ours = TinyViTEncoder(tiny_vit_t_spec(stem=stem), image_size=image_size).double()
    randomise(ours)
    ours.batch_norm_frozen = False
    reference = tiny_twin(ours)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    for mode in (False, True):
        ours.train(mode)
        reference.train(mode)
        expected = reference.forward_features(images)
        got = ours.forward_features(images)
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    expected.pow(2).mean().backward()
    got.pow(2).mean().backward()
    ours_grads = to_timm_names({k: p.grad for k, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours_grads[name], parameter.grad, atol=1e-12, rtol=1e-9)


def test_vit_t__total_strides_and_parameter_counts() -> None:
    for stem, size, grid in ((Stem.conv1x1, 64, 16), (Stem.conv3x3, 64, 4)):
        encoder = TinyViTEncoder(tiny_vit_t_spec(stem=stem), image_size=size)
        assert encoder(torch.zeros(1, 3, size, size)).shape == (1, 32, grid, grid)
        assert encoder.stride == size // grid
    # 5.74 M parameters in the published LiteMedSAM encoder; 3x3 stem kernels add 8 (3 x 32 + 32 x 64) of MobileSAM's.
    with torch.device("meta"):
        counts = {s: sum(p.numel() for p in build_sam("vit_t", stem=s).image_encoder.parameters()) for s in Stem}
    assert counts[Stem.conv3x3] - counts[Stem.conv1x1] == 8 * (3 * 32 + 32 * 64)
    assert round(counts[Stem.conv1x1] / 1e6, 2) == 5.73


@pytest.mark.parametrize(
    ("arch", "num_keys", "millions"),
    [("vit_b", 314, 93.7), ("vit_l", 482, 312.3), ("vit_h", 594, 641.1)],
)
def test_build_sam__same_keys_as_segment_anything(arch: str, num_keys: int, millions: float) -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours, stock = build_sam(arch), sam_model_registry[arch]()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert len(ours.state_dict()) == num_keys
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == millions


def test_whole_sam__same_masks_as_segment_anything() -> None:
    from segment_anything.modeling import Sam

    ours = make_sam(tiny_plain_spec(), image_size=160)
    stock = Sam(plain_twin(ours.image_encoder), ours.prompt_encoder, ours.mask_decoder).eval()
    image = {
        "image": 255 * torch.rand(3, 160, 120),
        "original_size": (200, 150),
        "boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]),
    }
    got, expected = (m([image], multimask_output=True)[0] for m in (ours, stock))
    torch.testing.assert_close(got["low_res_logits"], expected["low_res_logits"], atol=1e-4, rtol=1e-5)
    assert got["masks"].shape == (1, 3, 200, 150)
    assert torch.equal(got["masks"], expected["masks"])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "image_size"), [("vit_b", 256), ("vit_b", 1024), ("vit_l", 512), ("vit_h", 512)])
def test_real_shapes__equal_segment_anything(arch: str, image_size: int) -> None:
    ours, stock = real_pair(arch, image_size)
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), stock(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [256, 320])
def test_real_vit_b__same_gradients_as_segment_anything(image_size: int) -> None:
    ours, stock = real_pair("vit_b", image_size)
    assert_same_training(ours, stock, torch.randn(1, 3, image_size, image_size), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "image_size"), [(Stem.conv1x1, 256), (Stem.conv3x3, 1024)])
def test_real_vit_t__equals_timm(stem: Stem, image_size: int) -> None:
    ours = TinyViTEncoder(arch_spec("vit_t", stem), image_size=image_size)
    randomise(ours, scale=0.05)
    reference = tiny_twin(ours)
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        expected = reference.eval().forward_features(images)
        got = ours.eval().forward_features(images)
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
