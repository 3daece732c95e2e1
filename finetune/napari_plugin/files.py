"""Reader and writer for napari's menus, with the readers and writers of ``samgraft predict``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from samgraft.finetune.napari_plugin.scan_layers import (
    LayerData,
    image_layer,
    label_map_layer,
    masks_of_layer,
    open_scan,
)
from samgraft.finetune.prediction.loaded_model import Segmentation, read_one_scan
from samgraft.shared.invocation import called_from_python
from samgraft.shared.scans.case import is_label_map
from samgraft.shared.scans.readers.registry import scan_stem


def scan_reader(path: str | list[str]) -> Callable[[str], list[LayerData]] | None:
    """Return the function that reads a path as one scan, or None for several paths."""
    return read_scan_layers if isinstance(path, str) else None


def read_scan_layers(path: str) -> list[LayerData]:
    """Read a scan file or the folder of a DICOM series as an image layer, and a label map as a labels layer.

    Raises:
        DataError: If there is not one readable scan.
    """
    with called_from_python():
        opened = open_scan(read_one_scan(Path(path)))
    name = scan_stem(path)
    values = opened.scan.raw.array_ijk
    if values.dtype.kind in "iu" and is_label_map(values):
        return [label_map_layer(opened, name=name)]
    return [image_layer(opened, name=name)]


def save_labels(path: str, data: Any, arguments: dict[str, Any]) -> list[str]:
    """Write a labels layer as ``.nii.gz`` or ``.seg.nrrd`` on the grid of its scan's file.

    Raises:
        UsageError: If the layer has no scan.
        StorageError: If the file cannot be written.
    """
    with called_from_python():
        masks = masks_of_layer(data, arguments)
        return [str(Segmentation(masks=masks, notes=()).save(path))]
