"""Box-prompt check, the Dice of SAM's own decoder on the trained encoder.

Self-supervision changes the image embeddings, and the decoder is not trained with them. The check gives the base
weights' prompt encoder and mask decoder a tight box around each label and the embedding of the present encoder, and
measures the Dice of the masks. The value before training is the reference. A fall is no fault in itself, because
stage 2 trains the decoder, but the further it falls, the more of SAM's segmentation has to be learned again.

Shape letters: B = boxes, C = channels, h, w = embedding grid, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from samgraft.shared.encoders.base import ImageEncoder, ImageFeatures
from samgraft.shared.encoders.sam import decode_boxes, encode_images, to_pixels
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.samples.frame import InputFrame, logits_to_native
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.training.resume import preserve_rng
from samgraft.shared.weights.load import load_sam, read_weights
from samgraft.ssl.config import RANDOM, ModelConfig, ProbeConfig
from samgraft.ssl.monitor.held_out import spread_evenly
from samgraft.ssl.monitor.labelled import NO_LABELS, LabelledSlices, ProbeData
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


@dataclass(frozen=True, kw_only=True)
class ObjectBox:
    """Tight box around one object of one slice."""

    slice_number: int
    class_id: int
    native_xyxy: tuple[int, int, int, int]
    """Corners in pixels of the slice. The lower right one is outside the object."""

    def in_frame(self, frame: InputFrame) -> tuple[float, float, float, float]:
        """Return XYXY in pixels of the encoder's input."""
        down = frame.content_hw[0] / frame.native_hw[0]
        right = frame.content_hw[1] / frame.native_hw[1]
        x0, y0, x1, y1 = self.native_xyxy
        return x0 * right, y0 * down, x1 * right, y1 * down

    def filled_dice(self, label_HW: Tensor) -> float:
        """Return the Dice of the filled box, which needs no decoder."""
        x0, y0, x1, y1 = self.native_xyxy
        size = int((label_HW == self.class_id).sum())
        return 2 * size / (size + (x1 - x0) * (y1 - y0))


class BoxPromptCheck:
    """Untrained decoder with its boxes, and the Dice values of one monitoring round."""

    def __init__(
        self, decoder: Sam, slices: LabelledSlices, boxes: Sequence[ObjectBox], *, decoder_sha256: str | None = None
    ) -> None:
        self.decoder = decoder
        self.decoder_sha256 = decoder_sha256
        """Hash of the file that the decoder is from."""
        self.slices = slices
        self.boxes = tuple(boxes)
        self._dice: list[float] = []

    @property
    def filled_box_dice(self) -> float:
        """Mean Dice of the filled boxes. A decoder below it is worse than no decoder."""
        values = [box.filled_dice(self.slices.labels[box.slice_number]) for box in self.boxes]
        return sum(values) / len(values)

    def start_round(self) -> None:
        """Remove the values of the last round."""
        self._dice = []

    @torch.no_grad()
    def add(self, encoder: ImageEncoder, first: int, features_BChw: Tensor) -> None:
        """Decode the boxes of a batch of slices.

        Args:
            encoder: The present encoder, whose neck is applied.
            first: Number of the first slice of the batch.
            features_BChw: Features of the slices before the neck.
        """
        chosen = [box for box in self.boxes if first <= box.slice_number < first + len(features_BChw)]
        if not chosen:
            return
        self.decoder.to(features_BChw.device)
        rows = torch.tensor([box.slice_number - first for box in chosen], device=features_BChw.device)
        if encoder.high_res_layers():
            # The finer maps that this decoder reads are no part of the features, so the slices are encoded once more.
            images_B1SS = self.slices.images_N1SS[[box.slice_number for box in chosen]].to(features_BChw.device)
            features = encode_images(self.decoder, to_pixels(images_B1SS, encoder.spec), encoder=encoder)
        else:
            features = ImageFeatures(encoder.neck(features_BChw[rows]))
        # In float32 whatever the precision of the training, so that values of different runs can be compared.
        features = features.map(Tensor.float)
        frames = [self.slices.frames[box.slice_number] for box in chosen]
        boxes_B4 = torch.tensor([box.in_frame(f) for box, f in zip(chosen, frames, strict=True)])
        logits, _ = decode_boxes(self.decoder, features, boxes_B4.to(features_BChw.device), multimask=False)
        for box, frame, logits_1hw in zip(chosen, frames, logits, strict=True):
            label_HW = self.slices.labels[box.slice_number]
            predicted_HW = logits_to_native(logits_1hw[None].float(), frame)[0, 0].cpu() > 0
            predicted_HW &= label_HW != IGNORE_LABEL
            true_HW = label_HW == box.class_id
            self._dice.append(2 * float((predicted_HW & true_HW).sum()) / float(predicted_HW.sum() + true_HW.sum()))

    def mean_dice(self) -> float:
        """Return the mean Dice over the boxes of this round."""
        return sum(self._dice) / len(self._dice)


def load_box_prompt_check(
    data: ProbeData | None, config: ProbeConfig, model: ModelConfig, *, stride: int
) -> tuple[BoxPromptCheck | None, str]:
    """Load the decoder and choose the boxes.

    Returns:
        The check, or None where it is off, and a line that describes it or gives the reason.

    Raises:
        WeightsError: If both CKPT and BASE are given, and BASE has no decoder.
        UsageError: If the decoder expects another embedding grid.
    """
    if data is None:
        return None, NO_LABELS
    if config.num_boxes == 0:
        return None, "off (probe.num_boxes=0)"
    if model.base == RANDOM:
        return None, "off, because the initial weights are random"
    # The decoder of BASE is used, and a full SAM as CKPT alone supplies its own.
    name = model.base or model.initial_weights
    weights = read_weights(name)
    if not {"prompt_encoder", "mask_decoder"} <= weights.parts:
        if model.base is not None and model.ckpt is not None:
            raise WeightsError("BASE must be a full SAM with a mask decoder, this file has none.", where=weights.name)
        return None, f"off, because {weights.name} has no decoder (pass it as CKPT, and a full SAM as BASE)"
    if weights.spec.stride != stride:
        raise UsageError(
            f"the decoder of the box-prompt check must have the encoder's stride {stride}, got {weights.spec.stride} "
            f"from {weights.name}. Use the SAM of the encoder's architecture as BASE, or probe.num_boxes=0.",
            where="BASE (model.base)",
        )
    # Building the decoder draws weights, which the file then replaces. The run's random numbers must not depend on it.
    with preserve_rng():
        decoder = load_sam(name, image_size=model.image_size).requires_grad_(False)
    # The encoder of the file is not used and would only take memory.
    decoder.image_encoder = nn.Identity()
    boxes = choose_boxes(data.test, data.class_ids, config.num_boxes)
    check = BoxPromptCheck(decoder, data.test, boxes, decoder_sha256=weights.sha256)
    return check, f"{len(boxes)} boxes, decoder of {weights.name}; Dice of the filled boxes {check.filled_box_dice:.3f}"


def choose_boxes(slices: LabelledSlices, class_ids: Sequence[int], num_boxes: int) -> list[ObjectBox]:
    """Return up to ``num_boxes`` tight boxes, one per slice and class, evenly spread."""
    boxes = [
        box
        for number, label_HW in enumerate(slices.labels)
        for class_id in class_ids
        if (box := tight_box(label_HW, number, class_id)) is not None
    ]
    return [boxes[i] for i in spread_evenly(len(boxes), num_boxes)]


def tight_box(label_HW: Tensor, slice_number: int, class_id: int) -> ObjectBox | None:
    """Return the box around all pixels of a class, or None if the slice has none."""
    rows, columns = torch.where(label_HW == class_id)
    if not len(rows):
        return None
    x0, y0, x1, y1 = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    return ObjectBox(slice_number=slice_number, class_id=class_id, native_xyxy=(x0, y0, x1, y1))
