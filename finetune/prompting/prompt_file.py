"""Prompts files with boxes and points in voxels or millimetres, checked before anything is segmented.

    version: 1
    coordinates: voxel          # voxel: i, j, k of the file, from 0; ras_mm or lps_mm: millimetres in the patient
    prompts:
      - case: scan01.nii.gz     # name that `predict` prints, with or without its ending; optional for a single scan
        class: lesion           # name or label id
        box: [[40, 52, 10], [61, 80, 17]]       # two opposite corners of a 3D box, or of a box in one slice
      - case: scan02.nii.gz
        class: lesion
        points: [[50, 60, 12], [44, 55, 12]]    # each point prompts the slice that contains it
        labels: [1, 0]                          # 1 inside (default), 0 outside

A box and points of one entry form one prompt per slice; the masks of several entries of a class are joined. The file is
YAML or JSON.

Rules for coordinates, which are continuous: voxel n reaches from n - 0.5 to n + 0.5, and the scan from -0.5 to its last
voxel + 0.5. A box contains the voxels whose centres are between its corners, borders included, or the voxel nearest to
its middle if there is none. A point is in the voxel around it, and in the higher one exactly between two.

Rule for negative points (label 0): they take area away from the other prompts of their class in their slice, whichever
entry those are in. Where a slice has nothing else for the class, they are left out with a note and segment nothing.

Letters: i, j, k = voxel axes of the file; x, y, z = columns, rows and slices of the model's input.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from samgraft.finetune.classes import ClassTable
from samgraft.finetune.prompting.prompts import NEGATIVE, POSITIVE
from samgraft.shared.counting import counted
from samgraft.shared.errors import UsageError
from samgraft.shared.files import file_sha256
from samgraft.shared.scans.readers.registry import format_by_suffix, scan_suffix
from samgraft.shared.settings import read_yaml

log = logging.getLogger(__name__)

VERSION = 1
MAX_PROMPTS = 10_000
FILE_KEYS = {"version", "coordinates", "prompts"}
PROMPT_KEYS = {"case", "class", "box", "points", "labels"}

Coordinates3 = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
OnNote = Callable[[str], None]


class Frame(Enum):
    """Coordinate system of a prompts file."""

    VOXEL = "voxel"
    RAS_MM = "ras_mm"
    LPS_MM = "lps_mm"


@dataclass(frozen=True, kw_only=True)
class FilePrompt:
    """Entry of a prompts file."""

    where: str
    """File and number of the entry, for messages."""
    case: str | None
    """Name of the scan, None for the only one."""
    channel: int
    """Index of the class, from 0."""
    corners: Coordinates3 | None = None
    """Opposite corners (2, 3) of the box."""
    points: Coordinates3 | None = None
    """Points (K, 3)."""
    labels: tuple[int, ...] = ()
    """Label of every point, 1 inside and 0 outside."""


@dataclass(frozen=True, kw_only=True)
class SlicePrompt:
    """Prompt for one class in one slice, in the slice's own pixels."""

    where: str
    """Origin of the prompt, for messages."""
    slice_index: int
    """Number of the slice, from 0."""
    channel: int
    """Index of the class, from 0."""
    box: Box | None = None
    """Box as x0, y0, x1, y1, with the pixels at both corners."""
    points: tuple[tuple[float, float], ...] = ()
    """Points as x, y."""
    labels: tuple[int, ...] = ()
    """Label of every point, 1 inside and 0 outside."""

    @property
    def is_negative(self) -> bool:
        """True without a box and without a point inside the object."""
        return self.box is None and POSITIVE not in self.labels


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts file, checked as far as possible without the scans."""

    frame: Frame
    prompts: tuple[FilePrompt, ...]
    sha256: str
    name: str

    def for_case(self, name: str) -> tuple[FilePrompt, ...]:
        """Return the prompts of a scan, after ``with_scan_names``."""
        return tuple(prompt for prompt in self.prompts if prompt.case == name)

    def with_scan_names(self, names: Sequence[str]) -> PromptFile:
        """Return the file with the full name of a scan as the case of every prompt.

        Args:
            names: Names of all scans. A case may leave out the ending of a file name. It is optional for a single scan.

        Raises:
            UsageError: For a case that is not among the scans, or fits several of them.
        """
        full = tuple(dataclasses.replace(one, case=_find_scan(one, names)) for one in self.prompts)
        return dataclasses.replace(self, prompts=full)


def read_prompts(path: Path, classes: ClassTable) -> PromptFile:
    """Read a prompts file strictly.

    Raises:
        UsageError: If it is not plain YAML or JSON, a key is unknown or missing, a class does not exist, or numbers do
            not have the right shape.
    """
    values = read_yaml(path)
    _check_keys(values, FILE_KEYS, what="a prompts file", where=path.name)
    if values.get("version") != VERSION or isinstance(values["version"], bool):
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
    on_note: OnNote = log.warning,
) -> list[SlicePrompt]:
    """Convert prompts of a scan to prompts of its slices.

    Args:
        prompts: Entries for one scan.
        frame: Coordinate system of their numbers.
        native_affine: Voxel (i, j, k) of the file to RAS+ mm.
        affine: Voxel (x, y, z) of the slices to RAS+ mm.
        shape_zyx: Number of slices, rows, columns.
        on_note: Called with a note about every slice whose points are all negative.

    Returns:
        Prompts sorted by slice, with the module's rule for negative points applied.

    Raises:
        UsageError: If a box or point is outside the scan, or a point is both inside and outside a class.
    """
    found: list[SlicePrompt] = []
    # Voxels of the file -> millimetres -> pixels of the slices. The model sees its slices in one plane and orientation,
    # the user counts voxels as the file stores them.
    to_xyz = np.linalg.inv(affine) @ _to_world(frame, native_affine)
    for prompt in prompts:
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
    return apply_negative_points(sorted(found, key=lambda one: one.slice_index), on_note=on_note)


def apply_negative_points(prompts: Iterable[SlicePrompt], *, on_note: OnNote = log.warning) -> list[SlicePrompt]:
    """Add entries of negative points to the other prompts of their slice and class.

    Args:
        prompts: Prompts of one scan.
        on_note: Called with a note about every slice whose points of a class are all negative; they are left out.

    Returns:
        Prompts that all have a box or a positive point.

    Raises:
        UsageError: If a point is both inside and outside a class.
    """
    # SAM predicts a mask around any point, also around a negative one alone. Such a point is therefore only used
    # together with a prompt that marks an object.
    groups: dict[tuple[int, int], list[SlicePrompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.slice_index, prompt.channel), []).append(prompt)
    found: list[SlicePrompt] = []
    for group in groups.values():
        _refuse_contradiction(group)
        negative = [prompt for prompt in group if prompt.is_negative]
        points = tuple(point for prompt in negative for point in prompt.points)
        marking = [prompt for prompt in group if not prompt.is_negative]
        if not marking:
            where, index = negative[0].where, negative[0].slice_index
            on_note(f"slice {index} has only negative points, it stays empty ({where}). Add a box or a positive point.")
        found += [
            dataclasses.replace(one, points=one.points + points, labels=one.labels + (NEGATIVE,) * len(points))
            for one in marking
        ]
    return found


def _refuse_contradiction(group: Sequence[SlicePrompt]) -> None:
    label_of: dict[tuple[float, float], int] = {}
    for prompt in group:
        for point, label in zip(prompt.points, prompt.labels, strict=True):
            if label_of.setdefault(point, label) != label:
                raise UsageError(
                    f"a point must be inside or outside a class, got both labels for column {point[0]:g}, row "
                    f"{point[1]:g} of slice {prompt.slice_index}. Delete one of them.",
                    where=prompt.where,
                )


def _find_scan(prompt: FilePrompt, names: Sequence[str]) -> str:
    if prompt.case is None:
        if len(names) != 1:
            raise UsageError(f"with {counted(len(names), 'scan')} every prompt must name its case.", where=prompt.where)
        return names[0]
    # The exact name comes first, because "a" may be the name of a series beside a file "a.nii".
    found = [name for name in names if name == prompt.case] or [n for n in names if _plain_name(n) == prompt.case]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"case {prompt.case!r} fits {counted(len(found), 'scan')} ({', '.join(found[:3])}). Write the name with "
            "its ending.",
            where=prompt.where,
        )
    close = difflib.get_close_matches(prompt.case, names, n=3, cutoff=0.5) or list(names)[:3]
    raise UsageError(
        f"a prompt must name a scan, got {prompt.case!r} for {counted(len(names), 'scan')}. Write the name that "
        f"predict prints, such as {', '.join(close)}.",
        where=prompt.where,
    )


def _plain_name(name: str) -> str:
    """Return the name of a scan without the ending of a file. A series has none."""
    return name[: -len(scan_suffix(name))] if format_by_suffix(Path(name)) else name


def _prompt(entry: Any, classes: ClassTable, *, where: str) -> FilePrompt:
    if not isinstance(entry, dict):
        raise UsageError("a prompt must consist of keys and values.", where=where)
    _check_keys(entry, PROMPT_KEYS, what="a prompt", where=where)
    if "box" not in entry and "points" not in entry:
        raise UsageError("a prompt must have a box or points.", where=where)
    if "labels" in entry and "points" not in entry:
        raise UsageError("labels belong to points, there are none.", where=where)
    case = entry.get("case")
    if case is not None and not isinstance(case, str):
        raise UsageError(f"case must be a name, got {case!r}. Put it in quotes.", where=where)
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


def _check_keys(values: Mapping[str, Any], known: set[str], *, what: str, where: str) -> None:
    if unknown := sorted(set(map(str, values)) - known):
        raise UsageError(f"{what} must have keys among {', '.join(sorted(known))}, got {unknown[0]!r}.", where=where)


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
        return (POSITIVE,) * len(points)
    good = isinstance(labels, list) and all(label in (0, 1) and not isinstance(label, bool) for label in labels)
    if not good or len(labels) != len(points):
        raise UsageError(f"labels must be {len(points)} times 1 (inside) or 0 (outside), got {labels!r}.", where=where)
    return tuple(int(label) for label in labels)


def _numbers(values: Any, *, rows: int | None, what: str, where: str) -> Coordinates3:
    """Check the numbers of a box or of points and return them as (rows, 3)."""
    # NumPy would convert texts and booleans, and 1e400 to infinity: types are checked first.
    good = isinstance(values, list) and len(values) >= 1 and (rows is None or len(values) == rows)
    good = good and all(
        isinstance(row, list) and len(row) == 3 and all(type(v) in (int, float) for v in row) for row in values
    )
    shape = f"{rows or 'a list of'} triples of numbers"
    if not good:
        raise UsageError(f"{what} must be {shape}, got {reprlib.repr(values)}.", where=where)
    try:
        array = np.asarray(values, dtype=np.float64)
    except OverflowError:
        array = np.full((1, 3), np.inf)
    if not np.isfinite(array).all():
        raise UsageError(f"{what} must be {shape} that are finite, got {reprlib.repr(values)}.", where=where)
    return array


def _to_world(frame: Frame, native_affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if frame is Frame.VOXEL:
        return native_affine
    return np.diag([-1.0, -1.0, 1.0, 1.0]) if frame is Frame.LPS_MM else np.eye(4)


def _boxes(prompt: FilePrompt, to_xyz: npt.NDArray[np.float64], shape_zyx: tuple[int, int, int]) -> dict[int, Box]:
    if prompt.corners is None:
        return {}
    # In millimetres of an oblique scan the box is rotated. A slice can only have the hull of its eight corners.
    eight = np.array(list(product(*prompt.corners.T)))
    xyz = _transform(eight, to_xyz)
    low, high = xyz.min(axis=0), xyz.max(axis=0)
    last = _check_inside(
        np.stack([low, high]), shape_zyx, what="a box", written=[prompt.corners] * 2, where=prompt.where
    )
    first_voxel, last_voxel = np.ceil(low), np.floor(high)
    nearest = _voxel_of((low + high) / 2)
    has_center = first_voxel <= last_voxel
    x0, y0, z0 = np.clip(np.where(has_center, first_voxel, nearest), 0, last).tolist()
    x1, y1, z1 = np.clip(np.where(has_center, last_voxel, nearest), 0, last).tolist()
    return dict.fromkeys(range(int(z0), int(z1) + 1), (x0, y0, x1, y1))


def _points(
    prompt: FilePrompt, to_xyz: npt.NDArray[np.float64], shape_zyx: tuple[int, int, int]
) -> dict[int, tuple[tuple[tuple[float, float], ...], tuple[int, ...]]]:
    if prompt.points is None:
        return {}
    xyz = _transform(prompt.points, to_xyz)
    _check_inside(xyz, shape_zyx, what="a point", written=list(prompt.points), where=prompt.where)
    slices = np.clip(_voxel_of(xyz[:, 2]), 0, shape_zyx[0] - 1).astype(int).tolist()
    by_slice: dict[int, list[tuple[tuple[float, float], int]]] = {}
    for (x, y, _), index, label in zip(xyz.tolist(), slices, prompt.labels, strict=True):
        by_slice.setdefault(index, []).append(((x, y), label))
    return {index: (tuple(p for p, _ in pairs), tuple(n for _, n in pairs)) for index, pairs in by_slice.items()}


def _voxel_of(coordinates: Coordinates3) -> Coordinates3:
    """Return the voxel around every coordinate, the higher one exactly between two."""
    # numpy.round takes the even neighbour, which would put 0.5 and 1.5 into voxels 0 and 2.
    return np.asarray(np.floor(coordinates + 0.5), dtype=np.float64)


def _transform(points: Coordinates3, matrix: npt.NDArray[np.float64]) -> Coordinates3:
    moved = points @ matrix[:3, :3].T + matrix[:3, 3]
    # Differences of a millionth of a voxel are rounding errors of the affine; + 0.0 turns -0.0 into 0.0.
    return np.asarray(np.round(moved, 6) + 0.0)


def _check_inside(
    xyz: Coordinates3, shape_zyx: tuple[int, int, int], *, what: str, written: Sequence[Any], where: str
) -> Coordinates3:
    """Refuse coordinates outside the scan, showing the numbers ``written`` for them, and return its last voxel."""
    last = np.asarray(shape_zyx[::-1], dtype=np.float64) - 1
    # Written so that NaN, the difference of two huge numbers, is outside too.
    outside = ~((xyz >= -0.5) & (xyz <= last + 0.5)).all(axis=1)
    if outside.any():
        worst = int(outside.argmax())
        size = " x ".join(str(n) for n in shape_zyx[::-1])
        column, row, index = (f"{v:g}" for v in xyz[worst])
        raise UsageError(
            f"{what} must be inside the scan of {size} voxels (columns, rows, slices of the model's input), got "
            f"{written[worst].tolist()}, which is column {column}, row {row} of slice {index}. Check the numbers and "
            "coordinates: voxel, ras_mm or lps_mm.",
            where=where,
        )
    return last
