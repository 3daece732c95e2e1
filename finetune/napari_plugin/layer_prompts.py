"""Boxes and points of napari layers as the prompts of a scan.

A layer of points or shapes has the columns ``class`` and, for points, ``inside`` among its features. Layers without
them mark the inside of the class that is chosen in the widget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.napari_plugin.scan_layers import LayerScan, layer_affine
from samgraft.finetune.prompting.prompt_file import FilePrompt, Frame, PromptFile
from samgraft.finetune.prompting.prompts import NEGATIVE, POSITIVE
from samgraft.shared.errors import UsageError
from samgraft.shared.scans.orientation import DISPLAY_AXES, native_grid, slice_plane

CLASS, INSIDE = "class", "inside"
"""Columns of the features of prompt layers."""
YES, NO = "yes", "no"
"""Values of the column ``inside``."""

Coordinates3 = npt.NDArray[np.float64]


def prompts_of_layers(
    layers: Sequence[Any], image: Any, opened: LayerScan, *, classes: ClassTable, class_name: str
) -> PromptFile:
    """Return the prompts that are drawn on an image layer, in voxels of its scan's file.

    Args:
        layers: Points and Shapes layers of napari.
        image: Image layer.
        opened: Scan of the image layer.
        classes: Classes of the model.
        class_name: Class of layers without a column for it.

    Raises:
        UsageError: If there is no prompt, a shape is no rectangle in a slice of the model, or a class is unknown.
        DataError: If the image layer is rotated against the viewer.
    """
    layer_affine(image)
    prompts: list[FilePrompt] = []
    for layer in layers:
        if layer.ndim != image.ndim:
            raise UsageError(
                f"prompts must have the {image.ndim} axes of the scan, got {layer.ndim}. Make the layer with the "
                "button for prompt layers.",
                where=layer.name,
            )
        names = _column(layer, CLASS, default=class_name)
        channels = [_channel(str(name), classes, where=layer.name) for name in names]
        is_points = hasattr(layer, "symbol")
        prompts += _points(layer, image, opened, channels) if is_points else _boxes(layer, image, opened, channels)
    if not prompts:
        raise UsageError("there is no prompt. Draw a box or set a point in a prompt layer.", where=image.name)
    return PromptFile(frame=Frame.VOXEL, prompts=tuple(prompts), sha256="", name=image.name)


def _points(layer: Any, image: Any, opened: LayerScan, channels: Sequence[int]) -> list[FilePrompt]:
    """Return one entry per class. Its points in one slice are one prompt."""
    points_ijk = _to_file(layer.data, layer, image, opened)
    labels = [NEGATIVE if value == NO else POSITIVE for value in _column(layer, INSIDE, default=YES)]
    found = []
    for channel in sorted(set(channels)):
        chosen = [place for place, one in enumerate(channels) if one == channel]
        found.append(
            FilePrompt(
                where=layer.name,
                case=None,
                channel=channel,
                points=points_ijk[chosen],
                labels=tuple(labels[place] for place in chosen),
            )
        )
    return found


def _boxes(layer: Any, image: Any, opened: LayerScan, channels: Sequence[int]) -> list[FilePrompt]:
    found = []
    axis = _slice_axis(opened)
    for number, (vertices, kind) in enumerate(zip(layer.data, layer.shape_type, strict=True)):
        where = f"{layer.name}, shape {number + 1}"
        if kind != "rectangle":
            raise UsageError(f"a box must be a rectangle (got {kind}). Draw it with the rectangle tool.", where=where)
        corners = _to_file(vertices, layer, image, opened)
        low, high = corners.min(axis=0), corners.max(axis=0)
        # A box that is flat along another axis would mark a line in each of the model's slices.
        if high[axis] - low[axis] > 0.5:
            plane = slice_plane(opened.scan.raw.affine, opened.scan.raw.array_ijk.shape).value
            raise UsageError(
                f"a box must be in one slice of the {plane} plane, in which the model segments, got a box through "
                f"{high[axis] - low[axis]:.0f} of them. Show that plane and draw it again.",
                where=where,
            )
        found.append(FilePrompt(where=where, case=None, channel=channels[number], corners=np.stack([low, high])))
    return found


def _slice_axis(opened: LayerScan) -> int:
    """Return the voxel axis of the file along which the model's slices are counted."""
    raw = opened.scan.raw
    across = DISPLAY_AXES[slice_plane(raw.affine, raw.array_ijk.shape)][2]
    opposite = {"S": "I", "P": "A", "L": "R"}[across]
    orientation = native_grid(raw.affine, raw.array_ijk.shape).orientation
    return next(axis for axis, code in enumerate(orientation) if code in {across, opposite})


def _to_file(coordinates: Any, layer: Any, image: Any, opened: LayerScan) -> Coordinates3:
    """Return coordinates of a prompt layer as voxels of the file, (N, 3)."""
    abc = [image.world_to_data(layer.data_to_world(one)) for one in np.asarray(coordinates, dtype=np.float64)]
    array = np.asarray(abc, dtype=np.float64).reshape(-1, image.ndim)
    if opened.is_picture:
        array = np.insert(array, 0, 0.0, axis=1)
    return np.asarray(array[:, np.argsort(opened.order)])


def _column(layer: Any, name: str, *, default: str) -> list[Any]:
    features = layer.features
    return list(features[name]) if name in features else [default] * len(layer.data)


def _channel(name: str, classes: ClassTable, *, where: str) -> int:
    if name not in classes.names:
        raise UsageError(
            f"class must be one of the model's, {', '.join(classes.names)}, got {name!r}. Change it in the features of "
            "the layer.",
            where=where,
        )
    return classes.names.index(name)
