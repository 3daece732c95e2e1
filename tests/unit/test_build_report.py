"""The report of a build fits on one screen and shows how patients were identified."""

import numpy as np
from dicom_factory import write_series
from samgraft.shared.cli import main
from store_factory import make_scan, write_nifti

IMAGE = make_scan(shape_zyx=(6, 24, 20))[0]
MANY_LABELS = np.broadcast_to(np.arange(30, dtype=np.uint8).reshape(6, 5).repeat(4, 0).repeat(4, 1), IMAGE.shape)


def report(source, capsys):
    assert main(["store", "check", str(source), "--workers", "1"]) == 0
    return capsys.readouterr().err


def test_print_report__many_labels_are_shortened(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    write_nifti(tmp_path / "in" / "a_label.nii", MANY_LABELS)
    shown = report(tmp_path / "in", capsys)
    assert "... and 17 more labels (--report FILE has all)" in shown
    assert len(shown.splitlines()) < 40


def test_print_report__scans_in_sibling_folders_count_as_patients(tmp_path, capsys):
    for name in ("x", "y"):
        write_nifti(tmp_path / "in" / "all" / name / "t1.nii", IMAGE)
    shown = report(tmp_path / "in", capsys)
    assert "2 of 2, 2 patients" in shown


def test_print_report__control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    write_nifti(tmp_path / "in" / "good.nii", IMAGE)
    damaged = write_nifti(tmp_path / "in" / "bad\x1b[2J.nii", IMAGE)
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert main(["store", "check", str(tmp_path / "in"), "--workers", "1"]) == 3
    shown = capsys.readouterr().err
    assert "bad?[2J.nii" in shown
    assert "\x1b[2J" not in shown


def test_print_report__dicom_patients_need_no_note(tmp_path, capsys):
    write_series(tmp_path / "in", IMAGE)
    assert "counts as its own patient" not in report(tmp_path / "in", capsys)
    write_nifti(tmp_path / "in" / "a.nii", IMAGE)
    assert "every file directly below the root counts as its own patient" in report(tmp_path / "in", capsys)
