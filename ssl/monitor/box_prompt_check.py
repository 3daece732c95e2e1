"""Drift gauge: does SAM's own decoder still understand the encoder?

Self-supervision moves the image embeddings; the decoder never sees that. The gauge gives the base weights' untouched
prompt encoder and mask decoder a tight box around each label and the embedding of the encoder as it is now, and
measures the Dice of the answer. The start's value stands beside it. A fall is no fault by itself - stage 2 tunes the
decoder - but the further it falls, the more of SAM's segmentation has to be learned again.

Shape letters: B = boxes, h, w = embedding grid, H, W = rows and columns of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from samgraft.shared.encoders.base import ImageEncoder
from samgraft.shared.encoders.sam import decode_boxes
from samgraft.shared.errors import UsageError, WeightsError
from samgraft.shared.samples.frame import InputFrame, logits_to_native
from samgraft.shared.training.resume import preserve_rng
from samgraft.shared.weights.load import load_sam, read_weights
from samgraft.ssl.config import ModelConfig, ProbeConfig
from samgraft.ssl.monitor.held_out import spread
from samgraft.ssl.monitor.labelled import LabelledSlices, ProbeData
from samgraft.ssl.start import RANDOM
from segment_anything.modeling import Sam
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Box:
    """One object of one slice."""

    slice_number: int
    class_id: int
    native_xyxy: tuple[int, int, int, int]
    """Tight, in pixels of the slice; the lower right end lies outside of the object."""

    def in_frame(self, frame: InputFrame) -> tuple[float, float, float, float]:
        """Return XYXY in pixels of the encoder's input."""
        down = frame.content_hw[0] / frame.native_hw[0]
        right = frame.content_hw[1] / frame.native_hw[1]
        x0, y0, x1, y1 = self.native_xyxy
        return x0 * right, y0 * down, x1 * right, y1 * down

    def filled_dice(self, label_HW: Tensor) -> float:
        """Return the Dice of the box itself, filled: what no decoder is needed for."""
        x0, y0, x1, y1 = self.native_xyxy
        size = int((label_HW == self.class_id).sum())
        return 2 * size / (size + (x1 - x0) * (y1 - y0))


class DriftGauge:
    """The untouched decoder with its boxes; collects the answers of one look."""

    def __init__(
        self, decoder: Sam, slices: LabelledSlices, boxes: Sequence[Box], *, decoder_sha256: str | None = None
    ) -> None:
        self.decoder = decoder
        self.decoder_sha256 = decoder_sha256
        """Of the file that the decoder is from."""
        self.slices = slices
        self.boxes = tuple(boxes)
        self._dice: list[float] = []

    @property
    def filled_box_dice(self) -> float:
        """Mean Dice of the boxes themselves: an answer below it is worth nothing."""
        values = [box.filled_dice(self.slices.labels[box.slice_number]) for box in self.boxes]
        return sum(values) / len(values)

    def start_look(self) -> None:
        """Forget the last look."""
        self._dice = []

    @torch.no_grad()
    def add(self, encoder: ImageEncoder, first: int, features_BChw: Tensor) -> None:
        """Decode the boxes of the slices from ``first`` on, whose features before the neck are given."""
        chosen = [box for box in self.boxes if first <= box.slice_number < first + len(features_BChw)]
        if not chosen:
            return
        self.decoder.to(features_BChw.device)
        rows = torch.tensor([box.slice_number - first for box in chosen], device=features_BChw.device)
        embeddings_BChw = encoder.neck(features_BChw[rows]).float()
        frames = [self.slices.frames[box.slice_number] for box in chosen]
        boxes_B4 = torch.tensor([box.in_frame(f) for box, f in zip(chosen, frames, strict=True)])
        logits, _ = decode_boxes(self.decoder, embeddings_BChw, boxes_B4.to(features_BChw.device), multimask=False)
        for box, frame, logits_1hw in zip(chosen, frames, logits, strict=True):
            answer_HW = logits_to_native(logits_1hw[None].float(), frame)[0, 0].cpu() > 0
            true_HW = self.slices.labels[box.slice_number] == box.class_id
            self._dice.append(2 * float((answer_HW & true_HW).sum()) / float(answer_HW.sum() + true_HW.sum()))

    def result(self) -> float:
        """Return the mean Dice over the boxes of this look."""
        return sum(self._dice) / len(self._dice)


def load_gauge(
    data: ProbeData | None, config: ProbeConfig, model: ModelConfig, *, stride: int
) -> tuple[DriftGauge | None, str]:
    """Load the decoder and choose the boxes.

    Returns:
        The gauge, or None, and a line that says on what, or why not.

    Raises:
        WeightsError: If ``probe.decoder`` is named and has no decoder.
        UsageError: If its decoder expects another embedding grid.
    """
    if data is None:
        return None, "off: no labelled store named (probe.store)"
    if config.num_boxes == 0:
        return None, "off (probe.num_boxes=0)"
    if config.decoder is None and model.base == RANDOM:
        return None, "off: the run starts from random weights; probe.decoder can name a SAM"
    name = config.decoder or model.base
    weights = read_weights(name)
    if not {"prompt_encoder", "mask_decoder"} <= weights.parts:
        if config.decoder is not None:
            raise WeightsError("probe.decoder must be a whole SAM, this file has no decoder.", where=weights.name)
        return None, f"off: {weights.name} has no decoder; probe.decoder can name the SAM it came from"
    if weights.spec.stride != stride:
        raise UsageError(
            f"the drift gauge's decoder must have the encoder's stride {stride}, {weights.name} has "
            f"{weights.spec.stride}.",
            where="probe.decoder",
        )
    with preserve_rng():  # building it draws weights that are then loaded over
        decoder = load_sam(name, image_size=model.image_size).requires_grad_(False)
    decoder.image_encoder = nn.Identity()  # only prompt encoder and mask decoder are asked
    boxes = choose_boxes(data.test, data.class_ids, config.num_boxes)
    gauge = DriftGauge(decoder, data.test, boxes, decoder_sha256=weights.sha256)
    return gauge, f"{len(boxes)} boxes; decoder of {weights.name}; the boxes alone score {gauge.filled_box_dice:.3f}"


def choose_boxes(slices: LabelledSlices, class_ids: Sequence[int], num_boxes: int) -> list[Box]:
    """Return up to ``num_boxes`` tight boxes, one per slice and class, evenly spread."""
    every = [
        box
        for number, label_HW in enumerate(slices.labels)
        for class_id in class_ids
        if (box := tight_box(label_HW, number, class_id)) is not None
    ]
    return [every[i] for i in spread(len(every), num_boxes)]


def tight_box(label_HW: Tensor, slice_number: int, class_id: int) -> Box | None:
    """Return the box around all pixels of a class; None where the slice has none."""
    rows, columns = torch.where(label_HW == class_id)
    if not len(rows):
        return None
    x0, y0, x1, y1 = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
    return Box(slice_number=slice_number, class_id=class_id, native_xyxy=(x0, y0, x1, y1))
