"""The report of a build fits one screen, and says how patients were told apart."""

import numpy as np
from dicom_factory import write_series
from samgraft.shared.cli import main
from store_factory import make_scan, write_nifti

IMAGE = make_scan(shape_zyx=(6, 24, 20))[0]


def report(source, capsys):
    assert main(["store", "check", str(source), "--workers", "1"]) == 0
    return capsys.readouterr().err


def test_many_labels_are_cut(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    write_nifti(tmp_path / "in" / "a_label.nii", (np.arange(IMAGE.size).reshape(IMAGE.shape) % 120).astype(np.uint8))
    shown = report(tmp_path / "in", capsys)
    assert "... and 107 more labels (--report FILE has all)" in shown
    assert len(shown.splitlines()) < 40


def test_scans_below_one_folder_are_said_to_be_one_patient(tmp_path, capsys):
    for name in ("x", "y"):
        write_nifti(tmp_path / "in" / "all" / name / "t1.nii", IMAGE)
    shown = report(tmp_path / "in", capsys)
    assert "2 scans lie below one folder and count as one patient" in shown
    assert "count as one patient" not in report(tmp_path / "in" / "all", capsys)


def test_dicom_patients_come_from_their_headers(tmp_path, capsys):
    write_series(tmp_path / "in", IMAGE)
    assert "counts as its own patient" not in report(tmp_path / "in", capsys)
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    assert "every file directly below the root counts as its own patient" in report(tmp_path / "in", capsys)
