"""Stores behind an address: a local server that knows byte ranges, is slow to answer, or loses files (row 104)."""

import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import samgraft.shared.data.store_files as store_files
from samgraft.shared.data.store import SliceStore
from samgraft.shared.errors import DataError, StorageError, UsageError
from store_factory import make_store

pytest.importorskip("aiohttp", reason="fsspec reaches http addresses through aiohttp")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(store_files, "FIRST_WAIT_S", 0.001)
    make_store(tmp_path, num_patients=1)

    class Handler(BaseHTTPRequestHandler):
        failures = 0
        ranges = 0

        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def _answer(self, *, body):
            if Handler.failures > 0:
                Handler.failures -= 1
                self.send_error(503)
                return
            path = tmp_path / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            wanted = self.headers.get("Range")
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                part = data[int(first) : int(last) + 1]
                Handler.ranges += 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
            else:
                part = data
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/store.zarr", Handler, tmp_path / "store.zarr"
    httpd.shutdown()


def test_remote_store_reads_the_same_slices_by_range(server):
    url, handler, path = server
    local, remote = SliceStore.open(path), SliceStore.open(url)
    assert remote.fingerprint == local.fingerprint
    series_id = local.series[0].series_id
    np.testing.assert_array_equal(remote.read_slice(series_id, 3), local.read_slice(series_id, 3))
    assert handler.ranges == 2  # the index of the shard and one slice
    clone = pickle.loads(pickle.dumps(remote))
    np.testing.assert_array_equal(clone.read_label_volume(series_id), local.read_label_volume(series_id))


def test_row_104_busy_server_is_asked_again_and_then_named(server):
    url, handler, path = server
    handler.failures = 2
    remote = SliceStore.open(url)
    series_id = remote.series[0].series_id
    handler.failures = 3
    np.testing.assert_array_equal(remote.read_slice(series_id, 1), SliceStore.open(path).read_slice(series_id, 1))
    handler.failures = 10_000
    with pytest.raises(StorageError, match="after 4 attempts") as caught:
        remote.read_slice(series_id, 2)
    assert caught.value.next_command == "run the same command again"


def test_remote_store_with_a_lost_file_or_no_mark(server):
    url, _, path = server
    remote = SliceStore.open(url)
    next(p for p in path.rglob("image/c/0/0/0")).unlink()
    with pytest.raises(DataError, match="could not be decoded"):
        remote.read_slice(remote.series[0].series_id, 0)
    (path / "complete.json").unlink()
    with pytest.raises(DataError, match="no completion mark"):
        SliceStore.open(url)


def test_unknown_address():
    with pytest.raises(UsageError, match="needs another package"):
        SliceStore.open("nosuchprotocol://bucket/x.zarr")
