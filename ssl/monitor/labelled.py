"""Labelled slices of the linear probe and the box-prompt check, chosen by a fixed rule and read once.

Shape letters: N = slices, H, W = rows and columns of a slice, S = side of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from samgraft.shared.counting import counted
from samgraft.shared.errors import DataError
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.frame import InputFrame
from samgraft.shared.samples.slices import SliceRef, select_slices
from samgraft.shared.samples.split import Split, load_split
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.scans.volume import IGNORE_LABEL
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.config import OFF, PretrainConfig, ProbeConfig
from samgraft.ssl.monitor.held_out import spread_evenly

NO_LABELS = "off, because no labels are given (LABELLED=STORE.zarr)"
"""State of linear probe and box-prompt check without a labelled store."""
_PARTS = ("train", "val")
"""Parts of the split in which the head is fitted and scored."""


@dataclass(frozen=True, kw_only=True)
class LabelledSlices:
    """Slices on the CPU at the size of the encoder's input, with their labels at native size."""

    images_N1SS: torch.Tensor
    labels: tuple[torch.Tensor, ...]
    """Label ids (H, W), int64, of each slice at its native size."""
    frames: tuple[InputFrame, ...]
    patient_ids: tuple[str, ...]
    """Patient of each slice."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patient_ids))


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Slices for fitting and for scoring the linear probe, of different patients."""

    train: LabelledSlices
    test: LabelledSlices
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    store_name: str

    def describe(self) -> str:
        """Return classes, store and numbers of slices in one line."""
        return (
            f"{', '.join(self.class_names)} of {self.store_name}: fitted on {_count(self.train)}, scored on "
            f"{_count(self.test)}"
        )


def can_probe(store: SliceStore, *, modality: str) -> bool:
    """Return whether training and validation patients of a store have labels, and its scans the given modality."""
    split = load_split(None, store)
    return store.modality.value == modality and all(labelled_refs(store, split.part(name), 1) for name in _PARTS)


def open_probe_store(config: ProbeConfig) -> tuple[SliceStore, Split] | None:
    """Open the labelled store and its split, or return None if no store is set."""
    if config.store is None or config.store == OFF:
        return None
    store = SliceStore.open(config.store)
    return store, load_split(Path(config.split) if config.split else None, store)


def load_probe(
    opened: tuple[SliceStore, Split] | None, config: PretrainConfig, *, preset: ModalityPreset
) -> ProbeData | None:
    """Read the slices of the linear probe, or return None if no store is set.

    They are preprocessed as the slices of the pretraining.

    Raises:
        DataError: If the store is of another modality, or a part of the split has no labelled slice.
    """
    if opened is None:
        return None
    store, split = opened
    # Other intensities would make the features useless, and the probe would report a bad encoder.
    if store.modality is not preset.modality:
        raise DataError(
            f"the probe's store must be of modality {preset.modality.value}, got {store.modality.value}.",
            where=store.path.name,
        )
    parts = []
    numbers = (config.probe.num_train_slices, config.probe.num_test_slices)
    for name, number in zip(_PARTS, numbers, strict=True):
        refs = labelled_refs(store, split.part(name), number)
        if not refs:
            raise DataError(
                f"the {name} part of the probe's split must contain labelled slices, got none. Set probe.split to one "
                "with labelled patients in train and val, or leave probe.store out.",
                where=store.path.name,
            )
        parts.append(_read(store, refs, config, preset))
    train, test = parts
    ids = sorted({int(i) for label_HW in (*train.labels, *test.labels) for i in label_HW.unique()} - {0, IGNORE_LABEL})
    return ProbeData(
        train=train,
        test=test,
        class_ids=tuple(ids),
        class_names=tuple(store.label_names.get(i, f"label {i}") for i in ids),
        store_name=store.path.name,
    )


def labelled_refs(store: SliceStore, patient_ids: Sequence[str], num_slices: int) -> list[SliceRef]:
    """Choose up to ``num_slices`` slices with a label, the same number per patient, evenly spaced."""
    # Label counts per series are in the store, so no label has to be read to find the slices.
    wanted = set(patient_ids)
    labelled = {r.patient_id for r in store.series if r.patient_id in wanted and any(r.label_voxels.values())}
    if not labelled:
        return []
    per_patient: dict[str, list[SliceRef]] = {patient_id: [] for patient_id in sorted(labelled)}
    for ref in select_slices(store, labelled, labelled_only=True):
        per_patient[store.record(ref.series_id).patient_id].append(ref)
    chosen = [list(per_patient.values())[i] for i in spread_evenly(len(per_patient), num_slices)]
    refs: list[SliceRef] = []
    for position, usable in enumerate(chosen):
        # The first patients contribute one slice more where the number does not divide evenly.
        number = num_slices // len(chosen) + (position < num_slices % len(chosen))
        refs += [usable[i] for i in spread_evenly(len(usable), number)]
    return refs


def _read(
    store: SliceStore, refs: Sequence[SliceRef], config: PretrainConfig, preset: ModalityPreset
) -> LabelledSlices:
    # Read once and kept in memory, because every round needs the same slices.
    dataset = SliceDataset(
        store, refs, intensity=preset.intensity, with_label=True, num_neighbours=config.data.num_neighbours
    )
    batch = collate_slices([dataset[index, 0] for index in range(len(refs))])
    labels = batch.pop("labels")
    images_N1SS, _, frames = batch_to_input(
        batch, image_size=config.model.image_size, keep_aspect=config.data.keep_aspect, device="cpu"
    )
    return LabelledSlices(
        images_N1SS=images_N1SS,
        labels=tuple(labels),
        frames=tuple(frames),
        patient_ids=tuple(store.record(ref.series_id).patient_id for ref in refs),
    )


def _count(slices: LabelledSlices) -> str:
    patients = slices.num_patients
    return f"{counted(len(slices), 'slice')} of {counted(patients, 'patient')}"
