"""The privacy gate finds planted identifiers in every kind of file and passes clean releases."""

import base64
import getpass
import gzip
import io
import json
import lzma
import socket
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image, PngImagePlugin, TiffImagePlugin
from safetensors.torch import save_file
from samgraft.shared.errors import DataError
from samgraft.shared.release import containers, privacy
from samgraft.shared.release.identifiers import Identifier, IdentifierSearch
from samgraft.shared.release.privacy import refuse_findings, scan_folder

onnx = pytest.importorskip("onnx")

NAME = "Jane^Canary"
KNOWN = ["CanaryHospital"]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Folder like a release, with hashes, decimals, tensors, and torch's own digits."""
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
    monkeypatch.setattr(containers, "CHUNK", 1000)
    plant(clean)
    findings = scan_folder(clean, known=KNOWN)
    assert findings
    with pytest.raises(DataError, match="may identify a person or a machine") as refusal:
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
    # In the numbers of a large optimizer, some bytes always read like a@b.c.
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
        (b"\x28\xb5\x2f\xfd" + b"\0" * 50, "cannot be searched, because it is packed as zstd"),
        (b"7z\xbc\xaf\x27\x1c" + b"\0" * 50, "cannot be searched, because it is packed as 7z"),
        (gzip.compress(b"x" * 4000, mtime=0)[:-12], r"is damaged \(gzip\)"),
    ],
    ids=["zstd", "7z", "damaged_gzip"],
)
def test_gate__refuses_what_it_cannot_unpack(clean, content, match):
    (clean / "blob.bin").write_bytes(content)
    with pytest.raises(DataError, match=match):
        scan_folder(clean)


def test_gate__refuses_bombs(clean, monkeypatch):
    monkeypatch.setattr(containers, "MAX_UNPACKED", 1000)
    (clean / "blob.bin").write_bytes(gzip.compress(b"x" * 4000))
    with pytest.raises(DataError, match="unpacks to more than 1000 bytes"):
        scan_folder(clean)
    deep = b"x"
    for _ in range(8):
        deep = gzip.compress(deep)
    (clean / "blob.bin").write_bytes(deep)
    with pytest.raises(DataError, match="packed more than 4 deep"):
        scan_folder(clean)


PERSON = "Anna Müller"
SPELLINGS = {
    "upper case": "ANNA MÜLLER",
    "decomposed accents": unicodedata.normalize("NFD", "Anna Müller"),
    "without accents": "Anna Muller",
    "JSON escape": "Anna M\\u00fcller",
    "HTML entity": "Anna M&uuml;ller",
    "HTML number": "Anna M&#252;ller",
    "URL encoding": "Anna%20M%C3%BCller",
    "underscore": "anna_müller",
    "hyphen": "Anna-Müller",
    "dot": "anna.müller",
    "no separator": "AnnaMüller",
    "reversed": "Müller, Anna",
    "DICOM form": "MÜLLER^ANNA",
    "transliterated": "MUELLER^ANNA",
    "Python escape": "Anna M\\xfcller",
    "JSON list": '["Müller", "Anna"]',
    "soft hyphen": "Anna Mül\u00adler",
    "base64": base64.b64encode(b"see " + "Anna Müller".encode()).decode(),
    "base64 in a path": "data/" + base64.urlsafe_b64encode("Müller^Anna".encode()).decode().rstrip("="),
    "hexadecimal": "x" + "ANNA MÜLLER".encode().hex(),
}


def write_text(folder, text):
    (folder / "notes.md").write_text(f"From {text} today.\n", encoding="utf-8")


def write_json(folder, text):
    (folder / "notes.json").write_text(json.dumps({"notes": [text]}))


def write_safetensors_metadata(folder, text):
    save_file({"w": torch.zeros(3)}, folder / "sam.safetensors", metadata={"from": text})


def write_pickle(folder, text):
    torch.save({"from": text, "w": torch.zeros(2)}, folder / "sam.pth")


def write_npz(folder, text):
    np.savez_compressed(folder / "stats.npz", names=np.array([text]))


def write_gzip(folder, text):
    (folder / "notes.bin").write_bytes(gzip.compress(b"\0" * 99 + text.encode() + b"\0" * 99))


def write_zip_in_zip(folder, text):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("notes.txt", text)
    with zipfile.ZipFile(folder / "pack.bin", "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())


def write_onnx_metadata(folder, text):
    onnx.save(onnx_model(np.zeros(4, np.float32).tobytes(), note=text), str(folder / "encoder.onnx"))


def write_png(folder, text):
    facts = PngImagePlugin.PngInfo()
    facts.add_itxt("Comment", text, zip=True)
    Image.new("L", (8, 8)).save(folder / "figure.png", pnginfo=facts)


def write_gif(folder, text):
    Image.new("L", (8, 8)).save(folder / "figure.gif", comment=text.encode())


def write_zarr_attribute(folder, text):
    zarr.create_array(str(folder / "map.zarr"), shape=(4,), dtype="f4", attributes={"from": text})


CONTAINERS = [
    write_text,
    write_json,
    write_safetensors_metadata,
    write_pickle,
    write_npz,
    write_gzip,
    write_zip_in_zip,
    write_onnx_metadata,
    write_png,
    write_gif,
    write_zarr_attribute,
]


def onnx_model(weights, *, note="", name="w"):
    tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [len(weights) // 4], weights, raw=True)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[tensor]))
    onnx.helper.set_model_props(model, {"note": note})
    return model


@pytest.mark.parametrize("write", CONTAINERS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gate__finds_a_name_in_every_spelling_and_container(tmp_path, spelling, write):
    write(tmp_path, SPELLINGS[spelling])
    assert "known identifier" in {f.kind for f in scan_folder(tmp_path, known=[PERSON])}
    assert [f for f in scan_folder(tmp_path, known=["Otto Schneider"]) if "known" in f.kind] == []


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_gate__finds_a_name_in_every_encoding_of_unknown_bytes(tmp_path, encoding, case):
    (tmp_path / "blob.bin").write_bytes(b"\0\1\2" + case(PERSON).encode(encoding) + b"\0\1\2")
    assert {f.kind for f in scan_folder(tmp_path, known=[PERSON])} == {"known identifier"}


def write_bytes(name, content):
    def write(folder):
        (folder / name).write_bytes(content)

    return write


def string_array_of_zarr(folder):
    array = zarr.create_array(str(folder / "map.zarr"), shape=(2,), dtype=str)
    array[:] = np.array(["scan", "Anna Müller"])


def number_in_zarr_attribute(folder):
    zarr.create_array(str(folder / "map.zarr"), shape=(4,), dtype="f4", attributes={"subject": {"id": 4711081500}})


def structured_npz(folder):
    np.savez(folder / "stats.npz", np.array([(1.0, "Müller, Anna")], dtype=[("dice", "f4"), ("who", "U20")]))


def second_frame_of_gif(folder):
    file = folder / "figure.gif"
    Image.new("L", (8, 8)).save(file, save_all=True, append_images=[Image.new("L", (8, 8), 9)], duration=100)
    first, mark, second = file.read_bytes().rpartition(b"\x21\xf9")
    file.write_bytes(first + b"\x21\xfe\x07Anna Li\0" + mark + second)


def private_chunk_of_png(folder):
    Image.new("L", (8, 8)).save(folder / "figure.png")
    content = (folder / "figure.png").read_bytes()
    data = b"prVtLi, Anna was here"
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    (folder / "figure.png").write_bytes(content[:33] + chunk + content[33:])


def exif_of_the_camera(folder):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x8769] = {0xA430: "Li, Anna"}
    Image.new("L", (8, 8)).save(folder / "figure.tif", tiffinfo=tags)


def text_in_a_folder_of_digits(folder):
    with zipfile.ZipFile(folder / "pack.bin", "w") as archive:
        archive.writestr("x/data/0", "Li, Anna")


HIDDEN = [
    write_bytes("a.json", b'{"from": "D:\\\\scans\\\\x"}'),
    write_bytes("a.md", b"see file:///home/jane/scans"),
    write_bytes("a.md", b"see jane&#64;site.org"),
    write_bytes("a.md", b"scan.4711081500.nii"),
    write_bytes("a.md", b"scan.1.2.840.113619.2.55.3.604688.dcm"),
    write_bytes("a.md", "Möller^Jörg".encode()),
    write_bytes("a.csv", "id\tM\njane@site.org\t4711081500".encode("utf-16")),
    write_bytes("a.csv", "name;age\nMüller, Anna;47\n".encode("latin-1")),
    write_bytes("a.csv", "name\nMüller, Anna\n".encode("utf-16")),
    write_bytes("a.tsv", b"id\tP-1\n"),
    write_bytes("a.md", b"of P_1_t1"),
    write_bytes("a.md", b"by LI, ANNA"),
    write_bytes("a.LOG", b"x"),
    string_array_of_zarr,
    number_in_zarr_attribute,
    structured_npz,
    second_frame_of_gif,
    private_chunk_of_png,
    exif_of_the_camera,
    text_in_a_folder_of_digits,
]


@pytest.mark.parametrize("write", HIDDEN, ids=[f"{i}-{w.__qualname__.split('.')[0]}" for i, w in enumerate(HIDDEN)])
def test_gate__finds_what_other_formats_and_spellings_hide(tmp_path, write):
    write(tmp_path)
    assert scan_folder(tmp_path, known=["Anna Müller", "Anna Li", "P-1"])
    assert scan_folder(tmp_path / "none", known=["Anna Li"]) == []


@pytest.mark.parametrize("head", [b"\x89HDF\r\n", b"%PDF-1.7", b"PAR1", b"MATLAB 5.0 MAT-file", b"\x04\x22\x4d\x18"])
def test_gate__compressed_formats_without_a_reader_are_refused(tmp_path, head):
    (tmp_path / "blob.bin").write_bytes(head + bytes(50))
    with pytest.raises(DataError, match="cannot be searched, because it is packed as"):
        scan_folder(tmp_path)


def test_gate__base64_in_lines_is_decoded(tmp_path):
    lines = base64.encodebytes(bytes(range(48, 98)) + b"Anna Mueller" + bytes(range(48, 98)))
    assert b"\n" in lines[:-1]
    (tmp_path / "notes.txt").write_bytes(lines)
    assert {f.kind for f in scan_folder(tmp_path, known=[PERSON])} == {"known identifier"}


@pytest.mark.parametrize("seed", range(3))
def test_gate__hashes_and_random_base64_have_no_finding(tmp_path, seed):
    random = np.random.default_rng(seed)
    known = ["".join(map(chr, random.integers(97, 123, size=8))) for _ in range(500)]
    text = "\n".join(base64.b64encode(random.bytes(300)).decode() + " " + random.bytes(32).hex() for _ in range(500))
    (tmp_path / "notes.md").write_text(text)
    assert [f for f in scan_folder(tmp_path, known=known) if f.kind == "known identifier"] == []


def test_gate__ordinary_text_has_no_finding(tmp_path):
    text = "See https://site.org/a/b, 0.12345678 and 12.345678, x:/ and P 10, Anna and Li; step 3:/4.\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "notes.bin").write_text(text)
    assert scan_folder(tmp_path, known=["Anna Li", "P-1"]) == []


def random_floats(seed, *, megabytes):
    return np.random.default_rng(seed).standard_normal(megabytes * 250_000).astype(np.float32) * np.float32(0.02)


@pytest.mark.parametrize("seed", range(3))
def test_gate__random_weights_give_no_finding_in_any_container(tmp_path, seed):
    weights = random_floats(seed, megabytes=8)
    tensors = {"w": torch.from_numpy(weights)}
    save_file(tensors, tmp_path / "sam.safetensors")
    torch.save(tensors, tmp_path / "sam.pth")
    np.savez(tmp_path / "stats.npz", w=weights)
    onnx.save(onnx_model(weights.tobytes()), str(tmp_path / "encoder.onnx"))
    Image.fromarray(weights[:250_000].view(np.uint8).reshape(1000, 1000)).save(tmp_path / "figure.png")
    zarr.create_array(str(tmp_path / "map.zarr"), data=weights[:250_000], chunks=(50_000,))
    known = [f"patient{number:06d}" for number in range(1000)]
    assert scan_folder(tmp_path, known=known) == []


def in_onnx_weights(folder, raw):
    onnx.save(onnx_model(raw + bytes(-len(raw) % 4)), str(folder / "encoder.onnx"))


def in_external_onnx_weights(folder, raw):
    onnx.save(onnx_model(raw * 100), str(folder / "e.onnx"), save_as_external_data=True, location="weights.dat")


def in_safetensors_weights(folder, raw):
    save_file({"w": torch.tensor(list(raw), dtype=torch.uint8)}, folder / "sam.safetensors")


def in_torch_weights(folder, raw):
    torch.save({"w": torch.tensor(list(raw), dtype=torch.uint8)}, folder / "sam.pth")


def in_npz_numbers(folder, raw):
    np.savez_compressed(folder / "stats.npz", w=np.frombuffer(raw, np.uint8))


def in_zarr_values(folder, raw):
    zarr.create_array(str(folder / "map.zarr"), data=np.frombuffer(raw, np.uint8), overwrite=True)


def in_pixels(folder, raw):
    Image.fromarray(np.frombuffer(raw, np.uint8)[None]).save(folder / "figure.png")


NUMBERS = [
    in_onnx_weights,
    in_external_onnx_weights,
    in_safetensors_weights,
    in_torch_weights,
    in_npz_numbers,
    in_zarr_values,
    in_pixels,
]


@pytest.mark.parametrize("write", NUMBERS, ids=lambda w: w.__name__)
def test_gate__numbers_are_searched_for_what_cannot_occur_by_chance(tmp_path, write):
    write(tmp_path, b"\x01\x02\xf3" * 9 + rb"q:\x1_\y" + b"\x01\xf2" * 12 + b"a1@b.c \xff")
    assert scan_folder(tmp_path, known=["kim"]) == []
    write(tmp_path, b"\x01\x02\xf3" * 9 + b"CanaryHospital" + b"\x01\xf2\x03" * 9)
    assert {f.kind for f in scan_folder(tmp_path, known=KNOWN)} == {"known identifier"}


def test_gate__onnx_strings_are_searched_as_text(tmp_path):
    onnx.save(onnx_model(bytes(64), name="q:\\x1_\\y"), str(tmp_path / "encoder.onnx"))
    assert [f.kind for f in scan_folder(tmp_path)] == ["absolute path"]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_gate__damaged_onnx_is_refused(tmp_path, cut):
    content = onnx_model(bytes(range(256)) * 4).SerializeToString()
    (tmp_path / "encoder.onnx").write_bytes(content[: int(cut * len(content))])
    with pytest.raises(DataError, match="ONNX file in a release is damaged"):
        scan_folder(tmp_path)


def test_gate__linked_and_copied_files_are_searched_once(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"x" * 1000)
    (tmp_path / "b.bin").hardlink_to(tmp_path / "a.bin")
    (tmp_path / "c.bin").write_bytes(b"x" * 1000)
    (tmp_path / "d.bin").write_bytes(b"y" * 1000)
    opened = []
    original = privacy.regions
    monkeypatch.setattr(privacy, "regions", lambda file, name: opened.append(name) or original(file, name))
    scan_folder(tmp_path)
    assert opened == ["a.bin", "d.bin"]


def test_gate__copy_with_an_identifier_in_its_name_is_found(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 1000)
    (tmp_path / "CanaryHospital.bin").write_bytes(b"x" * 1000)
    assert [f.file for f in scan_folder(tmp_path, known=KNOWN)] == ["CanaryHospital.bin"]


def test_search__shortest_identifier_in_numbers_grows_with_the_numbers():
    search = IdentifierSearch([Identifier("known identifier", f"patient{n}") for n in range(1000)])
    lengths = [search.shortest_in_numbers(10**power) for power in (3, 6, 9, 12)]
    assert lengths == sorted(lengths)
    assert lengths[0] >= 8
    assert lengths[-1] <= 14
