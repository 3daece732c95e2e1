"""Which label ids become which channels, and back.

Channel 0 is background and has no logit of its own: its logit is fixed to 0, so that one foreground class gives
exactly SAM's own rule "mask where the logit is above 0" and several give a softmax.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from samgraft.shared.data.store import SliceStore
from samgraft.shared.errors import DataError, UsageError
from torch import Tensor

BACKGROUND = 0


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """Foreground classes in channel order."""

    ids: tuple[int, ...]
    """Label id of channel 1, 2, ..."""
    names: tuple[str, ...]
    """Name of channel 1, 2, ..."""

    def __post_init__(self) -> None:
        if not self.ids or len(set(self.ids)) != len(self.ids) or BACKGROUND in self.ids:
            raise UsageError(
                f"classes must be different label ids other than {BACKGROUND} (background), got {list(self.ids)}.",
                where="data.classes",
            )
        if len(self.names) != len(self.ids):
            raise ValueError(f"names must be one per class, got {len(self.names)} for {len(self.ids)}.")

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return len(self.ids)

    def to_channels(self, label: Tensor) -> Tensor:
        """Map label ids to channels; ids that are not a class become background. Same shape, int64."""
        channels = torch.zeros_like(label, dtype=torch.int64)
        for channel, label_id in enumerate(self.ids, start=1):
            channels[label == label_id] = channel
        return channels

    def to_ids(self, channels: Tensor) -> Tensor:
        """Map channels back to label ids. Same shape, int64."""
        table = torch.tensor([BACKGROUND, *self.ids], device=channels.device)
        return table[channels.to(torch.int64)]


def choose_classes(store: SliceStore, wanted: Sequence[int], *, train_patients: Iterable[str]) -> ClassTable:
    """Choose the classes to learn and check that they can be learnt.

    Args:
        store: The labelled store.
        wanted: Label ids; empty takes every id that occurs in the store.
        train_patients: Patients of the training part.

    Raises:
        DataError: If the store has no label, a wanted id does not occur, or an id does not occur in training.
    """
    present = sorted({label for record in store.series for label, voxels in record.label_voxels.items() if voxels})
    if not present:
        raise DataError(
            "fine-tuning must have labels, the store has none. Put label files beside the scans and build it again.",
            where=store.path.name,
            next_command="samgraft store build FOLDER --out STORE.zarr --modality mri",
        )
    if strangers := sorted(set(wanted) - set(present)):
        raise DataError(
            f"classes must be label ids of the store, got {_listed(strangers)}; it has {_listed(present)}.",
            where=f"data.classes, {store.path.name}",
        )
    ids = tuple(wanted) if wanted else tuple(present)
    patients = set(train_patients)
    learnable = {
        label
        for record in store.series
        if record.patient_id in patients
        for label, voxels in record.label_voxels.items()
        if voxels
    }
    if absent := [label for label in ids if label not in learnable]:
        raise DataError(
            f"every class must occur in the training part, {_listed(absent)} does not. "
            "Make another split, or name the classes to learn: data.classes=[...].",
            where=store.path.name,
        )
    return ClassTable(ids=ids, names=tuple(store.label_names.get(label, f"label {label}") for label in ids))


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(str(label) for label in labels[:10]) + (", ..." if len(labels) > 10 else "")
