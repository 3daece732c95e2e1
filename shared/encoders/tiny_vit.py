"""vit_t: TinyViT as an image encoder for SAM, at any size, for masked training too.

Built from timm's TinyViT blocks, arranged and named as in the published weights of LiteMedSAM and MobileSAM, so that
``state_dict()`` has their keys and their files load strictly without translation.

Shape letters: B = images; S = image side (pixels); h, w = grid of ``token_mask``; C = channels.

TinyViT's window attention: timm's outputs with less of its padding.

timm pads the grid with zeros to whole windows, before the norm, and lets real tokens attend to the padding. A grid of
16 with windows of 14 becomes 28: four windows of 196 tokens for 256 real ones. All padding tokens have one key and one
value, so that on a CPU their share of a softmax is a single extra key whose bias is the log-sum-exp of theirs: exact.
On a GPU, where few large operations are faster, only the attention itself sees padding: norm and products do not.

Shape letters: B = images; H, W = grid; C = channels; h = heads; n, m = queries and keys of a window; d = head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from samgraft.shared.encoders.architecture import ArchSpec, Stem
from samgraft.shared.errors import UsageError
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention, ConvNorm, MBConv, PatchMerging, TinyVitBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TinyStage(nn.Module):
    """Blocks of one resolution and the step to the next, under the published names ``blocks`` and ``downsample``."""

    def __init__(self, blocks: nn.Sequential, downsample: nn.Module | None, *, is_conv: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample
        self.is_conv = is_conv

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        """Run the blocks, then the downsampling where there is one."""
        if self.is_conv:
            features_BCHW = self.blocks(features_BCHW)
        else:
            features_BCHW = self.blocks(features_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.downsample is not None:
            features_BCHW = self.downsample(features_BCHW)
        return features_BCHW


class TinyPatchEmbed(nn.Module):
    """The stem: two convolutions, of stride 1 (LiteMedSAM) or stride 2 (MobileSAM)."""

    def __init__(self, embed_dim: int, *, stem: Stem) -> None:
        super().__init__()
        kernel, stride, pad = (1, 1, 0) if stem is Stem.conv1x1 else (3, 2, 1)
        self.seq = nn.Sequential(
            ConvNorm(3, embed_dim // 2, kernel, stride, pad),
            nn.GELU(),
            ConvNorm(embed_dim // 2, embed_dim, kernel, stride, pad),
        )

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Return the first feature map."""
        out: torch.Tensor = self.seq(images_B3SS)
        return out


class TinyViTEncoder(nn.Module):
    """Image encoder vit_t.

    Args:
        spec: Shape; ``spec.tiny`` is given.
        image_size: Side of the square input in pixels, a multiple of the stride.

    BatchNorm keeps its running statistics by default (``batch_norm_frozen``): with few, partly hidden or few-shot
    images they would drift away from the published ones, and they are not part of an adapter file. Stage 1 from random
    weights lets them move: there is nothing to keep.
    """

    def __init__(self, spec: ArchSpec, *, image_size: int) -> None:
        super().__init__()
        if spec.tiny is None:
            raise UsageError(f"TinyViTEncoder must get a vit_t shape, got {spec.title}.")
        spec.check_image_size(image_size)
        self.spec = spec
        self.arch = spec.arch
        self.img_size = image_size  # segment_anything's name: Sam.preprocess and postprocess_masks read it
        self.image_size = image_size
        self.feature_dim = spec.feature_dim
        self.stride = spec.stride
        self.mask_token_dim = spec.mask_token_dim
        self.activation_checkpointing = False
        self.batch_norm_frozen = True
        tiny = spec.tiny
        self.patch_embed = TinyPatchEmbed(tiny.embed_dims[0], stem=tiny.stem)
        self.layers = nn.ModuleList(_build_stage(spec, index) for index in range(len(tiny.depths)))
        self.neck = build_neck(spec.feature_dim, spec.neck_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _publish_names(self)

    def train(self, mode: bool = True) -> TinyViTEncoder:
        """Set the mode; frozen BatchNorm stays in eval whatever the mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
        """Return image embeddings (B, 256, S/stride, S/stride)."""
        out: torch.Tensor = self.neck(self.forward_features(images_B3SS))
        return out

    def forward_features(
        self,
        images_B3SS: torch.Tensor,
        *,
        token_mask_Bhw: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return features before the neck, with hidden tokens replaced.

        Args:
            images_B3SS: Images after ``to_pixels``.
            token_mask_Bhw: True = hidden, on any grid that divides both the image and the stem's output. No output
                depends on a hidden pixel: they are zeroed before the stem and its output there is replaced.
            mask_token: Shape (mask_token_dim,), stands in for a hidden position of the stem's output; zeros if None.

        Returns:
            Shape (B, feature_dim, S/stride, S/stride).
        """
        # channels_last throughout: 1.4x faster training on a CPU, and the blocks' BHWC views then copy nothing.
        images = images_B3SS.contiguous(memory_format=torch.channels_last)
        if token_mask_Bhw is None:
            features: torch.Tensor = self.patch_embed(images)
        else:
            hidden = _upsample_mask(token_mask_Bhw, side=images.shape[-1], name="image")
            features = self.patch_embed(images.masked_fill(hidden, 0.0))
            hidden = _upsample_mask(token_mask_Bhw, side=features.shape[-1], name="stem output")
            token = features.new_zeros(self.mask_token_dim) if mask_token is None else mask_token
            features = torch.where(hidden, token.to(features.dtype).view(1, -1, 1, 1), features)
            features = features.contiguous(memory_format=torch.channels_last)  # torch.where gives NCHW back
        for stage in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                features = checkpoint(stage, features, use_reentrant=False, context_fn=partial(_once_counted, stage))
            else:
                features = stage(features)
        return features

    def layer_groups(self) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Yield (depth index, parameters) from the stem (0) to the neck, for layer-wise learning-rate decay."""
        yield 0, list(self.patch_embed.parameters())
        depth = 0
        for stage in self.layers:
            assert isinstance(stage, TinyStage)
            for block in stage.blocks:
                depth += 1
                yield depth, list(block.parameters())
            if stage.downsample is not None:
                yield depth, list(stage.downsample.parameters())
        yield depth + 1, list(self.neck.parameters())


def _once_counted(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds a forward pass and its repetition in the backward pass, for ``checkpoint``."""
    return nullcontext(), _without_statistics(module)


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms that train use a batch's statistics without remembering them: they saw that batch before."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def freeze_batch_norm(module: nn.Module, *, frozen: bool = True) -> None:
    """Keep (or stop keeping) the BatchNorm statistics of every vit_t encoder inside ``module`` at their values."""
    for child in module.modules():
        if isinstance(child, TinyViTEncoder):
            child.batch_norm_frozen = frozen
            child.train(child.training)


def build_neck(feature_dim: int, neck_dim: int) -> nn.Sequential:
    """Build segment_anything's neck: features to image embeddings."""
    return nn.Sequential(
        nn.Conv2d(feature_dim, neck_dim, kernel_size=1, bias=False),
        LayerNorm2d(neck_dim),
        nn.Conv2d(neck_dim, neck_dim, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(neck_dim),
    )


def _build_stage(spec: ArchSpec, index: int) -> TinyStage:
    tiny = spec.tiny
    assert tiny is not None
    dim, last = tiny.embed_dims[index], len(tiny.depths) - 1
    blocks: list[nn.Module]
    if index == 0:
        blocks = [MBConv(dim, dim, 4.0, nn.GELU, 0.0) for _ in range(tiny.depths[0])]
    else:
        window, heads = tiny.attn_window_sizes[index], tiny.num_heads[index]
        blocks = [GridBlock(dim, heads, window_size=window) for _ in range(tiny.depths[index])]
    downsample = None
    if index < last:
        downsample = PatchMerging(dim, tiny.embed_dims[index + 1], nn.GELU)
        if index + 1 == last:
            # MobileSAM keeps the resolution at its last step, where TinyViT halves it.
            downsample.conv2.conv.stride = (1, 1)
    return TinyStage(nn.Sequential(*blocks), downsample, is_conv=index == 0)


def _publish_names(root: nn.Module) -> None:
    """Rename timm's ``conv`` to ``c`` in every convolution-and-norm pair, as the published keys have it."""
    for module in root.modules():
        if isinstance(module, ConvNorm):
            conv, norm = module.conv, module.bn
            del module.conv, module.bn
            module.add_module("c", conv)
            module.add_module("bn", norm)


def _upsample_mask(token_mask_Bhw: torch.Tensor, *, side: int, name: str) -> torch.Tensor:
    """Nearest-upsample to (B, 1, side, side) bool."""
    height, width = token_mask_Bhw.shape[-2:]
    if token_mask_Bhw.dtype != torch.bool:
        raise ValueError(f"token_mask must be bool (True = hidden), got {token_mask_Bhw.dtype}.")
    if height != width or side % height:
        raise ValueError(f"token_mask grid must be square and divide the {name} side {side}, got {height}x{width}.")
    mask = F.interpolate(token_mask_Bhw[:, None].to(torch.uint8), scale_factor=side // height, mode="nearest")
    return mask.bool()


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
