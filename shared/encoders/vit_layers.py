"""Transformer blocks of segment_anything's windowed vision transformers.

They are in a file of their own because segment_anything imports torchvision, which takes as long as torch itself. Code
that needs shapes only does not import them.

Shape letters: B = images; N = tokens; C = channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from samgraft.shared.encoders.attention import Plan, mix_tokens
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Attention, PatchEmbed
from torch import Tensor, nn

__all__ = ["PatchEmbed", "PlannedBlock", "RelPosAttention"]


class RelPosAttention(Attention):
    """Attention with the parameters of segment_anything's, within the windows of a plan."""

    def __init__(self, dim: int, *, num_heads: int, side: int, windowed: bool) -> None:
        super().__init__(dim, num_heads=num_heads, use_rel_pos=True, input_size=(side, side))
        self.windowed = windowed

    def forward(self, tokens_BNC: Tensor, plan: Plan | None) -> Tensor:
        """Mix tokens within the windows of a plan.

        Without a plan attention is global and has no relative positions.
        """
        if plan is None:
            query, key, value = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for part in self.qkv(tokens_BNC).chunk(3, dim=-1)
            )
            mixed_BNC = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        else:
            windows = plan.windowed if self.windowed else plan.everyone
            # segment_anything pads edge windows with zero tokens, whose queries, keys and values are the bias of qkv. A
            # layer with an adapter may add to that, so it is run on a zero token.
            is_linear = type(self.qkv) is nn.Linear
            padding_D = self.qkv.bias if is_linear else self.qkv(tokens_BNC.new_zeros(tokens_BNC.shape[-1]))
            mixed_BNC = mix_tokens(
                self.qkv(tokens_BNC), padding_D, self.rel_pos_h, self.rel_pos_w, windows, num_heads=self.num_heads
            )
        out: Tensor = self.proj(mixed_BNC)
        return out


class PlannedBlock(nn.Module):
    """Transformer block with the parameters of segment_anything's, for tokens in any order."""

    def __init__(self, dim: int, *, num_heads: int, side: int, windowed: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelPosAttention(dim, num_heads=num_heads, side=side, windowed=windowed)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(embedding_dim=dim, mlp_dim=4 * dim)

    def forward(self, tokens_BNC: Tensor, plan: Plan | None) -> Tensor:
        """Run attention and MLP with their residuals."""
        tokens_BNC = tokens_BNC + self.attn(self.norm1(tokens_BNC), plan)
        out: Tensor = tokens_BNC + self.mlp(self.norm2(tokens_BNC))
        return out
