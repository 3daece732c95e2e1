"""Our encoders against segment_anything and timm: outputs and gradients, small shapes with every kind of block."""

from functools import partial

import pytest
import torch
from model_factory import make_sam, randomise, tiny_plain_spec, tiny_vit_t_spec
from samgraft.shared.models import blocked_attention, image_encoder
from samgraft.shared.models.architecture import Arch, ArchSpec, Stem, arch_spec
from samgraft.shared.models.image_encoder import ImageEncoder
from samgraft.shared.models.relpos_attention import attend_fused
from samgraft.shared.models.sam import build_sam
from samgraft.shared.models.tiny_vit import TinyViTEncoder
from segment_anything.modeling import ImageEncoderViT
from timm.models.tiny_vit import TinyVit
from torch import nn

# Grids 3 (smaller than the window of 4), 4 (one window), 10 and 11 (full, edge and corner windows).
SIZES = (48, 64, 160, 176)


def stock_encoder(spec: ArchSpec, image_size: int) -> ImageEncoderViT:
    plain = spec.plain
    assert plain is not None
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=plain.embed_dim,
        depth=plain.depth,
        num_heads=plain.num_heads,
        out_chans=spec.neck_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=plain.attn_window_size,
        global_attn_indexes=plain.global_blocks,
    )


def pair(image_size: int, dtype: torch.dtype) -> tuple[ImageEncoder, ImageEncoderViT]:
    spec = tiny_plain_spec()
    ours = ImageEncoder(spec, image_size=image_size).to(dtype)
    randomise(ours)
    stock = stock_encoder(spec, image_size).to(dtype)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def outputs_and_gradients(
    model: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    images = images.clone().requires_grad_()
    out = model(images)
    weight = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)[None, :, None, None]
    (out * weight).pow(2).mean().backward()
    return out.detach(), images.grad, {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_same_training(ours: nn.Module, stock: nn.Module, images: torch.Tensor, *, tolerance: float) -> None:
    out, grad_images, grads = outputs_and_gradients(ours, images)
    expected, expected_images, expected_grads = outputs_and_gradients(stock, images)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        grad_images, expected_images, atol=tolerance * expected_images.abs().max().item(), rtol=0
    )
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        scale = expected_grad.abs().max().item()
        assert scale > 0, f"{name} gets no gradient: the test would not see a fault in it"
        torch.testing.assert_close(
            grads[name], expected_grad, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


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


def test_dense__block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 logits per block cut both windows and heads and the queries of global attention.
    monkeypatch.setattr(blocked_attention, "BLOCK_ELEMENTS", 300)
    ours, stock = pair(160, torch.float64)
    assert_same_training(ours, stock, torch.randn(1, 3, 160, 160, dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize("image_size", SIZES)
def test_fused__equals_segment_anything(image_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs, on a CPU."""
    monkeypatch.setattr(image_encoder, "attend", attend_fused)
    ours, stock = pair(image_size, torch.float64)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    assert_same_training(ours, stock, images, tolerance=1e-12)


def test_checkpointing__same_gradients() -> None:
    ours, stock = pair(160, torch.float64)
    ours.activation_checkpointing = True
    assert_same_training(ours, stock, torch.randn(1, 3, 160, 160, dtype=torch.float64), tolerance=1e-12)


def test_bfloat16_autocast__as_near_to_float32_as_segment_anything() -> None:
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


def test_frozen_start__saves_nothing_below_first_trainable_block() -> None:
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


def timm_tiny(spec: ArchSpec) -> nn.Module:
    """timm's own TinyVit with the two changes of the published vit_t."""
    tiny = spec.tiny
    assert tiny is not None
    model = TinyVit(
        num_classes=0,
        embed_dims=tiny.embed_dims,
        depths=tiny.depths,
        num_heads=tiny.num_heads,
        window_sizes=tiny.attn_window_sizes,
        drop_path_rate=0.0,
    )
    if tiny.stem is Stem.conv1x1:
        half = tiny.embed_dims[0] // 2
        model.patch_embed.conv1.conv = nn.Conv2d(3, half, 1, bias=False)
        model.patch_embed.conv2.conv = nn.Conv2d(half, tiny.embed_dims[0], 1, bias=False)
    model.stages[3].downsample.conv2.conv.stride = (1, 1)
    return model


def to_timm_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published vit_t names to timm's: written apart from the code under test."""
    out = {}
    for key, value in tensors.items():
        name = key.replace(".c.weight", ".conv.weight")
        name = name.replace("patch_embed.seq.0", "patch_embed.conv1").replace("patch_embed.seq.2", "patch_embed.conv2")
        words = name.split(".")
        if words[0] == "layers":
            words[0] = "stages"
            if words[2] == "downsample":
                words[1] = str(int(words[1]) + 1)
        out[".".join(words)] = value
    return out


@pytest.mark.parametrize(("stem", "image_size"), [(Stem.conv1x1, 48), (Stem.conv3x3, 112)])
def test_vit_t__equals_timm(stem: Stem, image_size: int) -> None:
    ours = TinyViTEncoder(tiny_vit_t_spec(stem=stem), image_size=image_size).double()
    randomise(ours)
    ours.batch_norm_frozen = False
    reference = timm_tiny(ours.spec).double()
    tensors = {k: v for k, v in ours.state_dict().items() if not k.startswith("neck.")}
    missing, unexpected = reference.load_state_dict(to_timm_names(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
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
        counts = {s: sum(p.numel() for p in build_sam(Arch.vit_t, stem=s).image_encoder.parameters()) for s in Stem}
    assert counts[Stem.conv3x3] - counts[Stem.conv1x1] == 8 * (3 * 32 + 32 * 64)
    assert round(counts[Stem.conv1x1] / 1e6, 2) == 5.73


@pytest.mark.parametrize(
    ("arch", "num_keys", "millions"),
    [(Arch.vit_b, 314, 93.7), (Arch.vit_l, 482, 312.3), (Arch.vit_h, 594, 641.1)],
)
def test_build_sam__same_keys_as_segment_anything(arch: Arch, num_keys: int, millions: float) -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours, stock = build_sam(arch), sam_model_registry[arch.value]()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert len(ours.state_dict()) == num_keys
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == millions


def test_whole_sam__same_masks_as_segment_anything() -> None:
    from segment_anything.modeling import Sam

    ours = make_sam(tiny_plain_spec(), image_size=160)
    stock = Sam(stock_encoder(ours.image_encoder.spec, 160), ours.prompt_encoder, ours.mask_decoder).eval()
    stock.image_encoder.load_state_dict(ours.image_encoder.state_dict(), strict=True)
    image = {
        "image": 255 * torch.rand(3, 160, 120),
        "original_size": (200, 150),
        "boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]),
    }
    got, expected = (m([image], multimask_output=True)[0] for m in (ours, stock))
    torch.testing.assert_close(got["low_res_logits"], expected["low_res_logits"], atol=1e-4, rtol=1e-5)
    assert got["masks"].shape == (1, 3, 200, 150)
    assert torch.equal(got["masks"], expected["masks"])


def real_pair(arch: Arch, image_size: int) -> tuple[ImageEncoder, ImageEncoderViT]:
    spec = arch_spec(arch)
    ours = ImageEncoder(spec, image_size=image_size)
    randomise(ours, scale=0.02)
    stock = stock_encoder(spec, image_size)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "image_size"), [(Arch.vit_b, 256), (Arch.vit_b, 1024), (Arch.vit_l, 512), (Arch.vit_h, 512)]
)
def test_real_shapes__equal_segment_anything(arch: Arch, image_size: int) -> None:
    ours, stock = real_pair(arch, image_size)
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), stock(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [256, 320])
def test_real_vit_b__same_gradients_as_segment_anything(image_size: int) -> None:
    ours, stock = real_pair(Arch.vit_b, image_size)
    assert_same_training(ours, stock, torch.randn(1, 3, image_size, image_size), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "image_size"), [(Stem.conv1x1, 256), (Stem.conv3x3, 1024)])
def test_real_vit_t__equals_timm(stem: Stem, image_size: int) -> None:
    ours = TinyViTEncoder(arch_spec(Arch.vit_t, stem), image_size=image_size)
    randomise(ours, scale=0.05)
    reference = timm_tiny(ours.spec)
    tensors = {k: v for k, v in ours.state_dict().items() if not k.startswith("neck.")}
    missing, unexpected = reference.load_state_dict(to_timm_names(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    images = torch.randn(1, 3, image_size, image_size)
    with torch.no_grad():
        expected = reference.eval().forward_features(images)
        got = ours.eval().forward_features(images)
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
