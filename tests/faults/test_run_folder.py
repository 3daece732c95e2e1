"""Tests that a run folder accepts one configuration and one process only."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from samgraft.shared.config import config_sha256, keys_that_may_change, load_config
from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.runs.run_folder import RunFolder, check_run_folder
from tiny_training import TinyConfig, tiny_config


def open_run(root: Path, name: str = "a", *, stage: str = "pretrain", **settings: object) -> RunFolder:
    return RunFolder.open(root, name, config=tiny_config(**settings), stage=stage)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and ".lock" not in p.name}


def test_open__with_the_same_configuration_changes_nothing(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    before = snapshot(tmp_path)
    open_run(tmp_path, num_workers=3, save_every_steps=99).close()
    assert snapshot(tmp_path) == before


def test_config_sha256__after_a_resume_is_that_of_config_yaml(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_run_json()
    with open_run(tmp_path, num_workers=3, save_every_steps=99) as run:
        run.write_run_json()
        recorded = run.read_run_json()["config_sha256"]
    assert recorded == config_sha256(load_config(TinyConfig, layers=[tmp_path / "a" / "config.yaml"]))
    assert recorded != config_sha256(tiny_config(max_steps=20))


def test_open__with_another_configuration_is_refused_with_the_keys(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    before = snapshot(tmp_path)
    message = (
        r"another configuration, 2 differences: trainer\.max_steps: 15 -> 20; trainer\.clip_grad_norm: 1\.0 -> None"
    )
    with pytest.raises(UsageError, match=message):
        open_run(tmp_path, max_steps=20, clip_grad_norm=None)
    assert snapshot(tmp_path) == before
    open_run(tmp_path).close()  # The refusal has released the lock.


def test_open__of_an_older_run_takes_the_default_for_a_newer_setting(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    record = tmp_path / "a" / "config.yaml"
    lines = record.read_text().splitlines()
    record.write_text("\n".join(line for line in lines if "accumulate:" not in line and "width:" not in line) + "\n")
    open_run(tmp_path).close()
    with pytest.raises(UsageError, match=r"1 difference: trainer\.accumulate: 1 -> 2"):
        open_run(tmp_path, accumulate=2)
    # A required setting has no default.
    record.write_text("\n".join(line for line in lines if "max_steps:" not in line) + "\n")
    with pytest.raises(UsageError, match=r"trainer\.max_steps: not set -> 15"):
        open_run(tmp_path)


def test_open__with_another_stage_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(UsageError, match="another stage than finetune"):
        open_run(tmp_path, stage="finetune")


def test_keys_that_may_change__are_exactly_these() -> None:
    names = (
        "devices num_workers log_every_steps save_every_steps save_every_min keep_last keep_every_steps allow_resize "
        "resume_from trackers"
    )
    assert set(keys_that_may_change(TinyConfig)) == {"note", *(f"trainer.{name}" for name in names.split(" "))}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "x" * 201])
def test_open__with_an_invalid_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="must be a plain folder name"):
        open_run(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dä ta", "患者 1", "-x", "it's"])
def test_open__with_an_unusual_name_works(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path, name) as run:
        assert run.path == tmp_path / name


def test_open__where_a_file_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UsageError, match="a is a file"):
        open_run(tmp_path)


def test_open__of_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.txt").write_text("x")
    with pytest.raises(UsageError, match=r"contains no run .*scan\.txt"):
        open_run(tmp_path)


def test_open__below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UsageError, match="a is a file"):
        open_run(tmp_path / "a" / "runs")


def test_check_run_folder__refuses_as_open_does_and_writes_nothing(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "scan.txt").write_text("x")
    everything = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def check(name: str, *, stage: str = "pretrain", **settings: object) -> None:
        check_run_folder(tmp_path, name, config=tiny_config(**settings), stage=stage)

    check("new")
    check("a", num_workers=3)
    for name, match in (("a/b", "plain folder name"), ("file", "file is a file"), ("foreign", "contains no run")):
        with pytest.raises(UsageError, match=match):
            check(name)
    with pytest.raises(UsageError, match=r"trainer\.max_steps: 15 -> 20"):
        check("a", max_steps=20)
    with pytest.raises(UsageError, match="another stage than finetune"):
        check("a", stage="finetune")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == everything


def test_open__in_an_unwritable_folder_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="cannot be written: Permission denied"):
        open_run(tmp_path)


def test_open__in_a_second_process_is_refused_with_the_first_one(tmp_path: Path) -> None:
    with open_run(tmp_path):
        script = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from filelock import FileLock\nfrom pathlib import Path\n"
            f"lock = FileLock(Path({str(tmp_path)!r}) / 'a' / '.lock')\n"
            "try: lock.acquire(timeout=0)\nexcept Exception as e: print(type(e).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "Timeout"
        with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on {socket.gethostname()} since 20"):
            open_run(tmp_path)
    open_run(tmp_path).close()


def test_run_json__has_versions_but_no_user_host_or_path_names(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_run_json(data_fingerprint="abc")
        run.mark_complete(encoder_sha256="def")
        assert run.is_complete
    text = (tmp_path / "a" / "run.json").read_text()
    facts = json.loads(text)
    assert facts["data_fingerprint"] == "abc"
    assert facts["encoder_sha256"] == "def"
    assert facts["versions"]["torch"].startswith("2.")
    for secret in (str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser()):
        assert len(secret) < 4 or secret not in text
    assert [p.name for p in (tmp_path / "a").iterdir() if "holder" in p.name] == []


def test_metrics_log__drops_an_incomplete_last_line_and_later_steps(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.append(step, {"train/loss": 1 / step})
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "train/l')
    assert [line["step"] for line in metrics.read()] == [1, 2, 3, 4, 5]
    assert metrics.truncate_after(3) == {"step": 3, "train/loss": 1 / 3}
    kept = '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 0.5}\n'
    assert metrics.path.read_text() == kept + '{"step": 3, "train/loss": 0.3333333333333333}\n'
    metrics.append_many([{"step": 3, "train/loss": 1 / 3, "probe/dice": 0.5}, {"step": 4}])
    metrics.append(4, {"x": 1})
    replaced = '{"step": 3, "train/loss": 0.3333333333333333, "probe/dice": 0.5}\n{"step": 4}\n'
    assert metrics.path.read_text() == kept + replaced + '{"step": 4, "x": 1}\n'


@pytest.mark.parametrize(("whole", "torn_bytes"), [("", 4), ('{"step": 2}\n', 200_000)])
def test_metrics_log__with_an_incomplete_line_keeps_all_others(tmp_path: Path, whole: str, torn_bytes: int) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.append(1, {})
    with metrics.path.open("a") as file:
        file.write(whole + "x" * torn_bytes)
    metrics.append(4, {})
    assert metrics.path.read_text() == '{"step": 1}\n' + whole + '{"step": 4}\n'
