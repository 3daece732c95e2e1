"""DINO with iBOT and KoLeo, the recipe of DINOv2 and MRI-CORE.

A student learns to predict the outputs of a teacher, a slow average of the student itself. Both start from SAM. The
teacher sees two large views of a slice. The student sees them too, one of the two with hidden tokens, and small views.
It must predict the teacher's output for the other views (DINO) and for every hidden token (iBOT), and keep different
slices apart (KoLeo). SAM has no class token, so the output of a view comes from the mean over its normalised tokens.

The run exports the teacher's encoder, which is smoother than the student; MRI-CORE exports it too. It never receives a
gradient and moves once per optimizer step. For ``train_neck`` see :func:`freeze_unused_neck`; the teacher averages a
trained neck too.

Shape letters: V = large views (2 B), B = slices, C = channels, h, w = feature rows and columns, L = h w.

Source: Caron et al., DINO (ICCV 2021). Zhou et al., iBOT (ICLR 2022). Sablayrolles et al., KoLeo (ICLR 2019). Oquab et
al., DINOv2 (TMLR 2024): their combination. Losses and heads are lightly's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from pydantic.dataclasses import dataclass
from samgraft.shared.config import NonNegative, OpenShare, Positive, PositiveInt, Share
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.training.optim import cosine_value
from samgraft.ssl.objectives.objective import Objective, ObjectiveLoss, freeze_unused_neck
from samgraft.ssl.objectives.panels import Panel, feature_panel
from samgraft.ssl.objectives.teacher import Heads, StepDINOLoss, StepIBOTLoss, Teacher, update_ema
from samgraft.ssl.scope import learns_mask_token
from samgraft.ssl.views.crops import NUM_GLOBAL, CropConfig, local_size, multi_crop
from samgraft.ssl.views.masking import MaskKind, mask_unit, scattered_masks
from samgraft.ssl.views.view_features import small_view_features, view_features
from torch import nn

KOLEO_EPS = 1e-4
"""Smallest distance in the KoLeo loss. Two equal slices have a gradient of 1 / eps, and lightly's 1e-8 would let one
pair dominate the step."""


@dataclass(frozen=True, kw_only=True)
class DINOConfig:
    """Settings of the objective ``dino``."""

    crops: CropConfig = field(default_factory=CropConfig)
    """Views of a slice."""
    output_dim: PositiveInt = 8192
    """Prototypes of each head (DINO uses 65536 for a million photographs, and fewer slices need fewer)."""
    head_hidden_dim: PositiveInt = 2048
    """Width of the heads (DINO)."""
    head_bottleneck_dim: PositiveInt = 256
    """Channels before the prototypes (DINO)."""
    student_temp: Positive = 0.1
    """Temperature of the student's outputs (DINO)."""
    teacher_temp: Positive = 0.07
    """Temperature of the teacher's outputs after the warm-up (DINOv2)."""
    warmup_teacher_temp: Positive = 0.04
    """Temperature of the teacher's outputs at the first step, sharper than later, against a collapse (DINO)."""
    teacher_temp_warmup: Share = 0.3
    """Share of the run over which the temperature rises linearly (DINO uses 30 of 100 epochs)."""
    momentum: Share = 0.994
    """EMA momentum of the teacher at the first step (DINOv2 uses 0.992), which rises along a cosine."""
    final_momentum: Share = 1.0
    """EMA momentum of the teacher at the last step (DINO)."""
    center_momentum: Share = 0.9
    """EMA momentum of the centers per step (DINO)."""
    freeze_last_layer: Share = 0.01
    """Share of the run in which the prototypes are frozen (DINO uses 1 of 100 epochs)."""
    ibot_weight: NonNegative = 1.0
    """Weight of the loss on hidden tokens (DINOv2). 0 hides nothing."""
    koleo_weight: NonNegative = 0.1
    """Weight of the loss that keeps slices apart (DINOv2). 0 switches it off."""
    mask_kind: MaskKind = MaskKind.BLOCK
    """Spread of the hidden tokens, random or block."""
    min_mask_ratio: OpenShare = 0.1
    """Smallest hidden fraction of the large view that has hidden tokens (iBOT)."""
    max_mask_ratio: OpenShare = 0.5
    """Largest hidden fraction (iBOT)."""
    mask_unit_px: PositiveInt | None = None
    """Side of a hidden square in pixels, a multiple of the encoder's stride. null takes one token of the windowed ViTs,
    32 px for sam2_* and about a tenth of the input for vit_t."""
    train_neck: bool = False
    """True trains SAM's neck and reads the features behind it. False keeps the neck's weights exactly."""

    def __post_init__(self) -> None:
        if not self.warmup_teacher_temp <= self.teacher_temp <= self.student_temp:
            raise ValueError(
                "temperatures must satisfy warmup_teacher_temp <= teacher_temp <= student_temp (a teacher softer "
                f"than its student collapses), got {self.warmup_teacher_temp}, {self.teacher_temp} and "
                f"{self.student_temp}."
            )
        if self.momentum > self.final_momentum:
            raise ValueError(f"momentum must be at most final_momentum, got {self.momentum} and {self.final_momentum}.")
        if self.min_mask_ratio > self.max_mask_ratio:
            raise ValueError(
                f"min_mask_ratio must be at most max_mask_ratio, got {self.min_mask_ratio} and {self.max_mask_ratio}."
            )
        if self.mask_kind is MaskKind.PER_WINDOW:
            raise ValueError("dino's mask_kind must be random or block, got per_window.")


class DINO(Objective):
    """The objective ``dino``, which exports the teacher's encoder."""

    settings_type = DINOConfig
    config: DINOConfig

    def __init__(self, encoder: Any, config: DINOConfig, *, seed: int, max_steps: int) -> None:
        super().__init__(encoder, config, seed=seed, max_steps=max_steps)
        self.local_size_px = local_size(encoder.spec, encoder.image_size, config.crops)
        self.mask_unit_px = mask_unit(encoder, config.mask_unit_px)
        self.heads = Heads(
            freeze_unused_neck(encoder, train_neck=config.train_neck),
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            output_dim=config.output_dim,
        )
        self.teacher = Teacher(encoder, self.heads)
        if not config.ibot_weight:
            self.heads.token.requires_grad_(False)
        learns_token = bool(config.ibot_weight) and learns_mask_token(encoder)
        self.mask_token = nn.Parameter(torch.zeros(encoder.mask_token_dim), requires_grad=learns_token)
        self.dino_loss = StepDINOLoss(
            config.output_dim, student_temp=config.student_temp, center_momentum=config.center_momentum
        )
        self.ibot_loss = StepIBOTLoss(
            config.output_dim, student_temp=config.student_temp, center_momentum=config.center_momentum
        )
        self.koleo_loss = KoLeoLoss(eps=KOLEO_EPS)

    @property
    def exported_encoder(self) -> Any:
        """The teacher's encoder."""
        return self.teacher.encoder

    def loss(
        self,
        images_B1SS: torch.Tensor,
        *,
        sample_counters: Sequence[int],
        step: int,
        planes: Sequence[Plane] | None = None,
    ) -> ObjectiveLoss:
        """Return the sum of DINO, iBOT and KoLeo on new views of the slices."""
        crops = multi_crop(
            images_B1SS,
            sample_counters=sample_counters,
            seed=self.seed,
            config=self.config.crops,
            local_size_px=self.local_size_px,
            planes=planes,
        )
        mask_Vhw = self._masks(sample_counters).to(images_B1SS.device) if self.config.ibot_weight else None
        # The teacher sees whole views without hidden tokens; its features are the targets of all losses.
        with torch.no_grad():
            taught_VChw = view_features(self.teacher.encoder, crops.global_BCSS, with_neck=self.config.train_neck)

        def encode(encoder: Any) -> torch.Tensor:
            return view_features(
                encoder, crops.global_BCSS, with_neck=False, token_mask_Bhw=mask_Vhw, mask_token=self.mask_token
            )

        encoded_VChw = encode(self.encoder)
        learned_VChw = self.encoder.neck(encoded_VChw) if self.config.train_neck else encoded_VChw
        small_BChw = None
        if crops.local_BCss is not None:
            small_BChw = small_view_features(
                self.encoder,
                crops.local_BCss,
                sample_counters=sample_counters,
                seed=self.seed,
                with_neck=self.config.train_neck,
            )
        # The sharp softmax of the outputs would lose digits in bf16.
        with torch.autocast(images_B1SS.device.type, enabled=False):
            total, parts = self._losses(taught_VChw, learned_VChw, small_BChw, mask_Vhw, step=step)
        features_BC = taught_VChw[: len(images_B1SS)].float().mean((2, 3))
        loss = ObjectiveLoss(total=total, parts=parts, features_BC=features_BC)
        return self.anchored(loss, encoded_VChw, encode, hidden_Bhw=mask_Vhw)

    def before_step(self, step: int) -> None:
        """Freeze the prototypes at the beginning of the run."""
        # DINO freezes the last layer at first, which makes the start of the training stable.
        for head in (self.heads.view, self.heads.token):
            head.cancel_last_layer_gradients(0 if step < self.config.freeze_last_layer * self.max_steps else 1)

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student and the centers towards the teacher's outputs."""
        momentum = cosine_value(
            step, start=self.config.momentum, end=self.config.final_momentum, last_step=max(1, self.max_steps - 1)
        )
        update_ema(self.teacher.encoder, self.encoder, momentum=momentum)
        update_ema(self.teacher.heads, self.heads, momentum=momentum)
        self.dino_loss.step_center.step()
        self.ibot_loss.center.step()

    @torch.no_grad()
    def panel(self, images_B1SS: torch.Tensor, *, sample_counters: Sequence[int]) -> Panel:
        """Return the slices and the principal directions of the teacher's features."""
        features_BChw = view_features(self.teacher.encoder, images_B1SS, with_neck=self.config.train_neck)
        return feature_panel(images_B1SS, features_BChw)

    def _losses(
        self,
        taught_VChw: torch.Tensor,
        learned_VChw: torch.Tensor,
        small_BChw: torch.Tensor | None,
        mask_Vhw: torch.Tensor | None,
        *,
        step: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        temperature = teacher_temperature(step, self.config, max_steps=self.max_steps)
        # Outputs are grouped by view, and each pair of different views gives one term of the loss.
        num_slices = len(taught_VChw) // NUM_GLOBAL
        with torch.no_grad():
            taught_VLC = self.teacher.heads.tokens(taught_VChw.float())
            taught = self.teacher.heads.view(taught_VLC.mean(1)).split(num_slices)
            entropy = _entropy(torch.cat(taught) - self.dino_loss.center[None], temperature)
        learned_VLC = self.heads.tokens(learned_VChw.float())
        pooled_VC = learned_VLC.mean(1)
        outputs = self.heads.view(pooled_VC).split(num_slices)
        if small_BChw is not None:
            outputs += self.heads.view(self.heads.tokens(small_BChw.float()).mean(1)).split(num_slices)
        dino = self.dino_loss(list(taught), list(outputs), teacher_temp=temperature)
        total, parts = dino, {"dino": dino.detach(), "teacher_entropy": entropy}
        if mask_Vhw is not None:
            ibot = self._ibot(taught_VLC, learned_VLC, mask_Vhw, temperature=temperature, grid=learned_VChw.shape[-1])
            total = total + self.config.ibot_weight * ibot
            parts["ibot"] = ibot.detach()
        if self.config.koleo_weight:
            koleo = self._koleo(pooled_VC.split(num_slices))
            total = total + self.config.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        return total, parts

    def _ibot(
        self,
        taught_VLC: torch.Tensor,
        learned_VLC: torch.Tensor,
        mask_Vhw: torch.Tensor,
        *,
        temperature: float,
        grid: int,
    ) -> torch.Tensor:
        """Return the loss on hidden tokens of the views that have some."""
        # lightly would count a view without hidden tokens as a loss of 0.
        with_holes = mask_Vhw.flatten(1).any(1)
        hidden_Bhw = F.interpolate(mask_Vhw[with_holes][:, None].float(), size=(grid, grid), mode="nearest")[:, 0] > 0
        hidden_BL = hidden_Bhw.flatten(1)
        with torch.no_grad():
            taught = self.teacher.heads.token(taught_VLC[with_holes][hidden_BL])
        learned = self.heads.token(learned_VLC[with_holes][hidden_BL])
        out: torch.Tensor = self.ibot_loss(taught, learned, hidden_Bhw, teacher_temp=temperature)
        return out

    def _koleo(self, pooled: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(pooled[0]) > 1:
            return torch.stack([self.koleo_loss(pooled_BC) for pooled_BC in pooled]).sum()
        if torch.is_grad_enabled():
            raise UsageError(
                "data.batch_size must be at least 2 for dino's KoLeo loss, which keeps slices of a batch apart, got "
                "1. Use a larger one, or objective.dino.koleo_weight=0.",
                where="data.batch_size",
            )
        return pooled[0].new_zeros(())  # The last held-out slice may be alone in its batch.

    def _masks(self, sample_counters: Sequence[int]) -> torch.Tensor:
        side = self.encoder.image_size // self.mask_unit_px
        return scattered_masks(
            sample_counters,
            seed=self.seed,
            side=side,
            num_views=NUM_GLOBAL,
            ratios=(self.config.min_mask_ratio, self.config.max_mask_ratio),
            kind=self.config.mask_kind,
        )


def teacher_temperature(step: int, config: DINOConfig, *, max_steps: int) -> float:
    """Return the temperature of the teacher's outputs at a step, which rises linearly and then stays."""
    length = config.teacher_temp_warmup * max_steps
    share = min(step / length, 1.0) if length else 1.0
    return config.warmup_teacher_temp + share * (config.teacher_temp - config.warmup_teacher_temp)


def _entropy(outputs_BD: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean entropy of the teacher's outputs as a share of its maximum."""
    # 0 means that one prototype has all the probability, 1 that all prototypes have the same.
    log_BD = F.log_softmax(outputs_BD / temperature, dim=-1)
    return -(log_BD.exp() * log_BD).sum(-1).mean() / math.log(max(2, outputs_BD.shape[-1]))
