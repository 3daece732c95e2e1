"""A finished model as a function from a volume to a mask.

    from samgraft.finetune.prediction import Predictor

    predictor = Predictor("releases/NAME")      # or runs/NAME
    labels_zyx = predictor(volume_zyx)          # native units in, label ids out, same shape

Shape letters: Z = slices, H, W = rows and columns of a slice, N = slices of a batch, C = classes, P = prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.baselines.networks import VolumeBaseline
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.evaluation.postprocess import PostProcessing, apply_postprocessing, read_postprocessing
from samgraft.finetune.inference import (
    ALL_FLIPS,
    NO_FLIPS,
    InferenceConfig,
    evaluating,
    segment_volume,
    with_neighbours,
)
from samgraft.finetune.model_folder import FinishedModel, read_model
from samgraft.finetune.prompting.prompt_file import SlicePrompt
from samgraft.finetune.prompting.prompts import Prompt, box_to_frame, points_to_frame, predict_prompts
from samgraft.shared.encoders.sam import to_pixels
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.samples.frame import InputFrame, fit_frame, image_to_frame, logits_to_native
from samgraft.shared.scans.intensity import IntensityStats, measure_intensity
from samgraft.shared.scans.volume import Modality
from samgraft.shared.training.device import Device, Precision, choose_device
from torch import Tensor

Volume = npt.NDArray[Any]
OnSlices = Callable[[int, int], None]
"""Called with slices done and slices to do; may raise to stop."""
NOWHERE = -1e4
"""Logit of a class that nobody prompted for in a slice."""


class Predictor:
    """A finished run or release, ready to segment; the model is never changed by it.

    Args:
        path: Run or release.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` computes in bf16 where that is fast, ``fp32`` everywhere else.
        batch_size: Slices per forward pass; changes speed and memory only. None: 8 on a GPU, 1 on a CPU, whose caches
            hold one slice of vit_t but not two (a quarter slower at 4).
        flips: Average the logits over the slice and its three flips: four times the work. Not for classes that
            differ by side.
        postprocess: Apply what was chosen on validation patients; nothing if nothing was chosen.

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
        """What the label ids mean."""
        return self.model.task.classes

    @property
    def modality(self) -> Modality:
        """Kind of scan the model was trained on."""
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
            volume_ZHW: Slices in the plane the model was trained on, native units (Hounsfield units for CT).
            prompts: Segment what they point at, in their slices only; None segments every slice automatically.
            stats: Intensity statistics of the volume; measured when not given.
            on_slices: Told about progress.

        Returns:
            Label ids, the shape of ``volume_ZHW``; 0 is background.

        Raises:
            DataError: If the volume is not three-dimensional or not finite.
            UsageError: If the model and the prompts do not fit each other.
        """
        if volume_ZHW.ndim != 3 or 0 in volume_ZHW.shape:
            raise DataError(f"a volume must have shape (slices, rows, columns), got {volume_ZHW.shape}.")
        self.refuse_unfit(prompted=prompts is not None)
        stats = stats or measure_intensity(volume_ZHW, modality=self.modality)
        config = self.model.task.inference(batch_size=self.batch_size)
        with self._autocast():
            if prompts is None:
                labels = segment_volume(
                    self.model.segmenter,
                    volume_ZHW,
                    stats,
                    self.classes,
                    config,
                    flips=ALL_FLIPS if self.flips else NO_FLIPS,
                    on_slices=on_slices,
                )
            else:
                labels = self._prompted(volume_ZHW, prompts, stats, config, on_slices)
        # A prompted mask may be several pieces on purpose.
        if prompts is not None:
            return labels
        return apply_postprocessing(labels, self.postprocessing.steps, is_overlapping=self.classes.is_overlapping)

    def refuse_unfit(self, *, prompted: bool) -> None:
        """Refuse prompts for a model that takes none, and a model that was trained with prompts without any.

        Raises:
            UsageError: With what to give instead.
        """
        mode = self.model.task.inference().prompt.mode.value
        if prompted and self.model.task.network:
            raise UsageError("this model is a network without prompts. Leave --prompts out.")
        if self.flips and isinstance(self.model.segmenter, VolumeBaseline):
            raise UsageError("flips mirror slices, this model segments whole volumes. Leave --flips out.")
        if not prompted and self.model.task.inference().prompt.is_prompted:
            raise UsageError(
                f"this model was trained with prompts ({mode}): what it gives without any means nothing.",
                next_command="add --prompts FILE with a box or points per structure",
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_bf16)

    def _prompted(
        self,
        volume_ZHW: Volume,
        prompts: Sequence[SlicePrompt],
        stats: IntensityStats,
        config: InferenceConfig,
        on_slices: OnSlices | None,
    ) -> npt.NDArray[np.int32]:
        segmenter = self.model.segmenter
        frame = fit_frame(
            (volume_ZHW.shape[1], volume_ZHW.shape[2]), image_size=segmenter.image_size, keep_aspect=config.keep_aspect
        )
        labels = np.zeros(volume_ZHW.shape, dtype=np.int32)
        indexes = sorted({prompt.slice_index for prompt in prompts})
        done = 0
        with evaluating(segmenter):
            for chosen in _batches(indexes, config.batch_size):
                images_NCHW = torch.from_numpy(with_neighbours(volume_ZHW, chosen, stats, config))
                images_NCSS = image_to_frame(images_NCHW.to(self.device), frame)
                pixels = to_pixels(images_NCSS, segmenter.sam.image_encoder.spec)
                embeddings = segmenter.sam.image_encoder(pixels)
                here = [prompt for prompt in prompts if prompt.slice_index in chosen]
                sam_prompts = [_to_prompt(prompt, chosen.index(prompt.slice_index), frame) for prompt in here]
                logits_Phw, _ = predict_prompts(segmenter.sam, embeddings, sam_prompts)
                logits_PHW = logits_to_native(logits_Phw[:, None].float(), frame)[:, 0]
                logits_NCHW = self._per_class(logits_PHW, here, chosen)
                labels[chosen] = self.classes.from_logits(logits_NCHW).cpu().numpy()
                done += len(chosen)
                if on_slices is not None:
                    on_slices(done, len(indexes))
        return labels

    def _per_class(self, logits_PHW: Tensor, prompts: Sequence[SlicePrompt], chosen: Sequence[int]) -> Tensor:
        """Join the prompts of a slice and class: a pixel belongs to what is surest of it."""
        shape = (len(chosen), self.classes.num_classes, *logits_PHW.shape[-2:])
        logits_NCHW = logits_PHW.new_full(shape, NOWHERE)
        for logits_HW, prompt in zip(logits_PHW, prompts, strict=True):
            place = (chosen.index(prompt.slice_index), prompt.channel)
            logits_NCHW[place] = torch.maximum(logits_NCHW[place], logits_HW)
        return logits_NCHW


def default_batch_size(device: torch.device) -> int:
    """Return the slices per forward pass that are fastest on a device."""
    return 1 if device.type == "cpu" else 8


def _to_prompt(prompt: SlicePrompt, image: int, frame: InputFrame) -> Prompt:
    box = box_to_frame(torch.tensor(prompt.box), frame) if prompt.box is not None else None
    points = points_to_frame(torch.tensor(prompt.points), frame) if prompt.points else None
    labels = torch.tensor(prompt.labels, dtype=torch.float32) if prompt.points else None
    return Prompt(image=image, box=box, points=points, labels=labels)


def _batches(indexes: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indexes), size):
        yield list(indexes[start : start + size])
