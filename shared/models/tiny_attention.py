"""TinyViT's window attention: timm's outputs with less of its padding.

timm pads the grid with zeros to whole windows, before the norm, and lets real tokens attend to the padding. A grid of
16 with windows of 14 becomes 28: four windows of 196 tokens for 256 real ones. All padding tokens have one key and one
value, so that on a CPU their share of a softmax is a single extra key whose bias is the log-sum-exp of theirs: exact.
On a GPU, where few large operations are faster, only the attention itself sees padding: norm and products do not.

Shape letters: B = images; H, W = grid; C = channels; h = heads; n, m = queries and keys of a window; d = head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.tiny_vit import Attention, TinyVitBlock
from torch import Tensor


class GridAttention(Attention):
    """timm's window attention with its parameters and names, on a whole grid instead of padded windows.

    No bias cache: timm gathers the biases once in eval mode. They then stay stale after an in-place update (EMA
    teacher, ``load_state_dict``), and a second backward in eval mode fails on the freed graph.
    """

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """Attend within windows of ``resolution``; returns (B, H, W, C)."""
        height, width = features_BHWC.shape[1:3]
        side = self.resolution[0]
        qkv_BHWC = self.qkv(self.norm(features_BHWC))
        padding_1C = None
        if height % side or width % side:
            padding_1C = self.qkv(self.norm(features_BHWC.new_zeros(1, features_BHWC.shape[-1])))
        if not attends_in_strips(features_BHWC.device):
            mixed = self._attend(_pad(qkv_BHWC, padding_1C, side=side), None)[:, :height, :width]
            padded: Tensor = self.proj(mixed)
            return padded
        rows = []
        for top, bottom in _spans(height, side):
            parts = [
                self._attend(qkv_BHWC[:, top:bottom, left:right], padding_1C) for left, right in _spans(width, side)
            ]
            rows.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
        out: Tensor = self.proj(torch.cat(rows, dim=1) if len(rows) > 1 else rows[0])
        return out

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """Gather the biases afresh: (heads, N, N)."""
        index: Tensor = self.attention_bias_idxs  # type: ignore[assignment]  # a buffer
        return self.attention_biases.index_select(1, index.flatten()).view(-1, *index.shape)

    def _attend(self, qkv_BHWC: Tensor, padding_1C: Tensor | None) -> Tensor:
        """Attend in one region: whole windows, or the strip or corner that is left at the edge."""
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
            k = torch.cat([k, pad_k.expand(k.shape[0], -1, -1, -1)], dim=2)
            v = torch.cat([v, pad_v.expand(v.shape[0], -1, -1, -1)], dim=2)
        out = _attention(q, k, v, bias_hnm.to(q.dtype))
        out = out.view(images, height // a, width // b, self.num_heads, a, b, self.val_dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(images, height, width, self.out_dim)

    def _biases(self, a: int, b: int) -> Tensor:
        """Return the biases among the first ``a`` x ``b`` tokens of a window, and that of its padding behind them."""
        side = self.resolution[0]
        bias_hNN = self.get_attention_biases(self.attention_biases.device)
        if a == side and b == side:
            return bias_hNN
        real = torch.zeros(side, side, dtype=torch.bool, device=bias_hNN.device)
        real[:a, :b] = True
        bias_hnN = bias_hNN[:, real.flatten()]
        among, padding = bias_hnN[..., real.flatten()], bias_hnN[..., ~real.flatten()]
        return torch.cat([among, padding.logsumexp(dim=-1, keepdim=True)], dim=-1)


class GridBlock(TinyVitBlock):
    """timm's block around ``GridAttention``."""

    def __init__(self, dim: int, num_heads: int, *, window_size: int) -> None:
        super().__init__(dim, num_heads, window_size=window_size)
        self.attn = GridAttention(dim, dim // num_heads, num_heads, attn_ratio=1, resolution=(window_size, window_size))

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """Run attention, local convolution and MLP; returns (B, H, W, C)."""
        features_BHWC = features_BHWC + self.drop_path1(self.attn(features_BHWC))
        features_BHWC = self.local_conv(features_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = features_BHWC + self.drop_path2(self.mlp(features_BHWC))
        return out


def attends_in_strips(device: torch.device) -> bool:
    """Return whether the edge of a grid is attended to by itself; on a GPU four calls cost more than some padding."""
    return device.type == "cpu"


def _pad(qkv_BHWC: Tensor, padding_1C: Tensor | None, *, side: int) -> Tensor:
    """Fill up to whole windows with what timm's zero padding contributes."""
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
    # A mask of four dimensions lets torch use the fused kernel; with three it falls back to plain products.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_hnm[None])


def _spans(length: int, side: int) -> Iterator[tuple[int, int]]:
    """Yield the stretch of whole windows, then the rest, as far as there are any."""
    whole = length // side * side
    if whole:
        yield 0, whole
    if whole < length:
        yield whole, length
