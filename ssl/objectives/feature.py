"""Masked feature prediction, which predicts SAM's own features of the whole slice from a part of it.

A frozen copy of the initial encoder encodes the whole slice. The trained encoder receives the slice with hidden tokens
and must produce the same features everywhere. SAM's mask decoder can still read these features, because they stay
where SAM put them, so this is the safest way to adapt an encoder that will be used with SAM's own decoder.

The windowed ViTs and Hiera run on visible tokens only (units of 32 px of Hiera), and a light decoder, which is not
exported, fills the grid with features of the hidden ones. vit_t, whose stem cannot drop tokens, has mask tokens in
place and no decoder.

With ``train_neck: false`` the student's features pass SAM's own neck, whose weights stay exactly the same. With
``true`` the neck may change too. The target before the neck (``target: features``) does not use the neck.

Shape letters: B = slices, S = image size, C = channels, h, w = feature rows and columns, N, M = visible and hidden
tokens, L = h w, K = directions.

Source: Wei et al., MaskFeat (CVPR 2022): features as targets. Xiong et al., EfficientSAM (CVPR 2024): SAM's own as
targets, a cross-attention decoder for hidden tokens. Baevski et al., data2vec (2022): normalised targets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegative, OpenShare, PositiveInt
from samgraft.shared.encoders.base import TokenDroppingEncoder
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import UsageError
from samgraft.shared.samples.dataset import centre_channel
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.anchor import normalise_tokens, token_error
from samgraft.ssl.objectives.decoders import Decoder, DecoderKind, DecoderShape, chosen_ids, place_tokens
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, freeze_unused_neck
from samgraft.ssl.objectives.panels import HIDDEN_IS_GREY, Panel, principal_directions, project_features
from samgraft.ssl.scope import learns_mask_token
from samgraft.ssl.views.masking import MaskKind, mask_unit, upsample_mask
from torch import nn


class FeatureTarget(Enum):
    """Features of SAM that are predicted."""

    EMBEDDINGS = "embeddings"
    """Image embeddings behind the neck, which the mask decoder reads."""
    FEATURES = "features"
    """Features before the neck, every token normalised to mean 0 and deviation 1, because a few channels would dominate
    the loss otherwise."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Settings of the objective ``feature``."""

    target: FeatureTarget = FeatureTarget.EMBEDDINGS
    """Predicted features, embeddings or features, see ``FeatureTarget``."""
    mask_ratio: OpenShare = 0.5
    """Fraction of tokens hidden, less than MAE's because features contain more than pixels."""
    mask_kind: MaskKind = MaskKind.RANDOM
    """Spread of the hidden tokens, random, block, or per_window (not for vit_t)."""
    mask_unit_px: PositiveInt | None = None
    """Side of a hidden square in pixels. null takes one token of the windowed ViTs, 32 px for sam2_* and about a tenth
    of the input for vit_t."""
    visible_weight: NonNegative = 1.0
    """Weight of the visible tokens' error relative to the hidden ones'. It keeps the encoder at SAM's features where
    the input is complete. 0 predicts hidden tokens only."""
    train_neck: bool = False
    """True trains SAM's neck too (target embeddings only)."""
    decoder_dim: PositiveInt = 256
    """Channels of the decoder (windowed ViTs)."""
    num_decoder_blocks: PositiveInt = 2
    """Depth of the decoder (windowed ViTs)."""
    num_decoder_heads: PositiveInt = 4
    """Attention heads of the decoder (windowed ViTs)."""

    def __post_init__(self) -> None:
        if self.train_neck and self.target is FeatureTarget.FEATURES:
            raise ValueError(
                "train_neck must be false with target features, which are taken before the neck, got true."
            )
        self.decoder_shape()

    def decoder_shape(self) -> DecoderShape:
        """Return the size of the decoder."""
        return DecoderShape(
            kind=DecoderKind.CROSS,
            dim=self.decoder_dim,
            num_blocks=self.num_decoder_blocks,
            num_heads=self.num_decoder_heads,
        )


class Feature(Objective):
    """The objective ``feature``, which exports the trained encoder."""

    settings_type = FeatureConfig
    config: FeatureConfig

    def __init__(self, encoder: Any, config: FeatureConfig, *, seed: int, max_steps: int = 1) -> None:
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        can_drop = isinstance(encoder, TokenDroppingEncoder)
        step_px = encoder.unit_px if can_drop else encoder.stride
        self.mask_unit_px = mask_unit(encoder, config.mask_unit_px, step_px=step_px)
        self.mask_side = encoder.image_size // self.mask_unit_px
        self.reads_neck = config.target is FeatureTarget.EMBEDDINGS
        # Not named "teacher", because readers of weights files take a teacher for the better encoder.
        self.frozen_copy: Any = copy.deepcopy(encoder).requires_grad_(False).eval()
        freeze_unused_neck(encoder, train_neck=config.train_neck)
        self.mask_token: nn.Parameter | None = None
        self.decoder: Decoder | None = None
        if can_drop:
            if self.mask_unit_px != encoder.unit_px and config.mask_kind is MaskKind.PER_WINDOW:
                raise UsageError(
                    f"mask_unit_px must not be set with mask_kind per_window, which hides single tokens, got "
                    f"{config.mask_unit_px}. Remove it.",
                    where="objective.feature.mask_unit_px",
                )
            self.decoder = Decoder(
                encoder.unit_dim, config.decoder_shape(), grid=encoder.grid, out_dim=encoder.unit_dim
            )
        else:
            if config.mask_kind is MaskKind.PER_WINDOW:
                raise UsageError(
                    f"mask_kind must be random or block for {encoder.arch}, which hides whole squares, got per_window.",
                    where="objective.feature.mask_kind",
                )
            self.mask_token = nn.Parameter(
                torch.zeros(encoder.mask_token_dim), requires_grad=learns_mask_token(encoder)
            )

    def train(self, mode: bool = True) -> Feature:
        """Set the mode of everything but the frozen copy, which has no dropout and no batch statistics."""
        super().train(mode)
        self.frozen_copy.eval()
        return self

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the unexplained share of the features' variance.

        Predicting the mean has a loss of 1. ``step`` and ``planes`` are not used.
        """
        mask_Bhw = self.draw_masks(sample_counters, side=self.mask_side).to(images_B1SS.device)
        target_BChw = self._target(images_B1SS)
        encoded_BChw = self._encode(self.encoder, images_B1SS, mask_Bhw)
        predicted_BChw, features_BChw = self._predict(encoded_BChw, mask_Bhw)
        # Differences of large features lose their digits in bf16.
        with torch.autocast(images_B1SS.device.type, enabled=False):
            error_Bhw = self._error(predicted_BChw.float(), target_BChw)
            hidden_Bhw = upsample_mask(mask_Bhw, image_size=target_BChw.shape[-1])[:, 0]
            hidden = error_Bhw[hidden_Bhw].mean()
            visible = error_Bhw[~hidden_Bhw].mean()
            weight = self.config.visible_weight
            total = (hidden + weight * visible) / (1 + weight)
        features_BC = features_BChw.detach().float().mean((2, 3))
        parts = {"hidden_error": hidden.detach(), "visible_error": visible.detach()}
        loss = ObjectiveLoss(total=total, parts=parts, features_BC=features_BC)
        return self.anchored(
            loss,
            encoded_BChw,
            lambda encoder: self._encode(encoder, images_B1SS, mask_Bhw),
            hidden_Bhw=mask_Bhw,
        )

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the input, its visible part, and the principal direction as predicted and as it is."""
        mask_Bhw = self.draw_masks(sample_counters, side=self.mask_side).to(images_B1SS.device)
        target_BChw = self._target(images_B1SS)
        predicted_BChw, _ = self._predict(self._encode(self.encoder, images_B1SS, mask_Bhw), mask_Bhw)
        images_B1SS = centre_channel(images_B1SS)
        directions_CK, mean_C = principal_directions(target_BChw, num=1)
        side = images_B1SS.shape[-1]
        both = project_features(torch.cat([predicted_BChw.float(), target_BChw]), directions_CK, mean_C, side=side)[0]
        predicted_BSS, target_BSS = both.chunk(2)
        seen_B1SS = images_B1SS.masked_fill(upsample_mask(mask_Bhw, image_size=side), 0.5)
        pictures = torch.stack([images_B1SS.squeeze(1), seen_B1SS.squeeze(1), predicted_BSS, target_BSS])
        return Panel(
            columns=("input", "visible", "output", "features of the whole slice"),
            images_KBHW=pictures.float().cpu(),
            caption=f"{HIDDEN_IS_GREY} The last two columns show features along the direction in which SAM's own "
            "features differ most over these slices. They are predicted from the visible part, and computed by SAM "
            "from the whole slice.",
        )

    @torch.no_grad()
    def _target(self, images_B1SS: torch.Tensor) -> torch.Tensor:
        """Return the frozen copy's features of the whole slice, float32."""
        features_BChw = self.frozen_copy.forward_features(to_pixels(images_B1SS, self.encoder.spec))
        target_BChw: torch.Tensor = self.frozen_copy.neck(features_BChw) if self.reads_neck else features_BChw
        return target_BChw.float()

    def _encode(self, encoder: Any, images_B1SS: torch.Tensor, mask_Bhw: torch.Tensor) -> torch.Tensor:
        """Return the features before the neck, which are 0 at hidden tokens that were left out."""
        pixels_B3SS = to_pixels(images_B1SS, encoder.spec)
        if self.decoder is None:
            features_BChw: torch.Tensor = encoder.forward_features(
                pixels_B3SS, token_mask_Bhw=mask_Bhw, mask_token=self.mask_token
            )
            return features_BChw
        ids_keep_BN = chosen_ids(~upsample_mask(mask_Bhw, image_size=encoder.grid).flatten(1))
        visible_BNC = encoder.forward_visible(pixels_B3SS, ids_keep_BN)
        tokens_BLC = place_tokens(visible_BNC, ids_keep_BN, num_tokens=encoder.grid**2)
        with_holes_BChw: torch.Tensor = encoder.units_to_features(tokens_BLC)
        return with_holes_BChw

    def _predict(self, encoded_BChw: torch.Tensor, mask_Bhw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predicted target and the features before the neck, hidden ones included."""
        features_BChw = encoded_BChw
        if self.decoder is not None:
            hidden_BL = upsample_mask(mask_Bhw, image_size=self.encoder.grid).flatten(1)
            features_BChw = self._fill_grid(encoded_BChw, hidden_BL)
        predicted_BChw = self.encoder.neck(features_BChw) if self.reads_neck else features_BChw
        return predicted_BChw, features_BChw

    def _fill_grid(self, encoded_BChw: torch.Tensor, hidden_BL: torch.Tensor) -> torch.Tensor:
        """Decode the hidden tokens from the visible ones and add them to the grid."""
        assert self.decoder is not None
        ids_keep_BN, ids_hidden_BM = chosen_ids(~hidden_BL), chosen_ids(hidden_BL)
        tokens_BLC = self.encoder.features_to_units(encoded_BChw)
        visible_BNC = tokens_BLC.gather(1, ids_keep_BN[..., None].expand(-1, -1, tokens_BLC.shape[-1]))
        hidden_BMC = self.decoder(visible_BNC, ids_keep_BN, ids_hidden_BM).to(visible_BNC.dtype)
        hidden_BLC = place_tokens(hidden_BMC, ids_hidden_BM, num_tokens=tokens_BLC.shape[1])
        features_BChw: torch.Tensor = encoded_BChw + self.encoder.units_to_features(hidden_BLC)
        return features_BChw

    def _error(self, predicted_BChw: torch.Tensor, target_BChw: torch.Tensor) -> torch.Tensor:
        """Return the squared error per token over the target's variance, shape (B, h, w)."""
        if not self.reads_neck:
            predicted_BChw, target_BChw = (normalise_tokens(x) for x in (predicted_BChw, target_BChw))
        return token_error(predicted_BChw, target_BChw)
