"""Box, point and mask prompts and their decoding by SAM.

Many prompts per image and many images are decoded together. Coordinates are (x, y) = (column, row) in pixels of the
encoder's input frame, 0 is the centre of the first pixel, as in segment_anything; ``box_to_frame`` and
``points_to_frame`` map a slice's own pixels to that frame.

Shape letters: B = images, P = prompts, K = points of a prompt, M = masks per prompt, C = embedding channels,
h, w = embedding grid, S = side of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.encoders.sam import decode_pairs, embed_prompts
from samgraft.shared.samples.frame import InputFrame
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

MAX_PROMPTS_PER_PASS = 64
"""Largest number of prompts decoded at once. Each one needs its own copy of the image's tokens."""
POSITIVE, NEGATIVE = 1, 0
"""Labels of points inside and outside an object, as in segment_anything."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt for one object of one image, with at least one of box, points and mask."""

    image: int
    """Index of the image in the batch."""
    box: Tensor | None = None
    """Box (4,) as x0, y0, x1, y1. The pixels at its corners belong to it."""
    points: Tensor | None = None
    """Points (K, 2) as x, y."""
    labels: Tensor | None = None
    """Labels (K,) of the points, 1 inside the object and 0 outside."""
    mask: Tensor | None = None
    """Logits (4h, 4w) of a first guess, e.g. the output of an earlier pass."""

    def __post_init__(self) -> None:
        if self.box is None and self.points is None and self.mask is None:
            raise ValueError("a prompt must have a box, points or a mask, got none of them.")
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and labels must be given together.")
        if self.points is not None and self.labels is not None and self.points.shape != (len(self.labels), 2):
            raise ValueError(f"points must be (K, 2) with K labels, got {tuple(self.points.shape)}.")

    @property
    def num_points(self) -> int:
        """Number of points with either label."""
        return 0 if self.points is None else len(self.points)

    @property
    def is_ambiguous(self) -> bool:
        """True for a single point, which may mean a part, an object or more. SAM then predicts several masks."""
        return self.num_points == 1 and self.box is None and self.mask is None


def decode_prompts(
    sam: Sam,
    features: ImageFeatures,
    prompts: Sequence[Prompt],
    *,
    multimask: bool,
    max_per_pass: int = MAX_PROMPTS_PER_PASS,
) -> tuple[Tensor, Tensor]:
    """Decode prompts of several images as segment_anything decodes each one.

    Prompts with the same parts share a pass.

    Args:
        sam: Model; its prompt encoder and mask decoder are used.
        features: Features of the images, from ``encode_images``.
        prompts: Any mixture, at least one.
        multimask: False decodes the first mask token only (M = 1), True all the others.
        max_per_pass: Limit for memory; it does not change the masks.

    Returns:
        ``low_res_logits`` (P, M, 4h, 4w) and ``iou_predictions`` (P, M), in the order of ``prompts``.
    """
    # Prompts with different numbers of points are not padded to share a pass: segment_anything's padding token takes
    # part in the attention and would change the masks.
    groups: dict[tuple[bool, int, bool], list[int]] = {}  # by box, number of points, mask
    for place, prompt in enumerate(prompts):
        groups.setdefault((prompt.box is not None, prompt.num_points, prompt.mask is not None), []).append(place)
    order: list[int] = []
    logits, ious = [], []
    for places in groups.values():
        for start in range(0, len(places), max_per_pass):
            chosen = places[start : start + max_per_pass]
            logits_PMhw, iou_PM = _decode_group(
                sam, features, [prompts[place] for place in chosen], multimask=multimask
            )
            logits.append(logits_PMhw)
            ious.append(iou_PM)
            order += chosen
    # The passes are in the order of the groups; this permutation restores the order of the prompts.
    back = torch.argsort(torch.tensor(order, device=features.embeddings.device))
    return torch.cat(logits)[back], torch.cat(ious)[back]


def predict_prompts(
    sam: Sam, features: ImageFeatures, prompts: Sequence[Prompt], *, max_per_pass: int = MAX_PROMPTS_PER_PASS
) -> tuple[Tensor, Tensor]:
    """Predict one mask per prompt.

    A single point is ambiguous, so its mask is the one of three with the highest predicted IoU. Every other prompt
    uses the first mask token.

    Returns:
        Logits (P, 4h, 4w), whose mask is where they are above 0, and predicted IoU (P,).

    Source:
        Segment Anything, arXiv 2304.02643, section 3 and appendix A.
    """
    places: list[int] = []
    logits, ious = [], []
    for ambiguous in (False, True):
        chosen = [place for place, prompt in enumerate(prompts) if prompt.is_ambiguous is ambiguous]
        if chosen:
            decoded = decode_prompts(
                sam,
                features,
                [prompts[place] for place in chosen],
                multimask=ambiguous,
                max_per_pass=max_per_pass,
            )
            best_Phw, iou_P = best_masks(*decoded)
            logits.append(best_Phw)
            ious.append(iou_P)
            places += chosen
    back = torch.argsort(torch.tensor(places, device=features.embeddings.device))
    return torch.cat(logits)[back], torch.cat(ious)[back]


def best_masks(logits_PMhw: Tensor, iou_PM: Tensor) -> tuple[Tensor, Tensor]:
    """Return each prompt's mask (P, h, w) with the highest predicted IoU, and that IoU (P,)."""
    best_P = iou_PM.argmax(dim=1)
    rows = torch.arange(len(best_P), device=best_P.device)
    return logits_PMhw[rows, best_P], iou_PM[rows, best_P]


def box_to_frame(box_xyxy: Tensor, frame: InputFrame) -> Tensor:
    """Map boxes (..., 4) from a slice's own pixels to the input frame, keeping the edges of their pixels."""
    x0, y0, x1, y1 = box_xyxy.to(torch.float32).unbind(-1)
    scale_y, scale_x = _scales(frame)
    # A box covers its pixels to their outer edges, half a pixel beyond the centres.
    return torch.stack(
        [x0 * scale_x, y0 * scale_y, (x1 + 1) * scale_x - 1, (y1 + 1) * scale_y - 1],
        dim=-1,
    )


def points_to_frame(points_xy: Tensor, frame: InputFrame) -> Tensor:
    """Map points (..., 2) from a slice's own pixels to the input frame, keeping the centres of pixels."""
    scale_y, scale_x = _scales(frame)
    x, y = points_xy.to(torch.float32).unbind(-1)
    return torch.stack([(x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5], dim=-1)


def _scales(frame: InputFrame) -> tuple[float, float]:
    return frame.content_hw[0] / frame.native_hw[0], frame.content_hw[1] / frame.native_hw[1]


def _decode_group(
    sam: Sam, features: ImageFeatures, prompts: Sequence[Prompt], *, multimask: bool
) -> tuple[Tensor, Tensor]:
    """Decode prompts that have the same parts in one pass."""
    device = features.embeddings.device
    sparse_PNC, dense_PChw = embed_prompts(
        sam,
        points=_stacked_points(prompts, device),
        boxes=_stacked([p.box for p in prompts], device),
        masks=_stacked([None if p.mask is None else p.mask[None] for p in prompts], device),
    )
    images = torch.tensor([prompt.image for prompt in prompts], device=device)
    return decode_pairs(sam, features.of_images(images), sparse_PNC, dense_PChw, multimask=multimask)


def _stacked(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    present = [part.to(device=device, dtype=torch.float32) for part in parts if part is not None]
    return torch.stack(present) if present else None


def _stacked_points(prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor, Tensor] | None:
    points = _stacked([p.points if p.num_points else None for p in prompts], device)
    labels = _stacked([p.labels if p.num_points else None for p in prompts], device)
    return None if points is None or labels is None else (points, labels)
