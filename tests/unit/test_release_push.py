"""``release --push`` against a server on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from samgraft.shared.cli import main
from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.fetch import OFFLINE_VARIABLE
from samgraft.shared.release.push import check_repository, push_release

TOKEN = "hf_invented"


class Hub(BaseHTTPRequestHandler):
    """The four requests of an upload. Files are committed as plain ones."""

    requests: list = []  # noqa: RUF012
    files: dict = {}  # noqa: RUF012
    refuse = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.requests.append((self.path, self.headers.get("Authorization"), body))
        if Hub.refuse:
            return self._answer({"error": "no"}, status=403)
        if self.path == "/api/repos/create":
            return self._answer({"url": f"http://{self.headers['Host']}/lab/model"})
        if self.path.startswith("/api/models/lab/model/preupload/"):
            named = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer({"files": named})
        if self.path.startswith("/api/models/lab/model/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"http://{self.headers['Host']}/lab/model/commit/1", "commitOid": "1"})
        return self._answer({"errors": [], "warnings": []})

    def do_GET(self):
        self._answer({"id": "lab/model", "sha": "0", "siblings": []})

    def _answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.requests, Hub.files, Hub.refuse = [], {}, False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    release = tmp_path / "release"
    (release / "adapter").mkdir(parents=True)
    (release / "sam.safetensors").write_bytes(b"tensors")
    (release / "adapter" / "adapter_config.json").write_text("{}")
    (release / "README.md").write_text("---\nlicense: cc-by-4.0\n---\ncard\n")
    return release


def test_push__sends_every_file_and_nothing_else(hub, folder):
    address = push_release(folder, "lab/model")
    assert address.endswith("/lab/model/commit/1")
    on_disk = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == on_disk
    created = json.loads(hub.requests[0][2])
    assert (hub.requests[0][0], created["name"], created["organization"]) == ("/api/repos/create", "model", "lab")
    assert created.get("private") or created.get("visibility") == "private"
    assert {token for _, token, _ in hub.requests} == {f"Bearer {TOKEN}"}
    sent = b" ".join(body for _, _, body in hub.requests)
    assert str(folder.parent).encode() not in sent


def test_push__refusal_keeps_the_release(hub, folder):
    hub.refuse = True
    with pytest.raises(StorageError, match=r"could not be uploaded \(status 403\)") as error:
        push_release(folder, "lab/model")
    assert error.value.kept == "the release release"
    assert TOKEN not in error.value.render()


@pytest.mark.parametrize("name", ["model", "a/b/c", "lab/", "/x", "lab/mod el", "..", ""])
def test_repository__wrong_name_is_refused(hub, name):
    with pytest.raises(UsageError, match="expected OWNER/NAME"):
        check_repository(name)


def test_repository__without_network_or_login_is_refused_before_the_release(hub, monkeypatch):
    check_repository("lab/model")
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    with pytest.raises(UsageError, match="disallows"):
        check_repository("lab/model")
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a login"):
        check_repository("lab/model")


def test_command__wrong_repository_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["release", "runs/a", "--out", "b", "--push", "model"]) == 2
    assert "--push must name a repository (got 'model', expected OWNER/NAME)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
