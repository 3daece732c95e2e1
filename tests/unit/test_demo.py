"""The labelled scans of the demo, made from small files of the same form as those in the archives."""

import nibabel as nib
import numpy as np
from mesh_factory import sphere
from samgraft.shared.demo.heads import (
    CLOSING_VOXELS,
    DEMO_SALT,
    PIAL_SURFACES,
    S1_SLICES,
    SLICE_STEP,
    TEST,
    TRAIN,
    VAL,
    DemoPaths,
    labelled_cases,
    prepare_labelled_scans,
    unlabelled_cases,
    write_demo_split,
)
from samgraft.shared.scans.preset import load_preset
from samgraft.shared.scans.privacy import pseudonym
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.build import build_store
from samgraft.shared.store.examine import BuildSettings

RADIUS = 9.0
S1_AFFINE = np.array([[-1.0, 0, 0, 30], [0, 0, 1, -20], [0, -1, 0, 100], [0, 0, 0, 1]])
"""Left, inferior, anterior axes, as the scan has them."""


def write_sources(scans):
    """Write templates with a ball as brain, and a person with a ball per hemisphere."""
    scans.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 40, 40)), indexing="ij"), axis=-1)
    ball = np.linalg.norm(grid - 20, axis=-1) < RADIUS
    noise = np.zeros_like(ball)
    noise[2, 2, :] = True
    random = np.random.default_rng(0)
    head = (random.integers(20, 60, ball.shape) + 100 * ball).astype(np.int16)
    nib.save(nib.Nifti1Image(head[..., None], np.eye(4)), scans / "SRI24.nii")
    nib.save(nib.Nifti1Image((head * (ball | noise))[..., None], np.eye(4)), scans / "SRI24_brain.nii")
    nib.save(nib.Nifti1Image(head, np.eye(4)), scans / "MNI152.nii.gz")
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), np.eye(4)), scans / "MNI152_brain.nii.gz")
    # Canonical slices 130 to 195 of 256 are rows 60 to 125 of the second axis.
    person = random.integers(0, 200, (60, 256, 40)).astype(np.uint8)
    nib.save(nib.Nifti1Image(person, S1_AFFINE), scans / "pycortex_S1.nii.gz")
    for name, side in zip(PIAL_SURFACES, (-10.5, 10.5), strict=True):
        vertices, faces = sphere(RADIUS, (side, 0.0, 100.0 - 93))
        arrays = [
            nib.gifti.GiftiDataArray(vertices.astype(np.float32), intent="NIFTI_INTENT_POINTSET"),
            nib.gifti.GiftiDataArray(faces.astype(np.int32), intent="NIFTI_INTENT_TRIANGLE"),
        ]
        nib.save(nib.gifti.GiftiImage(darrays=arrays), scans / name)


def test_labelled_scans__are_thinned_and_their_labels_lie_on_the_brain(tmp_path):
    scans = tmp_path / "scans"
    write_sources(scans)
    prepare_labelled_scans(scans)
    for name, step in SLICE_STEP.items():
        image, label = (nib.load(scans / f"{name}_{what}.nii.gz") for what in ("scan", "label"))
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (1.0, 1.0, step)
        np.testing.assert_array_equal(image.affine, label.affine)
        num_slices = (S1_SLICES.stop - S1_SLICES.start if name == "S1" else 40) // step
        assert abs(image.shape[2] - num_slices) <= 1
        inside = label.get_fdata() > 0
        volume_ml = inside.sum() * step / 1000
        one_ball_ml = 4 / 3 * np.pi * RADIUS**3 / 1000
        # The gap between the hemispheres is closed, which adds a little to the two balls.
        expected_ml = 2.1 * one_ball_ml if name == "S1" else one_ball_ml
        assert abs(volume_ml / expected_ml - 1) < 0.12
        if name != "S1":
            assert image.get_fdata()[inside].min() >= 100
    label = nib.load(scans / "S1_label.nii.gz")
    middle = np.rint(np.linalg.inv(label.affine) @ (0.0, 0.0, 7.0, 1.0)).astype(int)[:3]
    assert label.get_fdata()[tuple(middle)] == 1
    assert 2 * CLOSING_VOXELS > 3  # the gap in mm


def test_demo__test_and_validation_heads_are_in_no_other_part(tmp_path):
    scans = tmp_path / "scans"
    write_sources(scans)
    prepare_labelled_scans(scans)
    labelled = tmp_path / "brain.zarr"
    settings = BuildSettings(modality=Modality.MRI, salt=DEMO_SALT)
    intensity = load_preset(Modality.MRI).intensity
    build_store(labelled_cases(scans), out=labelled, settings=settings, label_names={1: "brain"}, intensity=intensity)
    paths = DemoPaths(unlabelled=tmp_path, labelled=labelled, split=tmp_path / "split.json", weights=tmp_path)
    split = write_demo_split(paths)
    train, val, test = ((pseudonym("p", key, salt=DEMO_SALT),) for key in (TRAIN, VAL, TEST))
    assert (split.train, split.val, split.test) == (train, val, test)
    pretrained_on = {case.patient_key for case in unlabelled_cases(scans, [])}
    assert TRAIN in pretrained_on
    assert not {VAL, TEST} & pretrained_on
