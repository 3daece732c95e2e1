"""LeJEPA, in which the views of a slice agree and all views together are distributed like a Gaussian.

Every view, large or small, is one point, the mean over the encoder's tokens behind a projection head. The points of a
slice are pulled towards the mean of its large views. The distribution of all points is compared with an isotropic
Gaussian along random directions (SIGReg), which prevents a collapse without a teacher or a schedule.

Shape letters: V = views per slice, B = slices, C = channels, D = outputs of the head, h, w = feature rows and columns.

Source: Balestriero and LeCun, LeJEPA (2025), arXiv 2511.08544. Loss terms and head are lightly's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.models.modules.heads import LeJEPAProjectionHead
from pydantic.dataclasses import dataclass
from samgraft.shared.config import OpenShare, PositiveInt
from samgraft.shared.scans.orientation import Plane
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, freeze_unused_neck
from samgraft.ssl.objectives.panels import Panel, feature_panel
from samgraft.ssl.views.crops import NUM_GLOBAL, CropConfig, local_size, multi_crop
from samgraft.ssl.views.view_features import small_view_features, view_features
from torch import nn

DIRECTION_STREAM = 0x64697265
"""Random stream of the directions, separate from those of crops and masks."""


@dataclass(frozen=True, kw_only=True)
class LeJEPAConfig:
    """Settings of the objective ``lejepa``."""

    crops: CropConfig = field(default_factory=CropConfig)
    """Views of a slice."""
    sigreg_weight: OpenShare = 0.05
    """Weight of the Gaussian term, the paper's lambda. Agreement has one minus this weight, and
    collapses alone."""
    num_directions: PositiveInt = 1024
    """Random directions per step, the paper's slices."""
    head_hidden_dim: PositiveInt = 2048
    """Width of the projection head (paper)."""
    output_dim: PositiveInt = 64
    """Channels in which views are compared (paper)."""
    train_neck: bool = False
    """True trains SAM's neck and reads the features behind it. False keeps the neck's weights exactly."""


class LeJEPA(Objective):
    """The objective ``lejepa``, which exports the trained encoder."""

    settings_type = LeJEPAConfig
    config: LeJEPAConfig

    def __init__(self, encoder: Any, config: LeJEPAConfig, *, seed: int, max_steps: int = 1) -> None:
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        self.local_size_px = local_size(encoder.spec, encoder.image_size, config.crops)
        in_dim = freeze_unused_neck(encoder, train_neck=config.train_neck)
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
        """Return agreement and the Gaussian term on new views of the slices."""
        crops = multi_crop(
            images_B1SS,
            sample_counters=sample_counters,
            seed=self.seed,
            config=self.config.crops,
            local_size_px=self.local_size_px,
            planes=planes,
        )
        neck = self.config.train_neck

        def encode(encoder: Any) -> torch.Tensor:
            return view_features(encoder, crops.global_BCSS, with_neck=False)

        encoded_VChw = encode(self.encoder)
        pooled = [(self.encoder.neck(encoded_VChw) if neck else encoded_VChw).float().mean((2, 3))]
        if crops.local_BCss is not None:
            small_BChw = small_view_features(
                self.encoder, crops.local_BCss, sample_counters=sample_counters, seed=self.seed, with_neck=neck
            )
            pooled.append(small_BChw.float().mean((2, 3)))
        # The empirical characteristic function of SIGReg needs more digits than bf16 has.
        with torch.autocast(images_B1SS.device.type, enabled=False):
            points_VBD = self.head(torch.cat(pooled)).unflatten(0, (-1, len(images_B1SS)))
            agreement = lejepa_invariance_loss(all_proj=points_VBD, global_proj=points_VBD[:NUM_GLOBAL])
            gaussian = self._gaussian(points_VBD, step)
        weight = self.config.sigreg_weight
        loss = ObjectiveLoss(
            total=weight * gaussian + (1 - weight) * agreement,
            parts={"agreement": agreement.detach(), "sigreg": gaussian.detach()},
            features_BC=pooled[0][: len(images_B1SS)].detach(),
        )
        return self.anchored(loss, encoded_VChw, encode)

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the slices and the principal directions of their features."""
        features_BChw = view_features(self.encoder, images_B1SS, with_neck=self.config.train_neck)
        return feature_panel(images_B1SS, features_BChw)

    def _gaussian(self, points_VBD: torch.Tensor, step: int) -> torch.Tensor:
        """Return SIGReg along directions that depend on the seed and the step only."""
        # Every process must draw the same directions, and the global random state must stay as it was.
        device = points_VBD.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self.seed * 1_000_003 + step) ^ DIRECTION_STREAM)
            out: torch.Tensor = self.sigreg(points_VBD)
        return out


def build_projector(in_dim: int, *, hidden_dim: int, output_dim: int) -> LeJEPAProjectionHead:
    """Build lightly's LeJEPA head without running statistics in its BatchNorm.

    Running statistics would change in every monitoring round, and would replace the batch's statistics there.
    """
    head = LeJEPAProjectionHead(in_dim, hidden_dim=hidden_dim, output_dim=output_dim)
    for name, module in list(head.layers.named_children()):
        if isinstance(module, nn.BatchNorm1d):
            setattr(head.layers, name, nn.BatchNorm1d(module.num_features, track_running_stats=False))
    return head
