"""Prompts from a file: boxes and points in a scan's own voxels or in millimetres, checked before anything is segmented.

    version: 1
    coordinates: voxel          # voxel: i, j, k of the file, from 0; ras_mm or lps_mm: millimetres in the patient
    prompts:
      - case: scan01.nii.gz     # as `predict` names it; may be left out when there is one scan
        class: lesion           # name or label id
        box: [[40, 52, 10], [61, 80, 17]]       # two opposite corners, both inside: one 3D box, or one slice of it
      - case: scan02.nii.gz
        class: lesion
        points: [[50, 60, 12], [44, 55, 12]]    # each prompts the slice that it lies in
        labels: [1, 0]                          # 1 inside (default), 0 outside

A box and points of one entry prompt together; entries of one class add up. YAML or JSON.

Letters: i, j, k = voxel axes of the file; x, y, z = columns, rows and slices as the model sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.shared.config import read_yaml
from samgraft.shared.errors import UsageError
from samgraft.shared.files import file_sha256

VERSION = 1
MAX_PROMPTS = 10_000
FILE_KEYS = {"version", "coordinates", "prompts"}
PROMPT_KEYS = {"case", "class", "box", "points", "labels"}

Coordinates3 = npt.NDArray[np.float64]


class Frame(Enum):
    """What the numbers of a prompts file count."""

    VOXEL = "voxel"
    RAS_MM = "ras_mm"
    LPS_MM = "lps_mm"


@dataclass(frozen=True, kw_only=True)
class FilePrompt:
    """One entry of a prompts file."""

    where: str
    case: str | None
    channel: int
    """Class, counted from 0."""
    corners: Coordinates3 | None = None
    """(2, 3)."""
    points: Coordinates3 | None = None
    """(K, 3)."""
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SlicePrompt:
    """What prompts one object in one slice, in the slice's own pixels."""

    where: str
    slice_index: int
    channel: int
    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1; both corners inside."""
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A prompts file, read and checked as far as it can be without the scans."""

    frame: Frame
    prompts: tuple[FilePrompt, ...]
    sha256: str
    name: str

    def for_case(self, name: str, *, is_only: bool) -> tuple[FilePrompt, ...]:
        """Return the prompts of a scan; entries without a case belong to the only one."""
        return tuple(p for p in self.prompts if p.case == name or (p.case is None and is_only))

    def refuse_strangers(self, names: Sequence[str]) -> None:
        """Refuse cases that are not among the scans, and entries without case where there are several.

        Raises:
            UsageError: With the first of them.
        """
        for prompt in self.prompts:
            if prompt.case is None and len(names) != 1:
                raise UsageError(f"with {len(names)} scans every prompt must name its case.", where=prompt.where)
            if prompt.case is not None and prompt.case not in names:
                shown = ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise UsageError(
                    f"a prompt must name one of the scans, got {prompt.case!r}; there are {shown}.", where=prompt.where
                )


def read_prompts(path: Path, classes: ClassTable) -> PromptFile:
    """Read a prompts file strictly.

    Raises:
        UsageError: If it is not plain YAML or JSON, a key is unknown or missing, a class does not exist, or numbers do
            not have the right shape.
    """
    values = read_yaml(path)
    if strangers := sorted(set(values) - FILE_KEYS):
        raise UsageError(
            f"a prompts file must have the keys {_listed(FILE_KEYS)}, got {strangers[0]!r}.", where=path.name
        )
    if values.get("version") != VERSION:
        raise UsageError(
            f"a prompts file must have version: {VERSION}, got {values.get('version')!r}.", where=path.name
        )
    try:
        frame = Frame(values.get("coordinates"))
    except ValueError as err:
        raise UsageError(
            f"coordinates must be one of {', '.join(f.value for f in Frame)}, got {values.get('coordinates')!r}.",
            where=path.name,
        ) from err
    entries = values.get("prompts")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_PROMPTS:
        raise UsageError(f"prompts must be a list of 1 to {MAX_PROMPTS} entries.", where=path.name)
    prompts = tuple(
        _prompt(entry, classes, where=f"{path.name}, prompt {number}") for number, entry in enumerate(entries, start=1)
    )
    return PromptFile(frame=frame, prompts=prompts, sha256=file_sha256(path), name=path.name)


def slice_prompts(
    prompts: Sequence[FilePrompt],
    frame: Frame,
    *,
    native_affine: npt.NDArray[np.float64],
    affine: npt.NDArray[np.float64],
    shape_zyx: tuple[int, int, int],
) -> list[SlicePrompt]:
    """Bring prompts to the slices that the model sees.

    Args:
        prompts: Of one scan.
        frame: What their numbers count.
        native_affine: Voxel (i, j, k) of the file to RAS+ mm.
        affine: Voxel (x, y, z) of the slices to RAS+ mm.
        shape_zyx: Slices, rows, columns.

    Returns:
        One per entry and slice, sorted by slice.

    Raises:
        UsageError: If a box or point lies outside the scan.
    """
    found: list[SlicePrompt] = []
    for prompt in prompts:
        to_xyz = np.linalg.inv(affine) @ _to_world(frame, native_affine)
        boxes = _boxes(prompt, to_xyz, shape_zyx)
        points = _points(prompt, to_xyz, shape_zyx)
        for index in sorted(set(boxes) | set(points)):
            coordinates, labels = points.get(index, ((), ()))
            found.append(
                SlicePrompt(
                    where=prompt.where,
                    slice_index=index,
                    channel=prompt.channel,
                    box=boxes.get(index),
                    points=coordinates,
                    labels=labels,
                )
            )
    return sorted(found, key=lambda one: one.slice_index)


def _prompt(entry: Any, classes: ClassTable, *, where: str) -> FilePrompt:
    if not isinstance(entry, dict):
        raise UsageError("a prompt must hold keys and values.", where=where)
    if strangers := sorted(set(map(str, entry)) - PROMPT_KEYS):
        raise UsageError(f"a prompt must have keys among {_listed(PROMPT_KEYS)}, got {strangers[0]!r}.", where=where)
    if "box" not in entry and "points" not in entry:
        raise UsageError("a prompt must have a box or points.", where=where)
    if "labels" in entry and "points" not in entry:
        raise UsageError("labels belong to points, there are none.", where=where)
    case = entry.get("case")
    if case is not None and not isinstance(case, str):
        raise UsageError(f"case must be a name, got {case!r}.", where=where)
    corners = _numbers(entry["box"], rows=2, what="box", where=where) if "box" in entry else None
    points = _numbers(entry["points"], rows=None, what="points", where=where) if "points" in entry else None
    return FilePrompt(
        where=where,
        case=case,
        channel=_channel(entry, classes, where=where),
        corners=corners,
        points=points,
        labels=_labels(entry.get("labels"), points, where=where),
    )


def _channel(entry: Mapping[str, Any], classes: ClassTable, *, where: str) -> int:
    wanted = entry.get("class")
    if wanted is None and classes.num_classes == 1:
        return 0
    if isinstance(wanted, str) and wanted in classes.names:
        return classes.names.index(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted in classes.ids:
        return classes.ids.index(wanted)
    known = ", ".join(f"{name} ({label})" for label, name in zip(classes.ids, classes.names, strict=True))
    raise UsageError(f"class must be one of the model's, {known}, got {wanted!r}.", where=where)


def _labels(labels: Any, points: Coordinates3 | None, *, where: str) -> tuple[int, ...]:
    if points is None:
        return ()
    if labels is None:
        return (1,) * len(points)
    good = isinstance(labels, list) and all(label in (0, 1) and not isinstance(label, bool) for label in labels)
    if not good or len(labels) != len(points):
        raise UsageError(f"labels must be {len(points)} times 1 (inside) or 0 (outside), got {labels!r}.", where=where)
    return tuple(int(label) for label in labels)


def _numbers(values: Any, *, rows: int | None, what: str, where: str) -> Coordinates3:
    shape = f"{rows or 'a list of'} triples of numbers"
    try:
        array = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as err:
        raise UsageError(f"{what} must be {shape}, got {values!r}.", where=where) from err
    if array.ndim != 2 or array.shape[1] != 3 or len(array) == 0 or (rows and len(array) != rows):
        raise UsageError(f"{what} must be {shape}, got shape {array.shape}.", where=where)
    if not np.isfinite(array).all():
        raise UsageError(f"{what} must be finite numbers.", where=where)
    return array


def _to_world(frame: Frame, native_affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if frame is Frame.VOXEL:
        return native_affine
    return np.diag([-1.0, -1.0, 1.0, 1.0]) if frame is Frame.LPS_MM else np.eye(4)


def _boxes(
    prompt: FilePrompt, to_xyz: npt.NDArray[np.float64], shape_zyx: tuple[int, int, int]
) -> dict[int, tuple[float, float, float, float]]:
    if prompt.corners is None:
        return {}
    # All eight corners: in millimetres of an oblique scan the box is turned, and its hull is what a slice can have.
    eight = np.array(list(product(*prompt.corners.T)))
    xyz = _transform(eight, to_xyz)
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    _check_inside(np.stack([low, high]), shape_zyx, what="a box", where=prompt.where)
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    return dict.fromkeys(range(round(float(low[2])), round(float(high[2])) + 1), box)


def _points(
    prompt: FilePrompt, to_xyz: npt.NDArray[np.float64], shape_zyx: tuple[int, int, int]
) -> dict[int, tuple[tuple[tuple[float, float], ...], tuple[int, ...]]]:
    if prompt.points is None:
        return {}
    xyz = _transform(prompt.points, to_xyz)
    _check_inside(xyz, shape_zyx, what="a point", where=prompt.where)
    by_slice: dict[int, list[tuple[tuple[float, float], int]]] = {}
    for (x, y, z), label in zip(xyz.tolist(), prompt.labels, strict=True):
        by_slice.setdefault(round(z), []).append(((x, y), label))
    return {index: (tuple(p for p, _ in pairs), tuple(n for _, n in pairs)) for index, pairs in by_slice.items()}


def _transform(points: Coordinates3, matrix: npt.NDArray[np.float64]) -> Coordinates3:
    moved = points @ matrix[:3, :3].T + matrix[:3, 3]
    # A millionth of a voxel is rounding of the affine, not a place outside.
    return np.asarray(np.round(moved, 6) + 0.0)


def _check_inside(xyz: Coordinates3, shape_zyx: tuple[int, int, int], *, what: str, where: str) -> None:
    last = np.asarray(shape_zyx[::-1], dtype=np.float64) - 1
    if (xyz < 0).any() or (xyz > last).any():
        size = " x ".join(str(n) for n in shape_zyx[::-1])
        worst = xyz[((xyz < 0) | (xyz > last)).any(axis=1)][0]
        raise UsageError(
            f"{what} must lie inside the scan of {size} voxels (columns, rows, slices as the model sees them), got "
            f"{', '.join(f'{v:g}' for v in worst)}. Check coordinates: voxel, ras_mm or lps_mm.",
            where=where,
        )


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys))
