"""Prompts drawn from labels, as inaccurate as those of a user.

Every draw uses the generator of its sample only, so that prompts do not depend on workers or on the order of samples.

Shape letters: H, W = rows and columns of a slice or of the input frame; C = foreground classes; K = points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
import torch
from samgraft.finetune.prompting.prompts import NEGATIVE, POSITIVE, Prompt
from samgraft.shared.config import NonNegative, NonNegativeInt, PositiveInt
from scipy import ndimage
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float32]
ClassObject = tuple[int, Bools]
"""Index of the class, from 0, and pixels of the object."""

MASK_LOGIT = 8.0
"""Absolute logit of a mask prompt. SAM's own low-resolution logits are clamped at 32 and mostly below 20."""


class PromptMode(Enum):
    """Input of the model besides the image."""

    NONE = "none"
    """No prompt. Every class has a mask token of its own (automatic)."""
    BOX = "box"
    """One box around each object."""
    POINTS = "points"
    """Points in the object and, with num_negative, next to it."""
    MASK = "mask"
    """Rough mask, e.g. the one of the slice before."""
    CLICKS = "clicks"
    """Box or point first (half of the cases each), then points where the mask is still wrong, with the mask so far."""


class PromptUnit(Enum):
    """Unit that one prompt refers to."""

    COMPONENT = "component"
    """Connected piece of a class in the slice."""
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


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Kind of prompts and their inaccuracy. Mode ``none`` (automatic) uses no other field."""

    mode: PromptMode = PromptMode.NONE
    """Kind of prompts, one of none, box, points, mask and clicks."""
    unit: PromptUnit = PromptUnit.COMPONENT
    """Unit of one prompt, component or class."""
    max_objects: PositiveInt = 8
    """Largest number of objects per training slice, drawn at random from more. Validation uses all objects."""
    min_pixels: PositiveInt = 4
    """Smallest object with a prompt in training, pixels of the input frame. Smaller ones are artefacts of resizing."""
    box_jitter: NonNegative = 0.1
    """Standard deviation of each box edge as a share of the box's side (0.1 in SAM)."""
    max_jitter: NonNegative = 0.02
    """Largest shift of a box edge as a share of the input's side (20 of 1024 pixels in SAM)."""
    num_positive: PositiveInt = 1
    """Number of points in the object, mode points. Negative points alone mark no object."""
    num_negative: NonNegativeInt = 0
    """Number of points outside the object, mode points. They are in its doubled box if that has room."""
    mask_jitter: NonNegative = 0.15
    """Largest growth, shrinkage and shift of a mask prompt as a share of the object's side."""
    num_clicks: PositiveInt = 3
    """Number of corrections after the first prompt, mode clicks."""
    eval_jitter: NonNegative = 0.0
    """Factor on all jitter in validation and evaluation, 0 for tight boxes and central points, 1 as in training."""
    iou_weight: NonNegative = 1.0
    """Weight of the squared error of the predicted IoU (1 in SAM)."""

    def __post_init__(self) -> None:
        if unused := self._unused_settings():
            raise ValueError(f"prompt.{unused[0]} has no effect with prompt.mode={self.mode.value}. Leave it out.")

    @property
    def is_prompted(self) -> bool:
        """False for the automatic mode."""
        return self.mode is not PromptMode.NONE

    @property
    def mask_tokens(self) -> tuple[int, ...]:
        """SAM's mask tokens that these prompts use, 1 to 3 for a single point and 0 for all others."""
        if self.mode is PromptMode.NONE:
            return ()
        if self.mode is PromptMode.CLICKS:
            return (0, 1, 2, 3)
        is_single = self.mode is PromptMode.POINTS and self.num_positive + self.num_negative == 1
        return (1, 2, 3) if is_single else (0,)

    def for_evaluation(self) -> PromptConfig:
        """Return these settings with the jitter of evaluation and for objects of any size."""
        if not self.is_prompted:
            return self
        jitters = {name: getattr(self, name) * self.eval_jitter for name in _JITTERS & _READ_BY[self.mode]}
        return dataclasses.replace(self, min_pixels=1, **jitters)

    def _unused_settings(self) -> list[str]:
        """Return settings that differ from their defaults although the mode does not read them."""
        known = _READ_BY[self.mode] | (_READ_BY_ALL if self.is_prompted else set())
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "mode"}
        return [name for name, default in defaults.items() if name not in known and getattr(self, name) != default]


@dataclass(frozen=True, kw_only=True)
class ClassPrompt:
    """Prompt for one class in one slice of a batch."""

    channel: int
    """Index of the class, from 0."""
    prompt: Prompt
    """Prompt in pixels of the slice, whose ``image`` is the index of the slice in the batch."""
    true_HW: Bools | None = None
    """Object that the prompt was drawn from, for correction clicks."""
    rng: np.random.Generator | None = None
    """Generator for correction clicks, shared by the prompts of a slice."""


def find_objects(masks_CHW: Bools, config: PromptConfig) -> list[ClassObject]:
    """List the objects of a slice, class by class.

    Args:
        masks_CHW: Pixels of every class; classes may overlap.
        config: Unit, and smallest size in pixels.
    """
    found = []
    for channel, mask_HW in enumerate(masks_CHW):
        if config.unit is PromptUnit.CLASS:
            pieces = [mask_HW]
        else:
            # Diagonal neighbours are connected. Otherwise thin structures would fall into many pieces.
            labelled, number = ndimage.label(mask_HW, structure=np.ones((3, 3)))
            pieces = [labelled == piece for piece in range(1, number + 1)]
        found += [(channel, piece) for piece in pieces if piece.sum() >= config.min_pixels]
    return found


def thin_out(objects: list[ClassObject], config: PromptConfig, rng: np.random.Generator) -> list[ClassObject]:
    """Return at most ``max_objects`` of the objects, drawn evenly, in their order."""
    if len(objects) <= config.max_objects:
        return objects
    # Evenly over all objects, not the largest ones: small lesions must be trained too.
    kept = sorted(rng.choice(len(objects), size=config.max_objects, replace=False).tolist())
    return [objects[place] for place in kept]


def draw_prompts(
    objects: Sequence[ClassObject],
    config: PromptConfig,
    rng: np.random.Generator,
    *,
    image: int,
    to_mask: Callable[[Bools], Tensor],
    central: bool,
) -> list[ClassPrompt]:
    """Draw the first prompt of every object of a slice, with the arguments of ``draw_prompt``."""
    options: Any = {"image": image, "to_mask": to_mask, "central": central}
    return [
        ClassPrompt(channel=c, prompt=draw_prompt(mask_HW, config, rng, **options), true_HW=mask_HW, rng=rng)
        for c, mask_HW in objects
    ]


def draw_prompt(
    mask_HW: Bools,
    config: PromptConfig,
    rng: np.random.Generator,
    *,
    image: int,
    to_mask: Callable[[Bools], Tensor],
    central: bool,
) -> Prompt:
    """Draw the first prompt for an object.

    Args:
        mask_HW: Object, not empty. The prompt has its pixel coordinates.
        config: Kind of prompt and jitter.
        rng: Generator of this sample, the only source of randomness.
        image: Index of the image in the batch.
        to_mask: Function from a mask to low-resolution logits for the prompt encoder.
        central: True puts the first point in the middle of the object (evaluation) instead of anywhere in it.
    """
    mode = config.mode
    if mode is PromptMode.CLICKS:
        # Evaluation always starts from a click, the harder of the two: after a box few corrections are left to measure.
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
    """Return a box x0, y0, x1, y1 around an object with noise on every edge.

    The box stays inside the frame.

    Source:
        Segment Anything, arXiv 2304.02643, appendix A: standard deviation 10 % of the side, at most 20 pixels.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2, dtype=np.float32)
    # Relative noise alone would move the edges of large objects by many pixels, so it has an absolute limit.
    limit = config.max_jitter * max(mask_HW.shape)
    noise = np.clip(rng.standard_normal(4) * config.box_jitter * sides, -limit, limit)
    height, width = mask_HW.shape
    moved = np.clip(box + noise, 0, [width - 1, height - 1] * 2).astype(np.float32)
    # Noise may exchange opposite edges of a box of one or two pixels.
    return np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])])


def draw_points(
    mask_HW: Bools, config: PromptConfig, rng: np.random.Generator, *, central: bool
) -> tuple[Points, Points]:
    """Return points (K, 2) as x, y and their labels (K,), positive ones first."""
    positive = [center_of(mask_HW)] if central and config.num_positive else []
    positive += [_any_pixel(mask_HW, rng) for _ in range(config.num_positive - len(positive))]
    around_HW = _surroundings(mask_HW)
    negative = [_any_pixel(around_HW, rng) for _ in range(config.num_negative)] if around_HW.any() else []
    points = np.array([*positive, *negative], dtype=np.float32).reshape(-1, 2)
    return points, np.array([POSITIVE] * len(positive) + [NEGATIVE] * len(negative), dtype=np.float32)


def add_correction_click(
    prompt: Prompt, drawn: ClassPrompt, predicted_HW: Bools, *, low_res_logits: Tensor, central: bool
) -> Prompt:
    """Add the next click of a user and the mask so far to a prompt.

    A mask without error gets a positive click again.

    Args:
        prompt: Prompt so far.
        drawn: First prompt with its object and generator.
        predicted_HW: Mask predicted from ``prompt``.
        low_res_logits: Logits (4h, 4w) of the prediction, detached.
        central: True clicks the middle of the largest wrong region (evaluation), False any wrong pixel (SAM's
            training).
    """
    true_HW, rng = drawn.true_HW, drawn.rng
    if true_HW is None or rng is None:
        raise ValueError("a correction click needs the true object and its generator, this prompt has none.")
    # Missed pixels get a positive click, wrongly added ones a negative click.
    wrong_HW = predicted_HW != true_HW
    if not wrong_HW.any():
        wrong_HW = true_HW
    x, y = center_of(_largest_component(wrong_HW)) if central else _any_pixel(wrong_HW, rng)
    label = float(POSITIVE if true_HW[int(y), int(x)] else NEGATIVE)
    point, kind = torch.tensor([[x, y]], dtype=torch.float32), torch.tensor([label])
    return dataclasses.replace(
        prompt,
        points=point if prompt.points is None else torch.cat([prompt.points, point]),
        labels=kind if prompt.labels is None else torch.cat([prompt.labels, kind]),
        mask=low_res_logits,
    )


def roughen(mask_HW: Bools, config: PromptConfig, rng: np.random.Generator) -> Bools:
    """Grow or shrink an object and shift it.

    The result resembles the mask of a neighbouring slice or a quick sketch.
    """
    side = float(np.sqrt(mask_HW.sum()))  # of a square with the object's area
    reach = config.mask_jitter * side
    steps = round(rng.uniform(-reach, reach))
    shift = np.rint(rng.uniform(-reach, reach, size=2)).astype(int)
    rough = mask_HW
    if steps:
        change = ndimage.binary_dilation if steps > 0 else ndimage.binary_erosion
        rough = change(mask_HW, iterations=abs(steps))
    rough = ndimage.shift(rough.astype(np.uint8), shift, order=0) > 0
    # Erosion can remove a thin object completely. Its own mask is the prompt then.
    return rough if rough.any() else mask_HW


def mask_prompt(mask_HW: Bools, *, side: int) -> Tensor:
    """Return a mask as low-resolution logits (side, side) for the prompt encoder."""
    # The mean over the pixels of a cell gives soft edges, as in SAM's own low-resolution masks.
    share = torch.nn.functional.interpolate(
        torch.from_numpy(mask_HW.astype(np.float32))[None, None], size=(side, side), mode="area"
    )
    return MASK_LOGIT * (2 * share[0, 0] - 1)


def center_of(mask_HW: Bools) -> tuple[float, float]:
    """Return the pixel (x, y) of an object that is farthest from its edge, the first of equals."""
    # The centre of mass can be outside a curved object. The padding makes the border of the slice an edge.
    distance = ndimage.distance_transform_edt(np.pad(mask_HW, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(column), float(row)


def _largest_component(mask_HW: Bools) -> Bools:
    labelled, number = ndimage.label(mask_HW, structure=np.ones((3, 3)))
    sizes: Any = ndimage.sum_labels(mask_HW, labelled, index=range(1, number + 1))
    return np.asarray(labelled == 1 + int(np.argmax(sizes)), dtype=np.bool_)


def _surroundings(mask_HW: Bools) -> Bools:
    """Return the pixels outside an object in its doubled box, or in the slice if that has none."""
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
