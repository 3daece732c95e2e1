"""Pictures of an objective, and of the principal directions of features.

Shape letters: K = columns, B = slices, C = channels, h, w = feature rows and columns, H, W, S = rows, columns and side
of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from samgraft.shared.samples.dataset import centre_channel

HIDDEN_IS_GREY = "Hidden pixels are grey in the second column; the encoder did not receive them."
GIVEN_BRIGHTNESS = (
    " The output takes brightness and contrast of every hidden square from the input; only its structure is predicted."
)
NUM_DIRECTIONS = 3
FEATURE_CAPTION = (
    "Features of the exported encoder along the three directions in which they differ most over these slices. Similar "
    "tissue has similar grey values. Noise or a uniform picture is a bad sign."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A grid of pictures with one row per slice, all values in [0, 1]."""

    columns: Sequence[str]
    """Title of each column."""
    images_KBHW: torch.Tensor
    """Pictures of shape (K columns, B slices, H, W), float32."""
    caption: str = ""
    """Explanation of the columns for the report."""


def feature_panel(images_B1SS: torch.Tensor, features_BChw: torch.Tensor) -> Panel:
    """Return the slices and their features along the principal directions."""
    directions_CK, mean_C = principal_directions(features_BChw, num=NUM_DIRECTIONS)
    pictures_KBSS = project_features(features_BChw, directions_CK, mean_C, side=images_B1SS.shape[-1])
    columns = ("input", *(f"direction {k + 1}" for k in range(directions_CK.shape[1])))
    images_KBHW = torch.cat([centre_channel(images_B1SS).float().squeeze(1)[None], pictures_KBSS])
    return Panel(columns=columns, images_KBHW=images_KBHW.cpu(), caption=FEATURE_CAPTION)


def principal_directions(features_BChw: torch.Tensor, *, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the strongest directions (C, num) over all positions, and the mean (C,)."""
    tokens_NC = features_BChw.float().movedim(1, -1).flatten(0, 2)
    mean_C = tokens_NC.mean(0)
    centered_NC = tokens_NC - mean_C
    # Eigenvalues are in ascending order, so the strongest directions are the last columns.
    _, directions_CC = torch.linalg.eigh(centered_NC.T @ centered_NC)
    directions_CK = directions_CC.flip(1)[:, :num]
    # The sign of an eigenvector is arbitrary. Fix it, or the pictures would invert between two monitoring rounds.
    largest_K = directions_CK.gather(0, directions_CK.abs().argmax(0, keepdim=True))
    return directions_CK * largest_K.sign(), mean_C


def project_features(
    features_BChw: torch.Tensor, directions_CK: torch.Tensor, mean_C: torch.Tensor, *, side: int
) -> torch.Tensor:
    """Return pictures (K, B, side, side) in [0, 1] of the features along the directions."""
    values_BKhw = torch.einsum("bchw,ck->bkhw", features_BChw.float() - mean_C[None, :, None, None], directions_CK)
    flat_KN = values_BKhw.movedim(1, 0).flatten(1)
    # The middle 96 % of the values fill the range, because single extreme tokens would make the rest uniform grey.
    low_K, high_K = flat_KN.quantile(0.02, dim=1), flat_KN.quantile(0.98, dim=1)
    scaled_BKhw = (values_BKhw - low_K[None, :, None, None]) / (high_K - low_K).clamp_min(1e-6)[None, :, None, None]
    return F.interpolate(scaled_BKhw.clamp(0, 1), size=(side, side), mode="nearest").movedim(1, 0)
