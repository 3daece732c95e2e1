"""Fetching by hash: resumed, verified, cached; damaged, replaced and unreachable archives end in one clear screen."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import samgraft.shared.fetch as fetch
from samgraft.shared.errors import DataError, StorageError, UsageError

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ARCHIVE = fetch.Archive(project="demo-scans", version="1.0", sha256=DIGEST, num_bytes=len(CONTENT))


@pytest.fixture
def index(monkeypatch):
    """A package index on this machine; ``served`` decides what it gives, ``cut`` breaks connections off."""

    class Handler(BaseHTTPRequestHandler):
        served, cut, ranges = CONTENT, 0, []

        def do_GET(self):
            if self.path == "/simple/demo-scans/":
                link = f'<a href="/files/demo-scans-1.0.tar.gz#sha256={DIGEST}">demo-scans-1.0.tar.gz</a>'
                self._send(200, link.encode(), {"Content-Type": "text/html"})
            elif self.path.startswith("/files/"):
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
                Handler.ranges.append(start)
                body = Handler.served[start:]
                code = 206 if "Range" in self.headers else 200
                self._send(code, body, {}, stop=len(body) // 3 if Handler.cut else None)
                Handler.cut = max(0, Handler.cut - 1)
            else:
                self._send(404, b"", {})

        def _send(self, code, body, headers, *, stop=None):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:stop])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{httpd.server_address[1]}/simple/")
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    yield Handler
    httpd.shutdown()


def test_fetch__verified_cached_and_shown(index, tmp_path):
    shown = []
    path = fetch.fetch_archive(ARCHIVE, cache=tmp_path, on_bytes=lambda *n: shown.append(n))
    assert path.read_bytes() == CONTENT
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    index.served = b""
    assert fetch.fetch_archive(ARCHIVE, cache=tmp_path).read_bytes() == CONTENT
    assert index.ranges == [0]


def test_fetch__broken_connection_goes_on_where_it_stopped(index, tmp_path):
    index.cut = 2
    assert fetch.fetch_archive(ARCHIVE, cache=tmp_path).read_bytes() == CONTENT
    assert index.ranges[0] == 0
    assert 0 < index.ranges[1] < index.ranges[2] < len(CONTENT)


def test_fetch__next_run_resumes(index, tmp_path):
    index.cut = 3
    with pytest.raises(StorageError, match="could not be fetched") as caught:
        fetch.fetch_archive(ARCHIVE, cache=tmp_path)
    assert "the next run goes on from there" in caught.value.kept
    assert not (tmp_path / ARCHIVE.cache_name).exists()
    part = (tmp_path / f"{ARCHIVE.cache_name}.part").stat().st_size
    assert part > len(CONTENT) / 2
    assert fetch.fetch_archive(ARCHIVE, cache=tmp_path).read_bytes() == CONTENT
    assert index.ranges[-1] == part


def test_fetch__wrong_hash_is_refused_and_removed(index, tmp_path):
    index.served = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=r"must have sha256.*it is removed"):
        fetch.fetch_archive(ARCHIVE, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch__damaged_cache_is_fetched_again(index, tmp_path):
    path = fetch.fetch_archive(ARCHIVE, cache=tmp_path)
    path.write_bytes(CONTENT[:100])
    assert fetch.fetch_archive(ARCHIVE, cache=tmp_path).read_bytes() == CONTENT


def test_fetch__hash_that_the_index_does_not_offer(index, tmp_path):
    other = fetch.Archive(project="demo-scans", version="1.0", sha256="0" * 64, num_bytes=5)
    with pytest.raises(DataError, match="has no such file"):
        fetch.fetch_archive(other, cache=tmp_path)


def test_fetch__offline_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(requests.Session, "request", refuse)
    with pytest.raises(StorageError, match="is this machine online") as caught:
        fetch.fetch_archive(ARCHIVE, cache=tmp_path)
    text = caught.value.render()
    assert fetch.CACHE_VARIABLE in text
    assert DIGEST in text
    assert len(text.splitlines()) <= 4
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_extract__only_named_regular_members(tmp_path, kind):
    archive = tmp_path / "a"
    if kind == "tar":
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in (("pkg/scan.nii", b"scan"), ("pkg/setup.py", b"evil"), ("../escape", b"evil")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("pkg/folder")
            link.type = tarfile.DIRTYPE
            tar.addfile(link)
    else:
        with zipfile.ZipFile(archive, "w") as container:
            container.writestr("pkg/scan.nii", b"scan")
            container.writestr("../escape", b"evil")
    out = tmp_path / "out"
    fetch.extract_members(archive, {"pkg/scan.nii": out / "x.nii"})
    assert (out / "x.nii").read_bytes() == b"scan"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a", "x.nii"]
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch.extract_members(archive, {"pkg/none": out / "y"})
    if kind == "tar":
        with pytest.raises(DataError, match="is not a file"):
            fetch.extract_members(archive, {"pkg/folder": out / "z"})


def test_index__environment_then_pip_then_the_usual(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert fetch.index_endpoint() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")

    class Answer:
        returncode, stdout = 0, "https://configured.example/simple\n"

    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: Answer)
    assert fetch.index_endpoint() == "https://configured.example/simple"
    Answer.returncode = 1
    assert fetch.index_endpoint() == fetch.PYPI_SIMPLE_ENDPOINT


def test_npm__missing_is_none_and_wrong_hash_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert fetch.fetch_npm("demo", "1.0", sha256=DIGEST, cache=tmp_path) is None
    (tmp_path / "demo-1.0.tgz").write_bytes(b"other")
    with pytest.raises(DataError, match="must have sha256"):
        fetch.fetch_npm("demo", "1.0", sha256=DIGEST, cache=tmp_path)


def test_demo_data__other_modality_names_the_way(tmp_path):
    from samgraft.shared.demo import demo_data

    with pytest.raises(UsageError, match="demo data exists for MODALITY=mri"):
        demo_data(tmp_path / "demo", "ct")
