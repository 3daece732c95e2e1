"""Downloads from local servers and registries that break off, change or refuse files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from filelock import FileLock
from pypi_simple import PYPI_SIMPLE_ENDPOINT
from samgraft.finetune.evaluation import viewer
from samgraft.shared import fetch
from samgraft.shared.errors import DataError, StorageError, UsageError, WeightsError
from samgraft.shared.weights import official
from samgraft.shared.weights.official import OFFICIAL, official_weights

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ARCHIVE = fetch.package_archive("demo-scans", "1.0", sha256=SHA256, num_bytes=len(CONTENT), licence="CC0-1.0")


class Server:
    """Web server on this machine with one file, a package index and an npm registry."""

    def __init__(self) -> None:
        self.body = CONTENT
        self.num_cuts = 0
        """Answers that end after a third of the file."""
        self.num_failures = 0
        """Answers with ``status`` before the first good one."""
        self.status = 503
        self.starts: list[int] = []
        """First byte of each request for the file."""
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send what the path stands for."""
        self.paths.append(request.path)
        if self.num_failures > 0:
            self.num_failures -= 1
            self._send(request, self.status, b"")
        elif request.path == "/simple/demo-scans/":
            link = f'<a href="/files/demo-scans-1.0.tar.gz#sha256={SHA256}">demo-scans-1.0.tar.gz</a>'
            self._send(request, 200, link.encode(), content_type="text/html")
        elif request.path.startswith("/files/"):
            wanted = request.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.starts.append(start)
            body = self.body[start:]
            self._send(request, 206 if wanted else 200, body, stop=len(body) // 3 if self.num_cuts else None)
            self.num_cuts = max(0, self.num_cuts - 1)
        elif request.path == "/demo-tool":
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(self.body).digest()).decode()
            dist = {"tarball": f"{self.root}/files/demo-tool-1.0.0.tgz", "integrity": integrity}
            version = {"name": "demo-tool", "version": "1.0.0", "dist": dist}
            packument = {"name": "demo-tool", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            self._send(request, 200, json.dumps(packument).encode(), content_type="application/json")
        else:
            self._send(request, 404, b"")

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        code: int,
        body: bytes,
        *,
        stop: int | None = None,
        content_type: str = "application/octet-stream",
    ) -> None:
        request.send_response(code)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Type", content_type)
        request.end_headers()
        request.wfile.write(body[:stop])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server()
    monkeypatch.setenv("PIP_INDEX_URL", f"{running.root}/simple/")
    monkeypatch.setenv(fetch.OFFLINE_VARIABLE, "0")
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.0)
    small = fetch.PinnedFile(
        name="small", file_name="w.pth", url=f"{running.root}/files/w.pth", num_bytes=len(CONTENT), sha256=SHA256
    )
    monkeypatch.setitem(OFFICIAL, "small", small)
    yield running
    running.http.shutdown()
    running.http.server_close()


def visible_files(folder: Path) -> list[str]:
    """Return the names in a folder without those of locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("kind", ["archive", "weights"])
def test_fetch__file_is_verified_cached_and_not_asked_for_again(server: Server, tmp_path: Path, kind: str) -> None:
    def run() -> Path:
        return official_weights("small", cache=tmp_path) if kind == "weights" else fetch_archive(tmp_path)

    path = run()
    assert path.read_bytes() == CONTENT
    assert visible_files(tmp_path) == [path.name]
    num_requests = len(server.paths)
    assert run() == path
    assert len(server.paths) == num_requests


def fetch_archive(cache: Path) -> Path:
    return fetch.fetch_file(ARCHIVE, cache=cache)


def test_fetch__outside_a_terminal_prints_one_line_and_more_only_for_slow_downloads(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("INFO"):
        fetch_archive(tmp_path / "fast")
        assert caplog.messages == ["fetching demo-scans 1.0: 1 MB"]
        monkeypatch.setattr(fetch, "LOG_INTERVAL_S", 0.0)
        fetch_archive(tmp_path / "slow")
    assert caplog.messages[-1] == "fetching demo-scans 1.0: 1 of 1 MB"
    assert len(caplog.messages) > 3


@pytest.mark.parametrize("trouble", ["num_cuts", "num_failures"])
def test_fetch__connection_that_breaks_is_continued(server: Server, tmp_path: Path, trouble: str) -> None:
    setattr(server, trouble, 2)
    assert official_weights("small", cache=tmp_path).read_bytes() == CONTENT
    assert server.starts[0] == 0
    if trouble == "num_cuts":
        assert 0 < server.starts[1] < server.starts[2] < len(CONTENT)


def test_fetch__next_command_continues_a_download(server: Server, tmp_path: Path) -> None:
    server.num_cuts = 4
    with pytest.raises(StorageError, match=r"demo-scans 1.0 .* could not be downloaded \(\w+Error\)") as refusal:
        fetch_archive(tmp_path)
    assert "where the next run continues" in str(refusal.value.kept)
    assert not (tmp_path / ARCHIVE.file_name).exists()
    part = (tmp_path / f"{ARCHIVE.file_name}.part").stat().st_size
    assert part > len(CONTENT) / 2
    assert fetch_archive(tmp_path).read_bytes() == CONTENT
    assert server.starts[-1] == part


@pytest.mark.parametrize("body", [CONTENT[::-1], CONTENT * 3], ids=["changed", "endless"])
def test_fetch__wrong_content_is_refused_and_deleted(server: Server, tmp_path: Path, body: bytes) -> None:
    server.body = body
    with pytest.raises(DataError, match=r"damaged or was replaced .*It is deleted"):
        fetch_archive(tmp_path)
    with pytest.raises(WeightsError, match=r"the download of small is damaged"):
        official_weights("small", cache=tmp_path)
    assert visible_files(tmp_path) == []


def test_fetch__endless_answer_is_cut_after_one_byte_too_many(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = CONTENT * 3
    sizes: list[int] = []
    sha256 = fetch.file_sha256
    monkeypatch.setattr(fetch, "file_sha256", lambda path: sizes.append(path.stat().st_size) or sha256(path))
    with pytest.raises(DataError, match="damaged"):
        fetch_archive(tmp_path)
    assert sizes == [len(CONTENT) + 1]


def test_fetch__damaged_cached_file_is_downloaded_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w.pth").write_bytes(b"damaged")
    with caplog.at_level("INFO"):
        assert official_weights("small", cache=tmp_path).read_bytes() == CONTENT
    assert "w.pth is damaged and is downloaded again" in caplog.text


def test_fetch__two_processes_download_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two commands that start together on a new machine would append to the same partial file."""
    lock = FileLock(tmp_path / ".w.pth.lock")
    lock.acquire()
    paths: list[Path] = []
    second = threading.Thread(target=lambda: paths.append(official_weights("small", cache=tmp_path)))
    with caplog.at_level("INFO"):
        second.start()
        while "Waiting for another process" not in caplog.text:
            second.join(0.01)
    (tmp_path / "w.pth").write_bytes(CONTENT)
    lock.release()
    second.join()
    assert paths == [tmp_path / "w.pth"]
    assert server.paths == []


@pytest.mark.parametrize("kind", ["archive", "weights", "npm"])
def test_offline__nothing_is_downloaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(fetch.OFFLINE_VARIABLE, "1")
    run, name = {
        "archive": (lambda: fetch_archive(tmp_path), ARCHIVE.file_name),
        "weights": (lambda: official_weights("small", cache=tmp_path), "w.pth"),
        "npm": (lambda: fetch.fetch_npm("demo", "1.0.0", sha256=SHA256, cache=tmp_path), "demo-1.0.0.tgz"),
    }[kind]
    with pytest.raises(
        StorageError, match=rf"SAMGRAFT_OFFLINE disallows downloads.*{SHA256} there as {name}"
    ) as refusal:
        run()
    assert refusal.value.where == str(tmp_path)
    (tmp_path / name).write_bytes(CONTENT)
    assert run() == tmp_path / name
    assert server.paths == []


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("yes", True), ("0", False), ("", False), ("no", False)])
def test_offline__values_of_the_variable(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv(fetch.OFFLINE_VARIABLE, value)
    assert fetch.is_offline() is offline


def test_unreachable__error_gives_the_way_without_network(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests.Session, "request", refuse)
    with pytest.raises(StorageError, match="Is this machine online") as refusal:
        fetch_archive(tmp_path)
    text = refusal.value.render()
    assert fetch.CACHE_VARIABLE in text
    assert SHA256 in text
    assert len(text.splitlines()) <= 4
    assert refusal.value.exit_code == 5


def test_unreachable__missing_file_is_not_asked_for_again(tmp_path: Path, server: Server) -> None:
    server.num_failures, server.status = 9, 404
    with pytest.raises(StorageError, match=r"small .*\(HTTPError 404\)"):
        official_weights("small", cache=tmp_path)
    assert len(server.paths) == 1


def test_index__file_with_another_hash_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"offers no file of demo-scans 1\.0"):
        fetch.fetch_file(replace(ARCHIVE, sha256="0" * 64), cache=tmp_path)
    with pytest.raises(StorageError, match="has no project other"):
        fetch.fetch_file(replace(ARCHIVE, project="other"), cache=tmp_path)


def test_index__environment_then_pip_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert fetch.index_endpoint() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")

    class Answer:
        returncode, stdout = 0, "https://configured.example/simple\n"

    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: Answer)
    assert fetch.index_endpoint() == "https://configured.example/simple"
    Answer.returncode = 1
    assert fetch.index_endpoint() == PYPI_SIMPLE_ENDPOINT


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_extract__only_named_regular_members(tmp_path: Path, kind: str) -> None:
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
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".a.lock", "a", "x.nii"]
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch.extract_members(archive, {"pkg/none": out / "y"})
    if kind == "tar":
        with pytest.raises(DataError, match="is not a file"):
            fetch.extract_members(archive, {"pkg/folder": out / "z"})


@pytest.fixture
def registry(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """Server as npm's registry, with npm's cache empty as on a new machine."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    monkeypatch.setenv("npm_config_registry", f"{server.root}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm cache"))
    monkeypatch.setenv("npm_config_userconfig", str(tmp_path / "npmrc"))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in (
            ("package/package.json", b'{"name": "demo-tool", "version": "1.0.0"}'),
            ("package/data", b"7"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    server.body = content.getvalue()
    return server


def test_npm__empty_cache_and_a_registry_that_fails_once(registry: Server, tmp_path: Path) -> None:
    """npm refused its own contradicting options before it connected, which a filled npm cache concealed."""
    registry.num_failures = 1
    sha256 = hashlib.sha256(registry.body).hexdigest()
    path = fetch.fetch_npm("demo-tool", "1.0.0", sha256=sha256, cache=tmp_path / "cache")
    fetch.extract_members(path, {"package/data": tmp_path / "data"})
    assert (tmp_path / "data").read_bytes() == b"7"
    assert registry.paths[:2] == ["/demo-tool", "/demo-tool"]


def test_npm__its_own_error_is_shown_and_the_next_call_tries_again(registry: Server, tmp_path: Path) -> None:
    registry.num_failures, registry.status = 99, 404
    sha256 = hashlib.sha256(registry.body).hexdigest()
    with pytest.raises(StorageError, match=r"demo-tool@1.0.0. It printed: code E404; 404 Not Found"):
        fetch.fetch_npm("demo-tool", "1.0.0", sha256=sha256, cache=tmp_path / "cache")
    registry.num_failures = 0
    assert fetch.fetch_npm("demo-tool", "1.0.0", sha256=sha256, cache=tmp_path / "cache").is_file()


def test_npm__missing_program_and_wrong_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(fetch.OFFLINE_VARIABLE, "0")
    monkeypatch.setattr(fetch.shutil, "which", lambda _: None)
    with pytest.raises(StorageError, match="npm, which is not installed"):
        fetch.fetch_npm("demo", "1.0", sha256=SHA256, cache=tmp_path)
    (tmp_path / "demo-1.0.tgz").write_bytes(b"other")
    with pytest.raises(DataError, match="damaged or was replaced"):
        fetch.fetch_npm("demo", "1.0", sha256=SHA256, cache=tmp_path)
    assert not (tmp_path / "demo-1.0.tgz").exists()


def test_viewer__missing_script_is_a_warning_and_the_next_report_tries_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fail(*_: object, **__: object) -> Path:
        calls.append(1)
        raise StorageError("the package index is down.")

    monkeypatch.setattr(viewer, "VENDOR_FOLDER", tmp_path / "vendor")
    monkeypatch.setattr(viewer, "fetch_file", fail)
    assert viewer.fetch_bundle() is None
    assert viewer.fetch_bundle() is None
    assert len(calls) == 2
    assert "no 3D viewer: the package index is down. The next report tries again." in caplog.text


def test_demo_data__other_modality_gives_the_command_for_own_scans(tmp_path: Path) -> None:
    from samgraft.shared.demo.heads import demo_data

    with pytest.raises(UsageError, match="demo data exist for MODALITY=mri"):
        demo_data(tmp_path / "demo", "ct")


def test_official__mirror_keeps_the_pinned_hash(tmp_path: Path, server: Server) -> None:
    address = f"{server.root}/files/mirror"
    assert official_weights("small", cache=tmp_path / "a", address=address).read_bytes() == CONTENT
    assert server.paths == ["/files/mirror"]
    server.body = CONTENT[::-1]
    with pytest.raises(WeightsError, match="small is damaged"):
        official_weights("small", cache=tmp_path / "b", address=address)


def test_official__file_of_an_earlier_version_is_used_where_it_is(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official, "FORMER_CACHE", tmp_path)
    (tmp_path / "w.pth").write_bytes(CONTENT)
    assert official_weights("small", cache=tmp_path / "new") == tmp_path / "w.pth"
    assert server.paths == []


def test_official__unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="known are sam_vit_b, sam_vit_l, sam_vit_h, mobile_sam, medsam_vit_b"):
        official_weights("sam_vit_x")


def test_official__every_file_is_pinned() -> None:
    for file in OFFICIAL.values():
        assert len(file.sha256) == 64
        assert str(file.url).startswith("https://")
        assert file.num_bytes > 10_000_000
