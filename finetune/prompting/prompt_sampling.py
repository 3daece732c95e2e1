"""Prompts drawn from labels: what a user would give, with a user's inaccuracy, from the sample's own generator.

Shape letters: H, W = rows and columns of a slice or of the input frame; C = foreground classes; K = points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.prompting.prompts import NEGATIVE, POSITIVE, Prompt
from scipy import ndimage
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float32]

MASK_LOGIT = 8.0
"""Absolute logit of a mask given as prompt; SAM's own low-resolution logits are clamped at 32 and mostly below 20."""


class PromptMode(Enum):
    """What the model is given besides the image."""

    NONE = "none"
    """Nothing: every class is found by its own mask token (automatic)."""
    BOX = "box"
    """One box around each object."""
    POINTS = "points"
    """Points in the object and, with num_negative, beside it."""
    MASK = "mask"
    """A rough mask, e.g. of the slice before."""
    CLICKS = "clicks"
    """A box or a point first (half and half), then points where the mask is still wrong, with the mask so far."""


class PromptUnit(Enum):
    """What one prompt points at."""

    COMPONENT = "component"
    """Each connected piece of a class in the slice."""
    CLASS = "class"
    """All pixels of a class in the slice."""


_JITTERS = {"box_jitter", "max_jitter", "mask_jitter"}
_READ_BY_ALL = {"unit", "max_objects", "min_pixels", "eval_jitter", "iou_weight"}
_READ_BY: dict[PromptMode, set[str]] = {
    PromptMode.NONE: set(),
    PromptMode.BOX: {"box_jitter", "max_jitter"},
    PromptMode.POINTS: {"num_positive", "num_negative"},
    PromptMode.MASK: {"mask_jitter"},
    PromptMode.CLICKS: {"num_clicks", "box_jitter", "max_jitter"},
}


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Which prompts, and how inaccurate. ``none`` is the automatic mode; the rest is only used with prompts."""

    mode: PromptMode = PromptMode.NONE
    """none, box, points, mask or clicks."""
    unit: PromptUnit = PromptUnit.COMPONENT
    """component or class."""
    max_objects: int = 8
    """Objects per training slice; more are thinned out at random. Validation takes all."""
    min_pixels: int = 4
    """Smaller objects, counted in the input frame, get no prompt in training: they are rounding of the resize."""
    box_jitter: float = 0.1
    """Standard deviation of each box edge as a share of the box's side (SAM: 0.1)."""
    max_jitter: float = 0.02
    """Largest shift of a box edge as a share of the input's side (SAM: 20 of 1024 pixels)."""
    num_positive: int = 1
    """Points in the object, mode points."""
    num_negative: int = 0
    """Points beside the object, mode points: within its doubled box, else anywhere."""
    mask_jitter: float = 0.15
    """Largest growth, shrinkage and shift of a mask prompt as a share of the object's side."""
    num_clicks: int = 3
    """Corrections after the first prompt, mode clicks."""
    eval_jitter: float = 0.0
    """Factor on all jitter in validation and evaluation: 0 gives tight boxes and central points, 1 as in training."""
    iou_weight: float = 1.0
    """Weight of the squared error of the predicted IoU (SAM: 1)."""

    def __post_init__(self) -> None:
        if idle := self._idle():
            raise ValueError(f"prompt.{idle[0]} has no effect with prompt.mode={self.mode.value}. Leave it out.")
        if self.max_objects < 1 or self.min_pixels < 1 or self.num_clicks < 1:
            raise ValueError("prompt.max_objects, min_pixels and num_clicks must be at least 1.")
        if self.num_positive < 0 or self.num_negative < 0 or self.num_positive + self.num_negative < 1:
            raise ValueError(
                "prompt.num_positive and num_negative must not be negative nor both 0, got "
                f"{self.num_positive} and {self.num_negative}."
            )
        for name in ("box_jitter", "max_jitter", "mask_jitter", "eval_jitter", "iou_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"prompt.{name} must not be negative, got {getattr(self, name)}.")

    @property
    def is_prompted(self) -> bool:
        """False for the automatic mode."""
        return self.mode is not PromptMode.NONE

    @property
    def mask_tokens(self) -> tuple[int, ...]:
        """SAM's mask tokens that answer these prompts: 1, 2, 3 a single point, 0 everything else; none without."""
        if self.mode is PromptMode.NONE:
            return ()
        if self.mode is PromptMode.CLICKS:
            return (0, 1, 2, 3)
        is_single = self.mode is PromptMode.POINTS and self.num_positive + self.num_negative == 1
        return (1, 2, 3) if is_single else (0,)

    def for_evaluation(self) -> PromptConfig:
        """Return the same prompts with the jitter of evaluation, for every object down to one pixel."""
        if not self.is_prompted:
            return self
        jitters = {name: getattr(self, name) * self.eval_jitter for name in _JITTERS & _READ_BY[self.mode]}
        return dataclasses.replace(self, min_pixels=1, **jitters)

    def _idle(self) -> list[str]:
        """Return the settings that differ from their defaults and that the mode does not read."""
        known = _READ_BY[self.mode] | (_READ_BY_ALL if self.is_prompted else set())
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "mode"}
        return [name for name, default in defaults.items() if name not in known and getattr(self, name) != default]


@dataclass(frozen=True, kw_only=True)
class PromptedObject:
    """One object of one slice that a prompt points at."""

    channel: int
    """Class, from 0."""
    mask_HW: Bools


def find_objects(masks_CHW: Bools, config: PromptConfig) -> list[PromptedObject]:
    """List the objects of a slice, class by class, larger than ``min_pixels``.

    Args:
        masks_CHW: Pixels of every class; classes may overlap.
        config: Unit and smallest size.
    """
    found = []
    for channel, mask_HW in enumerate(masks_CHW):
        if config.unit is PromptUnit.CLASS:
            pieces = [mask_HW]
        else:
            # Diagonal neighbours belong together: thin structures fall apart otherwise.
            labelled, number = ndimage.label(mask_HW, structure=np.ones((3, 3)))
            pieces = [labelled == piece for piece in range(1, number + 1)]
        found += [
            PromptedObject(channel=channel, mask_HW=piece) for piece in pieces if piece.sum() >= config.min_pixels
        ]
    return found


def thin_out(objects: list[PromptedObject], config: PromptConfig, rng: np.random.Generator) -> list[PromptedObject]:
    """Keep ``max_objects`` of them, drawn evenly, in their order."""
    if len(objects) <= config.max_objects:
        return objects
    kept = sorted(rng.choice(len(objects), size=config.max_objects, replace=False).tolist())
    return [objects[place] for place in kept]


def draw_prompt(
    mask_HW: Bools,
    config: PromptConfig,
    rng: np.random.Generator,
    *,
    image: int,
    to_mask: Callable[[Bools], Tensor],
    central: bool,
) -> Prompt:
    """Draw the (first) prompt for an object.

    Args:
        mask_HW: The object, not empty; coordinates come out in its pixels.
        config: Kind and jitter.
        rng: Of this sample; the only source of randomness.
        image: Place of the image in the batch.
        to_mask: Makes low-resolution logits of a mask, as the prompt encoder takes them.
        central: First points in the middle of the object instead of anywhere in it (evaluation).
    """
    mode = config.mode
    if mode is PromptMode.CLICKS:
        # Evaluation always starts from the click, the harder of the two; its box would make corrections idle.
        mode = PromptMode.BOX if not central and rng.random() < 0.5 else PromptMode.POINTS
    if mode is PromptMode.BOX:
        return Prompt(image=image, box=torch.from_numpy(draw_box(mask_HW, config, rng)))
    if mode is PromptMode.MASK:
        return Prompt(image=image, mask=to_mask(roughen(mask_HW, config, rng)))
    if mode is PromptMode.POINTS:
        points, labels = draw_points(mask_HW, config, rng, central=central)
        return Prompt(image=image, points=torch.from_numpy(points), labels=torch.from_numpy(labels))
    raise ValueError("prompts can be drawn with a prompt mode only, got none.")


def draw_box(mask_HW: Bools, config: PromptConfig, rng: np.random.Generator) -> Points:
    """Return x0, y0, x1, y1 around an object, every edge moved by noise and kept inside the frame.

    Source:
        Segment Anything, arXiv 2304.02643, appendix A: standard deviation 10 % of the side, at most 20 pixels.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2, dtype=np.float32)
    limit = config.max_jitter * max(mask_HW.shape)
    noise = np.clip(rng.standard_normal(4) * config.box_jitter * sides, -limit, limit)
    height, width = mask_HW.shape
    moved = np.clip(box + noise, 0, [width - 1, height - 1] * 2).astype(np.float32)
    # Noise may turn a box of one or two pixels around.
    return np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])])


def draw_points(
    mask_HW: Bools, config: PromptConfig, rng: np.random.Generator, *, central: bool
) -> tuple[Points, Points]:
    """Return points (K, 2) as x, y and their labels (K,): positive ones first."""
    positive = [center_of(mask_HW)] if central and config.num_positive else []
    positive += [_any_pixel(mask_HW, rng) for _ in range(config.num_positive - len(positive))]
    around_HW = _surroundings(mask_HW)
    negative = [_any_pixel(around_HW, rng) for _ in range(config.num_negative)] if around_HW.any() else []
    points = np.array([*positive, *negative], dtype=np.float32).reshape(-1, 2)
    return points, np.array([POSITIVE] * len(positive) + [NEGATIVE] * len(negative), dtype=np.float32)


def correct(
    prompt: Prompt,
    predicted_HW: Bools,
    true_HW: Bools,
    rng: np.random.Generator,
    *,
    low_res_logits: Tensor,
    central: bool,
) -> Prompt:
    """Add the click a user would make next, and the mask so far; a mask without error gets a positive click again.

    Args:
        prompt: So far.
        predicted_HW: Mask that it gave.
        true_HW: The object.
        rng: Of this sample.
        low_res_logits: (4h, 4w) of the prediction, detached.
        central: Middle of the largest wrong region (evaluation) instead of any wrong pixel (SAM's training).
    """
    wrong_HW = predicted_HW != true_HW
    if not wrong_HW.any():
        wrong_HW = true_HW
    x, y = center_of(_largest(wrong_HW)) if central else _any_pixel(wrong_HW, rng)
    label = float(POSITIVE if true_HW[int(y), int(x)] else NEGATIVE)
    point, kind = torch.tensor([[x, y]], dtype=torch.float32), torch.tensor([label])
    return dataclasses.replace(
        prompt,
        points=point if prompt.points is None else torch.cat([prompt.points, point]),
        labels=kind if prompt.labels is None else torch.cat([prompt.labels, kind]),
        mask=low_res_logits,
    )


def roughen(mask_HW: Bools, config: PromptConfig, rng: np.random.Generator) -> Bools:
    """Grow or shrink an object and shift it, as the mask of a neighbouring slice or a quick sketch would be."""
    side = float(np.sqrt(mask_HW.sum()))
    reach = config.mask_jitter * side
    steps = round(rng.uniform(-reach, reach))
    shift = np.rint(rng.uniform(-reach, reach, size=2)).astype(int)
    rough = mask_HW
    if steps:
        change = ndimage.binary_dilation if steps > 0 else ndimage.binary_erosion
        rough = change(mask_HW, iterations=abs(steps))
    rough = ndimage.shift(rough.astype(np.uint8), shift, order=0) > 0
    # A thin object can vanish; its own mask is then the roughest that is left.
    return rough if rough.any() else mask_HW


def mask_prompt(mask_HW: Bools, *, side: int) -> Tensor:
    """Return a mask as low-resolution logits (side, side), as the prompt encoder takes it."""
    share = torch.nn.functional.interpolate(
        torch.from_numpy(mask_HW.astype(np.float32))[None, None], size=(side, side), mode="area"
    )
    return MASK_LOGIT * (2 * share[0, 0] - 1)


def center_of(mask_HW: Bools) -> tuple[float, float]:
    """Return the pixel (x, y) of an object that is farthest from its edge; the first of equals."""
    distance = ndimage.distance_transform_edt(np.pad(mask_HW, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(column), float(row)


def _largest(mask_HW: Bools) -> Bools:
    labelled, number = ndimage.label(mask_HW, structure=np.ones((3, 3)))
    sizes: Any = ndimage.sum_labels(mask_HW, labelled, index=range(1, number + 1))
    return np.asarray(labelled == 1 + int(np.argmax(sizes)), dtype=np.bool_)


def _surroundings(mask_HW: Bools) -> Bools:
    """Return the pixels beside an object within its doubled box, else all pixels beside it."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    near_HW = np.zeros_like(mask_HW)
    near_HW[
        max(0, rows[0] - height // 2) : rows[-1] + height // 2 + 1,
        max(0, columns[0] - width // 2) : columns[-1] + width // 2 + 1,
    ] = True
    near_HW &= ~mask_HW
    return near_HW if near_HW.any() else ~mask_HW


def _any_pixel(mask_HW: Bools, rng: np.random.Generator) -> tuple[float, float]:
    rows, columns = np.nonzero(mask_HW)
    place = int(rng.integers(len(rows)))
    return float(columns[place]), float(rows[place])
