"""Pictures of features: their strongest directions over a few slices, one grey picture per direction.

Shape letters: K = columns, B = slices, C = channels, h, w = feature rows and columns, S = side of the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from samgraft.shared.samples.dataset import centre_channel
from samgraft.ssl.objectives.objective import Panel

NUM_DIRECTIONS = 3
CAPTION = (
    "Features of the encoder that is handed on, along the three directions in which they differ most over these "
    "slices: tissue that looks alike has the same grey. Noise or a flat picture is a bad sign."
)


def feature_panel(images_B1SS: torch.Tensor, features_BChw: torch.Tensor) -> Panel:
    """Show the features' principal directions beside the slices."""
    directions_CK, mean_C = principal_directions(features_BChw, num=NUM_DIRECTIONS)
    pictures_KBSS = project(features_BChw, directions_CK, mean_C, side=images_B1SS.shape[-1])
    columns = ("input", *(f"direction {k + 1}" for k in range(directions_CK.shape[1])))
    images_KBHW = torch.cat([centre_channel(images_B1SS).float().squeeze(1)[None], pictures_KBSS])
    return Panel(columns=columns, images_KBHW=images_KBHW.cpu(), caption=CAPTION)


def principal_directions(features_BChw: torch.Tensor, *, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the strongest directions (C, num) over all positions, and the mean (C,) they are counted from."""
    tokens_NC = features_BChw.float().movedim(1, -1).flatten(0, 2)
    mean_C = tokens_NC.mean(0)
    centered_NC = tokens_NC - mean_C
    _, directions_CC = torch.linalg.eigh(centered_NC.T @ centered_NC)
    directions_CK = directions_CC.flip(1)[:, :num]
    # The sign of a direction is arbitrary: fixed, or pictures would flip from one look to the next.
    largest_K = directions_CK.gather(0, directions_CK.abs().argmax(0, keepdim=True))
    return directions_CK * largest_K.sign(), mean_C


def project(
    features_BChw: torch.Tensor, directions_CK: torch.Tensor, mean_C: torch.Tensor, *, side: int
) -> torch.Tensor:
    """Return pictures (K, B, side, side) in [0, 1]; the middle 96 % of values fill the range."""
    values_BKhw = torch.einsum("bchw,ck->bkhw", features_BChw.float() - mean_C[None, :, None, None], directions_CK)
    flat_KN = values_BKhw.movedim(1, 0).flatten(1)
    low_K, high_K = flat_KN.quantile(0.02, dim=1), flat_KN.quantile(0.98, dim=1)
    scaled_BKhw = (values_BKhw - low_K[None, :, None, None]) / (high_K - low_K).clamp_min(1e-6)[None, :, None, None]
    return F.interpolate(scaled_BKhw.clamp(0, 1), size=(side, side), mode="nearest").movedim(1, 0)
