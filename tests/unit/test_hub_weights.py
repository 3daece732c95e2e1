"""Weights given as ``hf://`` addresses, from a server on this machine."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from model_factory import make_sam, tiny_vit_t_spec
from safetensors.torch import save
from samgraft.finetune.initial_weights import read_initial_weights
from samgraft.shared.cli import main
from samgraft.shared.errors import StorageError, WeightsError
from samgraft.shared.fetch import OFFLINE_VARIABLE
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import read_weights
from samgraft.shared.weights.official import fetch_from_hub
from samgraft.ssl.ssl_state import find_state

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
IS_MISSING = "the weights could not be downloaded"


class Hub(BaseHTTPRequestHandler):
    """Requests of a download, for one public repository."""

    files: dict = {}  # noqa: RUF012
    requests: list = []  # noqa: RUF012

    def do_HEAD(self):
        self._reply(with_body=False)

    def do_GET(self):
        self._reply(with_body=True)

    def _reply(self, *, with_body):
        Hub.requests.append(self.path)
        content, commit = self._find()
        self.send_response(200 if content is not None else 404)
        content = content or b""
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _find(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "lab", "model"]:
            commit = COMMITS.get(parts[5] if len(parts) > 5 else "main", "")
            if not commit:
                return None, ""
            if parts[4:5] == ["tree"]:
                listed = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                          for name, content in Hub.files.items()]  # fmt: skip
                return json.dumps(listed).encode(), commit
            about = {"id": "lab/model", "sha": commit, "siblings": [{"rfilename": name} for name in Hub.files]}
            return json.dumps(about).encode(), commit
        if parts[:3] == ["lab", "model", "resolve"]:
            return Hub.files.get("/".join(parts[4:])), COMMITS[parts[3]]
        return None, ""

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.requests = []
    spec = tiny_vit_t_spec()
    card = Card(arch="vit_t", stem=spec.variant, image_size=64, pixel_mean=[7.0] * 3, pixel_std=[9.0] * 3)
    card.write(tmp_path / "card.json")
    Hub.files = {
        "sam.safetensors": save(
            {name: t.contiguous() for name, t in make_sam(spec, image_size=64).state_dict().items()}
        ),
        "sam.pth": b"never downloaded",
        "README.md": b"never downloaded",
        "card.json": (tmp_path / "card.json").read_bytes(),
        "ssl_state/state.safetensors": b"state",
        "ssl_state/state.json": b"{}",
    }
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    monkeypatch.setenv("SAMGRAFT_CACHE", str(tmp_path / "cache"))
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    yield Hub
    server.shutdown()
    server.server_close()


def test_hub__weights_come_with_their_card_and_the_commit_is_recorded(hub, caplog):
    caplog.set_level("INFO", logger="samgraft")
    initial = read_initial_weights(None, base=Path("hf://lab/model"), image_size=None)
    assert initial.base.spec.pixel_mean == (7.0, 7.0, 7.0)
    assert initial.base.sha256 == hashlib.sha256(hub.files["sam.safetensors"]).hexdigest()
    assert f"from hf://lab/model@{COMMITS['main']}" in initial.base.notes
    assert f"those of hf://lab/model@{COMMITS['main']}" in caplog.text
    assert not [path for path in hub.requests if path.endswith(("sam.pth", "README.md"))]


def test_hub__file_and_revision_are_those_of_the_address(hub, capsys):
    assert main(["inspect", "hf://lab/model/sam.safetensors@v1"]) == 0
    assert f"note: from hf://lab/model/sam.safetensors@{COMMITS['v1']}" in capsys.readouterr().out


def test_hub__copy_is_used_offline_and_for_a_commit_without_a_request(hub, monkeypatch):
    first = fetch_from_hub("hf://lab/model")
    hub.requests.clear()
    assert fetch_from_hub(first.address) == first
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    assert fetch_from_hub("hf://lab/model") == first
    assert read_weights("hf://lab/model/sam.safetensors").sha256
    with pytest.raises(StorageError, match="not in the cache folder, and SAMGRAFT_OFFLINE disallows"):
        fetch_from_hub("hf://lab/model@v1")
    assert hub.requests == []


def test_hub__ssl_state_of_a_continuable_release_is_found(hub):
    assert find_state("hf://lab/model") == fetch_from_hub("hf://lab/model").path / "ssl_state"
    assert find_state("hf://lab/model/sam.safetensors") is None


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("hf://lab", WeightsError, r"not understood \(got hf://lab, expected hf://OWNER/NAME"),
        ("hf://lab/model@", WeightsError, "not understood"),
        ("hf://lab/model/none.pt", WeightsError, r"the repository has no none.pt \(found README.md, card.json"),
        ("hf://lab/other", StorageError, rf"{IS_MISSING} \(status 404\)"),
        ("hf://lab/model@v9", StorageError, rf"{IS_MISSING} \(status 404\)"),
    ],
)
def test_hub__wrong_address_is_refused(hub, address, error, message):
    with pytest.raises(error, match=message):
        fetch_from_hub(address)


def test_hub__repository_without_weights_is_refused_with_its_files(hub):
    hub.files = {"README.md": b"", "data.csv": b""}
    Hub.files = hub.files
    with pytest.raises(WeightsError, match=r"has none of encoder/encoder.safetensors.*\(found README.md, data.csv\)"):
        fetch_from_hub("hf://lab/model")
