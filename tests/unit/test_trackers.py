"""Curves for Weights & Biases and MLflow: what they contain, and what never."""

import getpass
import json
import os
import socket
import struct
from types import SimpleNamespace

import pytest
from samgraft.shared.errors import UsageError
from samgraft.shared.runs import trackers
from samgraft.shared.runs.metrics import MetricsLog
from samgraft.shared.runs.trackers import Tracker, check_trackers, read_numbers, write_trackers
from tiny_training import At, Killed, die, tiny_config, tiny_fit

CONFIG = """
data: {store: /mnt/someone/private/smith.zarr, batch_size: 4}
optim: {lr: 0.001, name: adamw}
trainer: {channels_last: true, trackers: [wandb]}
"""


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "a run"
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG)
    metrics = MetricsLog(path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.append(step, {"train/loss": 1.0 / step, "val/dice": 0.1 * step})
    return SimpleNamespace(path=path, metrics=metrics, is_writer=True)


def written_texts(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_private(folder, tmp_path):
    private = (str(tmp_path), os.getcwd(), "/mnt/", "someone", "smith", "adamw", f"{getpass.getuser()}@",
               f"/{getpass.getuser()}", f'"{socket.gethostname()}"', f": {socket.gethostname()}\n")  # fmt: skip
    texts = written_texts(folder)
    assert texts
    assert [(path.name, word) for path, text in texts.items() for word in private if word.encode() in text] == []
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_read_numbers__texts_and_paths_are_left_out(run):
    assert read_numbers(run.path / "config.yaml") == {
        "data.batch_size": 4, "optim.lr": 0.001, "trainer.channels_last": True,
    }  # fmt: skip


def records_of(data):
    """Yield the records of a small ``.wandb`` file: 7 bytes of header, then checksum, length, type and content."""
    place = 7
    while place < len(data):
        length, kind = struct.unpack_from("<HB", data, place + 4)
        assert kind == 1, "a record in several parts"
        yield data[place + 7 : place + 7 + length]
        place += 7 + length


def test_wandb__offline_run_has_every_step_once_and_nothing_private(run, tmp_path, capsys):
    pytest.importorskip("wandb", reason="the package wandb is not installed (pip install 'samgraft[wandb]')")
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(2):  # a resumed run is written anew
        write_trackers([Tracker.WANDB], run)
    (file,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    records = [Record.FromString(content) for content in records_of(file.read_bytes())]
    history = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
               for r in records if r.WhichOneof("record_type") == "history"]  # fmt: skip
    assert [line["_step"] for line in history] == [1, 2, 3]
    assert [line["train/loss"] for line in history] == [1.0, 0.5, 1 / 3]
    assert_private(run.path / "wandb", tmp_path)


def test_mlflow__folder_has_every_step_once_and_nothing_private(run, tmp_path, caplog):
    pytest.importorskip("mlflow", reason="the package mlflow is not installed (pip install 'samgraft[mlflow]')")
    caplog.set_level("INFO", logger="samgraft")
    for _ in range(2):
        write_trackers([Tracker.MLFLOW], run)
    (loss,) = (run.path / "mlflow").rglob("metrics/train/loss")
    assert [line.split()[1:] for line in loss.read_text().splitlines()] == [
        ["1.0", "1"], ["0.5", "2"], [str(1 / 3), "3"],
    ]  # fmt: skip
    (name,) = (run.path / "mlflow").rglob("mlflow.runName")
    assert name.read_text() == "a run"
    assert_private(run.path / "mlflow", tmp_path)
    assert "mlflow ui --backend-store-uri" in caplog.text
    assert trackers._FOLDERS_VARIABLE not in os.environ


def test_trackers__failure_is_a_warning_and_a_second_process_writes_nothing(run, monkeypatch, caplog):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise RuntimeError("/mnt/someone/secret")

    monkeypatch.setitem(trackers._WRITERS, Tracker.MLFLOW, fail)
    write_trackers([Tracker.MLFLOW], run)
    assert "the curves for mlflow could not be written (RuntimeError)" in caplog.text
    run.is_writer = False
    write_trackers([Tracker.MLFLOW], run)
    assert len(calls) == 1


def test_trackers__missing_package_is_refused_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"trainer\.trackers has wandb, which is not installed") as refused:
        check_trackers([Tracker.WANDB])
    assert refused.value.next_command == "pip install 'samgraft[wandb]'"
    with pytest.raises(UsageError, match="not installed"):
        tiny_fit(tmp_path, "a", tiny_config(trackers=["mlflow"]))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_training__resumed_run_is_written_with_all_its_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    steps = []

    def keep(folder, name, lines, settings):
        steps.append([int(line["step"]) for line in lines])
        return "shown"

    monkeypatch.setitem(trackers._WRITERS, Tracker.WANDB, keep)
    config = tiny_config(trackers=["wandb"], max_steps=6)
    with pytest.raises(Killed):
        tiny_fit(tmp_path, "a", config, callbacks=[At(5, die)])
    tiny_fit(tmp_path, "a", config)
    assert steps[-1] == [0, 1, 2, 3, 4, 5, 6]
