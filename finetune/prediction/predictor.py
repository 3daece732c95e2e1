"""Prediction by a finished model, as a function from a volume to a mask.

    from samgraft.finetune.prediction import Predictor

    predictor = Predictor("releases/NAME")      # or runs/NAME
    labels_zyx = predictor(volume_zyx)          # native units to label ids, equal shapes

Shape letters: Z = slices, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.baselines.networks import VolumeBaseline
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.postprocess import PostProcessing, apply_postprocessing, read_postprocessing
from samgraft.finetune.inference import ALL_FLIPS, NO_FLIPS, segment_volume
from samgraft.finetune.model_folder import FinishedModel, read_model
from samgraft.finetune.prompting.prompt_file import SlicePrompt, apply_negative_points
from samgraft.finetune.prompting.prompt_sampling import ClassPrompt
from samgraft.finetune.prompting.prompted_inference import PromptSource
from samgraft.finetune.prompting.prompts import Prompt
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.samples.frame import InputFrame
from samgraft.shared.scans.intensity import IntensityStats, measure_intensity
from samgraft.shared.scans.volume import Modality
from samgraft.shared.training.device import Device, Precision, choose_device

Volume = npt.NDArray[Any]
OnSlices = Callable[[int, int], None]
"""Callback with the numbers of slices done and slices to do. It may raise to stop."""


class Predictor:
    """Finished run or release that segments volumes. Calls never change the model.

    Args:
        path: Run or release.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` computes in bf16 where that is fast, ``fp32`` everywhere else.
        batch_size: Slices per forward pass; changes speed and memory only. None is 8 on a GPU and 1 on a CPU, whose
            caches hold one slice of vit_t but not two (a quarter slower at 4).
        flips: Average the logits over the slice and its three flips: four times the work. Not for classes that
            differ by side.
        postprocess: Apply the post-processing that was chosen on validation patients, if any.

    Raises:
        WeightsError: If the folder has no finished model or its weights are not those of its card.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: Device | str = Device.AUTO,
        precision: Precision | str = Precision.AUTO,
        batch_size: int | None = None,
        flips: bool = False,
        postprocess: bool = True,
    ) -> None:
        self.model: FinishedModel = read_model(Path(path))
        choice = choose_device(device, precision=precision)
        self.device = choice.torch_device
        self.is_bf16 = choice.precision == "bf16-mixed"
        self.reason = choice.reason
        self.flips = flips
        self.batch_size = batch_size or default_batch_size(self.device)
        self.model.segmenter.to(self.device)
        self.postprocessing = PostProcessing()
        if postprocess:
            self.postprocessing = read_postprocessing(
                self.model.folder, weights_sha256=self.model.card.weights_sha256, classes=self.classes
            )

    @property
    def classes(self) -> ClassTable:
        """Classes of the model and their label ids."""
        return self.model.task.classes

    @property
    def modality(self) -> Modality:
        """Modality of the training scans."""
        return Modality(self.model.task.modality)

    def __call__(
        self,
        volume_ZHW: Volume,
        *,
        prompts: Sequence[SlicePrompt] | None = None,
        stats: IntensityStats | None = None,
        on_slices: OnSlices | None = None,
    ) -> npt.NDArray[np.int32]:
        """Segment a volume.

        Args:
            volume_ZHW: Slices in the plane the model was trained on, native units (Hounsfield units for CT). Axial
                slices of near-isotropic voxels for a model of several planes.
            prompts: Prompts of some slices, the only ones to be segmented; None segments every slice automatically.
            stats: Intensity statistics of the volume; measured when not given.
            on_slices: Called after every batch of slices.

        Returns:
            Label ids, the shape of ``volume_ZHW``; 0 is background.

        Raises:
            DataError: If the volume is not three-dimensional or not finite.
            UsageError: If the model and the prompts do not fit each other.
            NumericalError: If the model gives NaN or Inf.
        """
        if volume_ZHW.ndim != 3 or 0 in volume_ZHW.shape:
            raise DataError(f"a volume must have shape (slices, rows, columns), got {volume_ZHW.shape}.")
        self.check_mode(prompted=prompts is not None)
        stats = stats or measure_intensity(volume_ZHW, modality=self.modality)
        config = self.model.task.inference(batch_size=self.batch_size)
        # Callers from Python may pass negative points alone, which must not become a mask either.
        marking = apply_negative_points(prompts or ())
        indexes = None if prompts is None else sorted({prompt.slice_index for prompt in marking})
        # Slices without a prompt are not sent through the encoder.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_bf16):
            segmented = segment_volume(
                self.model.segmenter,
                volume_ZHW,
                stats,
                self.classes,
                config if prompts is None else replace(config, planes=()),
                only=indexes,
                flips=ALL_FLIPS if self.flips else NO_FLIPS,
                prompts=None if prompts is None else _source(marking),
                on_slices=on_slices,
            )
        if indexes is None:
            steps = self.postprocessing.steps
            return apply_postprocessing(segmented, steps, is_overlapping=self.classes.is_overlapping)
        # No post-processing with prompts: the user may have marked several pieces on purpose.
        labels = np.zeros(volume_ZHW.shape, dtype=np.int32)
        labels[indexes] = segmented
        return labels

    def check_mode(self, *, prompted: bool) -> None:
        """Refuse prompts for a model without them, and no prompts for a model trained with them.

        Raises:
            UsageError: With the option to add or leave out.
        """
        mode = self.model.task.inference().prompt.mode.value
        if prompted and self.model.task.network:
            raise UsageError("this model is a network without prompts. Leave --prompts out.")
        if self.flips and isinstance(self.model.segmenter, VolumeBaseline):
            raise UsageError("flips mirror slices, this model segments whole volumes. Leave --flips out.")
        if self.flips and prompted:
            raise UsageError("flips are averaged in automatic segmentation only. Leave --flips or --prompts out.")
        if not prompted and self.model.task.inference().prompt.is_prompted:
            raise UsageError(
                f"this model was trained with prompts ({mode}), its output without prompts has no meaning.",
                next_command="add --prompts FILE with a box or points per structure",
            )


def default_batch_size(device: torch.device) -> int:
    """Return the slices per forward pass that are fastest on a device."""
    return 1 if device.type == "cpu" else 8


def _source(prompts: Sequence[SlicePrompt]) -> PromptSource:
    def prompts_of(slice_indexes: Sequence[int], _: InputFrame) -> list[ClassPrompt]:
        return [
            ClassPrompt(channel=one.channel, prompt=_to_prompt(one, list(slice_indexes).index(one.slice_index)))
            for one in prompts
            if one.slice_index in slice_indexes
        ]

    return PromptSource(prompts_of=prompts_of)


def _to_prompt(prompt: SlicePrompt, image: int) -> Prompt:
    return Prompt(
        image=image,
        box=torch.tensor(prompt.box) if prompt.box is not None else None,
        points=torch.tensor(prompt.points) if prompt.points else None,
        labels=torch.tensor(prompt.labels, dtype=torch.float32) if prompt.points else None,
    )
