"""Held-out slices, which are fixed slices of patients outside the training set with fixed masks.

The slices are spread evenly over each held-out patient by rule, not chosen by eye. The held-out loss and the pictures
of a run are computed on them.

Shape letters: N = slices, 1 = channels (3 with neighbours, data.num_neighbours), S = side of the encoder's input, K =
columns of a picture, H, W = its rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from samgraft.shared.samples.dataset import SliceDataset, batch_to_input, collate_slices
from samgraft.shared.samples.slices import SliceRef, select_slices
from samgraft.shared.scans.orientation import Plane
from samgraft.shared.scans.preset import ModalityPreset
from samgraft.shared.store.store import SliceStore
from samgraft.ssl.config import DataConfig, ModelConfig
from samgraft.ssl.monitor.health import feature_health
from samgraft.ssl.objectives import Objective, Panel

HELD_OUT_COUNTER = 1 << 40
"""First sample counter of held-out slices. Training never gets that far, so that the masks differ from training's."""
GAP_PX = 2
"""Width in pixels of the white gaps between pictures."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out slices on the CPU at the size of the encoder's input."""

    images_N1SS: torch.Tensor
    sample_counters: tuple[int, ...]
    planes: tuple[Plane, ...]
    refs: tuple[SliceRef, ...]
    num_patients: int
    """Number of patients with at least one slice, at most ``num_held_out_slices``."""

    def panel_rows(self, num_rows: int) -> list[int]:
        """Return positions of ``num_rows`` slices, evenly spread."""
        return spread_evenly(len(self.refs), num_rows)


def load_held_out(
    store: SliceStore, patient_ids: Sequence[str], *, config: DataConfig, model: ModelConfig, preset: ModalityPreset
) -> HeldOut | None:
    """Read the held-out slices, or return None if there is no held-out patient.

    Every patient contributes the same number of slices, evenly spaced over its usable ones.
    """
    num_slices = config.num_held_out_slices
    if not patient_ids or num_slices < 1:
        return None
    per_patient = max(1, num_slices // len(patient_ids))
    refs = spread_slices(store, sorted(patient_ids)[:num_slices], per_patient, config=config, preset=preset)
    dataset = SliceDataset(store, refs, intensity=preset.intensity, num_neighbours=config.num_neighbours)
    # Counters are fixed, so that every round has the same masks and views and differences come from the weights.
    counters = tuple(HELD_OUT_COUNTER + i for i in range(len(refs)))
    batch = collate_slices([dataset[i, counter] for i, counter in enumerate(counters)])
    images_N1SS, _, _ = batch_to_input(batch, image_size=model.image_size, keep_aspect=config.keep_aspect, device="cpu")
    return HeldOut(
        images_N1SS=images_N1SS,
        sample_counters=counters,
        planes=tuple(batch["planes"]),
        refs=tuple(refs),
        num_patients=len({store.record(ref.series_id).patient_id for ref in refs}),
    )


def spread_slices(
    store: SliceStore, patient_ids: Sequence[str], per_patient: int, *, config: DataConfig, preset: ModalityPreset
) -> list[SliceRef]:
    """Return up to ``per_patient`` slices of each patient, evenly spaced over its usable ones."""
    usable: dict[str, list[SliceRef]] = {patient_id: [] for patient_id in patient_ids}
    # One pass over the store for all patients, because a pass for each would take minutes with thousands of them.
    for ref in select_slices(
        store, patient_ids, planes=config.planes, min_foreground_fraction=config.minimum_foreground(preset)
    ):
        usable[store.record(ref.series_id).patient_id].append(ref)
    return [refs[i] for refs in usable.values() for i in spread_evenly(len(refs), per_patient)]


def spread_evenly(num_items: int, num_wanted: int) -> list[int]:
    """Return up to ``num_wanted`` positions in ``range(num_items)``, evenly spaced and away from both ends."""
    num_wanted = min(num_items, num_wanted)
    return [int((i + 0.5) * num_items / num_wanted) for i in range(num_wanted)]


@torch.no_grad()
def held_out_loss(
    objective: Objective, held_out: HeldOut, *, batch_size: int, step: int, device: torch.device
) -> dict[str, float]:
    """Return the mean loss, its parts, and the variety of the features over the held-out slices."""
    sums: dict[str, float] = {}
    features: list[torch.Tensor] = []
    # Means over slices and not over batches, because the last batch may be smaller.
    for start in range(0, len(held_out.refs), batch_size):
        part = slice(start, start + batch_size)
        counters = held_out.sample_counters[part]
        result = objective.loss(
            held_out.images_N1SS[part].to(device), sample_counters=counters, step=step, planes=held_out.planes[part]
        )
        for name, value in {"loss": result.total, **result.parts}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(counters)
        if result.features_BC is not None:
            features.append(result.features_BC.cpu())
    means = {name: total / len(held_out.refs) for name, total in sums.items()}
    return {**means, **(feature_health(torch.cat(features)) if features else {})}


@torch.no_grad()
def held_out_panel(objective: Objective, held_out: HeldOut, *, num_rows: int, device: torch.device) -> Panel:
    """Return pictures of evenly spread held-out slices."""
    rows = held_out.panel_rows(num_rows)
    images_B1SS = held_out.images_N1SS[rows].to(device)
    return objective.panel(images_B1SS, sample_counters=[held_out.sample_counters[i] for i in rows])


def panel_picture(panel: Panel) -> npt.NDArray[np.uint8]:
    """Return one picture (H, W) in 0..255 with a row per slice and a column per kind."""
    pictures_KBHW = (panel.images_KBHW.clamp(0, 1) * 255).round().to(torch.uint8)
    padded_KBHW = torch.nn.functional.pad(pictures_KBHW, (0, GAP_PX, 0, GAP_PX), value=255)
    columns, rows, height, width = padded_KBHW.shape
    return padded_KBHW.permute(1, 2, 0, 3).reshape(rows * height, columns * width).numpy()


def split_picture(picture_HW: npt.NDArray[np.uint8], *, num_columns: int, side: int) -> npt.NDArray[np.uint8]:
    """Return the pictures (K, N, side, side) in a picture of ``panel_picture``."""
    cell = side + GAP_PX
    num_rows = picture_HW.shape[0] // cell
    cells = picture_HW.reshape(num_rows, cell, num_columns, cell).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(cells[..., :side, :side])
