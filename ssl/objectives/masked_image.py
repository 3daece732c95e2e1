"""Masked-image modelling, the prediction of hidden squares from the rest of the slice (as in SimMIM).

This objective is for encoders with a convolutional stem (``vit_t``), which cannot drop tokens. Hidden pixels are set
to zero before the stem and mask tokens replace them after it, so no output depends on hidden values. A light
convolutional decoder, which is not exported, predicts the grey values below each feature. The loss is the mean absolute
error over hidden pixels only.

Shape letters: B = slices, S = image size in pixels, h, w = feature rows and columns, C = channels, P = pixels per
token, u = rows and columns of hidden squares.

Source: Xie et al., SimMIM (CVPR 2022): mask tokens in place, L1 on hidden pixels, a light head. Liu et al., A ConvNet
for the 2020s (CVPR 2022): the decoder's block. Tian et al., SparK (ICLR 2023): a decoder with skip connections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pydantic.dataclasses
import torch
import torch.nn.functional as F
from samgraft.shared.config import NonNegativeInt, OpenShare, PositiveInt
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.samples.dataset import centre_channel
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, freeze_unused_neck
from samgraft.ssl.objectives.panels import GIVEN_BRIGHTNESS, HIDDEN_IS_GREY, Panel
from samgraft.ssl.scope import learns_mask_token
from samgraft.ssl.views.masking import MaskKind, mask_unit, upsample_mask
from torch import nn

MASK_SHARE = 1 / 8
"""Side of a hidden square over the input's side where ``mask_unit_px`` is null. Smoothing fills smaller squares of a
head so well that a short run cannot do better (benchmarks/results/demo_stage1-2026-11-30.md)."""


class PixelTarget(Enum):
    """Units of the decoder's prediction."""

    SLICE = "slice"
    """Standard deviations from the mean of the slice's visible pixels. Predictions convert back to grey values without
    any hidden value, so the pictures show nothing that was given."""
    DETAIL = "detail"
    """Difference from the smoothing of the visible pixels, in standard deviations as for slice. The network supplies
    only what smoothing cannot, so that it fills holes better than smoothing from the first steps on."""
    UNIT = "unit"
    """Every hidden square normalised by its own mean and deviation (MAE's norm_pix_loss). Features are sharper, but the
    pictures need the hidden square's own mean and deviation."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedImageConfig:
    """Settings of the objective ``masked_image``."""

    mask_ratio: OpenShare = 0.5
    """Fraction of squares hidden."""
    mask_unit_px: PositiveInt | None = 16
    """Side of a hidden square in pixels of the encoder's input, a multiple of the encoder's stride. null takes one
    token of the windowed ViTs, 32 px for sam2_* and about an eighth of the input for vit_t."""
    mask_kind: MaskKind = MaskKind.RANDOM
    """Spread of the hidden squares, random or block."""
    target: PixelTarget = PixelTarget.SLICE
    """Units of the prediction, slice, detail or unit, see ``PixelTarget``."""
    train_neck: bool = False
    """True trains SAM's neck and reads the features behind it. False keeps the neck's weights exactly."""
    decoder_dim: PositiveInt = 192
    """Channels of the decoder."""
    decoder_sees_pixels: bool = False
    """True gives the decoder the visible pixels, smoothed over the holes, as well as the features (a skip connection as
    in SparK). Pictures then get sharp in a short run, because grey values need not pass through the encoder, which has
    to supply only what smoothing cannot. False sends everything through the encoder, as in SimMIM."""
    num_decoder_blocks: NonNegativeInt = 2
    """Depth of the decoder, small because the encoder need not learn what the decoder can do alone."""

    def __post_init__(self) -> None:
        if self.mask_kind is MaskKind.PER_WINDOW:
            raise ValueError(
                "mask_kind of masked_image must be random or block, because it hides whole squares, got per_window."
            )


class DecoderBlock(nn.Module):
    """ConvNeXt block with a depthwise 7x7 convolution, LayerNorm, two pointwise layers and a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.project = nn.Linear(4 * dim, dim)

    def forward(self, features_BChw: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape."""
        mixed_BhwC = self.depthwise(features_BChw).permute(0, 2, 3, 1)
        mixed_BhwC = self.project(F.gelu(self.expand(self.norm(mixed_BhwC))))
        out_BChw: torch.Tensor = features_BChw + mixed_BhwC.permute(0, 3, 1, 2)
        return out_BChw


class PixelDecoder(nn.Module):
    """Convolutional decoder from features (B, C, h, w) to grey values (B, 1, h * stride, w * stride)."""

    def __init__(self, in_dim: int, *, dim: int, num_blocks: int, stride: int, sees_pixels: bool) -> None:
        super().__init__()
        self.stride = stride
        self.embed_pixels = nn.Conv2d(stride * stride + 1, dim, kernel_size=1) if sees_pixels else None
        self.norm = nn.GroupNorm(1, in_dim)
        self.embed = nn.Conv2d(in_dim, dim, kernel_size=1)
        self.blocks = nn.Sequential(*(DecoderBlock(dim) for _ in range(num_blocks)))
        self.last_norm = nn.GroupNorm(1, dim)
        self.to_pixels = nn.Conv2d(dim, stride * stride, kernel_size=1)
        # Zero is the mean of the visible pixels. The first steps then need not undo a random picture.
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.zeros_(self.to_pixels.bias)  # type: ignore[arg-type]

    def forward(self, features_BChw: torch.Tensor, seen_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor) -> torch.Tensor:
        """Return the predicted picture in units of the target.

        Args:
            features_BChw: Output of the encoder.
            seen_B1SS: Visible pixels, smoothed over the holes, in units of the target.
            hidden_B1SS: True = hidden pixel.
        """
        hidden_BChw = self.embed(self.norm(features_BChw))
        if self.embed_pixels is not None:
            # Hidden squares are multiples of the stride, so that one pixel per feature shows whether it is hidden.
            holes_B1hw = hidden_B1SS[:, :, :: self.stride, :: self.stride].to(seen_B1SS.dtype)
            pixels_BPhw = torch.cat([F.pixel_unshuffle(seen_B1SS, self.stride), holes_B1hw], dim=1)
            hidden_BChw = hidden_BChw + self.embed_pixels(pixels_BPhw)
        hidden_BChw = self.blocks(hidden_BChw)
        return F.pixel_shuffle(self.to_pixels(self.last_norm(hidden_BChw)), self.stride)


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    """Result of one pass through encoder and decoder."""

    picture_B1SS: torch.Tensor
    """Predicted picture in units of the target."""
    features_BChw: torch.Tensor
    mask_Bhw: torch.Tensor
    """True = hidden square."""
    hidden_B1SS: torch.Tensor
    mean: torch.Tensor
    """Value subtracted from the grey values, broadcastable to them."""
    std: torch.Tensor
    """Divisor of the grey values, broadcastable to them."""


class MaskedImage(Objective):
    """The objective ``masked_image``, which exports the trained encoder."""

    settings_type = MaskedImageConfig
    config: MaskedImageConfig

    def __init__(self, encoder: Any, config: MaskedImageConfig, *, seed: int, max_steps: int = 1) -> None:
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        self.mask_unit_px = mask_unit(encoder, config.mask_unit_px, share=MASK_SHARE)
        self.mask_side = encoder.image_size // self.mask_unit_px
        in_dim = freeze_unused_neck(encoder, train_neck=config.train_neck)
        self.mask_token = nn.Parameter(torch.zeros(encoder.mask_token_dim), requires_grad=learns_mask_token(encoder))
        self.decoder = PixelDecoder(
            in_dim,
            dim=config.decoder_dim,
            num_blocks=config.num_decoder_blocks,
            stride=encoder.stride,
            sees_pixels=config.decoder_sees_pixels,
        )

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the mean absolute error over hidden pixels. ``step`` and ``planes`` are not used."""
        predicted, pixels_of_slices = self._predict(images_B1SS, sample_counters), images_B1SS
        images_B1SS = centre_channel(images_B1SS)
        error_B1SS = (predicted.picture_B1SS - (images_B1SS - predicted.mean) / predicted.std).abs()
        num_hidden = predicted.hidden_B1SS.sum()
        # Mean over hidden pixels of the batch. Every sample hides the same number, so it is the mean over samples too.
        total = (error_B1SS * predicted.hidden_B1SS).sum() / num_hidden
        grey_error = (error_B1SS.detach() * predicted.std * predicted.hidden_B1SS).sum() / num_hidden
        features_BC = predicted.features_BChw.detach().float().mean((2, 3))
        loss = ObjectiveLoss(total=total, parts={"grey_error": grey_error}, features_BC=features_BC)
        mask_Bhw = predicted.mask_Bhw
        return self.anchored(
            loss,
            predicted.features_BChw,
            lambda encoder: self._encode(encoder, pixels_of_slices, mask_Bhw),
            hidden_Bhw=mask_Bhw,
        )

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the input, its visible part, the prediction, and the prediction in the holes of the input."""
        predicted = self._predict(images_B1SS, sample_counters)
        images_B1SS = centre_channel(images_B1SS)
        grey_B1SS = (predicted.picture_B1SS * predicted.std + predicted.mean).clamp(0, 1)
        seen_B1SS = images_B1SS.masked_fill(predicted.hidden_B1SS, 0.5)
        filled_B1SS = torch.where(predicted.hidden_B1SS, grey_B1SS, images_B1SS)
        columns = torch.stack([images_B1SS, seen_B1SS, grey_B1SS, filled_B1SS]).squeeze(2)
        return Panel(
            columns=("input", "visible", "output", "output in the holes"),
            images_KBHW=columns.float().cpu(),
            caption=HIDDEN_IS_GREY + (GIVEN_BRIGHTNESS if self.config.target is PixelTarget.UNIT else ""),
        )

    @torch.no_grad()
    def references(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Mapping[str, float]:
        """Return the grey errors of the visible mean and of smoothing from the rim, which need no network."""
        images_B1SS = centre_channel(images_B1SS)
        mask_Bhw = self.draw_masks(sample_counters, side=self.mask_side).to(images_B1SS.device)
        hidden_B1SS = upsample_mask(mask_Bhw, image_size=images_B1SS.shape[-1])
        mean_B111, _ = _visible_statistics(images_B1SS, hidden_B1SS)
        smooth_B1SS = self._smooth(images_B1SS, hidden_B1SS)
        return {
            "mean of the visible pixels": _hidden_error(images_B1SS, mean_B111.expand_as(images_B1SS), hidden_B1SS),
            "smoothing of the visible pixels": _hidden_error(images_B1SS, smooth_B1SS, hidden_B1SS),
        }

    def _predict(self, images_B1SS: torch.Tensor, sample_counters: Sequence[int]) -> _Prediction:
        mask_Bhw = self.draw_masks(sample_counters, side=self.mask_side).to(images_B1SS.device)
        features_BChw = self._encode(self.encoder, images_B1SS, mask_Bhw)
        read_BChw = self.encoder.neck(features_BChw) if self.config.train_neck else features_BChw
        # Neighbour slices are hidden at the same places and help the encoder; the target is the slice itself.
        images_B1SS = centre_channel(images_B1SS)
        hidden_B1SS = upsample_mask(mask_Bhw, image_size=images_B1SS.shape[-1])
        mean, std = self._units(images_B1SS, hidden_B1SS)
        seen_B1SS = torch.zeros_like(images_B1SS)
        if self.config.decoder_sees_pixels:
            # Units of the visible pixels whatever the target, because units of hidden squares would reveal them.
            visible_mean, visible_std = _visible_statistics(images_B1SS, hidden_B1SS)
            smooth_B1SS = self._smooth(images_B1SS, hidden_B1SS)
            seen_B1SS = (torch.where(hidden_B1SS, smooth_B1SS, images_B1SS) - visible_mean) / visible_std
        picture_B1SS = self.decoder(read_BChw, seen_B1SS, hidden_B1SS).float()
        return _Prediction(
            picture_B1SS=picture_B1SS,
            features_BChw=features_BChw,
            mask_Bhw=mask_Bhw,
            hidden_B1SS=hidden_B1SS,
            mean=mean,
            std=std,
        )

    def _encode(self, encoder: Any, images_B1SS: torch.Tensor, mask_Bhw: torch.Tensor) -> torch.Tensor:
        """Return the features before the neck of slices with hidden squares."""
        pixels_B3SS = to_pixels(images_B1SS, encoder.spec)
        features_BChw: torch.Tensor = encoder.forward_features(
            pixels_B3SS, token_mask_Bhw=mask_Bhw, mask_token=self.mask_token
        )
        return features_BChw

    def _units(self, images_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the deviation that normalise the grey values, see ``PixelTarget``."""
        if self.config.target is PixelTarget.UNIT:
            return _unit_statistics(images_B1SS, self.mask_unit_px)
        mean_B111, std_B111 = _visible_statistics(images_B1SS, hidden_B1SS)
        if self.config.target is PixelTarget.DETAIL:
            return self._smooth(images_B1SS, hidden_B1SS), std_B111
        return mean_B111, std_B111

    def _smooth(self, images_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor) -> torch.Tensor:
        return fill_by_smoothing(images_B1SS, hidden_B1SS, sigma_px=self.mask_unit_px / 2)


def _visible_statistics(images_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    visible_B1SS = ~hidden_B1SS
    count_B111 = visible_B1SS.sum((2, 3), keepdim=True)
    mean_B111 = (images_B1SS * visible_B1SS).sum((2, 3), keepdim=True) / count_B111
    variance_B111 = ((images_B1SS - mean_B111).square() * visible_B1SS).sum((2, 3), keepdim=True) / count_B111
    # At least 0.05, or the noise of a nearly black slice would be amplified more than twentyfold.
    return mean_B111, variance_B111.sqrt().clamp_min(0.05)


def fill_by_smoothing(images_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor, *, sigma_px: float) -> torch.Tensor:
    """Fill every pixel with the Gaussian-weighted mean of the visible pixels around it."""
    reach = max(1, int(3 * sigma_px))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images_B1SS.device) / sigma_px) ** 2)

    def blur(plane_B1SS: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(plane_B1SS, weights.view(1, 1, -1, 1), padding=(reach, 0))
        return F.conv2d(rows, weights.view(1, 1, 1, -1), padding=(0, reach))

    # Normalised convolution, in which dividing by the blurred mask leaves hidden pixels out of the mean.
    visible_B1SS = (~hidden_B1SS).float()
    return blur(images_B1SS * visible_B1SS) / blur(visible_B1SS).clamp_min(1e-6)


def _hidden_error(images_B1SS: torch.Tensor, filled_B1SS: torch.Tensor, hidden_B1SS: torch.Tensor) -> float:
    return float(((images_B1SS - filled_B1SS).abs() * hidden_B1SS).sum() / hidden_B1SS.sum())


def _unit_statistics(images_B1SS: torch.Tensor, unit_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    mean_B1uu = F.avg_pool2d(images_B1SS, unit_px)
    variance_B1uu = (F.avg_pool2d(images_B1SS.square(), unit_px) - mean_B1uu.square()).clamp_min(0)
    grow = {"scale_factor": float(unit_px), "mode": "nearest"}
    mean_B1SS = F.interpolate(mean_B1uu, **grow)  # type: ignore[arg-type]
    return mean_B1SS, F.interpolate((variance_B1uu + 1e-6).sqrt(), **grow)  # type: ignore[arg-type]
