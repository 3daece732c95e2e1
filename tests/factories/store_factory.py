"""Small stores of deterministic scans, in which a bright ellipsoid is the label."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.intensity import IntensityPreset
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings


def make_scan(*, shape_zyx=(6, 32, 32), seed=0):
    """Return an int16 scan (Z, H, W) with air around a head and a brighter lesion, and the lesion's label."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape_zyx), indexing="ij")
    head = (z / 1.6) ** 2 + (y / 0.85) ** 2 + (x / 0.75) ** 2 < 1
    center = rng.uniform(-0.3, 0.3, size=3)
    lesion = ((z - center[0]) / 0.7) ** 2 + ((y - center[1]) / 0.3) ** 2 + ((x - center[2]) / 0.3) ** 2 < 1
    lesion &= head
    image = rng.integers(0, 12, size=shape_zyx)
    texture = 60 * np.sin(5 * x + seed) * np.cos(4 * y)
    image = image + head * (400 + texture) + lesion * 400
    return image.astype(np.int16), lesion.astype(np.uint8)


def write_nifti(path: Path, array_zyx, *, spacing_mm=(5.0, 1.0, 1.0), affine=None) -> Path:
    """Write (Z, H, W) as a NIfTI file with these canonical axial slices."""
    if affine is None:
        affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array_zyx.transpose(2, 1, 0)), affine), path)
    return path


def nifti_files(path: Path) -> ScanFiles:
    return ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name)


def make_cases(
    folder: Path, *, num_patients=3, series_per_patient=1, shape_zyx=(6, 32, 32), labelled=True, seed=0
) -> list[SourceCase]:
    """Write scans under ``folder`` and return their cases."""
    cases = []
    for patient in range(num_patients):
        for series in range(series_per_patient):
            image, label = make_scan(shape_zyx=shape_zyx, seed=seed + 100 * patient + series)
            name = f"case{patient:02d}_{series}"
            scan = nifti_files(write_nifti(folder / f"{name}.nii.gz", image))
            labels = ()
            if labelled:
                label_path = write_nifti(folder / "labels" / f"{name}.nii.gz", label)
                labels = (LabelFiles(scan=nifti_files(label_path), ids={1: 1}),)
            cases.append(SourceCase(name=name, patient_key=f"patient{patient:02d}", scan=scan, labels=labels))
    return cases


def make_store(
    tmp_path: Path,
    *,
    num_patients=3,
    series_per_patient=1,
    shape_zyx=(6, 32, 32),
    labelled=True,
    seed=0,
    modality="mri",
    name="store.zarr",
) -> Path:
    """Build a small store and return its path."""
    out = Path(tmp_path) / name
    cases = make_cases(
        Path(tmp_path) / f"scans_{name}",
        num_patients=num_patients,
        series_per_patient=series_per_patient,
        shape_zyx=shape_zyx,
        labelled=labelled,
        seed=seed,
    )
    build_store(
        cases,
        out=out,
        settings=BuildSettings(modality=Modality(modality), salt="test"),
        label_names={1: "lesion"} if labelled else {},
        intensity=IntensityPreset(),
    )
    return out
