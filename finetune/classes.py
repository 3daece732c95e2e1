"""Which label ids become which channels, and back.

Exclusive classes: channel 0 is background and has no logit of its own: its logit is fixed to 0, so that one foreground
class gives exactly SAM's own rule "mask where the logit is above 0" and several give a softmax.

Overlapping classes (regions): each is a union of label ids, e.g. whole tumour = core + oedema, with a sigmoid of its
own. A store has one label id per voxel, so overlapping structures are unions of ids. Predictions hold a bit per class.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.errors import DataError, NumericalError, UsageError
from samgraft.shared.store.store import SliceStore
from torch import Tensor

BACKGROUND = 0
MAX_OVERLAPPING = 30
"""Classes that fit into the bits of an int32."""

Labels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """Foreground classes in channel order."""

    ids: tuple[int, ...]
    """Label id of channel 1, 2, ...; of overlapping classes the bit in predictions: 1, 2, 4, ..."""
    names: tuple[str, ...]
    """Name of channel 1, 2, ..."""
    members: tuple[tuple[int, ...], ...] = ()
    """Overlapping classes only: the label ids that each class joins."""

    def __post_init__(self) -> None:
        if not self.ids or len(set(self.ids)) != len(self.ids) or BACKGROUND in self.ids:
            raise UsageError(
                f"classes must be different label ids other than {BACKGROUND} (background), got {list(self.ids)}.",
                where="data.classes",
            )
        if len(self.names) != len(self.ids):
            raise ValueError(f"names must be one per class, got {len(self.names)} for {len(self.ids)}.")
        if self.members and (
            len(self.members) != len(self.ids) or self.ids != tuple(2**i for i in range(len(self.ids)))
        ):
            raise ValueError("overlapping classes must have members and a bit each.")

    @classmethod
    def of_regions(cls, regions: Mapping[str, Sequence[int]]) -> ClassTable:
        """Make a table of overlapping classes from name -> label ids.

        Raises:
            UsageError: If a region is empty, repeats an id, names the background, or two are the same.
        """
        for name, labels in regions.items():
            if not labels or len(set(labels)) != len(labels) or BACKGROUND in labels:
                raise UsageError(
                    f"a region must join different label ids other than {BACKGROUND} (background), got "
                    f"{name}: {list(labels)}.",
                    where="data.regions",
                )
        if clean_class_names(tuple(regions)) != tuple(regions):
            raise UsageError(
                "names of regions must be different, without control characters, path separators or a leading dash, "
                f"got {list(regions)}.",
                where="data.regions",
            )
        members = tuple(tuple(sorted(labels)) for labels in regions.values())
        if len(set(members)) != len(members):
            raise UsageError("two regions join the same label ids. Name each union once.", where="data.regions")
        if len(members) > MAX_OVERLAPPING:
            raise UsageError(
                f"data.regions must have at most {MAX_OVERLAPPING} regions, got {len(members)}.", where="data.regions"
            )
        return cls(ids=tuple(2**i for i in range(len(members))), names=tuple(regions), members=members)

    @property
    def num_classes(self) -> int:
        """Foreground classes."""
        return len(self.ids)

    @property
    def is_overlapping(self) -> bool:
        """True for regions: one pixel may belong to several classes."""
        return bool(self.members)

    def store_ids(self, channel: int) -> tuple[int, ...]:
        """Return the label ids of a store that make up a class, counted from 0."""
        return self.members[channel] if self.members else (self.ids[channel],)

    def true_mask(self, label: Labels, channel: int) -> npt.NDArray[np.bool_]:
        """Return where a label volume of a store shows a class, counted from 0."""
        return np.isin(label, self.store_ids(channel))

    def predicted_mask(self, predicted: Labels, channel: int) -> npt.NDArray[np.bool_]:
        """Return where a predicted volume shows a class, counted from 0."""
        if self.members:
            return np.asarray((predicted & self.ids[channel]) != 0)
        return np.asarray(predicted == self.ids[channel])

    def to_masks(self, label_NHW: Tensor) -> Tensor:
        """Return one bool mask per class, (N, C, H, W), of label ids (N, H, W) as a store has them."""
        masks = [
            torch.isin(label_NHW, torch.tensor(self.store_ids(channel), device=label_NHW.device))
            for channel in range(self.num_classes)
        ]
        return torch.stack(masks, dim=1)

    def to_target(self, label_NHW: Tensor) -> Tensor:
        """Return what ``SegmentationLoss`` compares with: channels (N, H, W), or masks (N, C, H, W) of regions."""
        return self.to_masks(label_NHW) if self.members else self.to_channels(label_NHW)

    def from_logits(self, logits_NCHW: Tensor) -> Tensor:
        """Return predicted label ids (N, H, W), or bits of overlapping classes; 0 where no logit is above 0.

        Volumes work too: (N, C, Z, H, W) gives (N, Z, H, W).

        Raises:
            NumericalError: If a logit is NaN or Inf.
        """
        # NaN compares as "not above 0" and would become an empty mask, which looks like a valid result.
        if not bool(torch.isfinite(logits_NCHW).all()):
            num_bad = int((~torch.isfinite(logits_NCHW)).sum())
            raise NumericalError(
                f"the model's logits must be finite, got NaN or Inf for {num_bad} of {logits_NCHW.numel()}. Its "
                "weights, or pixel_mean and pixel_std in its card.json, are damaged. Use another model."
            )
        if self.members:
            # SAM without training may have fewer masks than classes.
            bits = torch.tensor(self.ids[: logits_NCHW.shape[1]], device=logits_NCHW.device)
            bits = bits.view(1, -1, *[1] * (logits_NCHW.ndim - 2))
            return ((logits_NCHW > 0) * bits).sum(dim=1)
        best, channel = logits_NCHW.max(dim=1)
        return self.to_ids(torch.where(best > 0, channel + 1, 0))

    def to_channels(self, label: Tensor) -> Tensor:
        """Map label ids to channels of exclusive classes, other ids to background. Same shape, int64."""
        channels = torch.zeros_like(label, dtype=torch.int64)
        for channel, label_id in enumerate(self.ids, start=1):
            channels[label == label_id] = channel
        return channels

    def to_ids(self, channels: Tensor) -> Tensor:
        """Map channels back to label ids. Same shape, int64."""
        table = torch.tensor([BACKGROUND, *self.ids], device=channels.device)
        return table[channels.to(torch.int64)]


def choose_classes(
    store: SliceStore,
    wanted: Sequence[int],
    *,
    train_patients: Iterable[str],
    regions: Mapping[str, Sequence[int]] | None = None,
) -> ClassTable:
    """Choose the classes to learn and check that they can be learnt.

    Args:
        store: The labelled store.
        wanted: Label ids; empty takes every id that occurs in the store.
        train_patients: Patients of the training part.
        regions: Overlapping classes instead: name -> label ids that it joins.

    Raises:
        DataError: If the store has no label, a wanted id does not occur, or an id does not occur in training.
        UsageError: If both ids and regions are given.
    """
    if wanted and regions:
        raise UsageError("data.classes and data.regions must not both be given.", where="data")
    present = sorted({label for record in store.series for label, voxels in record.label_voxels.items() if voxels})
    if not present:
        raise DataError(
            "fine-tuning must have labels, the store has none. Put label files beside the scans and build it again.",
            where=store.path.name,
            next_command="samgraft store build FOLDER --out STORE.zarr --modality mri",
        )
    asked = sorted({label for labels in regions.values() for label in labels}) if regions else list(wanted)
    if strangers := sorted(set(asked) - set(present) - {BACKGROUND}):
        raise DataError(
            f"classes must be label ids of the store, got {_listed(strangers)}; it has {_listed(present)}.",
            where=f"data.{'regions' if regions else 'classes'}, {store.path.name}",
        )
    ids = asked or list(present)
    patients = set(train_patients)
    learnable = {
        label
        for record in store.series
        if record.patient_id in patients
        for label, voxels in record.label_voxels.items()
        if voxels
    }
    if absent := [label for label in ids if label not in learnable and label != BACKGROUND]:
        raise DataError(
            f"every class must occur in the training part, {_listed(absent)} does not. "
            "Make another split, or name the classes to learn: data.classes=[...].",
            where=store.path.name,
        )
    if regions:
        return ClassTable.of_regions(regions)
    names = [store.label_names.get(label, f"label {label}") for label in ids]
    return ClassTable(ids=tuple(ids), names=clean_class_names(names))


def clean_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return different names that are safe in file names, headers and tables.

    Control characters and path separators become underscores, as does a dash in front, which a command would read as
    an option. A repeated name gets a number.
    """
    cleaned: list[str] = []
    for name in names:
        text = "".join("_" if unicodedata.category(c)[0] == "C" or c in "/\\" else c for c in name).strip() or "class"
        text = f"_{text[1:]}" if text[0] == "-" else text
        same = sum(text == other or other.startswith(f"{text} (") for other in cleaned)
        cleaned.append(f"{text} ({same + 1})" if text in cleaned else text)
    return tuple(cleaned)


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(str(label) for label in labels[:10]) + (", ..." if len(labels) > 10 else "")
