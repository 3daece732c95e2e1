"""Official weights from a local server: resumed, verified, cached, and never fetched when offline."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from samgraft.shared.errors import StorageError, UsageError, WeightsError
from samgraft.shared.weights import download
from samgraft.shared.weights.download import OFFICIAL, OfficialWeights, official_weights

CONTENT = bytes(range(256)) * 4096


class Server:
    """Serves CONTENT; can break off, lie or never end."""

    def __init__(self) -> None:
        self.requests: list[str | None] = []
        self.body = CONTENT
        self.break_after: int | None = None
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(wanted)
                if outer.status != 200:
                    self.send_error(outer.status)
                    return
                start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
                self.send_response(206 if wanted else 200)
                body = outer.body[start:]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if outer.break_after is not None:
                    body, outer.break_after = body[: outer.break_after], None
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/w.pth"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    entry = OfficialWeights(
        name="small", url=server.address, num_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(OFFICIAL, "small", entry)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.delenv(download.OFFLINE_VARIABLE, raising=False)
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_download__verified_and_then_taken_from_the_cache(tmp_path: Path, server: Server) -> None:
    path = official_weights("small", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert official_weights("small", cache=tmp_path) == path
    assert official_weights("small", cache=tmp_path, offline=True) == path
    assert server.requests == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_broken_connection__goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    server.break_after = 300_000
    assert official_weights("small", cache=tmp_path).read_bytes() == CONTENT
    assert server.requests[0] is None
    assert server.requests[1] == "bytes=262144-"  # whole pieces of 64 KiB are kept


def test_wrong_content__removed_and_refused(tmp_path: Path, server: Server) -> None:
    server.body = CONTENT[::-1]
    with pytest.raises(WeightsError, match=r"small must have sha256 .*got"):
        official_weights("small", cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_endless_server__does_not_fill_the_disk(tmp_path: Path, server: Server) -> None:
    server.body = CONTENT * 3
    with pytest.raises(WeightsError, match="must have sha256"):
        official_weights("small", cache=tmp_path)


def test_damaged_cache__fetched_again(tmp_path: Path, server: Server) -> None:
    (tmp_path / "w.pth").write_bytes(b"damaged")
    assert official_weights("small", cache=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline__never_connects(tmp_path: Path, server: Server, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv(download.OFFLINE_VARIABLE, "1")
    with pytest.raises(StorageError, match="must be in the cache when offline"):
        official_weights("small", cache=tmp_path, offline=True if how == "argument" else None)
    assert server.requests == []


def test_unreachable__says_what_to_bring(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(StorageError, match=r"could not be fetched \(HTTPError\)"):
        official_weights("small", cache=tmp_path)


def test_mirror__keeps_the_pinned_hash(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFICIAL, "small", replace(OFFICIAL["small"], url="https://example.org/w.pth"))
    assert official_weights("small", cache=tmp_path / "a", address=server.address).read_bytes() == CONTENT
    server.body = CONTENT[::-1]
    with pytest.raises(WeightsError, match="small must have sha256"):
        official_weights("small", cache=tmp_path / "b", address=server.address)


def test_unknown_name__lists_the_known() -> None:
    with pytest.raises(UsageError, match="sam_vit_b, sam_vit_l, sam_vit_h, mobile_sam, medsam_vit_b"):
        official_weights("sam_vit_x")


def test_official__every_entry_is_pinned() -> None:
    for entry in OFFICIAL.values():
        assert len(entry.sha256) == 64
        assert entry.url.startswith("https://")
        assert entry.num_bytes > 10_000_000
