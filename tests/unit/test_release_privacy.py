"""The gate before a release finds a canary in every place it could hide, and passes what is clean."""

import getpass
import gzip
import json
import lzma
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samgraft.shared.errors import DataError
from samgraft.shared.release import privacy
from samgraft.shared.release.privacy import refuse_findings, scan_folder

NAME = "Jane^Canary"
KNOWN = ["CanaryHospital"]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A folder like a release: hashes, decimals, tensors, a zip with torch's own digits."""
    folder = tmp_path / "release"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"image_encoder.w": torch.randn(150, 150, generator=generator), "i": torch.arange(20000)}
    save_file(tensors, folder / "sam.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "sam.pth")
    facts = {"sha256": "0123456789" * 6 + "abcd", "dice": 0.8123456, "revision": "1234567890" * 4}
    (folder / "card.json").write_text(json.dumps(facts))
    (folder / "README.md").write_text("# A model\n\n93.7 M parameters, Dice 0.812.\n")
    return folder


def test_gate__passes_a_clean_release(clean):
    assert scan_folder(clean, known=KNOWN) == []
    refuse_findings([])


def in_readme(text):
    def plant(folder):
        with (folder / "README.md").open("a") as file:
            file.write(f"\nseen by {text} today\n")

    return plant


def in_card(folder):
    (folder / "card.json").write_text(json.dumps({"notes": ["from canaryhospital"]}))


def in_tensor_name(folder):
    save_file({"CanaryHospital.w": torch.zeros(3)}, folder / "sam.safetensors")


def in_tensor_metadata(folder):
    save_file({"w": torch.zeros(3)}, folder / "sam.safetensors", metadata={"from": "/home/jane/scans"})


def in_tensor_bytes(folder):
    raw = torch.tensor(list(b"....patient MRN12345678 ...."), dtype=torch.uint8)
    save_file({"w": raw}, folder / "sam.safetensors")


def in_utf16_bytes(folder):
    raw = torch.tensor(list("CanaryHospital".encode("utf-16-le")), dtype=torch.uint8)
    save_file({"w": raw}, folder / "sam.safetensors")


def in_pickle(folder):
    torch.save({"args": "/home/jane/scans/a.nii", "w": torch.zeros(2)}, folder / "sam.pth")


def in_archive_root(folder):
    torch.save({"w": torch.zeros(2)}, folder / "MRN12345678_best.pth")
    (folder / "MRN12345678_best.pth").rename(folder / "sam.pth")


def in_file_name(folder):
    (folder / "CanaryHospital.txt").write_text("x")


def in_folder_name(folder):
    (folder / "scan_20260101").mkdir()


def far_inside(folder):
    (folder / "blob.bin").write_bytes(b"\0" * 9000 + b"jane.canary@hospital.example" + b"\0" * 100)


def on_a_chunk_border(folder):
    (folder / "blob.bin").write_bytes(b"\0" * 995 + b"CanaryHospital" + b"\0" * 2000)


def as_event_file(folder):
    (folder / "events.out.tfevents").write_bytes(b"x")


PLANTS = [
    in_readme(NAME), in_readme("jane@hospital.example"), in_readme("1.2.840.113619.2.55.3.604688"),
    in_readme("ID 4711081500"), in_readme("/home/jane/x"), in_readme("CANARYHOSPITAL"),
    in_readme(socket.gethostname()), in_readme(str(Path.home()) + "/x") if str(Path.home()) != "/" else in_card,
    in_card, in_tensor_name, in_tensor_metadata, in_tensor_bytes, in_utf16_bytes, in_pickle, in_archive_root,
    in_file_name, in_folder_name, far_inside, on_a_chunk_border, as_event_file,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.__qualname__)
def test_gate__finds_the_canary(clean, plant, monkeypatch):
    monkeypatch.setattr(privacy, "CHUNK", 1000)
    plant(clean)
    findings = scan_folder(clean, known=KNOWN)
    assert findings
    with pytest.raises(DataError, match="identifies a person or a machine") as refusal:
        refuse_findings(findings)
    assert "Canary" not in refusal.value.what.replace("CanaryHospital.txt", "").replace("CanaryHospital.w", "")


@pytest.mark.parametrize(
    ("text", "in_text", "in_tensor"),
    [
        (b"0=;<8a@b1.c7=;<0", 1, 0),
        (b"0=;<B31@Em.Un|.M0=;<", 1, 0),
        (b"0=;<8x:\\y;<=0=;<0", 1, 0),
        (b"0=;<812345678;=0=;<", 1, 0),
        (b"0=;<x:\\8-.y_z=;<0=;", 1, 0),
        (b"0=;<.X-^Ya;<=0=;<00", 1, 0),
        (b"0=;<.MUELLER^Anna<0", 1, 1),
        (b"0=;< jane@site.org", 1, 1),
        (b"0=;< D:\\scans\\x ;<", 1, 1),
    ],
    ids=[
        "chance address",
        "address of a real optimizer",
        "chance path",
        "chance digits",
        "longer chance path",
        "chance name",
        "name",
        "address",
        "path",
    ],
)
def test_gate__short_chance_matches_count_outside_of_tensors_only(clean, text, in_text, in_tensor):
    """Of the numbers of a large optimizer some always read like a@b.c."""
    tensors = {"w": torch.tensor(list(text), dtype=torch.uint8)}
    save_file(tensors, clean / "sam.safetensors")
    torch.save(tensors, clean / "sam.pth")
    found = scan_folder(clean)
    assert len([f for f in found if f.file == "sam.safetensors"]) == in_tensor
    assert len([f for f in found if f.file.startswith("sam.pth")]) == in_tensor
    torch.save({"args": text.decode()} | tensors, clean / "sam.pth")
    (clean / "notes.bin").write_bytes(text)
    found = [f.file.split(":")[-1] for f in scan_folder(clean)]
    assert found.count("notes.bin") == in_text
    assert found.count("sam/data.pkl") == in_text


def test_gate__finds_the_user_as_a_word(clean, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "kim")
    (clean / "README.md").write_text("skimming is no finding\n")
    assert scan_folder(clean) == []
    (clean / "README.md").write_text("made by kim\n")
    assert [f.kind for f in scan_folder(clean)] == ["user name"]


def test_gate__refuses_what_it_cannot_search(clean):
    (clean / "link").symlink_to(clean / "README.md")
    with pytest.raises(DataError, match="plain files only"):
        scan_folder(clean)


def in_gzip(folder):
    (folder / "notes.bin").write_bytes(gzip.compress(b"x" * 5000 + b"CanaryHospital"))


def in_gzip_header(folder):
    with gzip.GzipFile(folder / "notes.bin", "wb") as file:
        file.write(b"x")
    packed = bytearray((folder / "notes.bin").read_bytes())
    packed[3] = 8  # FNAME: the original file's name follows the fixed header
    (folder / "notes.bin").write_bytes(bytes(packed[:10]) + b"CanaryHospital\0" + gzip.compress(b"x")[10:])


def in_npz(folder):
    np.savez_compressed(folder / "stats.npz", names=np.array(["CanaryHospital"] * 20))


def in_xz_in_zip(folder):
    with zipfile.ZipFile(folder / "pack.bin", "w") as archive:
        archive.writestr("inner", lzma.compress(b"-" * 3000 + b"CanaryHospital"))


def in_zip_comment(folder):
    with zipfile.ZipFile(folder / "pack.bin", "w") as archive:
        archive.comment = b"by CanaryHospital"
        archive.writestr("a", b"x")


def in_utf16_big_endian(folder):
    (folder / "blob.bin").write_bytes(b"\0" * 100 + "CanaryHospital".encode("utf-16-be") + b"\0" * 100)


def in_onnx_metadata(folder):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"stack": "File /home/jane/work/model.py, line 3"})
    onnx.save(model, str(folder / "encoder.onnx"))


PACKED = [
    in_gzip,
    in_gzip_header,
    in_npz,
    in_xz_in_zip,
    in_zip_comment,
    in_utf16_big_endian,
    in_onnx_metadata,
]


@pytest.mark.parametrize("plant", PACKED, ids=lambda p: p.__name__)
def test_gate__finds_the_canary_in_what_is_packed(clean, plant):
    plant(clean)
    assert [f for f in scan_folder(clean, known=KNOWN) if "known" in f.kind or "path" in f.kind]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x28\xb5\x2f\xfd" + b"\0" * 50, "cannot be searched, this is zstd"),
        (b"7z\xbc\xaf\x27\x1c" + b"\0" * 50, "cannot be searched, this is 7z"),
        (gzip.compress(b"x" * 4000, mtime=0)[:-12], "this gzip is damaged"),
    ],
    ids=["zstd", "7z", "damaged_gzip"],
)
def test_gate__refuses_what_it_cannot_unpack(clean, content, match):
    (clean / "blob.bin").write_bytes(content)
    with pytest.raises(DataError, match=match):
        scan_folder(clean)


def test_gate__refuses_bombs(clean, monkeypatch):
    monkeypatch.setattr(privacy, "MAX_UNPACKED", 1000)
    (clean / "blob.bin").write_bytes(gzip.compress(b"x" * 4000))
    with pytest.raises(DataError, match="must unpack to at most 1000 bytes"):
        scan_folder(clean)
    deep = b"x"
    for _ in range(8):
        deep = gzip.compress(deep)
    (clean / "blob.bin").write_bytes(deep)
    with pytest.raises(DataError, match="packed more than 4 deep"):
        scan_folder(clean)
