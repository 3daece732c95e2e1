"""Stores behind an address, read from a local S3 and HTTP server that is slow or loses files."""

import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import samgraft.shared.files as files
from finished_factory import SPEC, make_lab
from model_factory import make_sam
from samgraft.finetune.commands.finetune import build_config, typed_settings
from samgraft.finetune.evaluation.evaluate import evaluate
from samgraft.finetune.evaluation.scores import read_cases
from samgraft.finetune.model_folder import read_model
from samgraft.finetune.training.preparation import prepare
from samgraft.shared.cli import main
from samgraft.shared.errors import DataError, StorageError, UsageError
from samgraft.shared.files import write_tensors
from samgraft.shared.samples.dataset import SliceDataset
from samgraft.shared.samples.slices import select_slices
from samgraft.shared.samples.split import load_split, load_split_beside
from samgraft.shared.samples.store_info import describe_store
from samgraft.shared.store.store import SliceStore
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.save import save_encoder
from samgraft.ssl.config import DataConfig
from samgraft.ssl.preflight import pretraining_split
from store_factory import make_store

pytest.importorskip("obstore", reason="addresses need the extra s3")

NO_SUCH_KEY = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>gone</Message></Error>"
KEY = "local-key"


class Server:
    """Server of the files of a folder under ``/bucket/``, for signed GET requests with ranges."""

    def __init__(self, root):
        self.root = root
        self.failures = 0
        self.status = 503
        self.requests = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            def log_message(self, *args):
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted, request.headers.get("Authorization", "")))
        path = self.root / request.path.removeprefix("/bucket/")
        if self.failures > 0:
            self.failures -= 1
            return self._send(request, self.status, b"busy")
        if not path.is_file():
            return self._send(request, 404, NO_SUCH_KEY)
        data = path.read_bytes()
        headers = {"ETag": '"x"', "Last-Modified": "Wed, 25 Nov 2026 10:00:00 GMT"}
        if wanted is None:
            return self._send(request, 200, data, headers)
        first, last = (int(v) for v in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return self._send(request, 206, part, headers)

    @staticmethod
    def _send(request, status, body, headers=None):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def close(self):
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.001)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    make_store(tmp_path, num_patients=1)
    running = Server(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "local-secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    yield running
    running.close()


@pytest.fixture(params=["s3", "http"])
def url(request, server):
    return "s3://bucket/store.zarr" if request.param == "s3" else f"{server.endpoint}/bucket/store.zarr"


def test_remote_store__slices_are_read_by_range_and_equal_local_ones(server, url):
    local, remote = SliceStore.open(server.root / "store.zarr"), SliceStore.open(url)
    assert remote.fingerprint == local.fingerprint
    series_id = local.series[0].series_id
    before = len(server.requests)
    np.testing.assert_array_equal(remote.read_slice(series_id, 3), local.read_slice(series_id, 3))
    ranged = [path for path, wanted, _ in server.requests[before:] if wanted]
    assert len(ranged) == 2  # the index of the shard and one slice
    clone = pickle.loads(pickle.dumps(remote))
    np.testing.assert_array_equal(clone.read_label_volume(series_id), local.read_label_volume(series_id))


def test_s3__requests_are_signed_with_the_key_of_the_environment(server):
    SliceStore.open("s3://bucket/store.zarr")
    assert all(f"Credential={KEY}/" in authorization for _, _, authorization in server.requests)
    assert server.requests[0][0] == "/bucket/store.zarr/zarr.json"


def test_s3__samples_for_training_equal_local_ones(server):
    local, remote = SliceStore.open(server.root / "store.zarr"), SliceStore.open("s3://bucket/store.zarr")
    for store in (local, remote):
        assert len(select_slices(store, store.patient_ids)) == 6
    refs = select_slices(local, local.patient_ids)
    ours = SliceDataset(local, refs, with_label=True, num_neighbours=1)[2, 0]
    theirs = SliceDataset(remote, refs, with_label=True, num_neighbours=1)[2, 0]
    np.testing.assert_array_equal(theirs["image"], ours["image"])
    np.testing.assert_array_equal(theirs["label"], ours["label"])


@pytest.mark.parametrize("status", [503, 403])
def test_remote_store__busy_server_is_retried_and_then_named(server, url, status):
    server.failures, server.status = 2, status
    remote = SliceStore.open(url)
    series_id = remote.series[0].series_id
    server.failures = 3
    local = SliceStore.open(server.root / "store.zarr")
    np.testing.assert_array_equal(remote.read_slice(series_id, 1), local.read_slice(series_id, 1))
    server.failures = 10_000
    with pytest.raises(
        StorageError, match=r"after 4 attempts\. Check network, AWS_ENDPOINT_URL and credentials"
    ) as caught:
        remote.read_slice(series_id, 2)
    assert caught.value.next_command == "run the same command again"
    assert caught.value.exit_code == 5


def test_remote_store__lost_file_or_missing_mark_is_refused(server, url):
    path = server.root / "store.zarr"
    remote = SliceStore.open(url)
    next(p for p in path.rglob("image/c/0/0/0")).unlink()
    with pytest.raises(DataError, match="cannot be decoded"):
        remote.read_slice(remote.series[0].series_id, 0)
    (path / "complete.json").unlink()
    with pytest.raises(DataError, match="no completion mark"):
        SliceStore.open(url)


def test_remote_store__changed_byte_is_refused(server, url):
    shard = next(p for p in (server.root / "store.zarr").rglob("image/c/0/0/0"))
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    remote = SliceStore.open(url)
    with pytest.raises(DataError, match="cannot be decoded"):
        remote.read_volume(remote.series[0].series_id)


def test_remote_store__unknown_address_is_refused():
    with pytest.raises(UsageError, match=r"the address cannot be used.*Use s3://"):
        SliceStore.open("nosuchprotocol://bucket/x.zarr")


def test_remote_store__missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError, match=r"addresses \(s3://\) need the package obstore") as caught:
        SliceStore.open("s3://bucket/x.zarr")
    assert caught.value.next_command == "pip install 'samgraft[s3]'"


# The commands on a store behind an address ---------------------------------------------------------------------------

LAB = "s3://bucket/lab/store.zarr"


@pytest.fixture
def lab(server):
    return make_lab(server.root / "lab", num_patients=4)


def test_s3__the_split_beside_the_store_is_found(server, lab):
    remote = SliceStore.open(LAB)
    assert load_split(None, remote) == lab.split
    assert pretraining_split(DataConfig(store=LAB), remote, seed=5) == lab.split
    assert describe_store(remote)["split"] == {name: len(lab.split.part(name)) for name in ("train", "val", "test")}
    other = SliceStore.open("s3://bucket/store.zarr")
    assert load_split_beside(other) is None
    server.failures = 10_000
    with pytest.raises(StorageError, match="does not respond"):
        load_split(None, remote)


@pytest.mark.parametrize("given", [("--data", LAB), ()], ids=["--data", "the store of the run"])
def test_s3__evaluate_scores_the_same(lab, tmp_path, monkeypatch, given):
    """The report page is left out, because it takes seconds and does not depend on the place of the store."""
    monkeypatch.setattr("samgraft.finetune.evaluation.evaluation_report.write_evaluation_report", lambda *_, **__: None)
    (lab.run / "config.yaml").write_text(f"data: {{store: '{'nowhere' if given else LAB}'}}\n")
    assert main(["evaluate", str(lab.run), "--out", str(tmp_path / "out"), "--precision=fp32", *given]) == 0
    expected = evaluate(read_model(lab.run), lab.store, lab.split, part="test").rows
    rows = read_cases(tmp_path / "out" / "cases.csv")
    assert {row["patient_id"] for row in rows} == set(lab.split.test)
    assert [(row["series_id"], row["predicted_voxels"], row["dice"]) for row in rows] == [
        (row["series_id"], row["predicted_voxels"], pytest.approx(row["dice"], abs=1e-4)) for row in expected
    ]


def test_s3__finetune_prepares_the_same_samples(lab):
    sam = make_sam(SPEC, image_size=32)
    write_tensors(lab.root / "sam.safetensors", dict(sam.state_dict()))
    about = {"arch": "vit_t", "stem": "conv1x1", "pixel_mean": [0.0] * 3, "pixel_std": [255.0] * 3}
    save_encoder(sam.image_encoder, lab.root / "ssl", Card(image_size=32, stage="encoder", **about))
    given = {"ckpt": lab.root / "ssl", "base": lab.root / "sam.safetensors"}

    def prepared(store):
        return prepare(
            build_config(typed_settings(**given, data=store, settings=["model.image_size=32"]), preset="cpu")
        )

    ours, theirs = prepared(str(lab.store.path)), prepared(LAB)
    assert theirs.split == ours.split == lab.split
    first, second = ours.dataset[0, 0], theirs.dataset[0, 0]
    np.testing.assert_array_equal(second["image"], first["image"])
    np.testing.assert_array_equal(second["label"], first["label"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "predict runs/a s3://bucket/scan --out x",
            "INPUT: must be on this machine, got the address s3://bucket/scan",
        ),
        ("store build s3://bucket/scans --out x.zarr", "source: must be on this machine"),
        ("store build scans --out s3://bucket/x.zarr", "--out: must be on this machine"),
        ("store check s3://bucket/store.zarr", "path: must be on this machine, got the address s3://"),
        ("store split s3://bucket/store.zarr", "--out is missing: the store is not on this machine"),
    ],
)
def test_commands__addresses_are_refused_where_local_files_are_needed(server, capsys, command, message):
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_s3__split_is_written_to_out(server, tmp_path):
    path = tmp_path / "mine.split.json"
    assert main(["store", "split", "s3://bucket/store.zarr", "--out", str(path), "--fractions", "1,0,0"]) == 0
    assert load_split(path, SliceStore.open("s3://bucket/store.zarr")).train


def test_s3__doctor_describes_the_store(server, capsys):
    assert main(["doctor", "--data", "s3://bucket/store.zarr"]) == 0
    assert "store.zarr: mri, 1 patient, 1 series" in capsys.readouterr().out
