"""Stores, models and weights, opened for use in Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from samgraft.api.calls import as_call

if TYPE_CHECKING:
    from samgraft.finetune.prediction.loaded_model import LoadedModel
    from samgraft.shared.encoders.base import ImageEncoder
    from samgraft.shared.store.store import SliceStore
    from segment_anything.modeling import Sam


@as_call
def open_store(path: Path | str) -> SliceStore:
    """Open a complete slice store.

    Args:
        path: Folder or address such as ``s3://bucket/NAME.zarr``.

    Raises:
        DataError: If it is not a complete store.
    """
    from samgraft.shared.store.store import SliceStore

    return SliceStore.open(path)


@as_call
def load(
    path: Path | str,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    flips: bool = False,
    postprocessing: bool = True,
) -> LoadedModel:
    """Load a finished run or a release, to segment scans with its ``predict``.

    Args:
        path: Finished stage-2 run or release.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``bf16`` or ``fp32``.
        batch_size: Slices per forward pass; None takes 1 on a CPU and 8 on a GPU.
        flips: Average over mirrored slices, which takes four times as long.
        postprocessing: Apply the post-processing that was chosen on validation, if any.

    Raises:
        WeightsError: If there is no finished model, or its weights are not those of its card.
    """
    from samgraft.finetune.prediction.loaded_model import LoadedModel
    from samgraft.finetune.prediction.predictor import Predictor

    predictor = Predictor(
        path, device=device, precision=precision, batch_size=batch_size, flips=flips, postprocess=postprocessing
    )
    return LoadedModel(predictor)


@as_call
def load_sam(path: Path | str, *, image_size: int | None = None) -> Sam:
    """Load a whole SAM of any known layout, under segment_anything's names and in eval mode.

    Args:
        path: Weights file, finished run or release, or the name of official weights such as ``sam_vit_b``.
        image_size: Side of the square input in pixels; None takes that of the file.

    Raises:
        WeightsError: If the file is damaged, incomplete or of a foreign family.
    """
    from samgraft.shared.weights.load import load_sam as load_from_file

    return load_from_file(path, image_size=image_size)


@as_call
def load_encoder(path: Path | str, *, image_size: int | None = None, base: Path | str | None = None) -> ImageEncoder:
    """Load an image encoder of any known layout in eval mode.

    Args:
        path: Weights file, run of stage 1, or the name of official weights.
        image_size: Side of the square input in pixels; None takes that of the file.
        base: Base SAM weights for a plain ViT, which has neither relative positions nor a neck.

    Raises:
        WeightsError: If the file is damaged, incomplete or of a foreign family.
    """
    from samgraft.shared.weights.load import load_image_encoder

    encoder, _ = load_image_encoder(path, image_size=image_size, base=base)
    return encoder
