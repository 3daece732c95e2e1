"""Kept tokens against the dense encoder whose hidden tokens are removed from every softmax by -inf."""

import pytest
import torch
import torch.nn.functional as F
from model_factory import randomise, tiny_plain_spec
from samgraft.shared.encoders import attention, blocked_attention
from samgraft.shared.encoders.vit import ViTEncoder
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos, window_partition, window_unpartition


def encoder_of(image_size: int) -> ViTEncoder:
    encoder = ViTEncoder(tiny_plain_spec(), image_size=image_size).double()
    randomise(encoder)
    return encoder


def dense_reference(encoder: ViTEncoder, images: torch.Tensor, visible_Bgg: torch.Tensor) -> torch.Tensor:
    """Return features (B, g, g, C) of segment_anything's own code with hidden keys at -inf.

    Its zero padding stays visible, as it is there.
    """
    tokens = encoder.patch_embed(images) + encoder.pos_embed
    grid = tokens.shape[1]
    for block in encoder.blocks:
        normed, attn, side = block.norm1(tokens), block.attn, encoder.attn_window_size
        visible = visible_Bgg
        if attn.windowed:
            normed, padded = window_partition(normed, side)
            visible = F.pad(visible[..., None].float(), (0, 0, 0, padded[1] - grid, 0, padded[0] - grid), value=1.0)
            visible = window_partition(visible, side)[0][..., 0] > 0
        mixed = masked_attention(attn, normed, visible)
        if attn.windowed:
            mixed = window_unpartition(mixed, side, padded, (grid, grid))
        tokens = tokens + mixed
        tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens


def masked_attention(attn: torch.nn.Module, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    count, height, width, _ = tokens.shape
    heads = attn.num_heads
    qkv = attn.qkv(tokens).reshape(count, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, count * heads, height * width, -1).unbind(0)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    logits = add_decomposed_rel_pos(logits, q, attn.rel_pos_h, attn.rel_pos_w, (height, width), (height, width))
    hidden = ~visible.reshape(count, 1, 1, -1).expand(-1, heads, -1, -1).reshape(count * heads, 1, -1)
    # A window without any visible key has no softmax; its rows are hidden and never read.
    none_visible = hidden.all(-1, keepdim=True)
    weights = logits.masked_fill(hidden & ~none_visible, float("-inf")).softmax(-1)
    mixed = (weights @ v).view(count, heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return attn.proj(mixed.reshape(count, height, width, -1))


def random_ids(grid: int) -> torch.Tensor:
    return torch.stack([torch.randperm(grid * grid)[: grid * grid // 4] for _ in range(2)])


def block_ids(grid: int) -> torch.Tensor:
    """Return ids of a square in another corner of each image, which leaves most windows empty."""
    number = torch.arange(grid * grid).view(grid, grid)
    return torch.stack([number[:3, :3].flatten(), number[-3:, -3:].flatten()])


def uniform_ids(grid: int, side: int = 4) -> torch.Tensor:
    """Return one token of every window, a different one in each image."""
    ids = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        row = [
            (r + int(torch.randint(min(side, grid - r), (), generator=generator))) * grid
            + c + int(torch.randint(min(side, grid - c), (), generator=generator))
            for r in range(0, grid, side)
            for c in range(0, grid, side)
        ]  # fmt: skip
        ids.append(torch.tensor(row))
    return torch.stack(ids)


def ragged_ids(grid: int) -> torch.Tensor:
    ids = random_ids(grid)
    ids[1, 5:] = -1
    return ids


def full_corner_ids(grid: int) -> torch.Tensor:
    """Return ids that fill the last window while another image keeps fewer tokens.

    No slot is then free for the missing token.
    """
    number = torch.arange(grid * grid).view(grid, grid)
    return torch.stack([torch.tensor([0, grid // 2, grid * grid // 2, -1]), number[-2:, -2:].flatten()])


MASKS = {
    "random": random_ids,
    "block": block_ids,
    "uniform": uniform_ids,
    "ragged": ragged_ids,
    "full_corner": full_corner_ids,
}


def compare(encoder: ViTEncoder, ids: torch.Tensor, *, tolerance: float) -> None:
    grid = encoder.grid
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size, dtype=torch.float64)
    kept = ids >= 0
    flat = torch.zeros(2, grid * grid + 1, dtype=torch.bool).scatter_(
        1, torch.where(kept, ids, grid * grid), value=True
    )
    visible = flat[:, :-1].view(2, grid, grid)
    results = []

    def reference() -> torch.Tensor:
        tokens = dense_reference(encoder, images, visible).flatten(1, 2)
        return tokens.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, 32))

    for run in (lambda: encoder.forward_visible(images, ids), reference):
        encoder.zero_grad()
        out = run()[kept]
        (out * torch.linspace(-1, 1, 32, dtype=out.dtype)).pow(2).mean().backward()
        results.append((out.detach(), {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}))
    (out, grads), (expected, expected_grads) = results
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=tolerance * max(1.0, float(grad.abs().max())), rtol=0)


@pytest.mark.parametrize("image_size", [64, 160, 176])
@pytest.mark.parametrize("kind", sorted(MASKS))
def test_visible__equals_dense_with_hidden_keys_at_minus_infinity(kind: str, image_size: int) -> None:
    encoder = encoder_of(image_size)
    compare(encoder, MASKS[kind](encoder.grid), tolerance=1e-11)


def test_visible__any_block_size_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK_ELEMENTS", 60)
    compare(encoder_of(160), random_ids(10), tolerance=1e-11)


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_visible_fused__equals_dense_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the engine of GPUs on a CPU."""
    monkeypatch.setattr(attention, "computes_in_blocks", lambda _device: False)
    compare(encoder_of(160), MASKS[kind](10), tolerance=1e-11)


def test_visible__nothing_hidden_equals_the_encoder() -> None:
    encoder = encoder_of(160)
    images = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    ids = torch.stack([torch.randperm(100), torch.randperm(100)])
    dense = encoder.forward_features(images).flatten(2).transpose(1, 2)
    expected = dense.gather(1, ids[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(encoder.forward_visible(images, ids), expected, atol=1e-11, rtol=1e-11)


def test_visible__output_depends_on_kept_pixels_only() -> None:
    encoder = encoder_of(160)
    ids = random_ids(10)
    images = torch.randn(2, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    encoder.forward_visible(images, ids).pow(2).sum().backward()
    touched = images.grad.abs().sum(1).unflatten(1, (10, 16)).unflatten(3, (10, 16)).sum((2, 4)).flatten(1) > 0
    for image in range(2):
        assert set(touched[image].nonzero().flatten().tolist()) == set(ids[image].tolist())


def test_visible__checkpointing_gives_the_same_gradient() -> None:
    encoder = encoder_of(160)
    images, ids = torch.randn(2, 3, 160, 160, dtype=torch.float64), random_ids(10)
    grads = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder.forward_visible(images, ids).pow(2).sum().backward()
        grads.append(encoder.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("ids", [[[100]], [[-2]], [[]]])
def test_visible__refuses_numbers_outside_the_grid(ids: list[list[int]]) -> None:
    encoder = encoder_of(160)
    with pytest.raises(ValueError, match="ids_keep must be"):
        encoder.forward_visible(torch.zeros(1, 3, 160, 160, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64))


def test_mask_tokens__output_does_not_depend_on_hidden_pixels() -> None:
    encoder = encoder_of(160)
    hidden = torch.rand(2, 5, 5) > 0.5
    images = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    pixels = F.interpolate(hidden[:, None].double(), scale_factor=32) > 0
    token = torch.randn(32, dtype=torch.float64)
    out = encoder.forward_features(images, token_mask_Bhw=hidden, mask_token=token)
    changed = torch.where(pixels, torch.randn_like(images), images)
    assert torch.equal(out, encoder.forward_features(changed, token_mask_Bhw=hidden, mask_token=token))
    assert not torch.equal(out, encoder.forward_features(images, token_mask_Bhw=hidden, mask_token=token + 1))
