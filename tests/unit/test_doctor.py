"""``samgraft doctor``: finds what is wrong, names nobody."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from pathlib import Path

import pytest
from samgraft.shared.cli import main
from samgraft.shared.training import diagnosis
from samgraft.shared.training.diagnosis import Status, diagnose
from store_factory import make_store


def by_name(root: Path) -> dict[str, diagnosis.Finding]:
    return {finding.name: finding for finding in diagnose(root)}


def test_empty_folder__warns_and_says_what_to_do(tmp_path: Path) -> None:
    findings = diagnose(tmp_path)
    assert diagnosis.exit_code(findings) == 0
    advice = {finding.area: finding.advice for finding in findings if finding.name == "none"}
    assert advice["data"] == "samgraft demo-data, or samgraft store build"
    assert {finding.area for finding in findings} == {"environment", "disk", "device", "data", "weights"}


def test_store_and_broken_weights__described(tmp_path: Path) -> None:
    (tmp_path / "data" / "weights").mkdir(parents=True)
    store = make_store(tmp_path, num_patients=3)
    shutil.move(store, tmp_path / "data" / store.name)
    (tmp_path / "data" / "weights" / "page.pth").write_text("<!doctype html><html></html>")
    found = by_name(tmp_path)
    assert found[store.name].text.startswith("mri, 3 patients, 3 series")
    assert found["page.pth"].status is Status.PROBLEM
    assert diagnosis.exit_code(list(found.values())) == 4


def test_old_package__is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis.version
    monkeypatch.setattr(diagnosis, "version", lambda name: "2.5.0" if name == "torch" else real(name))
    finding = by_name(tmp_path)["torch"]
    assert finding.status is Status.PROBLEM
    assert finding.text.startswith("2.5.0, needed: ")
    assert diagnosis.exit_code([finding]) == 2


def test_full_disk__is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9 // 2)
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: usage)
    finding = by_name(tmp_path)["working folder"]
    assert (finding.status, finding.text) == (Status.WARNING, "0.5 GB free")


@pytest.mark.parametrize(
    ("name", "value", "warned"),
    [("CUDA_VISIBLE_DEVICES", "", True), ("CUDA_VISIBLE_DEVICES", "0", False), ("PYTHONPATH", "/x", True)],
)
def test_leftover_variables__named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, warned: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert (name in by_name(tmp_path)) is warned


def test_json__names_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["ready"] is True
    for secret in (str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser()):
        assert len(secret) < 5 or secret not in text


def test_text__one_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.zarr").mkdir()
    assert main(["doctor", "--data", "no.zarr"]) == 3
    out = capsys.readouterr().out
    assert "PROBLEM  no.zarr: " in out
    assert out.splitlines()[-1].startswith("1 problem, ")
