"""Layers of TinyViT, with the names of the published weights.

They are in a file of their own because the import of timm takes time. Code that needs shapes only does not import it.

The window attention returns timm's outputs with less of its padding. timm pads the grid with zeros to whole windows
before the norm, and real tokens attend to the padding. A grid of 16 with windows of 14 becomes 28, which is four
windows of 196 tokens for 256 real ones. All padding tokens have the same key and the same value. On a CPU their share
of a softmax is therefore computed exactly by one extra key whose bias is the log-sum-exp of theirs. On a GPU, where few
large operations are faster, only the attention itself runs on padding, while norm and linear layers do not.

Shape letters: B = images; S = image side (pixels); H, W = grid; C = channels; n, m = queries and keys of a window;
d = channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.tiny_vit import Attention, ConvNorm, MBConv, PatchMerging, TinyVitBlock
from torch import Tensor, nn

__all__ = ["GridAttention", "GridBlock", "MBConv", "PatchMerging", "TinyPatchEmbed", "TinyStage", "publish_names"]


class TinyStage(nn.Module):
    """Blocks of one resolution and the downsampling to the next, under their published names."""

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module | None, *, is_conv: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample
        self.is_conv = is_conv

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        """Run the blocks, then the downsampling if there is one."""
        if self.is_conv:
            features_BCHW = self.blocks(features_BCHW)
        else:
            features_BCHW = self.blocks(features_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.downsample is not None:
            features_BCHW = self.downsample(features_BCHW)
        return features_BCHW


class TinyPatchEmbed(nn.Module):
    """Stem of two convolutions, each of stride 1 (LiteMedSAM) or 2 (MobileSAM)."""

    def __init__(self, embed_dim: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        pad = kernel // 2
        self.seq = nn.Sequential(
            ConvNorm(3, embed_dim // 2, kernel, stride, pad),
            nn.GELU(),
            ConvNorm(embed_dim // 2, embed_dim, kernel, stride, pad),
        )

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Return the first feature map."""
        out: torch.Tensor = self.seq(images_B3SS)
        return out


def publish_names(root: nn.Module) -> None:
    """Rename timm's ``conv`` to ``c`` in every convolution-and-norm pair, as the published keys have it."""
    for module in root.modules():
        if isinstance(module, ConvNorm):
            conv, norm = module.conv, module.bn
            del module.conv, module.bn
            module.add_module("c", conv)
            module.add_module("bn", norm)


class GridAttention(Attention):
    """timm's window attention with its parameters and names, on a whole grid instead of padded windows.

    It has no bias cache. timm gathers the biases once in eval mode. They would then be stale after an in-place update
    (EMA teacher, ``load_state_dict``), and a second backward pass in eval mode would fail on the freed graph.
    """

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """Mix features by attention within windows, shape (B, H, W, C)."""
        height, width = features_BHWC.shape[1:3]
        side = self.resolution[0]
        qkv_BHWC = self.qkv(self.norm(features_BHWC))
        padding_1C = None
        if height % side or width % side:
            padding_1C = self.qkv(self.norm(features_BHWC.new_zeros(1, features_BHWC.shape[-1])))
        if not splits_edges(features_BHWC.device):
            mixed = self._mix_region(_pad(qkv_BHWC, padding_1C, side=side), None)[:, :height, :width]
            padded: Tensor = self.proj(mixed)
            return padded
        # Up to four regions: whole windows, the strips at the right and at the bottom, and the corner.
        rows = []
        for top, bottom in _spans(height, side):
            parts = [
                self._mix_region(qkv_BHWC[:, top:bottom, left:right], padding_1C) for left, right in _spans(width, side)
            ]
            rows.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
        out: Tensor = self.proj(torch.cat(rows, dim=1) if len(rows) > 1 else rows[0])
        return out

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """Return the current biases of a window, shape (heads, n, n)."""
        index: Tensor = self.attention_bias_idxs  # type: ignore[assignment]  # a buffer
        return self.attention_biases.index_select(1, index.flatten()).view(-1, *index.shape)

    def _mix_region(self, qkv_BHWC: Tensor, padding_1C: Tensor | None) -> Tensor:
        """Mix one region, which is whole windows or a strip or corner left at the edge."""
        images, height, width, _ = qkv_BHWC.shape
        side = self.resolution[0]
        a, b = min(side, height), min(side, width)
        grid = (images, height // a, a, width // b, b, self.num_heads, -1)
        windows = (
            qkv_BHWC.reshape(grid).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, self.num_heads, a * b, 3 * self.key_dim)
        )
        q, k, v = windows.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        bias_hnm = self._biases(a, b)
        if a * b < side * side:
            assert padding_1C is not None
            _, pad_k, pad_v = padding_1C.view(1, self.num_heads, 1, -1).split(
                [self.key_dim, self.key_dim, self.val_dim], dim=-1
            )
            # One more key and value stand for all padding tokens of the window.
            k = torch.cat([k, pad_k.expand(k.shape[0], -1, -1, -1)], dim=2)
            v = torch.cat([v, pad_v.expand(v.shape[0], -1, -1, -1)], dim=2)
        out = _attention(q, k, v, bias_hnm.to(q.dtype))
        out = out.view(images, height // a, width // b, self.num_heads, a, b, self.val_dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(images, height, width, self.out_dim)

    def _biases(self, a: int, b: int) -> Tensor:
        """Return the biases among the first ``a`` x ``b`` tokens of a window, followed by that of its padding."""
        side = self.resolution[0]
        bias_hNN = self.get_attention_biases(self.attention_biases.device)
        if a == side and b == side:
            return bias_hNN
        real = torch.zeros(side, side, dtype=torch.bool, device=bias_hNN.device)
        real[:a, :b] = True
        bias_hnN = bias_hNN[:, real.flatten()]
        among, padding = bias_hnN[..., real.flatten()], bias_hnN[..., ~real.flatten()]
        # Keys of equal content add up: the sum of exp(q k + bias_i) is exp(q k + logsumexp of the biases).
        return torch.cat([among, padding.logsumexp(dim=-1, keepdim=True)], dim=-1)


class GridBlock(TinyVitBlock):
    """timm's block around ``GridAttention``."""

    def __init__(self, dim: int, num_heads: int, *, window_size: int) -> None:
        super().__init__(dim, num_heads, window_size=window_size)
        self.attn = GridAttention(dim, dim // num_heads, num_heads, attn_ratio=1, resolution=(window_size, window_size))

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """Run attention, local convolution and MLP, shape (B, H, W, C)."""
        features_BHWC = features_BHWC + self.drop_path1(self.attn(features_BHWC))
        features_BHWC = self.local_conv(features_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = features_BHWC + self.drop_path2(self.mlp(features_BHWC))
        return out


def splits_edges(device: torch.device) -> bool:
    """Return True if the edges of a grid are separate calls of the attention."""
    # On a GPU four calls cost more than the padding that they avoid.
    return device.type == "cpu"


def _pad(qkv_BHWC: Tensor, padding_1C: Tensor | None, *, side: int) -> Tensor:
    """Pad queries, keys and values to whole windows with those of timm's zero padding."""
    if padding_1C is None:
        return qkv_BHWC
    images, height, width, channels = qkv_BHWC.shape
    right = padding_1C.expand(images, height, -width % side, channels)
    below = padding_1C.expand(images, -height % side, width + -width % side, channels)
    return torch.cat([torch.cat([qkv_BHWC, right], dim=2), below], dim=1)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias_hnm: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(d) + bias) v."""
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        # torch's fused kernel needs 1.4 times as long here, 3.5 times with its backward pass (AVX-512 bf16).
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias_hnm
        out: Tensor = scores.softmax(dim=-1) @ v
        return out
    # With a mask of four dimensions torch uses the fused kernel, with three it falls back to plain products.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_hnm[None])


def _spans(length: int, side: int) -> Iterator[tuple[int, int]]:
    """Yield the range of whole windows and the range of the rest, as far as they exist."""
    whole = length // side * side
    if whole:
        yield 0, whole
    if whole < length:
        yield whole, length
