"""Slices of a store as training samples, and batches of them on the training device.

Shape letters: N = samples, C = channels (1, or neighbours of a 2.5D sample), H, W = rows and columns of a slice,
S = side of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from samgraft.shared.samples.frame import InputFrame, fit_frame, image_to_frame, label_to_frame
from samgraft.shared.samples.sampler import BatchPart, sample_generator
from samgraft.shared.samples.slices import SliceRef
from samgraft.shared.scans.intensity import IntensityPreset, normalise
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore
from torch import Tensor
from torch.utils.data import Dataset

Augment = Callable[[Tensor, Tensor | None, np.random.Generator, Plane], tuple[Tensor, Tensor | None]]
"""Function of image (C, H, W) in [0, 1], label (H, W) or None, generator and plane that returns image and label."""

MAX_NEIGHBOURS = 1
"""Largest number of neighbours on each side, because SAM's encoders have three input channels."""


class SliceSample(TypedDict):
    """Sample of one slice at its own size."""

    image: Tensor
    """Image (C, H, W), float32 in [0, 1]."""
    label: NotRequired[Tensor]
    """Label ids (H, W), int64."""
    series_index: int
    """Position of the series in ``store.series``."""
    slice_index: int
    sample_counter: int
    plane: Plane


class SliceBatch(TypedDict):
    """Samples of one batch. Their sizes may differ."""

    images: list[Tensor]
    labels: NotRequired[list[Tensor]]
    series_index: Tensor
    slice_index: Tensor
    sample_counter: Tensor
    planes: list[Plane]
    """Planes of the slices. They decide which flips are anatomically valid."""


class SliceDataset(Dataset[SliceSample]):
    """Dataset of slices that are normalised by the statistics of their volume.

    An item is requested as ``(index, sample_counter)``, see ``StepBatchSampler``. The counter seeds the augmentation.
    """

    def __init__(
        self,
        store: SliceStore,
        slices: Sequence[SliceRef],
        *,
        intensity: IntensityPreset | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        with_label: bool = False,
        num_neighbours: int = 0,
        labels: SliceStore | None = None,
        hide_labels: bool = False,
    ) -> None:
        """Keep the list of slices without reading any.

        Args:
            store: The store.
            slices: Slices by index.
            intensity: None takes the store's preset.
            augment: Augmentation of every sample. None for evaluation.
            seed: Seed of the run. With the sample counter it decides the augmentation.
            with_label: Read the label too. A series without label is an error.
            num_neighbours: Slices on each side that become extra channels (2.5D). At the ends of the volume the last
                slice is repeated.
            labels: Store that labels are read from, which has the same series. None reads those of ``store``.
            hide_labels: Give every pixel ``IGNORE_LABEL`` instead of reading labels, for unlabelled slices.

        Raises:
            ValueError: If the channels would not fit an encoder.
        """
        check_neighbours(num_neighbours)
        self.store = store
        self.slices = tuple(slices)
        self.intensity = intensity or store.intensity
        self.augment = augment
        self.seed = seed
        self.with_label = with_label
        self.num_neighbours = num_neighbours
        self.labels = labels or store
        self.hide_labels = hide_labels
        self._series_index = {record.series_id: i for i, record in enumerate(store.series)}

    def without_augmentation(self) -> SliceDataset:
        """Return a dataset of the same slices without augmentation."""
        return SliceDataset(
            self.store,
            self.slices,
            intensity=self.intensity,
            seed=self.seed,
            with_label=self.with_label,
            num_neighbours=self.num_neighbours,
            labels=self.labels,
            hide_labels=self.hide_labels,
        )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, item: tuple[int, int]) -> SliceSample:
        # The counter comes with the request instead of being counted here, because each worker sees only a part of the
        # requests.
        index, sample_counter = item
        ref = self.slices[index]
        image = torch.from_numpy(self._image(ref))
        label: Tensor | None = None
        if self.with_label and self.hide_labels:
            label = torch.full(image.shape[-2:], IGNORE_LABEL, dtype=torch.int64)
        elif self.with_label:
            label_HW = self.labels.read_label_slice(ref.series_id, ref.slice_index, plane=ref.plane)
            label = torch.from_numpy(label_HW.astype(np.int64))
        plane = ref.plane or self.store.record(ref.series_id).plane
        if self.augment is not None:
            image, label = self.augment(image, label, sample_generator(self.seed, sample_counter), plane)
        sample: SliceSample = {
            "image": image,
            "series_index": self._series_index[ref.series_id],
            "slice_index": ref.slice_index,
            "sample_counter": sample_counter,
            "plane": plane,
        }
        if label is not None:
            sample["label"] = label
        return sample

    def _image(self, ref: SliceRef) -> np.ndarray[Any, np.dtype[np.float32]]:
        record = self.store.record(ref.series_id)
        last = record.planes[ref.plane or record.plane].shape_zyx[0] - 1
        # All channels are scaled with the statistics of the volume. Scaled one by one, equal tissue would differ
        # between neighbouring slices.
        numbers = neighbour_slices(ref.slice_index, num_slices=last + 1, num_neighbours=self.num_neighbours)
        slices = {
            number: normalise(
                self.store.read_slice(ref.series_id, number, plane=ref.plane), record.stats, self.intensity
            )
            for number in set(numbers)
        }
        return np.stack([slices[number] for number in numbers])


class SizedDataset(Protocol):
    """Dataset with a length, whose items are ``(index, sample_counter)``."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, item: tuple[int, int]) -> Any:
        """Return one sample."""


class JoinedSamples(Dataset[Any]):
    """Slices or patches of several datasets, each with a fixed number of places in every batch."""

    def __init__(self, datasets: Sequence[SizedDataset], *, per_batch: Sequence[int]) -> None:
        self.datasets = tuple(datasets)
        self.parts = tuple(
            BatchPart(num_samples=len(dataset), per_batch=number)
            for dataset, number in zip(datasets, per_batch, strict=True)
        )

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, sample_counter = item
        for dataset in self.datasets:
            if index < len(dataset):
                return dataset[index, sample_counter]
            index -= len(dataset)
        raise IndexError(f"index must be below {len(self)}, got {item[0]}.")


def neighbour_slices(slice_index: int, *, num_slices: int, num_neighbours: int) -> list[int]:
    """Return the indices of the slices that become the channels of one 2.5D sample.

    At the ends of the volume the last slice is repeated.
    """
    offsets = range(-num_neighbours, num_neighbours + 1)
    return [min(max(slice_index + offset, 0), num_slices - 1) for offset in offsets]


def centre_channel(images_NCSS: Tensor) -> Tensor:
    """Return the slice itself (N, 1, S, S) from a batch with its neighbours as channels."""
    middle = images_NCSS.shape[1] // 2
    return images_NCSS[:, middle : middle + 1]


def check_neighbours(num_neighbours: int) -> None:
    """Check that the encoder has channels for the neighbours.

    Raises:
        ValueError: If it is negative or above ``MAX_NEIGHBOURS``.
    """
    if not 0 <= num_neighbours <= MAX_NEIGHBOURS:
        raise ValueError(
            f"data.num_neighbours must be in 0..{MAX_NEIGHBOURS}, got {num_neighbours}. SAM's encoders take three "
            "channels, the slice and one neighbour on each side."
        )


def collate_slices(samples: Sequence[SliceSample]) -> SliceBatch:
    """Put samples of any sizes into one batch. They are resized later, on the training device."""
    batch: SliceBatch = {
        "images": [sample["image"] for sample in samples],
        "series_index": torch.tensor([sample["series_index"] for sample in samples]),
        "slice_index": torch.tensor([sample["slice_index"] for sample in samples]),
        "sample_counter": torch.tensor([sample["sample_counter"] for sample in samples]),
        "planes": [sample["plane"] for sample in samples],
    }
    if all("label" in sample for sample in samples):
        batch["labels"] = [sample["label"] for sample in samples]
    return batch


def batch_to_input(
    batch: SliceBatch, *, image_size: int, keep_aspect: bool, device: torch.device | str
) -> tuple[Tensor, Tensor | None, list[InputFrame]]:
    """Move a batch to the device and resize it there.

    Returns:
        Images (N, C, S, S) in [0, 1], label ids (N, S, S) or None, and the frame of every sample.
    """
    # Slices are sent at their own size, usually smaller than the input, and resized one by one on the device.
    images, labels, frames = [], [], []
    batch_labels = batch.get("labels")
    for position, image in enumerate(batch["images"]):
        native_hw = (int(image.shape[-2]), int(image.shape[-1]))
        frame = fit_frame(native_hw, image_size=image_size, keep_aspect=keep_aspect)
        images.append(image_to_frame(image[None].to(device, non_blocking=True), frame))
        if batch_labels is not None:
            labels.append(label_to_frame(batch_labels[position][None].to(device, non_blocking=True), frame))
        frames.append(frame)
    return torch.cat(images), torch.cat(labels) if batch_labels is not None else None, frames
