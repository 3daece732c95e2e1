"""Segmentation of whole scans, slice by slice, on the scan's own grid.

Shape letters: Z = slices, H, W = rows and columns of a slice, N = slices of a batch, C = foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.finetune.baselines.networks import VolumeBaseline
from samgraft.finetune.classes import ClassTable, require_finite_logits
from samgraft.finetune.loss import with_background
from samgraft.finetune.prompting.prompt_sampling import PromptConfig
from samgraft.finetune.prompting.prompted_inference import PromptSource, label_prompts, segment_prompted_slices
from samgraft.finetune.segmenter import Segmenter
from samgraft.shared.errors import DataError
from samgraft.shared.samples.dataset import neighbour_slices
from samgraft.shared.samples.frame import InputFrame, fit_frame, image_to_frame, logits_to_native
from samgraft.shared.scans.intensity import IntensityPreset, IntensityStats, normalise
from samgraft.shared.scans.orientation import NEAR_ISOTROPIC_RATIO, Plane, change_plane
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore
from samgraft.shared.training.resume import evaluation_mode
from torch import Tensor, nn

Volume = npt.NDArray[Any]
Flips = tuple[tuple[int, ...], ...]
"""Axes to mirror, one entry per forward pass."""
NO_FLIPS: Flips = ((),)
ALL_FLIPS: Flips = ((), (-1,), (-2,), (-2, -1))


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Conversion of slices to the encoder's input, fixed in training and stored with the model."""

    intensity: IntensityPreset
    """Mapping from native units to [0, 1]."""
    keep_aspect: bool
    """True pads slices to a square, False changes their aspect ratio."""
    num_neighbours: int = 0
    """Number of slices on each side that are further channels of the encoder (2.5D)."""
    batch_size: int = 8
    """Number of slices per forward pass. It changes speed and memory only."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Prompts that validation and evaluation draw from the labels. Automatic mode has none."""
    planes: tuple[Plane, ...] = ()
    """Planes in which near-isotropic scans are segmented, with the mean of their probabilities. Empty segments the
    slices as they are given."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients, and restore the mode of every submodule."""
    with evaluation_mode(module), torch.inference_mode():
        yield


def segment_volume(
    segmenter: Segmenter,
    volume_ZHW: Volume,
    stats: IntensityStats,
    classes: ClassTable,
    config: InferenceConfig,
    *,
    only: Sequence[int] | None = None,
    flips: Flips = NO_FLIPS,
    prompts: PromptSource | None = None,
    on_slices: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int32]:
    """Segment a scan slice by slice, without random numbers and without changes of the model.

    Args:
        segmenter: Model, on the device to use.
        volume_ZHW: Scan in native units.
        stats: Intensity statistics of this volume.
        classes: Channel order of the model.
        config: Preparation of slices for the encoder.
        only: Numbers of the slices to segment; None segments all.
        flips: Axes to mirror, one pass each; the logits are averaged. Not used with prompts.
        prompts: Prompts of the slices; None segments automatically.
        on_slices: Called after every batch with the numbers of finished and of all slices. It may raise to stop.

    Returns:
        Label ids of these slices, (Z, H, W). Logits are resized and the class is chosen on native pixels.

    Raises:
        NumericalError: If the model gives NaN or Inf.
    """
    if isinstance(segmenter, VolumeBaseline):
        with evaluating(segmenter):
            return segmenter.segment(volume_ZHW, stats, classes, config.intensity)
    if config.planes:
        averaged = _segment_planes(segmenter, volume_ZHW, stats, classes, config, flips=flips, on_slices=on_slices)
        return averaged if only is None else averaged[list(only)]
    _, height, width = volume_ZHW.shape
    frame = fit_frame((height, width), image_size=segmenter.image_size, keep_aspect=config.keep_aspect)
    device, wanted = next(segmenter.parameters()).device, list(range(len(volume_ZHW)) if only is None else only)
    labels = np.zeros((len(wanted), *volume_ZHW.shape[1:]), dtype=np.int32)
    with evaluating(segmenter):
        for start in range(0, len(wanted), config.batch_size):
            numbers = wanted[start : start + config.batch_size]
            images_NCHW = _with_neighbours(volume_ZHW, numbers, stats, config).to(device)
            if prompts is None:
                found = classes.from_logits(_mean_logits(segmenter, images_NCHW, frame, flips)).cpu().numpy()
            else:
                found = segment_prompted_slices(
                    segmenter,
                    segmenter.embed(image_to_frame(images_NCHW, frame)),
                    prompts.prompts_of(numbers, frame),
                    classes=classes,
                    frame=frame,
                    num_corrections=prompts.num_corrections,
                )
            labels[start : start + len(numbers)] = found
            if on_slices is not None:
                on_slices(start + len(numbers), len(wanted))
    return labels


def segment_probabilities(
    segmenter: Segmenter,
    volume_ZHW: Volume,
    stats: IntensityStats,
    config: InferenceConfig,
    *,
    flips: Flips = NO_FLIPS,
    only: Sequence[int] | None = None,
) -> npt.NDArray[np.float32]:
    """Return the softmax probabilities (1 + C, Z, H, W) of exclusive classes on a scan's grid, background first.

    The slices are segmented as they are given. A caller that wants several planes cuts the scan and adds the results.

    Args:
        segmenter: Model without prompts, on the device to use.
        volume_ZHW: Scan in native units.
        stats: Intensity statistics of this volume.
        config: Preparation of slices for the encoder.
        flips: Axes to mirror, one pass each; the logits are averaged. Not used by 3D networks.
        only: Numbers of the slices; None returns all. A 3D network always returns all.

    Raises:
        NumericalError: If the model gives NaN or Inf.
    """
    with evaluating(segmenter):
        if isinstance(segmenter, VolumeBaseline):
            # A 3D network needs the slices around each slice, so it returns all of them at once.
            (whole_CZHW,) = _probabilities(segmenter.volume_logits(volume_ZHW, stats, config.intensity))
            return np.asarray(whole_CZHW)
        numbers = range(len(volume_ZHW)) if only is None else only
        batches = _logits_of(segmenter, volume_ZHW, numbers, stats, config, flips)
        return np.concatenate([_probabilities(logits_NCHW).swapaxes(0, 1) for logits_NCHW in batches], axis=1)


def _probabilities(logits_NC: Tensor) -> npt.NDArray[np.float32]:
    require_finite_logits(logits_NC)
    probabilities: npt.NDArray[np.float32] = torch.softmax(with_background(logits_NC), dim=1).cpu().numpy()
    return probabilities


def _segment_planes(
    segmenter: Segmenter,
    volume_ZHW: Volume,
    stats: IntensityStats,
    classes: ClassTable,
    config: InferenceConfig,
    *,
    flips: Flips,
    on_slices: Callable[[int, int], None] | None,
) -> npt.NDArray[np.int32]:
    """Segment axial slices in several planes, by the mean of the probabilities on the scan's own grid."""
    # Axial slices number z, coronal ones y and sagittal ones x.
    num_slices = dict(zip((Plane.AXIAL, Plane.CORONAL, Plane.SAGITTAL), volume_ZHW.shape, strict=True))
    total, done = sum(num_slices[plane] for plane in config.planes), 0

    def segment(cut_ZHW: Volume, _: Plane) -> npt.NDArray[np.float32]:
        nonlocal done
        found_CZHW = np.zeros((classes.num_classes, *cut_ZHW.shape), dtype=np.float32)
        start = 0
        for logits_NCHW in _logits_of(segmenter, cut_ZHW, range(len(cut_ZHW)), stats, config, flips):
            part_CNHW = classes.to_probabilities(logits_NCHW).cpu().numpy().swapaxes(0, 1)
            # An untrained SAM may have fewer masks than classes.
            found_CZHW[: len(part_CNHW), start : start + len(logits_NCHW)] = part_CNHW
            start, done = start + len(logits_NCHW), done + len(logits_NCHW)
            if on_slices is not None:
                on_slices(done, total)
        return found_CZHW

    with evaluating(segmenter):
        mean_CZHW = average_planes(volume_ZHW, config.planes, segment)
    return classes.from_probabilities(torch.from_numpy(mean_CZHW)[None])[0].numpy().astype(np.int32)


def average_planes(
    volume_ZHW: Volume, planes: Sequence[Plane], segment: Callable[[Volume, Plane], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Return the mean over planes of the probabilities of axial slices.

    Args:
        volume_ZHW: Axial slices of a scan.
        planes: Planes to cut the scan into, at least one.
        segment: Function that returns the probabilities (C, slices, rows, columns) of the slices of one plane.
    """
    mean_CZHW: npt.NDArray[np.float32] | None = None
    for plane in planes:
        found_CZHW = segment(change_plane(volume_ZHW, Plane.AXIAL, plane), plane)
        if mean_CZHW is None:
            mean_CZHW = np.zeros((len(found_CZHW), *volume_ZHW.shape), dtype=np.float32)
        # One class at a time, so that no second copy of all classes is needed.
        for mean_ZHW, found_ZHW in zip(mean_CZHW, found_CZHW, strict=True):
            mean_ZHW += change_plane(found_ZHW, plane, Plane.AXIAL) / len(planes)
    assert mean_CZHW is not None
    return mean_CZHW


def check_planes(record: SeriesRecord, config: InferenceConfig, *, name: str) -> None:
    """Refuse a scan that cannot be segmented in the planes of a model.

    Args:
        record: Geometry of the scan.
        config: Planes of the model.
        name: Name of the scan for the message.

    Raises:
        DataError: If its voxels are not near-isotropic, or it has one slice only.
    """
    ratio = max(record.spacing_mm) / min(record.spacing_mm)
    # Near-isotropic scans are always cut into axial slices, and a single slice has no other planes.
    if config.planes and (ratio > NEAR_ISOTROPIC_RATIO or record.plane is not Plane.AXIAL or 1 in record.shape_zyx):
        raise DataError(
            f"the model segments in {len(config.planes)} planes and needs near-isotropic scans (spacing ratio "
            f"{ratio:.2g} with {record.shape_zyx[0]} slices, expected at most {NEAR_ISOTROPIC_RATIO:g}). Use a model "
            "that was trained without data.planes.",
            where=name,
        )


def _logits_of(
    segmenter: Segmenter,
    volume_ZHW: Volume,
    numbers: Sequence[int],
    stats: IntensityStats,
    config: InferenceConfig,
    flips: Flips,
) -> Iterator[Tensor]:
    """Yield the mean logits (N, C, H, W) of all flips for one batch of slices after the other.

    The caller sets the evaluation mode. Set here, it would last as long as an interrupted generator exists.
    """
    device = next(segmenter.parameters()).device
    frame = fit_frame(volume_ZHW.shape[1:], image_size=segmenter.image_size, keep_aspect=config.keep_aspect)
    for start in range(0, len(numbers), config.batch_size):
        images_NCHW = _with_neighbours(volume_ZHW, numbers[start : start + config.batch_size], stats, config)
        yield _mean_logits(segmenter, images_NCHW.to(device), frame, flips)


def _mean_logits(segmenter: Segmenter, images_NCHW: Tensor, frame: InputFrame, flips: Flips) -> Tensor:
    """Return the mean logits (N, C, H, W) of all flips on native pixels."""
    passes = []
    for axes in flips:
        # Mirrored before padding: the padding must be on the right and at the bottom, as in training.
        mirrored = images_NCHW.flip(axes) if axes else images_NCHW
        logits_NCHW = logits_to_native(segmenter(image_to_frame(mirrored, frame)).float(), frame)
        passes.append(logits_NCHW.flip(axes) if axes else logits_NCHW)
    return passes[0] if len(passes) == 1 else torch.stack(passes).mean(dim=0)


def _with_neighbours(
    volume_ZHW: Volume, numbers: Sequence[int], stats: IntensityStats, config: InferenceConfig
) -> Tensor:
    """Return normalised slices with their neighbours as channels, (N, C, H, W)."""
    channels = [
        neighbour_slices(number, num_slices=len(volume_ZHW), num_neighbours=config.num_neighbours) for number in numbers
    ]
    # Neighbouring slices of a batch overlap, so every slice is normalised once.
    normalised = {z: normalise(volume_ZHW[z], stats, config.intensity) for row in channels for z in row}
    return torch.from_numpy(np.stack([np.stack([normalised[z] for z in row]) for row in channels]))


def segment_series(
    segmenter: Segmenter, store: SliceStore, series_id: str, classes: ClassTable, config: InferenceConfig
) -> npt.NDArray[np.int32]:
    """Segment one series of a store on its own grid, from prompts of its labels if the model needs prompts."""
    check_planes(store.record(series_id), config, name=series_id)
    volume_ZHW, stats = store.read_volume(series_id), store.record(series_id).stats
    if not config.prompt.is_prompted:
        return segment_volume(segmenter, volume_ZHW, stats, classes, config)
    label_ZHW = store.read_label_volume(series_id)
    # Slices without a class get no prompt and therefore no mask, so the encoder need not see them.
    members = [label for channel in range(classes.num_classes) for label in classes.store_ids(channel)]
    prompted = np.flatnonzero(np.isin(label_ZHW, members).any(axis=(1, 2))).tolist()
    source = label_prompts(segmenter, label_ZHW, series_id, classes, config.prompt)
    labels = np.zeros(volume_ZHW.shape, dtype=np.int32)
    labels[prompted] = segment_volume(segmenter, volume_ZHW, stats, classes, config, only=prompted, prompts=source)
    return labels
