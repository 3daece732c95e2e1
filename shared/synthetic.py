"""Synthetic scans with a label, to try a command or rehearse a study without any data.

Each is an ellipsoid with texture and noise in air, and with a brighter lesion in it. They are easy on purpose, so
their scores show that the software works, and nothing about a method.

Axis letters: Z, Y, X = slices, rows, columns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from samgraft.shared.errors import SamgraftError
from samgraft.shared.samples.split import default_split_path, make_split
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore

Array = npt.NDArray[Any]
SALT = "samgraft-synthetic"
"""Salt of the ids. It may be public, because the scans are of no person, and it makes fingerprints reproducible."""
SHAPE_ZYX = (8, 64, 56)
SPACING_ZYX_MM = (5.0, 1.5, 1.5)
FRACTIONS = (0.4, 0.2, 0.4)
"""Fractions of train, val and test. The test part is large, because a confidence interval needs six patients."""


def synthetic_scan(seed: int, *, shape_zyx: tuple[int, int, int] = SHAPE_ZYX) -> tuple[Array, Array]:
    """Return an int16 scan and the uint8 label of its lesion, both (Z, Y, X)."""
    # A stream of its own, so that a scan of number n shares no random numbers with a split or run of seed n.
    rng = np.random.default_rng([seed, 17])
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    head = (z / 1.5) ** 2 + (y / rng.uniform(0.75, 0.9)) ** 2 + (x / rng.uniform(0.65, 0.85)) ** 2 < 1
    centre, radii = rng.uniform(-0.3, 0.3, size=3), rng.uniform((0.4, 0.15, 0.15), (0.8, 0.35, 0.35))
    lesion = sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radii, strict=True)) < 1
    lesion &= head
    texture = 60 * np.sin(5 * x + seed) * np.cos(4 * y + 0.7 * seed)
    noise = rng.normal(0, 25, size=shape_zyx)
    image = head * (400 + texture) + lesion * rng.uniform(150, 350) + np.abs(noise)
    return image.round().astype(np.int16), lesion.astype(np.uint8)


def synthetic_store(out: Path, *, num_patients: int) -> Path:
    """Build a labelled store and its split, unless a complete one exists. Return its path."""
    if not _is_complete(out, num_patients):
        _build(out, num_patients)
    split = default_split_path(out)
    if not split.is_file():
        make_split(SliceStore.open(out), fractions=FRACTIONS).save(split)
    return out


def _is_complete(out: Path, num_patients: int) -> bool:
    try:
        return len(SliceStore.open(out).series) == num_patients
    except SamgraftError:
        return False


def _build(out: Path, num_patients: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        cases = [_case(Path(scratch), number) for number in range(num_patients)]
        build_store(
            cases,
            out=out,
            settings=BuildSettings(modality=Modality.MRI, salt=SALT),
            label_names={1: "lesion"},
            intensity=load_preset(Modality.MRI).intensity,
            overwrite=True,
        )


def _case(folder: Path, number: int) -> SourceCase:
    image, label = synthetic_scan(number)
    name = f"synthetic{number:03d}"
    scan, truth = (_nifti(folder / f"{name}{part}.nii", array) for part, array in (("", image), ("_label", label)))
    return SourceCase(name=name, patient_key=name, scan=scan, labels=(LabelFiles(scan=truth, ids={1: 1}),))


def _nifti(path: Path, array_zyx: Array) -> ScanFiles:
    z_mm, y_mm, x_mm = SPACING_ZYX_MM
    affine = np.diag([-x_mm, -y_mm, z_mm, 1.0])
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array_zyx.transpose(2, 1, 0)), affine), path)
    return ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name)
