"""Conversion between label ids and channels.

Exclusive classes: channel 0 is the background, whose logit is fixed to 0. One foreground class then follows SAM's own
rule, a mask where the logit is above 0, and several classes form a softmax.

Overlapping classes (regions): each class is a union of label ids, e.g. whole tumour = core + oedema, with its own
sigmoid. A store has one label id per voxel, so overlapping structures are unions of ids. Predictions have one bit per
class.

Voxels with ``IGNORE_LABEL`` are not annotated. They are no class and no background: losses skip them, and neither truth
nor prediction is counted there. No model predicts it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError, NumericalError, UsageError
from samgraft.shared.scans.volume import IGNORE_LABEL as IGNORE_LABEL
from samgraft.shared.store.series import SeriesRecord
from samgraft.shared.store.store import SliceStore
from torch import Tensor

BACKGROUND = 0
MAX_OVERLAPPING = 30
"""Largest number of overlapping classes, which must fit into the bits of an int32."""

Labels = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """Foreground classes in channel order."""

    ids: tuple[int, ...]
    """Label ids of channels 1, 2, .... For overlapping classes their bits in predictions, 1, 2, 4, ..."""
    names: tuple[str, ...]
    """Names of channels 1, 2, ..."""
    members: tuple[tuple[int, ...], ...] = ()
    """Label ids that each overlapping class joins. Empty for exclusive classes."""

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
            raise ValueError(f"overlapping classes need one bit each, got ids {list(self.ids)}.")

    @classmethod
    def of_regions(cls, regions: Mapping[str, Sequence[int]]) -> ClassTable:
        """Make a table of overlapping classes from label ids by name.

        Raises:
            UsageError: If a region is empty, repeats an id, contains the background, or equals another region.
        """
        for name, labels in regions.items():
            if not labels or len(set(labels)) != len(labels) or BACKGROUND in labels:
                raise UsageError(
                    f"a region must contain different label ids other than {BACKGROUND} (background), got "
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
            raise UsageError("two regions have the same label ids. Remove one of them.", where="data.regions")
        if len(members) > MAX_OVERLAPPING:
            raise UsageError(
                f"data.regions must have at most {MAX_OVERLAPPING} regions, got {len(members)}.", where="data.regions"
            )
        return cls(ids=tuple(2**i for i in range(len(members))), names=tuple(regions), members=members)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return len(self.ids)

    @property
    def is_overlapping(self) -> bool:
        """True for regions, where one pixel may belong to several classes."""
        return bool(self.members)

    def store_ids(self, channel: int) -> tuple[int, ...]:
        """Return the label ids of the store for a class, counted from 0."""
        return self.members[channel] if self.members else (self.ids[channel],)

    def true_mask(self, label: Labels, channel: int) -> npt.NDArray[np.bool_]:
        """Return the mask of a class, counted from 0, in a label volume of a store."""
        return np.isin(label, self.store_ids(channel))

    def predicted_mask(self, predicted: Labels, channel: int) -> npt.NDArray[np.bool_]:
        """Return the mask of a class, counted from 0, in a predicted volume."""
        if self.members:
            return np.asarray((predicted & self.ids[channel]) != 0)
        return np.asarray(predicted == self.ids[channel])

    def to_masks(self, label_NHW: Tensor) -> Tensor:
        """Return one bool mask per class, (N, C, H, W), from a store's label ids (N, H, W)."""
        masks = [
            torch.isin(label_NHW, torch.tensor(self.store_ids(channel), device=label_NHW.device))
            for channel in range(self.num_classes)
        ]
        return torch.stack(masks, dim=1)

    def to_target(self, label_NHW: Tensor) -> Tensor:
        """Return the target of ``SegmentationLoss``, int64, with ``IGNORE_LABEL`` where nothing is annotated.

        Channels (N, H, W) of exclusive classes, or masks (N, C, H, W) of 0 and 1 of regions.
        """
        if not self.members:
            return self.to_channels(label_NHW).masked_fill(label_NHW == IGNORE_LABEL, IGNORE_LABEL)
        return mark_ignored(self.to_masks(label_NHW), label_NHW)

    def from_logits(self, logits_NCHW: Tensor) -> Tensor:
        """Return predicted label ids (N, H, W), or bits of overlapping classes.

        Pixels without a logit above 0 are 0. Volumes are possible too: (N, C, Z, H, W) gives (N, Z, H, W).

        Raises:
            NumericalError: If a logit is NaN or Inf.
        """
        # NaN compares as "not above 0" and would become an empty mask, which looks like a valid result.
        require_finite_logits(logits_NCHW)
        if self.members:
            # An untrained SAM may have fewer masks than classes.
            bits = torch.tensor(self.ids[: logits_NCHW.shape[1]], device=logits_NCHW.device)
            bits = bits.view(1, -1, *[1] * (logits_NCHW.ndim - 2))
            return ((logits_NCHW > 0) * bits).sum(dim=1)
        # The background's logit is 0, so a class must be above 0 to win the softmax.
        best, channel = logits_NCHW.max(dim=1)
        return self.to_ids(torch.where(best > 0, channel + 1, 0))

    def to_probabilities(self, logits_NCHW: Tensor) -> Tensor:
        """Return the probability of every class, without the background's."""
        if self.members:
            return torch.sigmoid(logits_NCHW)
        background = torch.zeros_like(logits_NCHW[:, :1])
        return torch.softmax(torch.cat([background, logits_NCHW], dim=1), dim=1)[:, 1:]

    def from_probabilities(self, probabilities_NCHW: Tensor) -> Tensor:
        """Return the label ids of the most probable classes, as ``from_logits`` does for one set of logits."""
        if self.members:
            return self.from_logits(probabilities_NCHW - 0.5)
        # A class wins when it is more probable than the background and every other class.
        return self.from_logits(probabilities_NCHW - (1 - probabilities_NCHW.sum(dim=1, keepdim=True)))

    def to_channels(self, label: Tensor) -> Tensor:
        """Map label ids to channels of exclusive classes and other ids to background, int64."""
        channels = torch.zeros_like(label, dtype=torch.int64)
        for channel, label_id in enumerate(self.ids, start=1):
            channels[label == label_id] = channel
        return channels

    def to_ids(self, channels: Tensor) -> Tensor:
        """Map channels back to label ids, int64."""
        table = torch.tensor([BACKGROUND, *self.ids], device=channels.device)
        return table[channels.to(torch.int64)]


def mark_ignored(masks_NCHW: Tensor, label_NHW: Tensor) -> Tensor:
    """Return masks as 0 and 1, int64, with ``IGNORE_LABEL`` where the labels have it."""
    return masks_NCHW.to(torch.int64).masked_fill((label_NHW == IGNORE_LABEL)[:, None], IGNORE_LABEL)


def drop_ignored(predicted: Labels, true: Labels) -> Labels:
    """Return a prediction with background where the truth is not annotated, so that nothing counts there."""
    return np.where(true == IGNORE_LABEL, BACKGROUND, predicted)


def require_finite_logits(logits: Tensor) -> None:
    """Refuse logits that are not finite.

    Raises:
        NumericalError: If a logit is NaN or Inf.
    """
    if not bool(torch.isfinite(logits).all()):
        num_bad = int((~torch.isfinite(logits)).sum())
        raise NumericalError(
            f"the model's logits must be finite, got NaN or Inf for {num_bad} of {logits.numel()}. Its weights, or "
            "pixel_mean and pixel_std in its card.json, are damaged. Use another model."
        )


def choose_classes(
    store: SliceStore,
    wanted: Sequence[int],
    *,
    train_patients: Iterable[str],
    regions: Mapping[str, Sequence[int]] | None = None,
) -> ClassTable:
    """Choose the classes to train and check that the training part contains them.

    Args:
        store: Labelled store.
        wanted: Label ids; empty takes every id that occurs in the store.
        train_patients: Patients of the training part.
        regions: Overlapping classes as label ids by name, instead of ``wanted``.

    Raises:
        DataError: If the store or its training part has no labels, or a class does not occur in one of them.
        UsageError: If both ids and regions are given.
    """
    if wanted and regions:
        raise UsageError("data.classes and data.regions are both given. Remove one of them.", where="data")
    patients = set(train_patients)
    present = _label_ids(store.series)
    learnable = set(_label_ids([record for record in store.series if record.patient_id in patients]))
    _check_labels(store, present, learnable)
    asked = sorted({label for labels in regions.values() for label in labels}) if regions else list(wanted)
    if unknown := sorted(set(asked) - set(present) - {BACKGROUND}):
        raise DataError(
            f"classes must be label ids of the store, got {_listed(unknown)}; it has {_listed(present)}.",
            where=f"data.{'regions' if regions else 'classes'}, {store.path.name}",
        )
    ids = asked or list(present)
    if absent := [label for label in ids if label not in learnable and label != BACKGROUND]:
        raise DataError(
            f"classes {_listed(absent)} do not occur in the training part. Make another split, or choose other classes "
            f"with data.classes={sorted(learnable)}.",
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


def _label_ids(series: Iterable[SeriesRecord]) -> list[int]:
    counts = (item for record in series for item in record.label_voxels.items())
    return sorted({label for label, voxels in counts if voxels and label != BACKGROUND})


def _check_labels(store: SliceStore, present: Sequence[int], learnable: Collection[int]) -> None:
    """Refuse a store without label files, with empty labels only, or without labels in the training part."""
    num_labelled = sum(record.has_label for record in store.series)
    if not num_labelled:
        raise DataError(
            f"the store has no labels (0 of {counted(len(store.series), 'scan')}). Put the label files next to the "
            "scans and build the store again.",
            where=store.path.name,
            next_command="samgraft store build FOLDER --out STORE.zarr --modality mri",
        )
    if not present:
        raise DataError(
            f"the labels of the store ({counted(num_labelled, 'labelled scan')}) are empty: every voxel is background "
            f"({BACKGROUND}). Check the label files and build the store again.",
            where=store.path.name,
        )
    if not learnable:
        raise DataError(
            f"no patient of the training part has labels, although {counted(num_labelled, 'scan')} of the store "
            "have. Make a split with labelled patients in train.",
            where=store.path.name,
        )


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(str(label) for label in labels[:10]) + (", ..." if len(labels) > 10 else "")
