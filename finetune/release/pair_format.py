"""The format of models whose adapters cannot be merged, with base weights and adapter in separate files.

No SAM file is written for such a model, because a SAM file could hold the base weights only. Under the name ``sam.pth``
they would load everywhere and segment without the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from samgraft.finetune.adapters import base_tensors
from samgraft.finetune.model_folder import ADAPTER_FOLDER, BASE_FILE, PAIR_FILES, FinishedModel, read_model
from samgraft.shared.release.clients import Outputs
from samgraft.shared.release.formats import Artefact, Format
from samgraft.shared.release.subject import Subject, sam_outputs
from torch import Tensor

CANNOT_MERGE = (
    "its adapters cannot be merged into SAM's weights. The release contains base weights and adapter, which evaluate "
    "and predict read. For plain SAM files train with METHOD=lora."
)


def pair_formats(model: FinishedModel, others: Sequence[Format]) -> list[Format]:
    """Return the pair format, and all others with the reason why they are left out."""

    def write(subject: Subject, folder: Path) -> list[Artefact]:
        (folder / ADAPTER_FOLDER).mkdir()
        for name in PAIR_FILES:
            shutil.copyfile(model.folder / name, folder / name)
        return [Artefact(path=BASE_FILE, client="pair")]

    pair = Format(name="pair", why_not=lambda subject: None, write=write)
    return [pair, *(replace(other, why_not=lambda subject: CANNOT_MERGE) for other in others)]


def pair_subject(model: FinishedModel) -> Subject:
    """Return the base weights, without the adapter, as the weights to release."""
    sam = model.segmenter.sam
    return Subject(tensors=base_tensors(sam), spec=sam.image_encoder.spec, image_size=model.segmenter.image_size)


@torch.inference_mode()
def pair_outputs(model: FinishedModel, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the outputs of the model with its adapter, under the names of a SAM's outputs."""
    return sam_outputs(model.segmenter.sam.eval(), probe)


def pair_client(path: Path, probe: Mapping[str, Tensor], options: Mapping[str, Any]) -> Outputs:
    """Load the release as ``predict`` does and compute the probe."""
    # read_model refuses files whose hashes are not those in the card.
    return pair_outputs(read_model(path.parent), probe), "samgraft: base weights with their adapter"
