"""Atomic writes, file hashes and repeated calls, and the rule that no other module does these itself."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from samgraft.shared import files
from samgraft.shared.errors import StorageError
from samgraft.shared.files import (
    PYTORCH_METADATA,
    SAFETENSORS_DTYPES,
    file_sha256,
    move,
    read_with_retry,
    retry,
    write_atomically,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from samgraft.shared.weights.save import write_pth

Tensors = dict[str, torch.Tensor]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits in seconds that were asked for instead of waiting."""
    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return waits


def test_write_tensors__bytes_equal_those_of_the_library(tmp_path: Path) -> None:
    tensors = {f"{letter}.é{i}": torch.ones(3, 1, 2).to(dtype)
               for i, dtype in enumerate(getattr(torch, name.removeprefix("torch.")) for name in SAFETENSORS_DTYPES)
               for letter in "ba"}  # fmt: skip
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "library", metadata=dict(PYTORCH_METADATA))
    digest = write_tensors(tmp_path / "ours", tensors)
    content = (tmp_path / "library").read_bytes()
    assert (tmp_path / "ours").read_bytes() == content
    assert (digest.num_bytes, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("write", [write_tensors, write_pth])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_write__umask_decides_who_may_read(
    write: Callable[[Path, Mapping[str, torch.Tensor]], object], umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "w", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert [(p.name, p.stat().st_mode & 0o777) for p in tmp_path.iterdir()] == [("w", mode)]


def test_write_json__sorted_with_a_line_end_and_its_hash(tmp_path: Path) -> None:
    digest = write_json(tmp_path / "v.json", {"b": 0.1 + 0.2, "a": "é"})
    assert (tmp_path / "v.json").read_text() == '{\n "a": "\\u00e9",\n "b": 0.30000000000000004\n}\n'
    assert digest.sha256 == file_sha256(tmp_path / "v.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "v.json", {"a": float("nan")}, allow_nan=False)


def test_write__killed_before_the_rename_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old\r\n")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.txt", b"old\r\n")]


def test_write__content_then_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    write_bytes(tmp_path / "a", b"1")
    move(tmp_path / "a", tmp_path / "b")
    assert synced == ["a.tmp", tmp_path.name, tmp_path.name]


def test_write__parts_of_a_write_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_write_atomically__error_names_the_target_not_the_draft(tmp_path: Path) -> None:
    def write_half() -> None:
        with write_atomically(tmp_path / "w") as draft:
            draft.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))

    with pytest.raises(OSError, match="No space left") as refusal:
        write_half()
    assert refusal.value.filename == str(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_write_pth__full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Tensors, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):  # there is space: another error
        write_pth(tmp_path / "w", {"a": torch.ones(2)})
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="No space left on device") as refusal:
        write_pth(tmp_path / "w", {"a": torch.ones(2)})
    assert (refusal.value.errno, refusal.value.filename) == (errno.ENOSPC, str(tmp_path / "w"))
    assert list(tmp_path.iterdir()) == []


class Failing:
    """Call that fails with given error numbers before it succeeds."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.codes:
            code = self.codes.pop(0)
            raise OSError(code, os.strerror(code))
        return "content"


def test_retry__transient_errors_are_repeated_with_longer_waits(short_waits: list[float]) -> None:
    call = Failing(errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    assert retry(call) == "content"
    assert short_waits == pytest.approx([0.2, 0.4, 0.8])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT])
def test_retry__other_errors_are_raised_at_once(code: int) -> None:
    call = Failing(code)
    with pytest.raises(OSError, match=os.strerror(code)):
        read_with_retry(call, where="scan.nii.gz")
    assert call.num_calls == 1


def test_read_with_retry__error_that_stays_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match=r"does not respond after 4 attempts \(Input/output error\)") as refusal:
        read_with_retry(Failing(*[errno.EIO] * 4), where="scan.nii.gz")
    assert refusal.value.where == "scan.nii.gz"


def calls_of_file_operations(source: str) -> list[str]:
    """Return the calls in a module that rename, flush or hash files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            text = ast.unparse(node)
            name = node.func.attr
            one_argument = len(node.args) == 1 and not node.keywords
            renames = name == "rename" or (name == "replace" and one_argument) or text.startswith("os.replace(")
            hashes_file = text.startswith("hashlib.") and ("file_digest" in text or ".read" in text)
            if renames or hashes_file or name == "fsync":
                found.append(text)
    return found


def test_file_operations__are_found_in_source() -> None:
    lines = ["a.rename(b)", "a.replace(b)", "os.replace(a, b)", "os.fsync(f)", "hashlib.file_digest(f, 'sha256')"]
    assert calls_of_file_operations("\n".join(lines)) == lines
    assert calls_of_file_operations("hashlib.sha256(p.read_bytes())") == ["hashlib.sha256(p.read_bytes())"]
    assert calls_of_file_operations("'a'.replace('b', 'c'); hashlib.sha256(text); replace(record, a=1)") == []


def test_file_operations__are_in_one_module_only() -> None:
    """Atomic writes, hashes and attempts had several implementations once, of which some were incomplete."""
    found = {
        path.relative_to(ROOT).as_posix(): calls
        for folder in ("shared", "ssl", "finetune")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "shared" / "files.py" and (calls := calls_of_file_operations(path.read_text()))
    }
    assert found == {}
