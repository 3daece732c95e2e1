"""The doctor command finds what is wrong and prints no personal data."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from collections import Counter
from pathlib import Path

import nibabel as nib
import pydicom
import pytest
from dicom_factory import write_series
from samgraft.shared import diagnosis
from samgraft.shared.cli import main
from samgraft.shared.commands.doctor import next_command
from samgraft.shared.diagnosis import Status, diagnose
from samgraft.shared.invocation import for_terminal
from samgraft.shared.scans.header_check import check_headers
from samgraft.shared.scans.privacy import BURNED_IN
from samgraft.shared.scans.sources import discover
from samgraft.shared.scans.volume import Modality
from samgraft.shared.store.examine import BuildSettings, examine_case
from store_factory import make_scan, make_store, write_nifti


def by_name(root: Path) -> dict[str, diagnosis.DoctorFinding]:
    return {finding.name: finding for finding in diagnose(root)}


def test_diagnose__empty_folder_gives_warnings_with_advice(tmp_path: Path) -> None:
    findings = diagnose(tmp_path)
    assert diagnosis.exit_code(findings) == 0
    advice = {finding.area: finding.advice for finding in findings if finding.name == "none"}
    assert advice["data"] == "samgraft demo-data, or samgraft store build FOLDER --out STORE.zarr"
    assert {finding.area for finding in findings} == {"environment", "disk", "device", "data", "weights"}


def test_diagnose__store_and_broken_weights_are_described(tmp_path: Path) -> None:
    (tmp_path / "data" / "weights").mkdir(parents=True)
    store = make_store(tmp_path, num_patients=3)
    shutil.move(store, tmp_path / "data" / store.name)
    (tmp_path / "data" / "weights" / "page.pth").write_text("<!doctype html><html></html>")
    found = by_name(tmp_path)
    assert found[store.name].text.startswith("mri, 3 patients, 3 series")
    assert found["page.pth"].status is Status.PROBLEM
    assert diagnosis.exit_code(list(found.values())) == 4


def test_diagnose__old_package_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis.version
    monkeypatch.setattr(diagnosis, "version", lambda name: "2.5.0" if name == "torch" else real(name))
    finding = by_name(tmp_path)["torch"]
    assert finding.status is Status.PROBLEM
    assert finding.text.startswith("2.5.0, needed: ")
    assert diagnosis.exit_code([finding]) == 2


def test_diagnose__full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9 // 2)
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: usage)
    finding = by_name(tmp_path)["working folder"]
    assert (finding.status, finding.text) == (Status.WARNING, "0.5 GB free")


@pytest.mark.parametrize(
    ("name", "value", "warned"),
    [("CUDA_VISIBLE_DEVICES", "", True), ("CUDA_VISIBLE_DEVICES", "0", False), ("PYTHONPATH", "/x", True)],
)
def test_diagnose__leftover_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, warned: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert (name in by_name(tmp_path)) is warned


def clinic(folder: Path) -> Path:
    """Write a DICOM series full of names, a clean one, and NIfTI with free text under a patient's name."""
    volume = make_scan(shape_zyx=(3, 24, 20))[0]
    paths = write_series(
        folder / "a", volume, PatientName="Roe^Jane", PatientIdentityRemoved="NO", BurnedInAnnotation="YES"
    )
    private = pydicom.dcmread(paths[-1])  # in one file of the series only
    private.private_block(0x0011, "ACME", create=True).add_new(0x01, "LO", "secret-remark")
    private.save_as(paths[-1])
    write_series(folder / "b", volume, PatientID="P2", SeriesInstanceUID="1.2.3.5")
    scan = nib.load(write_nifti(folder / "Doe John" / "scan.nii.gz", volume))
    scan.header["descrip"] = b"ward 7"
    nib.save(scan, folder / "Doe John" / "scan.nii.gz")
    (folder / "readme.txt").write_text("Roe, Jane")
    return folder


def test_diagnose__identifying_content_of_scans_is_counted(tmp_path: Path) -> None:
    findings = [finding for finding in diagnose(tmp_path, data=[clinic(tmp_path / "in")]) if finding.area == "data"]
    assert findings[0].text == "3 in 7 files (plain folder); left out: 1 x text or description (not a scan)"
    assert [finding.name for finding in findings] == ["scans", *["privacy"] * 6]
    said = {finding.text.removeprefix("1 of 3 scans: "): finding.status for finding in findings[1:]}
    assert said == {
        BURNED_IN: Status.PROBLEM,
        "DICOM header does not confirm that the identity was removed (0012,0062)": Status.WARNING,
        "DICOM identifying tags: PatientName": Status.WARNING,
        "DICOM private tags": Status.WARNING,
        "NIfTI free text: descrip": Status.WARNING,
        "what looks like a person's name in a file or folder name": Status.WARNING,
    }
    assert diagnosis.exit_code(findings) == 3


def test_check_headers__finds_the_same_content_as_a_build(tmp_path: Path) -> None:
    folder = clinic(tmp_path / "in")
    settings = BuildSettings(modality=Modality.MRI, salt="", accept_burned_in=True)
    built: Counter[str] = Counter()
    for case in discover(folder).cases:
        built.update(examine_case(case, settings).privacy)
    assert check_headers(folder).kinds == built


def test_diagnose__clean_scans_are_reported_as_clean(tmp_path: Path) -> None:
    write_series(tmp_path / "in", make_scan(shape_zyx=(3, 24, 20))[0])
    findings = [finding for finding in diagnose(tmp_path, data=[tmp_path / "in"]) if finding.area == "data"]
    assert [(f.status, f.text) for f in findings] == [
        (Status.OK, "1 in 3 files (plain folder); no personal data found in headers and names")
    ]


def test_diagnose__damaged_headers_and_empty_folders_are_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = make_scan(shape_zyx=(3, 24, 20))[0]
    path = write_nifti(tmp_path / "in" / "scan.nii.gz", volume)
    path.write_bytes(path.read_bytes()[:20])
    assert check_headers(tmp_path / "in").refused == {"the file is too short for NIfTI (0 bytes)": 1}
    path.unlink()
    assert main(["doctor", "--data", str(tmp_path / "in")]) == 3
    assert "PROBLEM  scans: cannot be read as scans" in capsys.readouterr().out


def test_doctor__output_on_scans_has_no_personal_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--data", str(clinic(tmp_path / "Smith Anna"))]) == 3
    text = capsys.readouterr().out
    assert "PatientName" in text
    for secret in ("Roe", "Jane", "Doe", "John", "Smith", "secret-remark", "ACME", "ward 7", str(tmp_path)):
        assert secret not in text


def test_doctor__json_has_no_user_host_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["ready"] is True
    for secret in (str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser()):
        assert len(secret) < 5 or secret not in text


def test_doctor__text_ends_with_a_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.zarr").mkdir()
    assert main(["doctor", "--data", "no.zarr"]) == 3
    out = capsys.readouterr().out
    assert "PROBLEM  no.zarr: " in out
    *_, summary, following = out.splitlines()
    assert summary.startswith("1 problem, ")
    assert following.endswith("follow the advice above, then: samgraft doctor")


@pytest.mark.parametrize(
    ("stores", "command"),
    [([], "samgraft pretrain --modality mri"), (["demo/mri.zarr"], "samgraft pretrain --data data/demo/mri.zarr")],
)
def test_next_command__without_a_problem_pretrains_on_the_store_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: list[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in stores:
        (tmp_path / "data" / name).mkdir(parents=True)
    assert for_terminal(next_command([], [])) == command
    assert for_terminal(next_command([], ["my scans"])) == "samgraft pretrain --data 'my scans'"
