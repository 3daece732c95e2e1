"""A Decathlon data set from a local server, whose archive has the layout of the real one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel as nib
import numpy as np
import pytest
from monai.apps.datasets import DecathlonDataset
from samgraft.shared.commands.demo_data import COMMAND
from samgraft.shared.demo.decathlon import TASKS, decathlon_data
from samgraft.shared.errors import DataError, StorageError
from samgraft.shared.store.store import SliceStore

FOLDER = TASKS["hippocampus"].folder
LABELS = {"0": "background", "1": "Anterior", "2": "Posterior"}


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def archive() -> bytes:
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        listed = []
        for number in range(3):
            name = f"hippocampus_{number:03d}.nii.gz"
            label = np.zeros((16, 20, 12), dtype=np.uint8)
            label[4:8, 5:15, 3:9] = 1
            label[8:12, 5:15, 3:9] = 2
            image = (random.normal(100, 10, label.shape) + 50 * label).astype(np.float32)
            for folder, array in (("imagesTr", image), ("labelsTr", label)):
                _member(tar, f"{folder}/{name}", nib.Nifti1Image(array, np.eye(4)).to_bytes())
            listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        table = {"modality": {"0": "MRI"}, "labels": LABELS, "training": listed, "test": []}
        _member(tar, "dataset.json", json.dumps(table).encode())
    return stream.getvalue()


@pytest.fixture
def requests_seen(archive, monkeypatch):
    """Serve the archive and return the list of requested paths."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()
            self.wfile.write(archive)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{FOLDER}.tar"
    monkeypatch.setitem(DecathlonDataset.resource, FOLDER, address)
    monkeypatch.setitem(DecathlonDataset.md5, FOLDER, hashlib.md5(archive).hexdigest())
    monkeypatch.setenv("SAMGRAFT_OFFLINE", "0")
    yield seen
    server.shutdown()
    server.server_close()


def test_demo_data__task_becomes_a_labelled_store_once(requests_seen, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAMGRAFT_CACHE", raising=False)
    import argparse

    parser = argparse.ArgumentParser()
    COMMAND.add_arguments(parser)
    with caplog.at_level("INFO"):
        assert COMMAND.run(parser.parse_args(["--task", "hippocampus"])) == 0
        assert COMMAND.run(parser.parse_args(["--task", "hippocampus"])) == 0
    store = SliceStore.open(tmp_path / "data" / "hippocampus.zarr")
    assert len(store.series) == 3
    assert store.label_names == {1: "Anterior", 2: "Posterior"}
    assert requests_seen == [f"/{FOLDER}.tar"]
    assert "samgraft finetune --data data/hippocampus.zarr" in caplog.text
    assert "CC-BY-SA-4.0" in caplog.text


def test_decathlon__archive_with_another_hash_is_deleted(requests_seen, tmp_path, monkeypatch):
    monkeypatch.setitem(DecathlonDataset.md5, FOLDER, "0" * 32)
    with pytest.raises(DataError, match="damaged or was replaced"):
        decathlon_data("hippocampus", root=tmp_path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_decathlon__interrupted_unpacking_is_repeated(requests_seen, tmp_path):
    rest = tmp_path / "decathlon" / ".unpacked" / FOLDER
    rest.mkdir(parents=True)
    (rest / "half.nii.gz").write_bytes(b"half")
    decathlon_data("hippocampus", root=tmp_path, cache=tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "decathlon" / FOLDER).iterdir()) == [
        "dataset.json",
        "imagesTr",
        "labelsTr",
    ]


def test_decathlon__offline_names_the_address_and_the_folder(requests_seen, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMGRAFT_OFFLINE", "1")
    with pytest.raises(StorageError, match=r"not in the cache folder.*Put the archive from http"):
        decathlon_data("hippocampus", root=tmp_path, cache=tmp_path / "cache")
    assert requests_seen == []


def test_decathlon__server_that_is_down_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMGRAFT_OFFLINE", "0")
    monkeypatch.setitem(DecathlonDataset.resource, FOLDER, "http://127.0.0.1:9/none.tar")
    with pytest.raises(StorageError, match=r"could not be downloaded \(URLError\)"):
        decathlon_data("hippocampus", root=tmp_path, cache=tmp_path / "cache")
