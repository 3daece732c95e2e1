"""A whole scan with prompts drawn from its labels: what the model gives when somebody points at every object.

Scores of it say how well objects are outlined, not whether they are found: slices without a class get no prompt.

Shape letters: Z = slices, H, W = rows and columns of a slice, C = foreground classes, P = prompts.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prompting.prompt_sampling import (
    Bools,
    PromptConfig,
    PromptedObject,
    PromptMode,
    correct,
    draw_prompt,
    find_objects,
    mask_prompt,
)
from samgraft.finetune.prompting.prompts import Prompt, box_to_frame, points_to_frame, predict_prompts
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.samples.frame import InputFrame, image_to_frame, logits_to_native
from torch import Tensor

Labels = npt.NDArray[Any]
EVALUATION_STREAM = 5
"""Second number of the seed of prompts in validation and evaluation: equal for every model and run."""


def segment_with_label_prompts(
    segmenter: Segmenter,
    embeddings_NChw: Tensor,
    label_NHW: Labels,
    *,
    series_id: str,
    slice_indexes: Sequence[int],
    classes: ClassTable,
    prompt: PromptConfig,
    frame: InputFrame,
) -> Labels:
    """Prompt for every object of some slices and put the masks together.

    Args:
        segmenter: In eval mode, without gradients.
        embeddings_NChw: Of the slices.
        label_NHW: Label ids of the store, on the slices' own pixels.
        series_id: With the slice's number, decides what jitter draws.
        slice_indexes: Numbers of the slices in their scan.
        classes: Of the model.
        prompt: Kind of prompts; already ``for_evaluation``.
        frame: Where the slices lie in the input.

    Returns:
        Predicted label ids (or bits of overlapping classes), shape of ``label_NHW``. Where objects of exclusive classes
        overlap, the higher logit wins.
    """
    objects, prompts, generators = _draw(segmenter, label_NHW, series_id, slice_indexes, classes, prompt, frame)
    logits_NCHW = torch.full(
        (len(label_NHW), classes.num_classes, *label_NHW.shape[1:]), -torch.inf, device=embeddings_NChw.device
    )
    if prompts:
        logits_PHW = _predict(segmenter, embeddings_NChw, prompts, objects, generators, prompt, frame)
        for one, asked, logits_HW in zip(objects, prompts, logits_PHW, strict=True):
            place = logits_NCHW[asked.image, one.channel]
            torch.maximum(place, logits_HW, out=place)
    return classes.from_logits(logits_NCHW).cpu().numpy()


def prompt_to_frame(prompt: Prompt, frame: InputFrame) -> Prompt:
    """Bring box and points from a slice's own pixels into the input frame; a mask is there already."""
    return dataclasses.replace(
        prompt,
        box=None if prompt.box is None else box_to_frame(prompt.box, frame),
        points=None if prompt.points is None else points_to_frame(prompt.points, frame),
    )


def mask_to_frame(mask_HW: Bools, *, frame: InputFrame, side: int) -> Tensor:
    """Return a mask on a slice's own pixels as low-resolution logits for the prompt encoder, (side, side)."""
    resized = image_to_frame(torch.from_numpy(mask_HW.astype(np.float32))[None, None], frame)
    return mask_prompt((resized[0, 0] > 0.5).numpy(), side=side)


def _draw(
    segmenter: Segmenter,
    label_NHW: Labels,
    series_id: str,
    slice_indexes: Sequence[int],
    classes: ClassTable,
    config: PromptConfig,
    frame: InputFrame,
) -> tuple[list[PromptedObject], list[Prompt], list[np.random.Generator]]:
    to_mask = partial(mask_to_frame, frame=frame, side=int(segmenter.sam.prompt_encoder.mask_input_size[0]))
    objects: list[PromptedObject] = []
    prompts: list[Prompt] = []
    generators: list[np.random.Generator] = []
    for image, (label_HW, index) in enumerate(zip(label_NHW, slice_indexes, strict=True)):
        masks_CHW = np.stack([classes.true_mask(label_HW, channel) for channel in range(classes.num_classes)])
        rng = np.random.default_rng([EVALUATION_STREAM, zlib.crc32(series_id.encode()), int(index)])
        for one in find_objects(masks_CHW, config):
            objects.append(one)
            prompts.append(draw_prompt(one.mask_HW, config, rng, image=image, to_mask=to_mask, central=True))
            generators.append(rng)
    return objects, prompts, generators


def _predict(
    segmenter: Segmenter,
    embeddings_NChw: Tensor,
    prompts: Sequence[Prompt],
    objects: Sequence[PromptedObject],
    generators: Sequence[np.random.Generator],
    config: PromptConfig,
    frame: InputFrame,
) -> Tensor:
    """Return one logit map per prompt on the slices' own pixels, (P, H, W), after all corrections."""
    asked = list(prompts)
    rounds = 1 + (config.num_clicks if config.mode is PromptMode.CLICKS else 0)
    for number in range(rounds):
        in_frame = [prompt_to_frame(prompt, frame) for prompt in asked]
        low_res_Phw, _ = predict_prompts(segmenter.sam, embeddings_NChw, in_frame)
        low_res_Phw = low_res_Phw.float()
        logits_PHW = logits_to_native(low_res_Phw[:, None], frame)[:, 0]
        if number + 1 < rounds:
            predicted_PHW = (logits_PHW > 0).cpu().numpy()
            asked = [
                correct(prompt, predicted, one.mask_HW, rng, low_res_logits=low_res, central=True)
                for prompt, predicted, one, rng, low_res in zip(
                    asked, predicted_PHW, objects, generators, low_res_Phw, strict=True
                )
            ]
    return logits_PHW
