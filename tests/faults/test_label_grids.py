"""Labels on another grid than their scan, which are refused and drawn on request."""

import re

import numpy as np
import pytest
from PIL import Image
from samgraft.shared.cli import main
from samgraft.shared.scans.grid_picture import GAP_PX, resample_to
from samgraft.shared.scans.readers.registry import read_scan
from samgraft.shared.scans.volume import RawScan
from store_factory import make_scan, nifti_files, write_nifti

IMAGE, LABEL = make_scan(shape_zyx=(6, 24, 20))
GRID = np.diag([-1.0, -1.0, 5.0, 1.0])


def moved(*, shift_mm=0.0, flip=False):
    affine = GRID.copy()
    affine[0, 3] = shift_mm
    if flip:
        affine[0, 0], affine[0, 3] = 1.0, -19.0
    return affine


@pytest.mark.parametrize(
    "command", [["build", "--out", "x.zarr"], ["build", "--out", "x.zarr", "--dry-run"], ["check"]]
)
def test_store_command__overlays_draw_a_label_on_another_grid(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "in" / "Meyer Anna" / "t1.nii", IMAGE)
    write_nifti(tmp_path / "in" / "Meyer Anna" / "t1_label.nii", LABEL, affine=moved(shift_mm=3.0))
    arguments = ["store", command[0], "in", *command[1:], "--workers", "1"]
    assert main(arguments) == 3
    assert "corners lie up to 3 mm apart" in (shown := capsys.readouterr().err)
    assert "--overlays FOLDER draws it" in shown
    assert main([*arguments, "--overlays", "pictures"]) == 3
    path = re.search(r"See (pictures/s_[0-9a-f]{12}\.png)", capsys.readouterr().err)[1]
    picture = np.asarray(Image.open(tmp_path / path)).astype(int)
    factor = -(-320 // 24)
    assert picture.shape == (24 * factor, (20 + GAP_PX + 20) * factor, 3)
    small = picture[::factor, ::factor]
    is_red = small[..., 0] - small[..., 1] > 50
    by_header, by_voxel = is_red[:, :20], is_red[:, 20 + GAP_PX :]
    z = LABEL.sum(axis=(1, 2)).argmax()
    np.testing.assert_array_equal(by_voxel, LABEL[z] > 0)
    # Three millimetres to the right of the patient are three columns to the left.
    np.testing.assert_array_equal(by_header[:, :17], np.roll(LABEL[z] > 0, -3, axis=1)[:, :17])


def test_resample_to__identity_shift_flip_and_another_resolution(tmp_path):
    scan = read_scan(nifti_files(write_nifti(tmp_path / "a.nii", IMAGE)))
    truth = LABEL.transpose(2, 1, 0) != 0

    def label_of(array_zyx, affine, name):
        return read_scan(nifti_files(write_nifti(tmp_path / f"{name}.nii", array_zyx, affine=affine)), as_label=True)

    np.testing.assert_array_equal(resample_to(label_of(LABEL, GRID, "same"), scan), truth)
    np.testing.assert_array_equal(resample_to(label_of(LABEL[:, :, ::-1], moved(flip=True), "flip"), scan), truth)
    fine = np.diag([-0.5, -0.5, 5.0, 1.0])
    fine[:2, 3] = 0.25
    doubled = LABEL.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(resample_to(label_of(doubled, fine, "fine"), scan), truth)
    far = RawScan(array_ijk=truth, affine=moved(shift_mm=500.0), source_sha256="")
    assert not resample_to(far, scan).any()


def test_write_grid_picture__another_shape_has_one_panel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    write_nifti(tmp_path / "in" / "a_label.nii", LABEL[:, :12])
    assert main(["store", "check", "in", "--workers", "1", "--overlays", "p"]) == 3
    assert "shapes differ" in capsys.readouterr().err
    assert Image.open(next((tmp_path / "p").glob("*.png"))).size == (20 * 14, 24 * 14)
