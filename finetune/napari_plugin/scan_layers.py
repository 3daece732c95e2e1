"""Scans as napari layers, and layers as scans.

The viewer's axes are superior, posterior and left in mm, which is ITK's LPS in the order z, y, x. Slices then appear as
on a radiologist's screen, and the view in 3D is not mirrored.

Letters: i, j, k = voxel axes of the scan's file; a, b, c = axes of a layer's array.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prediction.loaded_model import ReadScan, Segmentation
from samgraft.finetune.prediction.prediction_files import COLORS, NativeMasks
from samgraft.shared.errors import DataError, UsageError
from samgraft.shared.scans.orientation import affine_of_axes, voxel_sizes
from samgraft.shared.scans.readers.images import gray_of_color
from samgraft.shared.scans.readers.nifti import scan_of_array
from samgraft.shared.scans.volume import Array

METADATA = "samgraft"
"""Key of this plugin in the metadata of a layer."""
VIEWER_AXES = "SPL"
"""Directions in which the viewer's axes grow."""

LayerData = tuple[Any, dict[str, Any], str]
"""Data, arguments and type of a layer, as napari's readers return them."""


@dataclass(frozen=True, kw_only=True)
class LayerScan:
    """Scan behind a layer."""

    scan: ReadScan
    order: tuple[int, int, int]
    """Voxel axis of the file that each axis of the layer's array is."""
    classes: ClassTable | None = None
    """Classes of a labels layer."""
    is_picture: bool = False
    """True if the layer has two axes, and the scan one slice."""

    @property
    def shape_abc(self) -> tuple[int, ...]:
        """Shape of the layer's array."""
        return self.to_layer(self.scan.raw.array_ijk).shape

    def to_file(self, array_abc: Array) -> Array:
        """Return an array of the layer on the axes of the file."""
        return (array_abc[None] if self.is_picture else array_abc).transpose(tuple(np.argsort(self.order).tolist()))

    def to_layer(self, array_ijk: Array) -> Array:
        """Return an array of the file on the axes of the layer."""
        array_abc = array_ijk.transpose(self.order)
        return array_abc[0] if self.is_picture else array_abc


def open_scan(scan: ReadScan) -> LayerScan:
    """Return a scan with the order of axes in which napari shows its slices."""
    # World axis (0 = left-right, 1 = back-front, 2 = foot-head) that each voxel axis is closest to. napari slices along
    # an axis of the array only, so that the axes are put into the order of the viewer's.
    world = nib.io_orientation(scan.raw.affine)[:, 0].tolist()
    return LayerScan(scan=scan, order=(world.index(2), world.index(1), world.index(0)))


def placement(opened: LayerScan) -> dict[str, Any]:
    """Return scale and translation of a layer, in mm along the viewer's axes.

    napari does not slice along oblique axes and would show other voxels than those that are clicked. An oblique scan
    is shown along its own axes, with its middle where it is in the patient.
    """
    affine = opened.scan.raw.affine
    # RAS+ to the viewer's axes.
    directions = np.linalg.inv(affine_of_axes(VIEWER_AXES, (1, 1, 1)))[:3, :3] @ affine[:3, :3]
    order = list(opened.order)
    scale = voxel_sizes(affine)[order] * np.sign(np.diagonal(directions[:, order]))
    middle_ijk = (np.asarray(opened.scan.raw.array_ijk.shape) - 1) / 2
    middle = directions @ middle_ijk + np.linalg.inv(affine_of_axes(VIEWER_AXES, (1, 1, 1)))[:3, :3] @ affine[:3, 3]
    return {"scale": scale, "translate": middle - scale * middle_ijk[order]}


def image_layer(opened: LayerScan, *, name: str) -> LayerData:
    """Return a scan as an image layer."""
    data = opened.to_layer(opened.scan.raw.array_ijk)
    return data, {"name": name, "metadata": {METADATA: opened}, **placement(opened)}, "image"


def label_map_layer(opened: LayerScan, *, name: str) -> LayerData:
    """Return a label map that was read from a file as a labels layer, whose classes are its ids."""
    values = opened.scan.raw.array_ijk
    ids = tuple(int(value) for value in np.unique(values) if value != 0)
    classes = ClassTable(ids=ids, names=tuple(f"label {label}" for label in ids))
    return _labels_layer(values, opened, classes, {"name": name, **placement(opened)})


def segmentation_layers(
    segmentation: Segmentation, opened: LayerScan, *, name: str, placed: dict[str, Any]
) -> list[LayerData]:
    """Return a segmentation as labels layers, one per class where classes overlap.

    Args:
        segmentation: Result for the scan of ``opened``.
        opened: Scan of the image layer.
        name: Name of the image layer.
        placed: Arguments by which the image layer is placed in the viewer.
    """
    masks = segmentation.masks
    if not masks.classes.is_overlapping:
        return [_labels_layer(masks.labels_ijk, opened, masks.classes, {"name": f"{name} labels", **placed})]
    layers = []
    for channel, class_name in enumerate(masks.classes.names):
        one = masks.single(channel)
        layers.append(_labels_layer(one.labels_ijk, opened, one.classes, {"name": f"{name} {class_name}", **placed}))
    return layers


def _labels_layer(labels_ijk: Array, opened: LayerScan, classes: ClassTable, arguments: dict[str, Any]) -> LayerData:
    colors: dict[int | None, Any] = {None: (0.5, 0.5, 0.5, 1.0), 0: (0.0, 0.0, 0.0, 0.0)}
    for number, label in enumerate(classes.ids):
        colors[label] = (*(value / 255 for value in COLORS[number % len(COLORS)]), 1.0)
    # The status bar shows the row of the label under the mouse.
    features = {"index": [0, *classes.ids], "class": ["background", *classes.names]}
    metadata = {METADATA: replace(opened, classes=classes)}
    data = np.ascontiguousarray(opened.to_layer(labels_ijk).astype(np.int32))
    return data, {"features": features, "colormap": colors, "metadata": metadata, **arguments}, "labels"


def scan_of_layer(layer: Any, *, axes: str) -> LayerScan:
    """Return the scan of an image layer, with the voxels that the layer has now.

    Args:
        layer: Image layer of napari.
        axes: Directions in which the viewer's axes grow, such as ``SPL``; only for a layer that another reader opened.

    Raises:
        UsageError: If the layer has no orientation and ``axes`` is empty.
        DataError: If it is not one gray scan, or its axes are not those of the viewer.
    """
    values = np.asarray(layer.data[0] if layer.multiscale else layer.data)
    opened = layer.metadata.get(METADATA)
    if isinstance(opened, LayerScan) and values.shape == opened.shape_abc:
        raw = replace(opened.scan.raw, array_ijk=opened.to_file(values))
        return replace(opened, scan=replace(opened.scan, raw=raw))
    if layer.rgb:
        values = gray_of_color(values, where=layer.name, notes=set())
    is_picture = values.ndim == 2
    values = values[None] if is_picture else values
    if values.ndim != 3:
        raise DataError(
            f"a scan must have three axes, or two for a picture, got shape {values.shape}. Split the layer into "
            "volumes first.",
            where=layer.name,
        )
    if not axes.strip():
        raise UsageError(
            "the layer was not opened by samgraft and has no orientation. Enter the directions in which its axes grow, "
            f"such as {VIEWER_AXES} for axial slices with the lowest first.",
            where=layer.name,
        )
    raw = scan_of_array(values, affine_of_axes(axes.strip(), (1, 1, 1)) @ layer_affine(layer), where=layer.name)
    return LayerScan(scan=ReadScan.in_memory(raw, name=layer.name), order=(0, 1, 2), is_picture=is_picture)


def layer_affine(layer: Any) -> npt.NDArray[np.float64]:
    """Return the map from an array's voxel to mm along the viewer's axes, 4x4. A picture has one slice of 1 mm.

    Raises:
        DataError: If the layer is rotated against the viewer, so that other voxels are shown than are clicked.
    """
    num_axes = layer.ndim
    origin = np.asarray(layer.data_to_world(np.zeros(num_axes)), dtype=np.float64)
    columns = [np.asarray(layer.data_to_world(unit), dtype=np.float64) - origin for unit in np.eye(num_axes)]
    matrix = np.stack(columns, axis=1)
    if not np.allclose(matrix, np.diag(np.diagonal(matrix)), atol=1e-3 * np.abs(matrix).max()):
        raise DataError(
            "the layer is rotated against the axes of the viewer. Open its file with samgraft instead.",
            where=layer.name,
        )
    affine = np.eye(4)
    millimetres = np.asarray([_millimetres(unit) for unit in layer.units])
    affine[3 - num_axes : 3, 3 - num_axes : 3] = matrix * millimetres
    affine[3 - num_axes : 3, 3] = origin * millimetres
    return affine


def _millimetres(unit: Any) -> float:
    """Return the millimetres of a unit of napari, whose default is a pixel without a size."""
    quantity = 1 * unit
    return float(quantity.to("mm").magnitude) if quantity.check("[length]") else 1.0


def masks_of_layer(data: Any, arguments: dict[str, Any]) -> NativeMasks:
    """Return a labels layer on the grid of its scan's file.

    Args:
        data: Array of the layer.
        arguments: Arguments of the layer, as napari's writers get them.

    Raises:
        UsageError: If the layer is not of this plugin, or its shape was changed.
    """
    opened = arguments.get("metadata", {}).get(METADATA)
    labels_abc = np.asarray(data)
    if not isinstance(opened, LayerScan) or labels_abc.shape != opened.shape_abc:
        raise UsageError(
            "the labels layer has no scan of its own. Segment a scan with samgraft and correct that layer, or save "
            "this one with another plugin.",
            where=arguments.get("name"),
        )
    if labels_abc.min() < 0:
        raise UsageError(f"labels must not be negative, got {labels_abc.min()}.", where=arguments.get("name"))
    ids, names = (opened.classes.ids, opened.classes.names) if opened.classes else ((), ())
    # Somebody may have painted with a label that no class has.
    added = [int(value) for value in np.unique(labels_abc) if value != 0 and value not in ids]
    if not ids and not added:
        raise UsageError("the labels layer is empty. Paint a label first.", where=arguments.get("name"))
    return NativeMasks(
        labels_ijk=opened.to_file(labels_abc),
        affine=np.asarray(opened.scan.raw.affine, dtype=np.float64),
        classes=ClassTable(ids=(*ids, *added), names=(*names, *(f"label {label}" for label in added))),
        form_codes=opened.scan.form_codes,
    )
