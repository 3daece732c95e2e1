"""Self-training in one run. The averaged weights of the run label the unlabelled slices of every batch.

The teacher gets a slice as the data augmentation returns it. The student gets it with further intensity changes and has
to give the same labels. On request, rectangles of labelled slices are pasted into unlabelled ones and the reverse.

Source: Sohn et al., FixMatch, NeurIPS 2020 (confident labels of a weak view); Tarvainen and Valpola, Mean teachers,
NeurIPS 2017; Bai et al., Bidirectional copy-paste, CVPR 2023.

Shape letters: N = slices, L = labelled ones, U = unlabelled ones, C = channels, S = side of the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from samgraft.finetune.config import FinetuneConfig
from samgraft.finetune.loss import with_background
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.samples.augment import AugmentConfig, SliceAugmentation
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.training.resume import evaluation_mode
from torch import Tensor

ONLINE_STREAM = 6
"""Second number of the seeds of strong views and rectangles. It separates them from the streams of the samples."""
MIN_SIDE, MAX_SIDE = 0.3, 0.7
"""Range of the sides of a pasted rectangle, as a fraction of the input's side."""


@dataclass(frozen=True, kw_only=True)
class MixedBatch:
    """Student's view of a batch, with one target for labels and one for pseudo-labels."""

    images_NCSS: Tensor
    known_NSS: Tensor
    """Channels from labels, ``IGNORE_LABEL`` elsewhere."""
    pseudo_NSS: Tensor
    """Channels from the teacher, ``IGNORE_LABEL`` elsewhere."""


class OnlineTeacher:
    """Labels, views and loss weights of the unlabelled slices of a batch."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config.selftrain
        ramp_up_steps = self.config.online.ramp_up_steps
        self.ramp_up_steps = config.trainer.max_steps if ramp_up_steps is None else ramp_up_steps
        self.seed = config.seed
        self.strong = SliceAugmentation(strong_intensity(config.data.augment, self.config.online.intensity_strength))

    def weight(self, step: int) -> float:
        """Return the weight of the loss on pseudo-labels at a step."""
        done = min(1.0, step / self.ramp_up_steps) if self.ramp_up_steps else 1.0
        return self.config.online.weight * math.exp(-5 * (1 - done) ** 2)

    @torch.no_grad()
    def label(self, segmenter: Segmenter, images_UCSS: Tensor) -> Tensor:
        """Return the channel of every pixel (U, S, S), int64, ``IGNORE_LABEL`` where the model is not confident.

        The caller gives the model the averaged weights.
        """
        # Dropout would make the labels random.
        with evaluation_mode(segmenter):
            logits = segmenter(images_UCSS).float()
        # SAM's logits have a quarter of the input's side.
        logits = F.interpolate(logits, size=images_UCSS.shape[-2:], mode="bilinear", align_corners=False)
        confidence, channel = torch.softmax(with_background(logits), dim=1).max(dim=1)
        return channel.masked_fill(confidence < self.config.min_agreement, IGNORE_LABEL)

    def mix(
        self,
        images_NCSS: Tensor,
        target_NSS: Tensor,
        pseudo_USS: Tensor,
        *,
        counters: Sequence[int],
        planes: Sequence[Plane],
    ) -> MixedBatch:
        """Return the student's view of the batch.

        Args:
            images_NCSS: Slices in [0, 1], the labelled ones first.
            target_NSS: Channels of the labels, ``IGNORE_LABEL`` in unlabelled slices.
            pseudo_USS: Channels of the unlabelled slices from ``label``.
            counters: Sample counters of the slices, which decide everything random.
            planes: Planes of the slices. Rectangles are pasted between slices of one plane only.
        """
        num_labelled = len(images_NCSS) - len(pseudo_USS)
        # Labels and pseudo-labels have a target each, so that their losses can have different weights.
        known = target_NSS.clone()
        pseudo = torch.full_like(target_NSS, IGNORE_LABEL)
        pseudo[num_labelled:] = pseudo_USS
        # Seeded by the sample counters, so that a resumed run mixes its batches in the same way.
        generators = [np.random.default_rng([self.seed, ONLINE_STREAM, counter]) for counter in counters]
        views = images_NCSS.clone()
        for place in range(num_labelled, len(views)):
            # The geometry stays, so that the teacher's labels fit the student's view pixel by pixel.
            view = self.strong.change_intensity(images_NCSS[place].float().cpu(), generators[place])
            views[place] = view.to(views)
        # Sources are read before anything is pasted, so that a partner is not a mixed slice itself.
        sources = (views.clone(), known.clone(), pseudo.clone())
        for place, generator in enumerate(generators):
            if generator.random() >= self.config.online.paste_probability:
                continue
            partner = _partner(place, planes, num_labelled=num_labelled)
            if partner is None:
                continue
            box = _rectangle(int(views.shape[-1]), generator)
            for mixed, source in zip((views, known, pseudo), sources, strict=True):
                mixed[place][..., box[0], box[1]] = source[partner][..., box[0], box[1]]
        return MixedBatch(images_NCSS=views, known_NSS=known, pseudo_NSS=pseudo)


def strong_intensity(augment: AugmentConfig, strength: float) -> AugmentConfig:
    """Return intensity changes that are ``strength`` times as strong as those of an augmentation.

    The preset of the modality decides which changes are plausible, so none is added.
    """
    return dataclasses.replace(
        augment,
        max_log_gamma=strength * augment.max_log_gamma,
        max_log_contrast=strength * augment.max_log_contrast,
        bias_field=strength * augment.bias_field,
        blur_probability=min(1.0, strength * augment.blur_probability),
        noise_std=strength * augment.noise_std,
    )


def _partner(place: int, planes: Sequence[Plane], *, num_labelled: int) -> int | None:
    """Return the place of a slice of the same plane in the other part of the batch, None without one."""
    # A rectangle of another plane shows anatomy that no scan has at this place.
    others = range(num_labelled, len(planes)) if place < num_labelled else range(num_labelled)
    fitting = [other for other in others if planes[other] is planes[place]]
    return fitting[place % len(fitting)] if fitting else None


def _rectangle(side: int, generator: np.random.Generator) -> tuple[slice, slice]:
    # Rows and columns are drawn one after the other.
    ranges = []
    for _ in range(2):
        length = max(1, round(side * float(generator.uniform(MIN_SIDE, MAX_SIDE))))
        start = int(generator.integers(0, side - length + 1))
        ranges.append(slice(start, start + length))
    return ranges[0], ranges[1]
