"""LeJEPA: views of a slice agree, and all views together look like a Gaussian cloud. No teacher, no schedule.

Every view, large or small, is one point: the mean over the encoder's tokens, through a projection head. Points of one
slice are pulled to the mean of its large views; the distribution of all points is held against an isotropic Gaussian
along random directions (SIGReg), which is what keeps it from collapsing.

The neck: with ``train_neck: false`` the head reads the features before the neck, which keeps SAM's weights to the
bit; with ``true`` it reads the image embeddings behind it, and the neck learns too.

Shape letters: V = views per slice, B = slices, C = channels, D = outputs of the head, h, w = feature rows and columns.

Source: Balestriero and LeCun, LeJEPA (2025), arXiv 2511.08544. Loss terms and head are lightly's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.models.modules.heads import LeJEPAProjectionHead
from samgraft.shared.encoders.vit import MaskableEncoder
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.feature_panel import feature_panel
from samgraft.ssl.objectives.objective import ObjectiveLoss, Panel, WithoutTeacher
from samgraft.ssl.views.crops import NUM_GLOBAL, CropConfig, local_size, multi_crop
from samgraft.ssl.views.view_features import draw_places, view_features
from torch import nn

DIRECTION_STREAM = 0x64697265


@dataclass(frozen=True, kw_only=True)
class LeJEPAConfig:
    """Settings of the objective ``lejepa``."""

    crops: CropConfig = field(default_factory=CropConfig)
    """Views of a slice."""
    sigreg_weight: float = 0.05
    """Weight of the Gaussian term; agreement has the rest (the paper's lambda)."""
    num_directions: int = 1024
    """Random directions per step along which the distribution is compared (the paper's slices)."""
    head_hidden_dim: int = 2048
    """Width of the projection head (the paper's)."""
    output_dim: int = 64
    """Channels in which views are compared (the paper's)."""
    train_neck: bool = False
    """Whether the head reads behind SAM's neck and trains it. False keeps it bit for bit; stage 2 trains it anyway."""

    def __post_init__(self) -> None:
        if not 0 < self.sigreg_weight < 1:
            raise ValueError(
                f"sigreg_weight must lie between 0 and 1, got {self.sigreg_weight}: alone, agreement collapses."
            )
        if min(self.num_directions, self.head_hidden_dim, self.output_dim) < 1:
            raise ValueError("lejepa's num_directions, head_hidden_dim and output_dim must be positive.")


class LeJEPA(WithoutTeacher, nn.Module):
    """The objective ``lejepa``. Exports ``encoder``; throws the head away."""

    def __init__(self, encoder: MaskableEncoder, config: LeJEPAConfig, *, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.local_size_px = local_size(encoder.spec, encoder.image_size, config.crops)
        if not config.train_neck:
            encoder.neck.requires_grad_(False)
        in_dim = encoder.spec.neck_dim if config.train_neck else encoder.feature_dim
        self.head = build_projector(in_dim, hidden_dim=config.head_hidden_dim, output_dim=config.output_dim)
        distributed = torch.distributed.is_available()
        self.sigreg = SIGReg(num_vectors=config.num_directions, gather_distributed=distributed)

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return agreement and the Gaussian term on fresh views of the slices."""
        crops = multi_crop(
            images_B1SS,
            sample_counters=sample_counters,
            seed=self.seed,
            config=self.config.crops,
            local_size_px=self.local_size_px,
            planes=planes,
        )
        neck = self.config.train_neck
        pooled = [view_features(self.encoder, crops.global_BCSS, with_neck=neck).float().mean((2, 3))]
        if crops.local_BCss is not None:
            places_B2 = draw_places(
                self.encoder,
                sample_counters,
                side_px=self.local_size_px,
                num_views=self.config.crops.num_local_crops,
                seed=self.seed,
            )
            small_BChw = view_features(self.encoder, crops.local_BCss, with_neck=neck, places_B2=places_B2)
            pooled.append(small_BChw.float().mean((2, 3)))
        with torch.autocast(images_B1SS.device.type, enabled=False):
            points_VBD = self.head(torch.cat(pooled)).unflatten(0, (-1, len(images_B1SS)))
            agreement = lejepa_invariance_loss(all_proj=points_VBD, global_proj=points_VBD[:NUM_GLOBAL])
            gaussian = self._gaussian(points_VBD, step)
        weight = self.config.sigreg_weight
        return ObjectiveLoss(
            total=weight * gaussian + (1 - weight) * agreement,
            parts={"agreement": agreement.detach(), "sigreg": gaussian.detach()},
            features_BC=pooled[0][: len(images_B1SS)].detach(),
        )

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the slices and the strongest directions of their features."""
        features_BChw = view_features(self.encoder, images_B1SS, with_neck=self.config.train_neck)
        return feature_panel(images_B1SS, features_BChw)

    def references(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Mapping[str, float]:
        """Return nothing: the loss has no trivial answer to compare with."""
        return {}

    def _gaussian(self, points_VBD: torch.Tensor, step: int) -> torch.Tensor:
        """Return SIGReg along directions that depend on seed and step only, the same on every process."""
        device = points_VBD.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self.seed * 1_000_003 + step) ^ DIRECTION_STREAM)
            out: torch.Tensor = self.sigreg(points_VBD)
        return out


def build_projector(in_dim: int, *, hidden_dim: int, output_dim: int) -> LeJEPAProjectionHead:
    """Build lightly's LeJEPA head; its BatchNorm always uses the batch's own statistics and keeps none.

    Running ones would change at every look at held-out slices, and be used there instead of the batch's.
    """
    head = LeJEPAProjectionHead(in_dim, hidden_dim=hidden_dim, output_dim=output_dim)
    for name, module in list(head.layers.named_children()):
        if isinstance(module, nn.BatchNorm1d):
            setattr(head.layers, name, nn.BatchNorm1d(module.num_features, track_running_stats=False))
    return head
