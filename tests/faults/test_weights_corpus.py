"""Hostile, damaged and foreign weights files. Each is refused with a reason and exit code 4, and none runs code."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from model_factory import make_sam, tiny_hiera_spec, tiny_plain_spec
from safetensors.torch import save_file
from samgraft.shared.cli import main
from samgraft.shared.encoders.sam import build_sam
from samgraft.shared.errors import WeightsError
from samgraft.shared.weights.card import Card
from samgraft.shared.weights.load import load_image_encoder, load_sam, read_weights
from samgraft.shared.weights.safe_read import read_raw_weights
from samgraft.shared.weights.sam2_format import to_sam2
from samgraft.shared.weights.save import save_sam


@pytest.fixture(scope="module")
def sam_tensors() -> dict[str, torch.Tensor]:
    return dict(make_sam(tiny_plain_spec(), image_size=160).state_dict())


class Payload:
    """Object whose unpickling runs a command that writes a canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.canary}",))


class EvalPayload(Payload):
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, (f"open({str(self.canary)!r}, 'w')",))


def save_zip(path: Path, members: dict[str, bytes], *, compressed: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def rezip(path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = dict(change(info.filename, archive.read(info)) for info in archive.infolist())
    save_zip(path, members)


def safetensors_bytes(header: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Tensors = dict[str, torch.Tensor]


def _code(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({**t, "x": Payload(canary)}, path)


def _code_eval(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"model": t, "x": EvalPayload(canary)}, path)


def _code_old_protocol(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({**t, "x": Payload(canary)}, path, pickle_protocol=4)


def _bare_pickle(path: Path, t: Tensors, canary: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"x": Payload(canary)}))


def _legacy_pth_with_code(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"x": Payload(canary)}, path, _use_new_zipfile_serialization=False)


def _namespace(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"model": t, "args": argparse.Namespace(lr=1)}, path)


def _path_object(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"model": t, "args": pathlib.PurePosixPath("/x")}, path)


def _numpy_scalar(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"model": t, "best": np.float64(0.5)}, path)


def _torchscript(path: Path, t: Tensors, canary: Path) -> None:
    save_zip(path, {"m/data.pkl": b"\x80\x02}q\x00.", "m/code/__torch__.py": b"", "m/constants.pkl": b""})


def _dcp_folder(path: Path, t: Tensors, canary: Path) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x04.")
    (path / "__0_0.distcp").write_bytes(b"x")


def _empty(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"")


def _truncated_pth(path: Path, t: Tensors, canary: Path) -> None:
    torch.save(t, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated_safetensors(path: Path, t: Tensors, canary: Path) -> None:
    save_file(t, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _padded_safetensors(path: Path, t: Tensors, canary: Path) -> None:
    save_file(t, path)
    path.write_bytes(path.read_bytes() + b"\0" * 100)


def _padded_pth(path: Path, t: Tensors, canary: Path) -> None:
    torch.save(t, path)
    path.write_bytes(path.read_bytes() + b"\0" * 70_000)


def _cut_by_one_byte(path: Path, t: Tensors, canary: Path) -> None:
    torch.save(t, path)
    path.write_bytes(path.read_bytes()[:-1])


def _web_page(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"\n<!DOCTYPE html><html>quota exceeded</html>" * 20)


def _lfs_pointer(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 375042383\n")


def _json(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b'{"weights": [1, 2, 3]}' * 30)


def _zip_of_folder(path: Path, t: Tensors, canary: Path) -> None:
    save_zip(path, {"folder/readme.txt": b"hello", "folder/weights.bin": b"1" * 100})


def _old_tar(path: Path, t: Tensors, canary: Path) -> None:
    import tarfile

    inner = path.with_suffix(".txt")
    inner.write_text("x")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(inner, "storages")


def _zip_bomb(path: Path, t: Tensors, canary: Path) -> None:
    save_zip(path, {"m/data.pkl": b"\x80\x02}.", "m/data/0": b"\0" * 50_000_000}, compressed=True)


def _huge_header(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{" * 64)


def _huge_shape_safetensors(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}))


def _negative_shape_safetensors(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(safetensors_bytes({"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, b"0" * 16))


def _huge_shape_pth(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({"a": torch.empty(1).expand(2**40)}, path)


def _many_tensors(path: Path, t: Tensors, canary: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(safetensors_bytes({f"t{i}": entry for i in range(9000)}))


def _path_traversal(path: Path, t: Tensors, canary: Path) -> None:
    torch.save(t, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../" + canary.name, b"x")


def _broken_pickle(path: Path, t: Tensors, canary: Path) -> None:
    save_zip(path, {"m/data.pkl": b"\x80\x02}q\x00(X\xff\xff", "m/data/0": b"0"})


def _missing_storage(path: Path, t: Tensors, canary: Path) -> None:
    torch.save(t, path)
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist() if not i.filename.endswith("/data/3")}
    save_zip(path, members)


def _onnx(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"\x08\x07\x12\x07pytorch" + b"\0" * 64)


def _gguf(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"GGUF" + b"\0" * 64)


def _gzip(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + b"\0" * 64)


def _hdf5(path: Path, t: Tensors, canary: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 64)


def _nan(path: Path, t: Tensors, canary: Path) -> None:
    bad = {k: v.clone() for k, v in t.items()}
    bad["image_encoder.blocks.3.attn.qkv.weight"][0, 0] = float("nan")
    torch.save(bad, path)


def _no_known_key(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({f"backbone_{i}": torch.ones(2) for i in range(5)}, path)


def _one_missing(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({k: v for k, v in t.items() if k != "mask_decoder.iou_token.weight"}, path)


def _no_encoder(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({k: v for k, v in t.items() if not k.startswith("image_encoder.")}, path)


def _encoder_only(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({k: v for k, v in t.items() if k.startswith("image_encoder.")}, path)


def _unknown_beside(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({**t, "mask_decoder.extra.weight": torch.ones(2)}, path)


def _peft_adapter(path: Path, t: Tensors, canary: Path) -> None:
    save_file({"base_model.model.image_encoder.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 32)}, path)


def _bottleneck_adapters(path: Path, t: Tensors, canary: Path) -> None:
    torch.save({**t, "image_encoder.blocks.0.Space_Adapter.D_fc1.weight": torch.ones(8, 32)}, path)


CORPUS: list[tuple[Callable[[Path, Tensors, Path], None], str]] = [
    (_code, r"contains code to run on loading \(posix.system\)"),
    (_code_eval, r"contains code to run on loading \((__builtin__|builtins).eval\)"),
    (_code_old_protocol, r"contains code to run on loading \(posix.system\)"),
    (_bare_pickle, "bare pickle"),
    (_legacy_pth_with_code, "old format"),
    (_namespace, r"foreign objects \(argparse.Namespace\)"),
    (_path_object, "foreign objects .*pathlib"),
    (_numpy_scalar, "foreign objects .*numpy"),
    (_torchscript, "got a TorchScript program"),
    (_dcp_folder, "distributed checkpoint"),
    (_empty, r"empty \(0 bytes\)"),
    (_truncated_pth, "damaged or incomplete"),
    (_truncated_safetensors, "incomplete or wrong"),
    (_padded_safetensors, "cut off or padded"),
    (_padded_pth, "damaged or incomplete"),
    (_cut_by_one_byte, "damaged or incomplete"),
    (_web_page, "got a web page"),
    (_lfs_pointer, "git-lfs pointer"),
    (_json, "content is neither"),
    (_zip_of_folder, "another zip archive"),
    (_old_tar, "old tar format"),
    (_zip_bomb, "claims more data than it contains, or is compressed"),
    (_huge_header, "content is neither, or is cut off"),
    (_huge_shape_safetensors, "incomplete or wrong"),
    (_negative_shape_safetensors, "malformed"),
    (_huge_shape_pth, "claims shape .*more than the file contains"),
    (_many_tensors, "at most 8192 tensors, got 9000"),
    (_path_traversal, "paths outside of it"),
    (_broken_pickle, "damaged"),
    (_missing_storage, "cannot be read"),
    (_onnx, "ONNX model"),
    (_gguf, "GGUF"),
    (_gzip, "gzip"),
    (_hdf5, "HDF5"),
    (_nan, r"image_encoder.blocks.3.attn.qkv.weight contains NaN or Inf"),
    (_no_known_key, r"no image encoder of a known layout \(found backbone_0 1"),
    (_one_missing, r"1 missing \(mask_decoder.iou_token.weight\)"),
    (_no_encoder, "image encoder"),
    (_encoder_only, "missing"),
    (_unknown_beside, r"1 unexpected \(mask_decoder.extra.weight\)"),
    (_peft_adapter, "an adapter alone.*needs the base weights"),
    (_bottleneck_adapters, "bottleneck adapters .*cannot be merged"),
]


@pytest.mark.parametrize(("make", "message"), CORPUS, ids=[make.__name__.strip("_") for make, _ in CORPUS])
def test_corpus__is_refused_with_its_reason_and_runs_nothing(
    make: Callable[[Path, Tensors, Path], None],
    message: str,
    tmp_path: Path,
    sam_tensors: Tensors,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside = tmp_path / "given"
    inside.mkdir()
    path, canary = inside / "weights.pth", tmp_path / "canary"
    make(path, sam_tensors, canary)
    before = {p.name: p.read_bytes() for p in inside.iterdir() if p.is_file()}
    with limited_memory(), pytest.raises(WeightsError, match=message) as caught:
        load_sam(path)
    assert int(caught.value.exit_code) == 4
    assert not canary.exists()
    assert not list(tmp_path.rglob("canary*"))
    assert {p.name: p.read_bytes() for p in inside.iterdir() if p.is_file()} == before
    if make in (_one_missing, _encoder_only, _unknown_beside, _bottleneck_adapters):
        return  # complete enough for a description
    assert main(["inspect", str(path)]) == 4
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 6


class limited_memory:
    """Limit of 6 GiB above the memory in use, so that a wrong size fails instead of filling the machine."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)


def test_corpus__is_large_enough() -> None:
    assert len({make for make, _ in CORPUS}) >= 25


def test_torchscript__with_compressed_code_is_named(tmp_path: Path) -> None:
    """torch.jit.save compresses the code, which must not hide what the file is."""
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:
        archive.writestr("jit/data.pkl", b"\x80\x02}.")
        archive.writestr("jit/code/__torch__.py", "x = 1\n" * 500, compress_type=zipfile.ZIP_DEFLATED)
        archive.writestr("jit/constants.pkl", b"\x80\x02}.")
    with pytest.raises(WeightsError, match="got a TorchScript program"):
        read_weights(tmp_path / "jit.pt")


def test_official_name__mistyped_is_answered_with_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"Did you mean the official weights sam_vit_b\?"):
        read_weights("sam_vitb")


@pytest.mark.parametrize("given", ["https://example.org/sam.pth", "missing.pth"])
def test_address_or_missing_file__refused(given: str) -> None:
    with pytest.raises(WeightsError, match=r"local file|existing file"):
        read_weights(given)


def test_foreign_objects__tensors_are_extracted_without_running_code(
    tmp_path: Path, sam_tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "run.pth", tmp_path / "tensors.safetensors"
    _namespace(path, sam_tensors, tmp_path / "canary")
    assert main(["inspect", str(path), "--save-tensors", str(out)]) == 0
    assert load_sam(out).state_dict().keys() == sam_tensors.keys()
    _code(path, sam_tensors, tmp_path / "canary")
    assert main(["inspect", str(path), "--save-tensors", str(out)]) == 4
    assert not (tmp_path / "canary").exists()


def test_safetensors__with_a_length_that_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    tensors = {"image_encoder.pos_embed": torch.zeros(1, 2, 2, 4)}
    header = {name: {"dtype": "F32", "shape": [1, 2, 2, 4], "data_offsets": [0, 64]} for name in tensors}
    text = json.dumps(header).encode().ljust(0x280)  # 80 02: the first bytes of a pickle of protocol 2
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_raw_weights(path).content["image_encoder.pos_embed"], tensors["image_encoder.pos_embed"])


def test_unfinished_run__newest_complete_state_is_read_with_a_note(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, name in ((9, "step-000009"), (10, "step-000010"), (11, "step-000011.tmp"), (12, "step-000012.corrupt")):
        tensors = dict(make_sam(tiny_plain_spec(), image_size=160, seed=step).image_encoder.state_dict())
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        save_file({f"model.objective.encoder.{k}": v for k, v in tensors.items()}, folder / "state.safetensors")
        if step == 10:
            expected = tensors
    with pytest.raises(
        WeightsError, match=r"without checkpoints/card.json, so their pixel statistics are unknown"
    ) as refusal:
        read_weights(run)
    assert "which resumes it" in str(refusal.value.next_command)
    card = Card(arch="vit_b", image_size=160, pixel_mean=[0.0] * 3, pixel_std=[255.0] * 3)
    card.write(run / "checkpoints" / "card.json")
    encoder, found = load_image_encoder(run)
    assert (found.pixel_std, found.steps) == ([255.0] * 3, 10)
    assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items())
    assert "a training state (step-000010), not the result of a finished run" in read_weights(run).notes


@pytest.mark.slow
def test_inspect__real_vit_b_has_all_314_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_sam(build_sam("vit_b"), tmp_path / "w.pth")
    assert main(["inspect", str(path), "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert sum(part["matched"] for part in parts.values()) == 314
    assert not any(part["missing"] or part["unexpected"] for part in parts.values())


@pytest.fixture(scope="module")
def sam2_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of a small SAM 2 under the names of its own package, with a part of the memory."""
    tensors = to_sam2(make_sam(tiny_hiera_spec(), image_size=64).state_dict())
    return {**tensors, "maskmem_tpos_enc": torch.rand(7, 1, 1, 8), "memory_encoder.out_proj.bias": torch.rand(8)}


def test_sam2__nested_file_is_read_with_its_memory_and_a_warning(
    tmp_path: Path, sam2_tensors: dict[str, torch.Tensor]
) -> None:
    torch.save({"model": sam2_tensors}, tmp_path / "sam2.pt")
    weights = read_weights(tmp_path / "sam2.pt")
    assert weights.format == "SAM 2"
    assert set(weights.memory) == {"maskmem_tpos_enc", "memory_encoder.out_proj.bias"}
    assert weights.parts == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert any("do not contain the number of heads (1)" in note for note in weights.notes)
    assert main(["inspect", str(tmp_path / "sam2.pt")]) == 0
    load_sam(tmp_path / "sam2.pt", image_size=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if not re.search(r"blocks\.[89]\.", k)},
            "3 stages in 8 blocks, expected 4",
        ),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("pos_embed_window")}, r"pos_embed_window is missing"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("neck.convs.2.conv.bias")}, r"1 missing.*convs\.2"),
        (lambda t: {**t, "image_encoder.trunk.blocks.0.lora": torch.rand(2)}, r"1 unexpected.*blocks\.0\.lora"),
        (lambda t: {**t, "sam_mask_decoder.new.weight": torch.rand(2)}, r"1 unexpected.*mask_decoder\.new"),
        (lambda t: {**t, "image_encoder.trunk.pos_embed": torch.full((1, 8, 7, 7), torch.nan)}, "contains NaN or Inf"),
        (
            lambda t: {f"detector.backbone.vision_backbone.{k}": v for k, v in t.items()},
            r"weights are SAM 3\. Its encoder has another structure than those of SAM and SAM 2.*sam2\.1_hiera_tiny",
        ),
    ],
    ids=["no last stage", "no positions", "no neck bias", "extra encoder", "extra decoder", "NaN", "SAM 3"],
)
def test_sam2__damaged_or_foreign_file_is_refused_by_name(
    tmp_path: Path,
    sam2_tensors: dict[str, torch.Tensor],
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
) -> None:
    torch.save({"model": change(sam2_tensors)}, tmp_path / "sam2.pt")
    with pytest.raises(WeightsError, match=message):
        load_sam(tmp_path / "sam2.pt", image_size=64)


def test_sam2__truncated_file_is_refused(tmp_path: Path, sam2_tensors: dict[str, torch.Tensor]) -> None:
    torch.save({"model": sam2_tensors}, tmp_path / "whole.pt")
    (tmp_path / "sam2.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-5000])
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "sam2.pt")
