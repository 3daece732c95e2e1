"""Segmentation of a batch of slices from prompts, given by a user or drawn from labels.

Scores with drawn prompts measure how well objects are outlined, not whether they are found, because slices without a
class get no prompt.

Shape letters: N = slices of a batch, H, W = rows and columns of a slice, C = foreground classes, P = prompts.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prompting.prompt_sampling import (
    Bools,
    ClassPrompt,
    PromptConfig,
    PromptMode,
    add_correction_click,
    draw_prompts,
    find_objects,
    mask_prompt,
)
from samgraft.finetune.prompting.prompts import Prompt, box_to_frame, points_to_frame, predict_prompts
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.encoders.base import ImageFeatures
from samgraft.shared.samples.frame import InputFrame, image_to_frame, logits_to_native
from torch import Tensor

Labels = npt.NDArray[Any]
EVALUATION_STREAM = 5
"""Second number of the seed of prompts in validation and evaluation, equal for every model and run."""
NO_PROMPT_LOGIT = -1e4
"""Logit of a class that has no prompt in a slice. It is finite, so that a check for NaN and Inf can stay strict."""


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Prompts of any slices of one scan."""

    prompts_of: Callable[[Sequence[int], InputFrame], list[ClassPrompt]]
    """Function from slice numbers of a batch and their frame to prompts."""
    num_corrections: int = 0
    """Number of correction clicks after the first mask. They need the true objects."""


def label_prompts(segmenter: Segmenter, label_ZHW: Labels, series_id: str, classes: ClassTable, config: PromptConfig
) -> PromptSource:  # fmt: skip
    """Return prompts drawn from the labels of a scan, one per object.

    Args:
        segmenter: Model; only the size of its mask prompts is read.
        label_ZHW: Label ids of the store on the scan's own grid.
        series_id: Scan. With the slice number it seeds the jitter, so all models get the same prompts.
        classes: Classes of the model.
        config: Kind of prompts, already ``for_evaluation``.
    """
    side = int(segmenter.sam.prompt_encoder.mask_input_size[0])

    def draw(slice_indexes: Sequence[int], frame: InputFrame) -> list[ClassPrompt]:
        to_mask = partial(mask_to_frame, frame=frame, side=side)
        found: list[ClassPrompt] = []
        for image, index in enumerate(slice_indexes):
            masks_CHW = np.stack([classes.true_mask(label_ZHW[index], c) for c in range(classes.num_classes)])
            # One generator per slice: the prompts do not depend on the batch size or on other slices.
            rng = np.random.default_rng([EVALUATION_STREAM, zlib.crc32(series_id.encode()), int(index)])
            objects = find_objects(masks_CHW, config)
            found += draw_prompts(objects, config, rng, image=image, to_mask=to_mask, central=True)
        return found

    return PromptSource(prompts_of=draw, num_corrections=config.num_clicks if config.mode is PromptMode.CLICKS else 0)


def segment_prompted_slices(
    segmenter: Segmenter,
    features: ImageFeatures,
    prompts: Sequence[ClassPrompt],
    *,
    classes: ClassTable,
    frame: InputFrame,
    num_corrections: int = 0,
) -> Labels:
    """Segment slices from their prompts and join the masks.

    Args:
        segmenter: Model in eval mode, without gradients.
        features: Features of the slices.
        prompts: Any number per slice and class; none leaves the slice empty.
        classes: Classes of the model.
        frame: Position of the slices in the encoder's input.
        num_corrections: Number of correction clicks after the first mask.

    Returns:
        Label ids (N, H, W), or bits of overlapping classes. Of several prompts of a class a pixel gets the highest
        logit, and where exclusive classes overlap the higher logit decides.
    """
    shape = (len(features.embeddings), classes.num_classes, *frame.native_hw)
    logits_NCHW = torch.full(shape, NO_PROMPT_LOGIT, device=features.embeddings.device)
    if prompts:
        logits_PHW = _prompt_logits(segmenter, features, prompts, frame, num_corrections)
        for one, logits_HW in zip(prompts, logits_PHW, strict=True):
            place = logits_NCHW[one.prompt.image, one.channel]
            torch.maximum(place, logits_HW, out=place)
    return classes.from_logits(logits_NCHW).cpu().numpy()


def prompt_to_frame(prompt: Prompt, frame: InputFrame) -> Prompt:
    """Map box and points of a prompt to the input frame, where a mask is already."""
    return dataclasses.replace(
        prompt,
        box=None if prompt.box is None else box_to_frame(prompt.box, frame),
        points=None if prompt.points is None else points_to_frame(prompt.points, frame),
    )


def mask_to_frame(mask_HW: Bools, *, frame: InputFrame, side: int) -> Tensor:
    """Return a mask of a slice as low-resolution logits (side, side) for the prompt encoder."""
    resized = image_to_frame(torch.from_numpy(mask_HW.astype(np.float32))[None, None], frame)
    return mask_prompt((resized[0, 0] > 0.5).numpy(), side=side)


def _prompt_logits(
    segmenter: Segmenter,
    features: ImageFeatures,
    prompts: Sequence[ClassPrompt],
    frame: InputFrame,
    num_corrections: int,
) -> Tensor:
    """Return one logit map per prompt on the slices' own pixels, (P, H, W), after all corrections."""
    current = [one.prompt for one in prompts]
    for number in range(1 + num_corrections):
        low_res_Phw, _ = predict_prompts(
            segmenter.sam, features, [prompt_to_frame(prompt, frame) for prompt in current]
        )
        low_res_Phw = low_res_Phw.float()  # under bf16 autocast resizing and maxima would lose digits
        logits_PHW = logits_to_native(low_res_Phw[:, None], frame)[:, 0]
        if number == num_corrections:
            break
        predicted_PHW = (logits_PHW > 0).cpu().numpy()
        current = [
            add_correction_click(prompt, one, predicted_HW, low_res_logits=low_res_hw, central=True)
            for prompt, one, predicted_HW, low_res_hw in zip(current, prompts, predicted_PHW, low_res_Phw, strict=True)
        ]
    return logits_PHW
